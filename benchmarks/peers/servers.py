#!/usr/bin/env python3
"""The servers to take instead: `fastgpt2 up` and llama.cpp's `llama-server`, over HTTP, on the same checkpoint.

    python benchmarks/peers/servers.py --model /tmp/peers/english --workdir /tmp/peers/models \\
        --llama-server /tmp/peers/llama.cpp/build/bin/llama-server

Each turn starts a server, lets it answer some requests that do not count, and then has --clients clients send
--requests requests to `/v1/completions`, each client one after the other: prompts of 8 tokens, then prompts of 24 to
496; 32 new tokens each, greedily. Tokens a second are those of all answers, from the first request to the last answer.
Prompts are places of a held-out text that --seed draws, and no server remembers one. Ours is one worker with as many
processes as there are threads; the other gets as many threads; both decode up to --clients sequences together. GGUF
files are those that `peers.py` made in --workdir. Without --llama-server only ours is measured.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the clone's root, where `benchmarks` is

from benchmarks.common import (
    HELD_OUT_TEXT,
    Failed,
    begin,
    environment,
    even_lengths,
    heading,
    in_turns,
    medians,
    parse,
    parser,
    pieces,
    wait_until,
    write,
)
from fastgpt2 import settings
from fastgpt2.bench import Values, median, quantile, table
from fastgpt2.engine.machine import usable_cores
from fastgpt2.engine.model.config import read_config
from fastgpt2.engine.model.hub import find_model
from fastgpt2.engine.text.tokenizer import Tokenizer
from fastgpt2.process import set_up_child
from fastgpt2.system.up import System

# Weights of ours, and types of GGUF files.
OURS = ("float32", "bfloat16", "int8")
THEIRS = ("f32", "f16", "bf16", "q8_0")
DEFAULT = ["float32", "int8", "f16", "q8_0"]
# Tokens of the shortest and the longest prompt, by load.
LOADS = {"short": (8, 8), "mixed": (24, 496)}
START_SECONDS = 120.0
QUICK = {"requests": 4, "clients": 2, "tokens": 4}

Prompts = Sequence[list[int]]


def main() -> None:
    arguments = parser(__doc__, rounds=2)
    arguments.add_argument("--llama-server", type=Path, metavar="FILE", help="the program of llama.cpp")
    arguments.add_argument("--workdir", type=Path, help="where `peers.py` left its GGUF files")
    arguments.add_argument(
        "--weights",
        action="append",
        choices=(*OURS, *THEIRS),
        help=f"may be repeated; default: {DEFAULT}",
    )
    arguments.add_argument("--threads", type=int, help="of each server; default: all cores")
    arguments.add_argument("--clients", type=int, default=16, help="default: 16")
    arguments.add_argument("--requests", type=int, default=96, help="of each load; default: 96")
    arguments.add_argument("--tokens", type=int, default=32, help="new ones of each request; default: 32")
    arguments.add_argument("--seed", type=int, default=0, help="of the prompts; default: 0")
    asked = parse(arguments, QUICK)
    asked.weights = asked.weights or DEFAULT
    asked.threads = asked.threads or usable_cores()
    result = begin("servers", asked)
    result["models"] = [measure(model, asked) for model in asked.model]
    write(result, asked.output)


def measure(model: str, asked: argparse.Namespace) -> Values:
    """Return what clients of each server got, with one model."""
    folder = find_model(model)
    ids = Tokenizer.from_folder(folder).encode(HELD_OUT_TEXT.read_text("utf-8"))
    room = read_config(folder).n_positions - asked.tokens
    loads = {
        load: prompts(ids, asked.requests, shortest, min(longest, room), asked.seed)
        for load, (shortest, longest) in LOADS.items()
    }
    skipped: dict[str, str] = {}
    turns = {}
    for weights in asked.weights:
        name = f"{'fastgpt2' if weights in OURS else 'llama-server'}-{weights}"
        file = asked.workdir / f"{folder.resolve().name}.llama.cpp-{weights}" if asked.workdir else None
        if weights in OURS:
            turns[name] = partial(turn_of_ours, model, weights, loads, asked)
        elif asked.llama_server is None:
            skipped[name] = "no --llama-server was given"
        elif file is None or not file.exists():
            skipped[name] = f"peers.py has made no {folder.resolve().name}.llama.cpp-{weights} in --workdir"
        else:
            turns[name] = partial(turn_of_llama_server, file, loads, asked)
    found = in_turns(turns, asked.rounds)
    entry: Values = {
        "model": model,
        "clients": asked.clients,
        "requests": asked.requests,
        "tokens": asked.tokens,
        "threads": asked.threads,
        "skipped": skipped,
        "servers": {name: medians(runs) for name, runs in found.items()},
    }
    heading(f"{model}: {asked.clients} clients, {asked.requests} requests of {asked.tokens} new tokens")
    print(table(*table_of(entry)))
    for name, reason in skipped.items():
        print(f"{name} was skipped: {reason}")
    return entry


def prompts(ids: list[int], count: int, shortest: int, longest: int, seed: int) -> Prompts:
    """Return prompts with lengths spread evenly between two bounds, in an order and at places that a seed draws."""
    dice = random.Random(seed)
    return pieces(ids, even_lengths(count, shortest, longest, dice), dice)


def turn_of_ours(model: str, weights: str, loads: dict[str, Prompts], asked: argparse.Namespace) -> Values:
    """Start our system with one worker, measure it, and stop it."""
    values = settings.of_system(
        model=model, weights=weights, workers="1", threads=str(asked.threads), max_batch=str(asked.clients),
        port="0", redis_port="0", prefix_memory="0", log_level="warning", timeout="600",
    )  # fmt: skip
    with System(values) as system:
        port = urlsplit(system.http_url).port
        assert port is not None
        return answers(port, loads, asked)


def turn_of_llama_server(file: Path, loads: dict[str, Prompts], asked: argparse.Namespace) -> Values:
    """Start llama.cpp's server with one file, measure it, and stop it."""
    with llama_server(asked.llama_server, file, asked) as port:
        return answers(port, loads, asked)


@contextmanager
def llama_server(program: Path, file: Path, asked: argparse.Namespace) -> Iterator[int]:
    """Run llama.cpp's server, with room for the longest sequence of each client; give its port."""
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    places = asked.clients * -(-(LOADS["mixed"][1] + asked.tokens) // 256) * 256
    command = [program, "--model", file, "--host", "127.0.0.1", "--port", str(port), "--no-ui"]
    command += [
        "--no-cache-prompt",
        "--threads",
        str(asked.threads),
        "--parallel",
        str(asked.clients),
        "--ctx-size",
        str(places),
    ]
    with subprocess.Popen(
        [str(word) for word in command],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=set_up_child,
    ) as process:
        try:
            wait_until(partial(is_ready, process, port), f"{program} to be ready", START_SECONDS)
            yield port
        finally:
            process.terminate()


def is_ready(process: subprocess.Popen[bytes], port: int) -> bool:
    """Return whether a server says that it is healthy.

    Raises:
        Failed: it has ended.
    """
    if process.poll() is not None:
        raise Failed(f"{process.args!r} ended with status {process.returncode}")
    try:
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as connection:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
    except OSError:
        return False


def answers(port: int, loads: dict[str, Prompts], asked: argparse.Namespace) -> Values:
    """Return tokens a second and the times of whole requests, by load."""
    send(port, loads["short"][: asked.clients], asked)  # does not count
    found: Values = {}
    for load, wanted in loads.items():
        began = time.perf_counter()
        seconds = send(port, wanted, asked)
        rate = len(wanted) * asked.tokens / (time.perf_counter() - began)
        found[load] = {
            "tokens_per_s": rate,
            "request_ms": median(seconds) * 1e3,
            "request_ms_95": quantile(seconds, 0.95) * 1e3,
        }
    return found


def send(port: int, wanted: Prompts, asked: argparse.Namespace) -> list[float]:
    """Have clients send requests, each client one after the other; return the seconds of each.

    Raises:
        Failed: an answer was another one than was asked for.
    """

    def request(prompt: list[int]) -> float:
        body = {"prompt": prompt, "max_tokens": asked.tokens, "temperature": 0, "ignore_eos": True}
        began = time.perf_counter()
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=600)) as connection:
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            answer = json.loads(connection.getresponse().read())
        if answer.get("usage", {}).get("completion_tokens") != asked.tokens:
            raise Failed(f"no answer of {asked.tokens} tokens: {json.dumps(answer)[:500]}")
        return time.perf_counter() - began

    with ThreadPoolExecutor(asked.clients) as clients:
        return list(clients.map(request, wanted))


def table_of(entry: Values) -> tuple[list[str], list[list[str]]]:
    """Return the headers and the rows of the servers' table."""
    headers = [""]
    for load, (shortest, longest) in LOADS.items():
        of = f"prompts of {shortest}" if load == "short" else f"of {shortest} to {longest}"
        headers += [f"tokens/s, {of}", "s a request, p50", "p95"]
    rows = []
    for name, found in entry["servers"].items():
        cells = [name]
        for load in LOADS:
            times = [found[load][key]["median"] for key in ("request_ms", "request_ms_95")]
            cells += [f"{found[load]['tokens_per_s']['median']:.0f}", *(f"{ms / 1e3:.2f}" for ms in times)]
        rows.append(cells)
    return headers, rows


if __name__ == "__main__":
    main()
