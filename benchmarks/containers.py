#!/usr/bin/env python3
"""docker-compose.yml measured: how soon a container serves, what containers hold together, and how to cut a machine up.

    python benchmarks/bench_containers.py --model /path/to/gpt2

Needs a Docker daemon, root (to read other users' /proc), and the ports 6390 and 6391. --model is `demo`, a hub id, or a
folder, which is mounted into the containers. Images are built first; the model is packed before anything is timed.

start    a worker's container is stopped, a job with a stream is put into the queue, and `docker start` is called:
         seconds until the worker is registered, and until the job's first text is in the client's hands. Beside it,
         the same of a container that only runs `true`: what Docker itself takes
memory   --containers of one worker each, after a job in each: PSS summed over all processes of all of them (a page that
         k processes map counts 1/k for each), of the packed weights and of all else, beside what so many copies take
cut      the cores as one worker for each, as one worker with all of them, and as one container with a pool of such
         workers: --jobs jobs at one go and one alone, with prompts of --prompt tokens and --tokens new ones
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from bench_memory import fields, mappings
from common import begin, heading, in_turns, parse, parser, progress, write

from fastgpt2 import Client, GenerationRequest
from fastgpt2.bench import Values, median, quantile, table
from fastgpt2.engine.machine import usable_cores

ROOT = Path(__file__).resolve().parent.parent
PROJECT, PASSWORD, PORT, HTTP_PORT = "fastgpt2-bench", "of-the-benchmark", "6390", "6391"
FILES = ("docker-compose.yml", "deploy/compose.redis-port.yml")
WAIT_SECONDS = 120.0


class Project:
    """The composed pool, with a model and a cut."""

    def __init__(self, model: str, folder: Path) -> None:
        self._override = folder / "override.yml"
        self._mounted = f"{Path(model).resolve()}:/model:ro" if Path(model).is_dir() else ""
        self._variables = {
            "MODEL": "/model" if self._mounted else model,
            "REDIS_PASSWORD": PASSWORD,
            "REDIS_PORT": PORT,
            "FASTGPT2_PORT": HTTP_PORT,
            "FASTGPT2_IMAGE": "fastgpt2:bench",
        }
        self.cut(1.0)

    def cut(self, cores: float, workers_of_a_pool: int = 0) -> None:
        """So many cores a container, and in each one worker, or a pool of some."""
        self._variables["WORKER_CPUS"] = str(cores)
        mounts = [self._mounted] if self._mounted else []
        worker: dict[str, Any] = {"volumes": mounts}
        if workers_of_a_pool:
            worker["command"] = ["fastgpt2", "pool", "--workers", str(workers_of_a_pool)]
        # JSON is YAML.
        self._override.write_text(json.dumps({"services": {"model": {"volumes": mounts}, "worker": worker}}))

    def __call__(self, *words: str) -> str:
        files = [word for file in (*FILES, str(self._override)) for word in ("-f", file)]
        command = ["docker", "compose", "-p", PROJECT, "--env-file", ".env.example", *files, *words]
        return run(command, {**os.environ, **self._variables})

    def up(self, workers: int) -> None:
        self("up", "--detach", "--scale", f"worker={workers}")

    def workers(self) -> list[str]:
        label = "label=com.docker.compose.service=worker"
        project = f"label=com.docker.compose.project={PROJECT}"
        return run(["docker", "ps", "--all", "--quiet", "--filter", label, "--filter", project]).split()


def run(command: list[str], environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr.strip()[-500:]}")
    return done.stdout


def main() -> None:
    arguments = parser(__doc__, rounds=5)
    arguments.add_argument("--containers", type=int, default=4, help="for the memory; default: 4")
    arguments.add_argument("--jobs", type=int, default=32, help="at one go; default: 32")
    arguments.add_argument("--prompt", type=int, default=8, help="tokens; default: 8")
    arguments.add_argument("--tokens", type=int, default=32, help="new ones; default: 32")
    asked = parse(arguments)
    result = begin("containers", asked)
    result["models"] = []
    for model in asked.model:
        with tempfile.TemporaryDirectory() as folder:
            project = Project(model, Path(folder))
            try:
                progress("building, packing")
                project("build", "--quiet")
                project.up(1)
                with Client(f"redis://:{PASSWORD}@127.0.0.1:{PORT}/0") as client:
                    entry = {"model": model, **measured(project, client, asked)}
            finally:
                project("down", "--volumes", "--timeout", "1")
        show(entry)
        result["models"].append(entry)
    write(result, asked.output)


def measured(project: Project, client: Client, asked: argparse.Namespace) -> Values:
    wait_for(client, 1)
    progress("start")
    start = starts(project, client, asked.rounds)
    progress("memory")
    memory = held(project, client, asked.containers)
    return {"start": start, "memory": memory, "cut": cuts(project, client, asked)}


def starts(project: Project, client: Client, rounds: int) -> Values:
    (container,) = project.workers()
    idle = run(["docker", "create", "--init", "fastgpt2:bench", "true"]).strip()
    client.enqueue("warm").result(timeout=WAIT_SECONDS)
    found: dict[str, list[float]] = {"docker_seconds": [], "ready_seconds": [], "first_token_seconds": []}
    for _ in range(rounds):
        began = time.perf_counter()
        run(["docker", "start", "--attach", idle])
        found["docker_seconds"].append(time.perf_counter() - began)
        run(["docker", "stop", container])
        job = client.enqueue([464], max_new_tokens=4, ignore_eos=True, stream=True)
        began = time.perf_counter()
        with ThreadPoolExecutor(2) as beside:
            beside.submit(run, ["docker", "start", container])
            ready = beside.submit(wait_for, client, 1)
            next(iter(job.stream(timeout=WAIT_SECONDS)))
            found["first_token_seconds"].append(time.perf_counter() - began)
            found["ready_seconds"].append(ready.result() - began)
        job.result(timeout=WAIT_SECONDS)
    run(["docker", "rm", idle])
    return {name: {"median": median(times), "q25": quantile(times, 0.25), "q75": quantile(times, 0.75)}
            for name, times in found.items()}  # fmt: skip


def wait_for(client: Client, workers: int) -> float:
    deadline = time.monotonic() + WAIT_SECONDS
    while client.workers() != workers:
        if time.monotonic() > deadline:
            sys.exit(f"not {workers} but {client.workers()} workers after {WAIT_SECONDS:.0f} s")
        time.sleep(0.005)
    return time.perf_counter()


def held(project: Project, client: Client, containers: int) -> Values:
    found = []
    for count in (1, containers):
        project.up(count)
        wait_for(client, count)
        list(client.map([GenerationRequest((464,), 8, ignore_eos=True)] * 16 * count))
        total = weights = size = 0.0
        for container in project.workers():
            for pid in run(["docker", "top", container, "-eo", "pid"]).split()[1:]:
                total += fields(Path(f"/proc/{pid}/smaps_rollup").read_text())["Pss"]
                for _, _, name, sizes in mappings(Path(f"/proc/{pid}/smaps").read_text()):
                    if name.endswith(".safetensors"):
                        weights, size = weights + sizes["Pss"], max(size, sizes["Size"])
        copies = total - weights + count * size
        sizes_mb = {"pss_mb": total / 1e6, "weights_mb": weights / 1e6, "copies_mb": copies / 1e6}
        found.append({"containers": count, **sizes_mb})
    return {"by_containers": found}


def cuts(project: Project, client: Client, asked: argparse.Namespace) -> list[Values]:
    cores = usable_cores()
    kinds = {
        f"{cores} containers, a worker on one core each": (cores, 1.0, 0),
        f"1 container, a worker on {cores} cores": (1, float(cores), 0),
        f"1 container, a pool of {cores} workers": (1, float(cores), cores),
    }
    prompts = [GenerationRequest((464 + n,) * asked.prompt, asked.tokens, ignore_eos=True) for n in range(asked.jobs)]

    def turn(containers: int, core_count: float, pool: int) -> Values:
        project.cut(core_count, pool)
        project.up(containers)
        wait_for(client, pool or containers)
        list(client.map(prompts[:4]))
        began = time.perf_counter()
        list(client.map(prompts, in_flight=asked.jobs))
        together = asked.jobs * asked.tokens / (time.perf_counter() - began)
        alone = min(client.enqueue_request(prompts[0]).result(WAIT_SECONDS).timings.decode_seconds for _ in range(3))
        return {"tokens_per_second": together, "alone_ms": 1e3 * alone / (asked.tokens - 1)}

    runs = in_turns({name: partial(turn, *cut) for name, cut in kinds.items()}, max(2, asked.rounds // 2))
    return [
        {"cut": name, **{key: median([round_[key] for round_ in rounds]) for key in ("tokens_per_second", "alone_ms")}}
        for name, rounds in runs.items()
    ]


def show(entry: Values) -> None:
    heading(f"{entry['model']}: seconds from `docker start`, median and quartiles")
    rows = [[name.removesuffix("_seconds"), *(f"{times[key]:.2f}" for key in ("median", "q25", "q75"))]
            for name, times in entry["start"].items()]  # fmt: skip
    print(table(["until", "median", "25%", "75%"], rows))
    heading("MB of memory, PSS over all processes of all containers")
    memory = entry["memory"]["by_containers"]
    print(table(list(memory[0]), [[f"{value:.0f}" for value in row.values()] for row in memory]))
    heading("the same cores, cut otherwise")
    print(table(list(entry["cut"][0]), [[row["cut"], f"{row['tokens_per_second']:.0f}", f"{row['alone_ms']:.1f}"]
                                        for row in entry["cut"]]))  # fmt: skip


if __name__ == "__main__":
    main()
