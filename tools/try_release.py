"""Try whether an earlier commit's programs and this one's work together: workers, endpoints and clients, in all pairs.

    .venv/bin/python tools/try_release.py v0.1.0

The earlier commit is taken from git into a temporary folder and runs with the packages that are installed here. Each
line that is printed is one trial: which version the worker, the endpoint and the client are of, and what came out.
`tests/protocol/test_compatibility.py` compares with recordings what stands in Redis; this runs the programs themselves.
The exit status is 1 if a trial failed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fastgpt2 import Client, FastGPT2Error
from fastgpt2.system.redis_server import RedisServer

ROOT = Path(__file__).resolve().parents[1]
WAIT_SECONDS = 60.0
WORKER = ("worker", "--model", "demo", "--threads", "1")
PATHS = ("/status", "/metrics", "/v1/models")

# What a client of either version does. It uses what both have, and prints what it got as JSON.
CLIENT = """
import json, sys
from fastgpt2 import Client, FastGPT2Error
client = Client(sys.argv[1])
job = client.enqueue("My name is", max_new_tokens=12, ignore_eos=True, priority="high")
got = {"result": job.result(timeout=60).text}
pieces = client.stream("My name is", max_new_tokens=12, ignore_eos=True)
got["stream"] = "".join(getattr(piece, "text", piece) for piece in pieces)
got["map"] = [result.text for result in client.map(["My name is"] * 3, max_new_tokens=12, ignore_eos=True)]
long = client.enqueue("My name is", max_new_tokens=480, ignore_eos=True, stream=True)
next(iter(long.stream(timeout=60)))
long.cancel()
try:
    got["cancelled"] = str(long.result(timeout=60).text)
except FastGPT2Error as error:
    got["cancelled"] = type(error).__name__
print(json.dumps(got))
"""

# A job that takes a while, so that its worker can be killed meanwhile.
LONG_JOB = """
import sys
from fastgpt2 import Client
print(Client(sys.argv[1]).enqueue("My name is", max_new_tokens=500, ignore_eos=True).id)
"""


class Release:
    """The programs of one version.

    Args:
        name: how it is called in what is printed.
        folder: where its package is.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        kept = {name: value for name, value in os.environ.items() if not name.startswith("FASTGPT2_")}
        self._environment = {**kept, "PYTHONPATH": str(folder)}
        self._folder = folder

    @contextmanager
    def program(self, *words: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run one of its commands until the context ends."""
        command = [sys.executable, "-m", "fastgpt2", *words, "--log-level", "error"]
        process = subprocess.Popen(command, cwd=self._folder, env=self._environment)
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()

    def run(self, code: str, *words: str) -> str:
        """Run Python code with its package, and return what it printed."""
        command = [sys.executable, "-c", code, *words]
        done = subprocess.run(command, cwd=self._folder, env=self._environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        return done.stdout.strip()


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Wait until the condition holds, for at most `WAIT_SECONDS`."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"waited {WAIT_SECONDS:.0f} s for {what}")
        time.sleep(0.05)


@contextmanager
def workers(url: str, *releases: Release) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Run a worker of each of these versions."""
    with ExitStack() as stack, Client(url) as client:
        started = [stack.enter_context(release.program(*WORKER, "--redis-url", url)) for release in releases]
        wait_until(lambda: client.workers() == len(releases), "the workers")
        yield started


def try_client(url: str, worker: Release, client: Release) -> str:
    """Let a client enqueue, stream, map and cancel, with a worker of the other version."""
    with workers(url, worker):
        got = json.loads(client.run(CLIENT, url))
    texts = {got["result"], got["stream"], *got["map"]}
    if len(texts) > 1 or not got["result"] or got["cancelled"] != "JobCancelled":
        raise RuntimeError(f"it got {got}")
    return "result, stream, map, cancel"


def try_endpoint(url: str, worker: Release, endpoint: Release) -> str:
    """Ask an endpoint for a completion and for the state of the pool, with a worker of the other version."""
    port = free_port()
    with workers(url, worker), endpoint.program("api", "--redis-url", url, "--port", str(port)):
        base = f"http://127.0.0.1:{port}"
        wait_until(lambda: answers(f"{base}/ready"), "the endpoint")
        body = json.dumps({"prompt": "My name is", "max_tokens": 12}).encode()
        request = urllib.request.Request(f"{base}/v1/completions", body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=WAIT_SECONDS) as answer:
            if not json.load(answer)["choices"][0]["text"]:
                raise RuntimeError("the completion has no text")
        missing = [path for path in PATHS if not answers(base + path)]
        if missing:
            raise RuntimeError(f"no 200 for {', '.join(missing)}")
    return f"completion, {', '.join(PATHS)}"


def try_death(url: str, dies: Release, takes_over: Release) -> str:
    """Kill the worker that runs a job. A worker of the other version takes the job back and finishes it."""
    with Client(url) as reader, workers(url, dies) as (first,):
        job_id = dies.run(LONG_JOB, url)
        wait_until(lambda: reader.status(job_id) == "started", "the job to start")
        first.kill()
        with takes_over.program(*WORKER, "--redis-url", url):
            tokens = reader.result(job_id, timeout=WAIT_SECONDS).usage.completion_tokens
    return f"the other finished its job of {tokens} tokens"


def answers(url: str) -> bool:
    """Tell whether a URL is answered with 200."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def free_port() -> int:
    """Return a port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


TRIALS: dict[str, Callable[[str, Release, Release], str]] = {
    "worker {}, client {}": try_client,
    "worker {}, endpoint {}": try_endpoint,
    "worker {} is killed, worker {} lives": try_death,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="a tag or a commit of this repository")
    commit = parser.parse_args().commit
    failed = 0
    with tempfile.TemporaryDirectory(prefix="fastgpt2-release-") as folder:
        archive = subprocess.run(["git", "archive", commit, "fastgpt2"], cwd=ROOT, stdout=subprocess.PIPE, check=True)
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        old, new = Release(commit, Path(folder)), Release("this", ROOT)
        for label, trial in TRIALS.items():
            for first, second in ((old, new), (new, old)):
                try:
                    with RedisServer() as server:
                        outcome = trial(server.url, first, second)
                except (RuntimeError, OSError, FastGPT2Error) as reason:
                    failed += 1
                    outcome = f"FAILED: {reason}"
                print(f"{label.format(first.name, second.name)}: {outcome}", flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
