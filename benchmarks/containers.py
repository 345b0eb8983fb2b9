#!/usr/bin/env python3
"""docker-compose.yml measured: how soon a container serves, what containers hold together, and how to cut a machine up.

    python benchmarks/containers.py --model /path/to/gpt2

It needs a Docker daemon, root (to read other users' /proc), and the ports 6390 and 6391. --model is `demo`, a hub id,
or a folder, which is mounted into the containers. The image is built first, and the model is packed before anything is
timed.

start    a worker's container is stopped, a job with a stream is put into the queue, and `docker start` is called: the
         seconds until the worker is registered, and until the job's first text is in the client's hands. Beside them
         the seconds of a container that only runs `true`: what Docker itself takes
memory   --containers containers of one worker each, after a job in each: PSS summed over all processes of all of them
         (a page that k processes map counts 1/k for each), of the packed weights and of all else, beside what as many
         copies of the weights would take
cut      the cores as one worker for each core, as one worker with all cores, and as one container with a pool of
         workers of one core: --jobs jobs at one go and one alone, with prompts of --prompt tokens and --tokens new ones
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the clone's root, where `benchmarks` is

from benchmarks.common import begin, heading, in_turns, parse, parser, progress, write
from benchmarks.engine.memory import fields, mappings
from fastgpt2 import Client, GenerationRequest
from fastgpt2.bench import Values, median, quantile, table
from fastgpt2.engine.machine import usable_cores

ROOT = Path(__file__).resolve().parent.parent
PROJECT, PASSWORD, PORT, HTTP_PORT = "fastgpt2-bench", "of-the-benchmark", "6390", "6391"
FILES = ("docker-compose.yml", "deploy/compose.redis-port.yml")
WAIT_SECONDS = 120.0
QUICK = {"containers": 2, "jobs": 4, "tokens": 8}


class Project:
    """The pool of docker-compose.yml, with a model and a cut of the cores.

    Args:
        folder: where to write the file that changes the compose file's services.
    """

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
        """Set the cores of a container, and whether it runs one worker or a pool."""
        self._variables["WORKER_CPUS"] = str(cores)
        mounts = [self._mounted] if self._mounted else []
        worker: dict[str, Any] = {"volumes": mounts}
        if workers_of_a_pool:
            worker["command"] = ["fastgpt2", "pool", "--workers", str(workers_of_a_pool)]
        # JSON is YAML.
        self._override.write_text(json.dumps({"services": {"model": {"volumes": mounts}, "worker": worker}}))

    def __call__(self, *words: str) -> str:
        """Run `docker compose` with these words. Return its output."""
        files = [word for file in (*FILES, str(self._override)) for word in ("-f", file)]
        command = ["docker", "compose", "-p", PROJECT, "--env-file", ".env.example", *files, *words]
        return run(command, {**os.environ, **self._variables})

    def up(self, workers: int) -> None:
        """Start everything, with this number of containers of workers."""
        self("up", "--detach", "--scale", f"worker={workers}")

    def workers(self) -> list[str]:
        """Return the ids of the workers' containers."""
        label = "label=com.docker.compose.service=worker"
        project = f"label=com.docker.compose.project={PROJECT}"
        return run(["docker", "ps", "--all", "--quiet", "--filter", label, "--filter", project]).split()


def run(command: list[str], environment: dict[str, str] | None = None) -> str:
    """Run a command in the clone's root. Return its output; end this script if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr.strip()[-500:]}")
    return done.stdout


def main() -> None:
    arguments = parser(__doc__, rounds=5)
    arguments.add_argument("--containers", type=int, default=4, help="containers for the memory; default: 4")
    arguments.add_argument("--jobs", type=int, default=32, help="jobs at one go; default: 32")
    arguments.add_argument("--prompt", type=int, default=8, help="tokens of a prompt; default: 8")
    arguments.add_argument("--tokens", type=int, default=32, help="new tokens; default: 32")
    asked = parse(arguments, QUICK)
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
                    entry = {"model": model, **measure(project, client, asked)}
            finally:
                project("down", "--volumes", "--timeout", "1")
        show(entry)
        result["models"].append(entry)
    write(result, asked.output)


def measure(project: Project, client: Client, asked: argparse.Namespace) -> Values:
    """Return start times, memory and cuts with one model."""
    wait_for(client, 1)
    progress("start")
    start = measure_starts(project, client, asked.rounds)
    progress("memory")
    memory = measure_memory(project, client, asked.containers)
    return {"start": start, "memory": memory, "cut": measure_cuts(project, client, asked)}


def measure_starts(project: Project, client: Client, rounds: int) -> Values:
    """Return median and quartiles of the seconds from `docker start`."""
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
    """Wait until this number of workers is registered. Return when that was."""
    deadline = time.monotonic() + WAIT_SECONDS
    while client.workers() != workers:
        if time.monotonic() > deadline:
            sys.exit(f"{client.workers()} workers are registered after {WAIT_SECONDS:.0f} s, not {workers}")
        time.sleep(0.005)
    return time.perf_counter()


def measure_memory(project: Project, client: Client, containers: int) -> Values:
    """Return the memory of one container of a worker, and of several."""
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


def measure_cuts(project: Project, client: Client, asked: argparse.Namespace) -> list[Values]:
    """Return tokens/s of many jobs, and ms a token of one alone, of each way to cut the cores up."""
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
    """Print the tables of one model."""
    heading(f"{entry['model']}: seconds from `docker start`, median and quartiles")
    rows = [[name.removesuffix("_seconds"), *(f"{times[key]:.2f}" for key in ("median", "q25", "q75"))]
            for name, times in entry["start"].items()]  # fmt: skip
    print(table(["until", "median", "25%", "75%"], rows))
    heading("MB of memory, PSS over all processes of all containers")
    memory = entry["memory"]["by_containers"]
    print(table(list(memory[0]), [[f"{value:.0f}" for value in row.values()] for row in memory]))
    heading("the same cores, cut in different ways")
    print(table(list(entry["cut"][0]), [[row["cut"], f"{row['tokens_per_second']:.0f}", f"{row['alone_ms']:.1f}"]
                                        for row in entry["cut"]]))  # fmt: skip


if __name__ == "__main__":
    main()
