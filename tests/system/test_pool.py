"""A pool keeps processes alive, replaces and stops them: small ones of a line each, and those of `fastgpt2 pool`."""

from __future__ import annotations

import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from redis import Redis
from rq import Queue, Worker
from rq.command import send_shutdown_command
from support.redis_process import OpenRedis
from support.running import HOLDABLE, has_ended, jobs_held, wait_until

from fastgpt2 import Client
from fastgpt2.engine.model.hub import DEMO_FOLDER
from fastgpt2.errors import FastGPT2Error, RedisUnfit
from fastgpt2.protocol.connection import connect
from fastgpt2.system.pool import MAX_QUICK_DEATHS, MAX_QUICK_ENDS, START_PAUSE_SECONDS, Child, Pool
from fastgpt2.system.redis_server import RedisServer
from fastgpt2.system.served_model import ServedModel
from fastgpt2.system.up import child_environment, worker_children

pytestmark = pytest.mark.processes

StartPool = Callable[..., tuple[subprocess.Popen[str], Path]]


def child_of(code: str) -> Child:
    return Child("child", [sys.executable, "-c", code], {})


def ended(child: Child) -> int:
    """Return the status of a child that ends of itself."""
    assert child.process is not None
    return child.process.wait(60)


class TestDeaths:
    def test_back_off_grows_and_ends(self) -> None:
        child = child_of("import sys; sys.exit(7)")
        pool = Pool([child])
        pool.start()
        now, delays = time.monotonic(), []
        for _ in range(MAX_QUICK_DEATHS):
            assert ended(child) == 7
            pool.check(now)
            delays.append(child.restart_at - now)
            pool.check(child.restart_at - 0.01)
            assert child.process is None, "not before its time"
            now = child.restart_at
            pool.check(now)
        assert delays == pytest.approx([0.5, 1, 2, 4, 8])
        ended(child)
        with pytest.raises(FastGPT2Error, match="child ended with status 7, 6 times in a row; giving up"):
            pool.check(now)

    def test_a_redis_that_is_of_no_use_for_long_ends_it_with_the_status_that_says_so(self) -> None:
        child = child_of(f"import sys; sys.exit({RedisUnfit.exit_code})")
        pool = Pool([child])
        pool.start()
        now = time.monotonic()
        for _ in range(MAX_QUICK_DEATHS):
            ended(child)
            pool.check(now)
            now = child.restart_at
            pool.check(now)
        ended(child)
        with pytest.raises(FastGPT2Error, match="giving up") as raised:
            pool.check(now)
        assert raised.value.exit_code == RedisUnfit.exit_code

    def test_a_long_life_forgives(self) -> None:
        child = child_of("import sys; sys.exit(7)")
        pool = Pool([child])
        pool.start()
        now = time.monotonic()
        for _ in range(2 * MAX_QUICK_DEATHS):
            ended(child)
            now += 100  # as if it had lived so long
            pool.check(now)
            assert child.restart_at - now == pytest.approx(0.5)
            now = child.restart_at
            pool.check(now)
        pool.stop(5)

    @pytest.mark.parametrize("status", [2, 3])
    def test_wrong_settings_and_models_are_not_tried_again(self, status: int) -> None:
        child = child_of(f"import sys; sys.exit({status})")
        pool = Pool([child])
        pool.start()
        ended(child)
        with pytest.raises(FastGPT2Error, match=f"child ended with status {status}; its message above says why"):
            pool.check(time.monotonic())


class TestEnds:
    """A child ends with status 0 while nobody stops it."""

    def test_it_is_replaced_at_once(self, caplog: pytest.LogCaptureFixture) -> None:
        child = child_of("pass")
        pool = Pool([child])
        pool.start()
        now = time.monotonic()
        with caplog.at_level(logging.INFO, "fastgpt2.pool"):
            for _ in range(3 * MAX_QUICK_DEATHS):
                first = child.process
                assert ended(child) == 0
                now += 1.5  # as if it had lived so long
                pool.check(now)
                assert child.process is not None
                assert child.process is not first
        assert {(r.levelname, r.getMessage()) for r in caplog.records} == {
            ("INFO", "child has ended; starting another")
        }
        pool.stop(5)

    def test_starts_are_a_second_apart(self) -> None:
        child = child_of("pass")
        pool = Pool([child])
        pool.start()
        began = child.started_at
        ended(child)
        pool.check(began + 0.3)
        pool.check(began + START_PAUSE_SECONDS - 0.01)
        assert child.process is None, "not before its time"
        pool.check(began + START_PAUSE_SECONDS)
        assert child.process is not None
        pool.stop(5)

    def test_ending_at_once_again_and_again_is_dying(self) -> None:
        child = child_of("pass")
        pool = Pool([child])
        pool.start()
        now, delays = child.started_at, []
        for _ in range(MAX_QUICK_ENDS - 1 + MAX_QUICK_DEATHS):
            ended(child)
            pool.check(now + 0.25)
            delays.append(child.restart_at - child.started_at)
            now = child.restart_at
            pool.check(now)
        assert delays == pytest.approx([1, 1, 1, 1, 0.75, 1.25, 2.25, 4.25, 8.25])
        ended(child)
        with pytest.raises(FastGPT2Error, match="child ended with status 0, 6 times in a row; giving up"):
            pool.check(now + 0.25)

    def test_one_that_was_told_to_end_soon_may(self) -> None:
        child = child_of("pass")
        child.ends_soon = True
        pool = Pool([child])
        pool.start()
        for _ in range(2 * (MAX_QUICK_ENDS + MAX_QUICK_DEATHS)):
            began = child.started_at
            ended(child)
            pool.check(began + 0.25)
            assert child.restart_at == began + START_PAUSE_SECONDS
            pool.check(child.restart_at)
            assert child.process is not None
        pool.stop(5)

    def test_deaths_with_an_orderly_end_between_are_not_in_a_row(self) -> None:
        child = child_of("")
        pool = Pool([child])
        now = 0.0
        for turn in range(4 * MAX_QUICK_DEATHS):
            child.command = [sys.executable, "-c", f"import sys; sys.exit({7 if turn % 2 else 0})"]
            child.start(now)
            ended(child)
            now += 2
            pool.check(now)
        pool.stop(5)


class TestStop:
    """Children say in a file when they are there to be told, and what they are told."""

    def child(self, told: Path, on_signal: str) -> Child:
        return child_of(f"""if True:
            import signal, sys, threading
            told, count = open({str(told)!r}, "a", buffering=1), 0
            def on(signum, frame):
                global count
                count += 1
                print(signal.Signals(signum).name, file=told)
                {on_signal}
            signal.signal(signal.SIGTERM, on)
            print("there", file=told)
            while True:
                signal.pause()
        """)

    def started(self, told: Path, on_signal: str) -> tuple[Child, Pool]:
        child = self.child(told, on_signal)
        pool = Pool([child])
        pool.start()
        wait_until(lambda: told.exists() and "there" in told.read_text(), "the child to be there")
        return child, pool

    def test_who_heeds_is_told_once(self, tmp_path: Path) -> None:
        child, pool = self.started(tmp_path / "told", "sys.exit(0)")
        pool.stop(60)
        assert ended(child) == 0
        assert (tmp_path / "told").read_text() == "there\nSIGTERM\n"

    def test_who_takes_too_long_is_told_again(self, tmp_path: Path) -> None:
        child, pool = self.started(tmp_path / "told", "if count == 2: sys.exit(0)")
        pool.stop(0.2)
        assert ended(child) == 0
        assert (tmp_path / "told").read_text() == "there\nSIGTERM\nSIGTERM\n"

    def test_who_will_not_end_is_killed(self, tmp_path: Path) -> None:
        child, pool = self.started(tmp_path / "told", "pass")
        pool.stop(0.2)
        assert ended(child) == -signal.SIGKILL

    def test_the_endpoint_goes_before_the_workers(self, tmp_path: Path) -> None:
        told = tmp_path / "told"
        worker = self.child(told, "print('worker', file=told); sys.exit(0)")
        endpoint = self.child(told, "print('endpoint', file=told); sys.exit(0)")
        endpoint.stops_first = True
        pool = Pool([worker, endpoint])
        pool.start()
        wait_until(lambda: told.exists() and told.read_text().count("there") == 2, "both to be there")
        pool.stop(60)
        assert told.read_text() == "there\nthere\nSIGTERM\nendpoint\nSIGTERM\nworker\n"

    def test_what_waits_to_be_started_again_is_not(self) -> None:
        child = child_of("import sys; sys.exit(7)")
        pool = Pool([child])
        pool.start()
        ended(child)
        pool.check(time.monotonic())
        pool.stop(60)
        assert child.process is None


def test_settings_reach_the_children_by_their_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that a pool's worker must not take from the shell."""
    from fastgpt2 import settings

    given = settings.of_system(
        workers="3", max_batch="7", kv_memory="2GiB", max_jobs="5", max_growth="64MiB", max_queue="9",
        drain_timeout="7", prefix_memory="off", allow_origin="http://a,http://b",
    )  # fmt: skip
    monkeypatch.setenv("FASTGPT2_SERVED_MODEL_NAME", "demo=of-the-shell")
    models = [ServedModel("demo"), ServedModel("gpt2", ("small", "g"), named_only=True)]
    for name, text in child_environment(given, models, "redis://there/1").items():
        monkeypatch.setenv(name, text)
    for setting in (settings.NAME, settings.BURST, settings.REVISION, settings.THREADS):
        assert setting.resolve() == setting.default
    assert settings.KV_MEMORY.resolve() == 2 << 30
    assert settings.PREFIX_MEMORY.resolve() == 0
    assert settings.MAX_GROWTH.resolve() == 64 << 20
    assert (settings.MAX_BATCH.resolve(), settings.MAX_JOBS.resolve(), settings.MAX_QUEUE.resolve()) == (7, 5, 9)
    assert settings.DRAIN_TIMEOUT.resolve() == 7
    assert settings.ALLOW_ORIGIN.resolve() == ("http://a", "http://b")
    assert settings.TRUSTED_PROXY.resolve() == ()
    assert settings.REDIS_URL.resolve() == "redis://there/1"
    assert os.environ["FASTGPT2_POOL_WORKERS"] == "6"
    assert settings.SERVED_MODEL_NAME.resolve() == (), "not those of the shell"
    children = worker_children(given, models, "redis://there/1")
    assert [child.name for child in children] == [f"worker {n}" for n in range(1, 7)]
    told = []
    for child in children:
        for name, text in child.environment.items():
            monkeypatch.setenv(name, text)
        told.append((settings.MODEL.resolve(), settings.SERVED_MODEL_NAME.resolve(), settings.NAMED_ONLY.resolve()))
    assert told == [("demo", (), False)] * 3 + [("gpt2", ("small", "g"), True)] * 3


def as_in_a_shell() -> None:
    # Under `nohup make test` it would come ignored, and be left so.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))


@pytest.fixture
def start_pool(redis_server: RedisServer, queue_name: str, tmp_path: Path) -> Iterator[StartPool]:
    """Start `fastgpt2 pool` with the demo model on the shared Redis; its output goes to a file."""
    started: list[subprocess.Popen[str]] = []

    def start(*options: str, **environment: str) -> tuple[subprocess.Popen[str], Path]:
        path = tmp_path / f"pool-{len(started)}.log"
        with path.open("w") as log:
            process = subprocess.Popen(
                [*HOLDABLE, "pool", *options],
                env={
                    **os.environ,
                    "FASTGPT2_REDIS_URL": redis_server.url,
                    "FASTGPT2_QUEUE": queue_name,
                    "FASTGPT2_MODEL": "demo",
                    "FASTGPT2_THREADS": "1",
                    **environment,
                },
                stdout=log,
                stderr=log,
                text=True,
                preexec_fn=as_in_a_shell,
            )
        started.append(process)
        return process, path

    yield start
    for process in started:
        process.kill()
        process.wait()


def worker_pids(redis: Redis, queue_name: str) -> set[int]:
    keys = redis.smembers(f"rq:workers:{queue_name}")
    return {int(redis.hget(key, "pid") or 0) for key in keys}


def wait_for_workers(redis: Redis, queue_name: str, count: int) -> set[int]:
    wait_until(lambda: redis.scard(f"rq:workers:{queue_name}") == count, f"{count} workers")
    return worker_pids(redis, queue_name)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_pool_serves_and_a_signal_drains_it(
    start_pool: StartPool, redis: Redis, client: Client, queue_name: str, signum: int
) -> None:
    process, log = start_pool("--workers", "2")
    pids = wait_for_workers(redis, queue_name, 2)
    with jobs_held():
        running = client.enqueue("My name is", max_new_tokens=450, ignore_eos=True)
        wait_until(lambda: running.status() == "started", "the job to start")
        process.send_signal(signum)
        wait_until(lambda: "is told to stop: finishing 1 job" in log.read_text(), "the worker to be told")
    assert process.wait(60) == 0
    assert all(map(has_ended, pids))
    assert running.result(timeout=30).usage.completion_tokens == 450
    text = log.read_text()
    assert f"2 workers, queue {queue_name}, Redis redis://127.0.0.1" in text
    assert "stopping: workers finish the jobs that they run" in text
    assert "starting another" not in text
    assert "Traceback" not in text
    assert redis.scard(f"rq:workers:{queue_name}") == 0, "they signed off"


def test_a_second_signal_gives_the_jobs_back(
    start_pool: StartPool, redis: Redis, client: Client, queue_name: str
) -> None:
    process, log = start_pool("--workers", "1", "--max-batch", "8", "--drain-timeout", "1000")
    wait_for_workers(redis, queue_name, 1)
    with jobs_held():
        jobs = [client.enqueue("My name is", max_new_tokens=500, ignore_eos=True) for _ in range(8)]
        wait_until(lambda: all(job.status() == "started" for job in jobs), "the jobs to start")
        process.terminate()
        said = "finishing 8 jobs within 1000 s; a second signal gives back all"
        wait_until(lambda: said in log.read_text(), "SIGTERM")
        process.terminate()
        assert process.wait(60) == 0
    assert {job.status() for job in jobs} == {"queued"}, log.read_text()


def test_a_drain_that_takes_too_long_gives_the_jobs_back(
    start_pool: StartPool, redis: Redis, client: Client, queue_name: str
) -> None:
    process, log = start_pool("--workers", "1", "--drain-timeout", "0.05")
    wait_for_workers(redis, queue_name, 1)
    with jobs_held():
        jobs = [client.enqueue("My name is", max_new_tokens=500, ignore_eos=True) for _ in range(4)]
        wait_until(lambda: any(job.status() == "started" for job in jobs), "a job to start")
        process.terminate()
        assert process.wait(60) == 0
    assert {job.status() for job in jobs} == {"queued"}, log.read_text()


def test_a_killed_worker_is_replaced(start_pool: StartPool, redis: Redis, client: Client, queue_name: str) -> None:
    process, log = start_pool("--workers", "1")
    (pid,) = wait_for_workers(redis, queue_name, 1)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: "worker 1 was killed by SIGKILL; starting it again in 0.5 s" in log.read_text(), "the notice")
    assert client.enqueue("My name is", max_new_tokens=3).result(timeout=30).text
    process.terminate()
    assert process.wait(60) == 0


def test_a_worker_that_is_shut_down_is_replaced(
    start_pool: StartPool, redis: Redis, client: Client, queue_name: str
) -> None:
    process, log = start_pool("--workers", "1")
    (pid,) = wait_for_workers(redis, queue_name, 1)
    (worker,) = Worker.all(redis, queue=Queue(queue_name, connection=redis))
    send_shutdown_command(redis, worker.name)
    wait_until(lambda: worker_pids(redis, queue_name) not in (set(), {pid}), "another worker")
    assert "INFO worker 1 has ended; starting another" in log.read_text()
    assert client.enqueue("My name is", max_new_tokens=3).result(timeout=30).text
    process.terminate()
    assert process.wait(60) == 0


@pytest.mark.parametrize(("count", "max_jobs"), [(30, 5), (12, 1)])
def test_workers_are_recycled_and_no_job_is_lost(
    start_pool: StartPool, client: Client, count: int, max_jobs: int
) -> None:
    jobs = [client.enqueue("My name is", max_new_tokens=20, ignore_eos=True) for _ in range(count)]
    process, log = start_pool("--workers", "2", "--max-jobs", str(max_jobs), "--max-batch", "2")
    results = [job.result(timeout=60) for job in jobs]
    assert len({result.text for result in results}) == 1
    assert {result.usage.completion_tokens for result in results} == {20}
    process.terminate()
    assert process.wait(60) == 0
    text = log.read_text()
    assert f", and --max-jobs is {max_jobs}" in text
    assert "has ended; starting another" in text
    assert "starting it again" not in text, "an end is no death"
    # Each does `max_jobs`, and what it had begun by then: two batches at most. The last two are stopped before.
    lives = len(set(re.findall(r"(\S+) is ready: model", text)))
    assert count / (max_jobs + 4) <= lives <= count / max_jobs + 2


def test_a_worker_that_grew_is_recycled(start_pool: StartPool, redis: Redis, client: Client, queue_name: str) -> None:
    """Sixteen jobs at once leave something behind in the heap; with a limit of a byte, that is too much."""
    process, log = start_pool("--workers", "1", "--max-batch", "16", "--max-growth", "1B")
    (pid,) = wait_for_workers(redis, queue_name, 1)
    jobs = [client.enqueue("a " * 300, max_new_tokens=100, ignore_eos=True, logprobs=20) for _ in range(16)]
    assert all(job.result(timeout=60).usage.completion_tokens == 100 for job in jobs)
    wait_until(lambda: worker_pids(redis, queue_name) not in (set(), {pid}), "another worker")
    text = log.read_text()
    assert "MiB, keys and values apart, and --max-growth is 0.0 MiB" in text
    assert "INFO worker 1 has ended; starting another" in text
    process.terminate()
    assert process.wait(60) == 0


def test_a_pool_waits_for_its_redis(start_pool: StartPool, queue_name: str) -> None:
    server = RedisServer()
    process, log = start_pool("--workers", "1", FASTGPT2_REDIS_URL=server.url)
    wait_until(lambda: "Redis cannot be used" in log.read_text(), "the worker to look for it")
    with server, Client(server.url, queue_name) as client:
        assert client.enqueue("My name is", max_new_tokens=3).result(timeout=30).text
        process.terminate()
        assert process.wait(60) == 0


def test_a_stop_without_redis_warns_of_no_jobs_that_were_never_taken(start_pool: StartPool, queue_name: str) -> None:
    """One pool is idle and the other has a job, of which its worker tells: what is in hand, and nothing else."""
    with OpenRedis() as server:
        connection = connect(server.url)
        idle, idle_log = start_pool("--workers", "2", FASTGPT2_REDIS_URL=server.url)
        busy, busy_log = start_pool("--workers", "1", FASTGPT2_REDIS_URL=server.url, FASTGPT2_QUEUE="busy")
        wait_for_workers(connection, queue_name, 2)
        wait_for_workers(connection, "busy", 1)
        with jobs_held():
            with Client(server.url, "busy") as client:
                job = client.enqueue("My name is", max_new_tokens=500, ignore_eos=True)
                wait_until(lambda: job.status() == "started", "the job to start")
            connection.close()
            os.kill(server.pid, signal.SIGKILL)
            wait_until(lambda: "Redis cannot be used" in busy_log.read_text(), "the worker to miss Redis")
            for process in (idle, busy):
                process.terminate()
            wait_until(lambda: "a second signal gives back all" in busy_log.read_text(), "the worker to be told")
            busy.terminate()
            assert (idle.wait(60), busy.wait(60)) == (0, 0)
    text = idle_log.read_text()
    assert text.count("could not sign off") == 2
    assert not re.search(r"\b(WARNING|ERROR) .*\bjobs?\b", text), text
    text = busy_log.read_text()
    (line,) = [line for line in text.splitlines() if " ERROR " in line]
    assert "1 job could not be given back" in line
    assert "whoever serves the queue next finds it" in line
    assert not re.search(r"\b0 (claimed|jobs)", text)
    assert text.count("Redis cannot be used") <= 3, "not each time that it is tried"


def test_a_redis_that_says_no_ends_it_at_once(start_pool: StartPool) -> None:
    with RedisServer() as server:
        connection = connect(server.url)
        connection.acl_setuser("default", reset_passwords=True, passwords=["+secret"])
        process, log = start_pool(FASTGPT2_REDIS_URL=server.url.replace("//", "//:wrong@"))
        assert process.wait(60) == 4
        connection.close()
    assert "denied access" in log.read_text()
    assert "check the user and password in FASTGPT2_REDIS_URL" in log.read_text()
    assert "wrong@" not in log.read_text()
    assert "worker 1" not in log.read_text(), "nothing was started"


def test_nothing_outlives_a_killed_supervisor(start_pool: StartPool, redis: Redis, queue_name: str) -> None:
    process, _ = start_pool("--workers", "2")
    pids = wait_for_workers(redis, queue_name, 2)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for pid in (process.pid, *pids):
        assert resource.prlimit(pid, resource.RLIMIT_NOFILE) == (hard, hard), "more than a shell allows"
    process.kill()
    process.wait()
    wait_until(lambda: all(map(has_ended, pids)), "the workers to end")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--model", "/no/such/model"], 3, "/no/such/model: no such folder"),
        (["--workers", "0"], 2, "--workers: '0' is not between 1 and 1024"),
        (["--redis-url", "nonsense"], 2, "the Redis URL cannot be used"),
        (["--kv-memory", "lots"], 2, "--kv-memory: 'lots' is not a size like 2GB or 512MiB"),
    ],
)
def test_a_pool_says_why_it_cannot(start_pool: StartPool, options: list[str], code: int, message: str) -> None:
    process, log = start_pool(*options)
    assert process.wait(60) == code
    assert message in log.read_text()
    assert "Traceback" not in log.read_text()


def test_a_model_that_the_workers_refuse_ends_it_with_their_status(start_pool: StartPool, tmp_path: Path) -> None:
    folder = shutil.copytree(DEMO_FOLDER, tmp_path / "model")
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(100_000)
    process, log = start_pool("--model", str(folder))
    assert process.wait(60) == 3
    assert "ended with status 3; its message above says why" in log.read_text()
