#!/usr/bin/env python3
"""The cost of the HTTP endpoint: to a request, to a stream, to a start.

    python benchmarks/endpoint/endpoint.py --model demo

All processes are real and share this machine's cores: an embedded Redis, a worker, `fastgpt2 api`.

overhead   the time of requests of 8 tokens and 1 new one, one after the other, in turns by `Client.enqueue(...)
           .result()`, by `POST /v1/completions` over one connection, and by `GET /health`, which asks nobody
streams    for 1, 50, 200 and 500 streams at once, all decoded together by one worker (--max-batch): the events/s that
           reach the clients, the share of one core that the endpoint's process takes for them, and so the events/s that
           it could pass on with a core of its own; the time to the first event, and between two events
start      the time from the start of the process to its first answer
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the clone's root, where `benchmarks` is

from benchmarks.common import begin, environment, heading, in_turns, numbers, parse, parser, progress, write
from benchmarks.endpoint.streams import read_all
from fastgpt2 import Client, settings
from fastgpt2.bench import Values, median, quantile, summary, table
from fastgpt2.system.up import System

OVERHEAD_TARGET_MS, START_TARGET_MS, STREAMS_TARGET = 3.0, 500.0, 500
# Tokens of each prompt.
PROMPT = 8
STARTS = 5
QUICK = {"streams": [1, 4], "tokens": 4, "requests": 4}


def main() -> None:
    arguments = parser(__doc__, rounds=3)
    arguments.add_argument(
        "--streams", type=numbers, default=[1, 50, 200, 500], help="streams at once; default: 1,50,200,500"
    )
    arguments.add_argument("--tokens", type=int, default=64, help="new ones of each stream; default: 64")
    arguments.add_argument("--requests", type=int, default=200, help="requests a round, for the overhead; default: 200")
    asked = parse(arguments, QUICK)
    result = begin("endpoint", asked)
    result["models"] = [measure(model, asked) for model in asked.model]
    write(result, asked.output)


def measure(model: str, asked: argparse.Namespace) -> Values:
    """Return what was measured of an endpoint with one model behind it."""
    values = settings.of_system(
        model=model, workers="1", port="0", redis_port="0", threads="1", max_batch=str(max(asked.streams)),
        log_level="warning", timeout="600",
    )  # fmt: skip
    entry: Values = {"model": model, "start": start_times(STARTS if asked.rounds > 1 else 1)}
    heading(f"{model}: {median(entry['start']):.0f} ms from a start to the first answer (goal {START_TARGET_MS:.0f})")
    with System(values) as system:
        entry["overhead"] = measure_overhead(system, asked)
        entry["streams"] = [measure_streams(system, count, asked) for count in asked.streams]
    show(entry)
    return entry


def start_times(count: int) -> list[float]:
    """Return the milliseconds of `count` starts. There is no Redis: the process can only answer for itself."""
    found = []
    for _ in range(count):
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "fastgpt2", "api", "--port", "0"],
            env=environment(FASTGPT2_REDIS_URL="redis://127.0.0.1:1/0"),
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        port = urlsplit(process.stderr.readline().rpartition(" ")[2].strip()).port
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", "/health")
        connection.getresponse().read()
        found.append((time.perf_counter() - began) * 1e3)
        connection.close()
        process.terminate()
        process.communicate()
    return found


def measure_overhead(system: System, asked: argparse.Namespace) -> Values:
    """Return the milliseconds of requests in each way, and what the endpoint adds."""
    ids = [random.Random(1).randrange(500) for _ in range(PROMPT)]
    body = json.dumps({"prompt": ids, "max_tokens": 1, "ignore_eos": True})
    connection = http.client.HTTPConnection("127.0.0.1", urlsplit(system.http_url).port)

    def by_http(method: str, path: str, body: str | None) -> None:
        connection.request(method, path, body)
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 200

    with Client(system.redis_url) as client:
        ways: dict[str, Any] = {
            "client": lambda: client.enqueue(ids, max_new_tokens=1, ignore_eos=True).result(timeout=60),
            "endpoint": lambda: by_http("POST", "/v1/completions", body),
            "health": lambda: by_http("GET", "/health", None),
        }
        for way in ways.values():
            way()
        times = in_turns({name: partial(timed, way) for name, way in ways.items()}, asked.rounds * asked.requests)
    connection.close()
    added = [b - a for a, b in zip(times["client"], times["endpoint"], strict=True)]
    return {**{name: summary(found) for name, found in times.items()}, "added": summary(added)}


def timed(way: Any) -> float:
    """Return the milliseconds that a call takes."""
    began = time.perf_counter()
    way()
    return (time.perf_counter() - began) * 1e3


def measure_streams(system: System, count: int, asked: argparse.Namespace) -> Values:
    """Return what `count` streams at once get, and what they cost the endpoint: medians, and each round."""
    port, pid = urlsplit(system.http_url).port, endpoint_pid(system)
    assert port is not None
    rounds = []
    for number in range(asked.rounds):
        progress(f"{count} streams, round {number + 1} of {asked.rounds}")
        dice = random.Random(number)
        prompts = [[dice.randrange(500) for _ in range(PROMPT)] for _ in range(count)]
        used, began = cpu_seconds(pid), time.perf_counter()
        found = read_all(port, prompts, asked.tokens)
        seconds, used = time.perf_counter() - began, cpu_seconds(pid) - used
        assert all(stream.done for stream in found)
        events = sum(stream.events for stream in found)
        gaps = [gap for stream in found for gap in stream.gaps]
        rounds.append(
            {
                "events": events,
                "seconds": seconds,
                "cpu_seconds": used,
                "first_ms": median([stream.first for stream in found]) * 1e3,
                "gap_ms": median(gaps) * 1e3,
                "gap_ms_95": quantile(gaps, 0.95) * 1e3,
            }
        )
    progress("")
    return {"streams": count, **{name: median([one[name] for one in rounds]) for name in rounds[0]}, "rounds": rounds}


def endpoint_pid(system: System) -> int:
    """Return the id of the endpoint's process."""
    (endpoint,) = [child for child in system.pool.children if child.name == "endpoint"]
    assert endpoint.process is not None
    return endpoint.process.pid


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that a process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def show(entry: Values) -> None:
    """Print the tables of one model."""
    over = entry["overhead"]
    added = over["added"]["median"]
    heading(f"a request, in ms: median and quartiles; the endpoint adds {added:.2f} (goal {OVERHEAD_TARGET_MS:.0f})")
    rows = [
        [name, *(f"{over[name][key]:.2f}" for key in ("median", "q1", "q3"))]
        for name in ("client", "endpoint", "added", "health")
    ]
    print(table(["by", "median", "q1", "q3"], rows))
    heading("streams at once")
    print(
        table(
            ["streams", "events/s", "of a core", "events/s with a core", "first ms", "gap ms", "95 of 100 below"],
            [
                [
                    str(one["streams"]),
                    f"{one['events'] / one['seconds']:.0f}",
                    f"{one['cpu_seconds'] / one['seconds']:.0%}",
                    f"{one['events'] / max(one['cpu_seconds'], 0.01):.0f}",
                    *(f"{one[key]:.0f}" for key in ("first_ms", "gap_ms", "gap_ms_95")),
                ]
                for one in entry["streams"]
            ],
        )
    )


if __name__ == "__main__":
    main()
