"""The fixtures of all tests: a real Redis, real worker processes, the engine with the shipped model."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from redis import Redis
from rq import Queue
from rq.serializers import JSONSerializer
from support.running import GOLDEN, HOLDABLE, RunningEndpoint, SharedWorker, StartEndpoint, StartWorker, wait_until
from support.turns import Turns, take_turns

from fastgpt2 import Client, Engine, settings
from fastgpt2.engine.kernels import program
from fastgpt2.engine.network import step
from fastgpt2.protocol.connection import connect
from fastgpt2.protocol.keys import leases_key, queues_of
from fastgpt2.system import up
from fastgpt2.system.redis_server import RedisServer
from fastgpt2.system.up import System

if TYPE_CHECKING:
    from playwright.sync_api import Browser
    from support.browser import Tabs

    from fastgpt2.engine.kernels.kernel import Kernel

# Hundreds of processes are started. One that compiles the package anew starts 0.1 s later.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# They find what one of them has compiled, as a user's processes do, but not in the developer's own cache.
os.environ["XDG_CACHE_HOME"] = str(Path(__file__).parent.parent / ".pytest_cache" / "user_cache")

# Next to nothing is garbage of what collecting the tests makes. Looking for it takes a third of that time.
gc.disable()


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's own settings must not reach into the tests."""
    for name in list(os.environ):
        if name.startswith(("FASTGPT2_", "HF_", "OTEL_")):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session", autouse=True)
def _short_looks() -> Iterator[None]:
    """Let engines of several processes wait asleep for each other after a few looks.

    Tests run side by side, more of them than there are cores: the other process often has none, and looking for it
    takes a core from who has work. Helpers, and workers in processes of their own, look as long as ever.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "_LOOKS_BEFORE_SLEEP", 200)
        patch.setattr(program, "LOOKS", 200)
        yield


# The files that take longest begin first: one that began last would run while the other cores have nothing left to do.
LONG_FILES = (
    "test_batch_invariance.py",
    "test_prefixes.py",
    "test_sampled_texts.py",
    "test_benchmarks.py",
    "test_hub.py",
    "test_worker.py",
    "test_drafter.py",
    "test_crashes.py",
    "test_page.py",
    "test_decoder.py",
    "test_proxy.py",
    "test_several_models.py",
    "test_job_page.py",
    "test_soak.py",
    "test_failovers.py",
    "test_faults.py",
    "test_sign_on.py",
    "test_sentinel.py",
    "test_confirmation.py",
    "test_redis_faults.py",
    "test_durability.py",
    "test_strange_entries.py",
    "test_stopping.py",
    "test_lost_jobs.py",
    "test_sampler.py",
    "test_pool.py",
    "test_cli.py",
    "test_draft_reports.py",
    "test_endpoint.py",
    "test_fuzz.py",
    "test_packing.py",
    "test_openapi.py",
    "test_up.py",
    "test_batch.py",
)


def pytest_collection_finish() -> None:
    """Look for garbage from here on, but not among what stands until the end: the tests and all that was imported."""
    gc.freeze()
    gc.enable()


PROCESS_FIXTURES = frozenset({"redis_server", "redis", "start_worker", "start_endpoint", "system"})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what takes a server, a worker or an endpoint, which `make check` leaves out; put the long files first."""
    for item in items:
        if PROCESS_FIXTURES.intersection(getattr(item, "fixturenames", ())):
            item.add_marker("processes")
    ranks = {name: rank for rank, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


@pytest.fixture(autouse=True)
def _processes_are_marked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that starts a process and does not say so would slow the fast lane down."""
    if request.node.get_closest_marker("processes") is not None:
        return

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("this test starts a process: mark it with pytest.mark.processes")

    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
    monkeypatch.setattr(os, "fork", refuse)


@pytest.fixture(scope="session")
def engine() -> Engine:
    """The shipped model. Four slots, so that batches are mixed.

    It keeps no prefixes: in how many steps a prompt is read, and by how much, would depend on the tests before. It
    guesses nothing: what it guesses depends on the time that steps take, and two runs shall have the same bits.
    """
    return Engine.load("demo", max_batch=4, prefix_memory=0, drafts="off")


@pytest.fixture(scope="session")
def _widths_measured() -> dict[tuple[str, int], int]:
    return {}


@pytest.fixture
def _measured_once(_widths_measured: dict[tuple[str, int], int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Remember the widths measured, for tests with a cache of their own: each takes half a second to measure."""
    from fastgpt2.engine.kernels import calibration, choice

    measure = calibration.measure_fastest_width

    def measure_once(kernel: Kernel, n_in: int) -> int:
        key = kernel.product.name, n_in
        if key not in _widths_measured:
            _widths_measured[key] = measure(kernel, n_in)
        return _widths_measured[key]

    monkeypatch.setattr(choice, "measure_fastest_width", measure_once)


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="session")
def redis(redis_server: RedisServer) -> Iterator[Redis]:
    connection = connect(redis_server.url)
    yield connection
    connection.close()


@pytest.fixture
def queue_name(request: pytest.FixtureRequest) -> str:
    """A queue of the test's own on the shared server; that of the shared worker if the test asks to be served."""
    if "served" in request.fixturenames:
        shared: SharedWorker = request.getfixturevalue("shared_worker")
        return shared.queue
    return f"test-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def client(redis_server: RedisServer, queue_name: str) -> Iterator[Client]:
    with Client(redis_server.url, queue_name) as made:
        yield made


@pytest.fixture
def queue(redis: Redis, queue_name: str) -> Queue:
    """The test's queue, as RQ's own programs use it."""
    return Queue(queue_name, connection=redis, serializer=JSONSerializer)


@pytest.fixture
def turns(engine: Engine, redis_server: RedisServer, queue_name: str) -> Iterator[Turns]:
    """A worker of the test's queue, which the test takes through its loop."""
    with take_turns(engine, redis_server, queue_name) as turns:
        yield turns


def run_worker(url: str, queue: str, log: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    """Start `fastgpt2 worker` as a process, its log in a file; a test may hold it."""
    own = {"FASTGPT2_REDIS_URL": url, "FASTGPT2_QUEUE": queue, "FASTGPT2_MODEL": "demo", "FASTGPT2_THREADS": "1"}
    with log.open("w") as out:
        return subprocess.Popen(
            [*HOLDABLE, "worker"],
            env={**os.environ, **own, **environment},
            stdout=out,
            stderr=out,
            text=True,
        )


def wait_for_workers(redis: Redis, queue: str, count: int) -> None:
    wait_until(lambda: redis.scard(f"rq:workers:{queue}") == count, "the worker to register")
    # A moment later; that of a first one is what tells clients that the queue is served.
    wait_until(lambda: redis.zcard(leases_key(queue)), "the worker to take its lease")


@pytest.fixture
def start_worker(redis_server: RedisServer, redis: Redis, queue_name: str, tmp_path: Path) -> Iterator[StartWorker]:
    """Starts a worker of the test's queue; waits until it is registered unless told not to."""
    started: list[subprocess.Popen[str]] = []

    def start(wait: bool = True, **environment: str) -> subprocess.Popen[str]:
        log = tmp_path / f"worker-{len(started)}.log"
        started.append(run_worker(redis_server.url, queue_name, log, environment))
        if wait:
            wait_for_workers(redis, queue_name, len(started))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def shared_worker(
    redis_server: RedisServer, redis: Redis, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SharedWorker]:
    """The worker of the tests that ask to be `served`, and the name of its queue."""
    queue = f"test-{uuid.uuid4().hex[:8]}"
    process = run_worker(redis_server.url, queue, tmp_path_factory.mktemp("shared") / "worker.log", {})
    wait_for_workers(redis, queue, 1)
    yield SharedWorker(queue, process)
    process.kill()
    process.wait()


@pytest.fixture
def served(redis: Redis, shared_worker: SharedWorker) -> Iterator[None]:
    """Gives the test a queue with a worker that all such tests of its module have, one after the other.

    It is for tests that need a worker and nothing special of it, and count nothing of all that the queue had. What a
    test leaves behind has ended before the next one begins.
    """
    yield
    keys = [f"{kind}:{queue}" for queue in queues_of(shared_worker.queue) for kind in ("rq:queue", "rq:wip")]
    wait_until(lambda: not redis.exists(*keys), "what the test left behind to end")
    assert shared_worker.process.poll() is None, "the worker is not this test's own"


@pytest.fixture
def start_endpoint(redis_server: RedisServer, queue_name: str, tmp_path: Path) -> Iterator[StartEndpoint]:
    """Starts `fastgpt2 api` as a process, its log in a file; waits until it listens."""
    started: list[RunningEndpoint] = []

    def start(*options: str, **environment: str) -> RunningEndpoint:
        log = tmp_path / f"api-{len(started)}.log"
        own = {"FASTGPT2_REDIS_URL": redis_server.url, "FASTGPT2_QUEUE": queue_name, **environment}
        with log.open("w") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "fastgpt2", "api", "--port", "0", *options],
                env={**os.environ, **own},
                stderr=out,
                text=True,
            )
        started.append(RunningEndpoint(process, log))
        wait_until(lambda: "endpoint on" in log.read_text(), "the endpoint to listen")
        return started[-1]

    yield start
    for endpoint in started:
        endpoint.process.kill()
        endpoint.process.wait()


@pytest.fixture(scope="session")
def system() -> Iterator[System]:
    """The whole system, as `fastgpt2 up` runs it."""
    template = str(GOLDEN / "chat_templates" / "human-and-assistant.jinja")
    values = settings.of_system(
        model="demo", workers="2", port="0", redis_port="0", log_level="warning", chat_template=template
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(up, "COMMAND", HOLDABLE)
        with System(values) as running:
            patch.undo()
            yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Run a browser for one module only: while playwright runs, `asyncio.run` refuses, as the thread has a loop."""
    from support.browser import chromium

    with chromium() as browser:
        yield browser


@pytest.fixture
def tabs(browser: Browser) -> Iterator[Tabs]:
    from support.browser import Tabs

    tabs = Tabs(browser)
    yield tabs
    tabs.close()
