"""A worker process as RQ's users know one: statuses, failures, signals, stop commands, and nothing but the one task."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import zlib
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from rq import Queue, Worker
from rq import Retry as RQRetry
from rq.command import send_stop_job_command
from rq.job import Job
from rq.results import Result
from rq.serializers import JSONSerializer
from rq.suspension import resume, suspend
from rq.webhook import Webhook
from support.running import GOLDEN, HOLDABLE, StartWorker, has_ended, jobs_held, wait_until

from fastgpt2 import Client
from fastgpt2.protocol.connection import connect
from fastgpt2.system.redis_server import RedisServer

pytestmark = pytest.mark.processes

RQ = str(Path(sys.executable).with_name("rq"))
TASK = "fastgpt2.worker.tasks.generate"
ENTRY: dict[str, Any] = json.loads((GOLDEN / "demo_continuations.json").read_text("utf-8"))["continuations"][0]
# Long enough to be held.
LONG: dict[str, Any] = {"max_new_tokens": 480, "ignore_eos": True}


def status(job: Job) -> str:
    return str(job.get_status().value)


def wait_for_status(job: Job, *wanted: str) -> None:
    wait_until(lambda: status(job) in wanted, f"job to be {' or '.join(wanted)}")


def value_of(job: Job) -> Any:
    """Return the JSON object of a finished job."""
    return job.return_value()


def failure(job: Job) -> str:
    """Return the recorded reason of a failed job."""
    wait_for_status(job, "failed")
    result = job.latest_result()
    assert result is not None
    assert result.type == Result.Type.FAILED
    assert job.id in job.failed_job_registry
    return str(result.exc_string)


def test_plain_rq_enqueue_is_served(queue: Queue, start_worker: StartWorker) -> None:
    start_worker()
    job = queue.enqueue(TASK, ENTRY["prompt"], max_new_tokens=30, ignore_eos=True)
    wait_for_status(job, "finished")
    value = value_of(job)
    assert value["token_ids"] == ENTRY["ids"][:30]
    assert value["finish_reason"] == "length"
    assert value["usage"] == {
        "prompt_tokens": len(ENTRY["prompt_ids"]), "completion_tokens": 30, "cached_tokens": 0
    }  # fmt: skip
    assert value["drafting"] == {"steps": 29, "drafted": 0, "accepted": 0}
    assert value["model"] == "demo"
    assert set(value["timings"]) == {"queue_seconds", "prefill_seconds", "decode_seconds"}
    assert job.id in queue.finished_job_registry
    stored = queue.fetch_job(job.id)
    assert stored is not None
    assert stored.started_at is not None
    assert stored.ended_at is not None
    assert queue.intermediate_queue.get_job_ids() == []
    assert queue.started_job_registry.count == 0
    (worker,) = Worker.all(queue=queue, serializer=JSONSerializer)
    assert (worker.get_state(), worker.successful_job_count, worker.failed_job_count) == ("idle", 1, 0)


def test_a_stock_rq_worker_can_run_the_task(queue: Queue, redis_server: RedisServer) -> None:
    job = queue.enqueue(TASK, kwargs={"prompt": ENTRY["prompt"], "max_new_tokens": 10, "ignore_eos": True})
    refused = queue.enqueue(TASK, kwargs={"prompt": "a", "num_beams": 4})
    subprocess.run(
        [
            str(Path(sys.executable).with_name("rq")),
            "worker",
            "--burst",
            "-S",
            "json",
            "-u",
            redis_server.url,
            queue.name,
        ],
        env={**os.environ, "FASTGPT2_MODEL": "demo"},
        check=True,
        timeout=60,
        capture_output=True,
    )
    assert value_of(job)["token_ids"] == ENTRY["ids"][:10]
    assert value_of(job)["timings"]["queue_seconds"] > 0
    assert "num_beams is refused" in failure(refused)


def test_rq_info_shows_queue_and_worker(queue: Queue, redis_server: RedisServer, start_worker: StartWorker) -> None:
    start_worker(FASTGPT2_NAME="herring")
    info = subprocess.run(
        [RQ, "info", "-S", "json", "-u", redis_server.url, queue.name],
        check=True,
        timeout=60,
        capture_output=True,
        text=True,
    ).stdout
    assert queue.name in info
    assert "herring" in info
    assert "idle" in info


def test_the_model_is_loaded_once(queue: Queue, start_worker: StartWorker, tmp_path: Path) -> None:
    process = start_worker()
    jobs = [queue.enqueue(TASK, f"prompt {n}", max_new_tokens=2) for n in range(5)]
    for job in jobs:
        wait_for_status(job, "finished")
    process.terminate()
    assert process.wait(60) == 0
    lines = (tmp_path / "worker-0.log").read_text().splitlines()
    assert sum("loaded demo" in line for line in lines) == 1
    for job in jobs:
        (line,) = [line for line in lines if job.id in line]
        assert "finished:" in line
        assert "prompt" not in line
    assert not any("prompt 0" in line for line in lines), "prompts stay out of the log"


def test_what_cannot_be_done_fails_with_a_sentence(queue: Queue, start_worker: StartWorker, tmp_path: Path) -> None:
    """And the job that comes with them is served."""
    refused = {
        "BadRequest: the job names the function 'os.system'": queue.enqueue("os.system", "exit 1"),
        "BadRequest: num_beams is refused": queue.enqueue(TASK, "a", num_beams=4),
        "BadRequest: prompt is missing": queue.enqueue(TASK),
        "PromptTooLong: prompt tokens .*, over the model's 512 positions": queue.enqueue(TASK, "the " * 5000),
        "PromptTooLong: prompt tokens 1 and max_new_tokens 10000 make 10001": queue.enqueue(
            TASK, "a", max_new_tokens=10_000
        ),
        "lone surrogate": queue.enqueue(TASK, "a\ud800"),
    }
    after = queue.enqueue(TASK, ENTRY["prompt"], max_new_tokens=3, ignore_eos=True)
    start_worker()
    for reason, job in refused.items():
        recorded = failure(job)
        assert "Traceback" not in recorded
        assert len(recorded.strip().splitlines()) == 1
        assert re.search(reason, recorded), recorded
    wait_for_status(after, "finished")
    assert value_of(after)["token_ids"] == ENTRY["ids"][:3]
    assert "Traceback" not in (tmp_path / "worker-0.log").read_text()


class Trap:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


def test_pickles_callbacks_and_webhooks_are_never_touched(
    redis: Redis, queue: Queue, start_worker: StartWorker, tmp_path: Path
) -> None:
    trap = tmp_path / "sprung"
    pickled = Queue(queue.name, connection=redis).enqueue(TASK, Trap(trap))
    garbage = queue.enqueue(TASK, "a")
    redis.hset(garbage.key, mapping={"data": b"\x80\x04garbage", "meta": pickle.dumps(Trap(trap))})
    called_back = queue.enqueue(TASK, ENTRY["prompt"], max_new_tokens=2, ignore_eos=True)
    redis.hset(
        called_back.key, mapping={"success_callback_name": "antigravity.geohash", "success_callback_timeout": 10}
    )
    failing = queue.enqueue(TASK)
    redis.hset(failing.key, mapping={"failure_callback_name": "antigravity.geohash"})
    start_worker()
    refused = Job.fetch(garbage.id, connection=redis, serializer=JSONSerializer)
    assert "neither JSON nor a pickle of plain values" in failure(refused)
    assert "prompt is missing" in failure(failing)
    wait_for_status(called_back, "finished")
    wait_until(lambda: redis.hget(pickled.key, "status") == b"failed", "the pickled job to fail")
    assert not trap.exists()


def test_no_webhook_is_fetched_and_no_upkeep_calls_back(
    redis: Redis, queue: Queue, start_worker: StartWorker, tmp_path: Path
) -> None:
    """One job ends, one fails, and RQ's own clean-up fails one for having been abandoned."""
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.settimeout(0.1)
        url = f"http://127.0.0.1:{trap.getsockname()[1]}/"
        hooks = json.dumps([Webhook(url, "finished").to_dict(), Webhook(url, "failed").to_dict()])
        jobs = [queue.enqueue(TASK, ENTRY["prompt"], max_new_tokens=2), queue.enqueue(TASK, "a", num_beams=4)]
        abandoned = queue.enqueue_in(timedelta(days=1), TASK, "a")
        redis.hset(abandoned.key, mapping={"status": "started", "failure_callback_name": "antigravity.geohash"})
        redis.zadd(f"rq:wip:{queue.name}", {f"{abandoned.id}:0": 1})
        for job in (*jobs, abandoned):
            redis.hset(job.key, "webhooks", hooks)
        start_worker()
        wait_for_status(jobs[0], "finished")
        failure(jobs[1])
        wait_for_status(abandoned, "failed")
        with pytest.raises(TimeoutError):
            trap.accept()
    assert "antigravity" not in (tmp_path / "worker-0.log").read_text()


def test_prompts_are_logged_if_asked_for(queue: Queue, start_worker: StartWorker, tmp_path: Path) -> None:
    start_worker(FASTGPT2_LOG_PROMPTS="yes")
    job = queue.enqueue(TASK, "Once upon a\ntime", max_new_tokens=2)
    wait_for_status(job, "finished")
    assert f'job {job.id}: "Once upon a\\ntime"' in (tmp_path / "worker-0.log").read_text()


MANGLED = {
    "created_at": "yesterday",
    "status": "confused",
    "timeout": "soon",
    "result_ttl": "x",
    "retry_intervals": "{",
    "meta": "\x80",
    "data": "",
    "webhooks": "[{}]",
    "dependency_ids": "[",
}


def test_mangled_entries_end_no_worker(queue: Queue, redis: Redis, start_worker: StartWorker) -> None:
    """Each is mangled in another field, and comes between two that are served."""
    mangled, others = list[Job](), list[Job]()
    for field, value in MANGLED.items():
        mangled.append(queue.enqueue(TASK, ENTRY["prompt"], max_new_tokens=2))
        redis.hset(mangled[-1].key, field, value)
        others.append(queue.enqueue(TASK, ENTRY["prompt"], max_new_tokens=3, ignore_eos=True))
    process = start_worker()
    for job in others:
        wait_for_status(job, "finished")
    assert process.poll() is None
    for field, job in zip(MANGLED, mangled, strict=True):
        wait_until(lambda job=job: redis.exists(f"rq:results:{job.id}"), f"the end of that with {field}")  # type: ignore[misc]
        assert redis.hget(job.key, "status") in (b"failed", b"finished"), field
    assert queue.intermediate_queue.get_job_ids() == []


def test_data_that_inflates_beyond_the_limit_is_refused(queue: Queue, redis: Redis, start_worker: StartWorker) -> None:
    job = queue.enqueue(TASK, "a")
    redis.hset(job.key, "data", zlib.compress(bytes(300_000_000)))
    process = start_worker()
    assert "the job's data has more than 8388608 bytes" in failure(job)
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
    assert peak is not None
    assert int(peak[1]) < 250_000


@pytest.mark.usefixtures("served")
def test_a_job_for_later_is_run(queue: Queue) -> None:
    """RQ's own scheduler is a process of its own; here the worker does its work."""
    later = queue.enqueue_in(timedelta(seconds=1), TASK, ENTRY["prompt"], max_new_tokens=2)
    assert status(later) == "scheduled"
    again = queue.enqueue(TASK, "a", num_beams=4, retry=RQRetry(max=1, interval=1))
    wait_for_status(later, "finished")
    assert "num_beams is refused" in failure(again)
    assert redis_field(again, "retries_left") == b"0"


def redis_field(job: Job, name: str) -> Any:
    return job.connection.hget(job.key, name)


@pytest.mark.parametrize("field", ["created_at", "status", "timeout"])
def test_a_mangled_entry_that_is_due_keeps_no_job_waiting(
    queue: Queue, redis: Redis, start_worker: StartWorker, field: str
) -> None:
    """RQ's scheduler and its clean-up fetch what the registries name, and stumble over it."""
    due = queue.enqueue_in(timedelta(days=1), TASK, "a")
    redis.hset(due.key, field, "nonsense")
    redis.zadd(f"rq:scheduled:{queue.name}", {due.id: 1})
    redis.zadd(f"rq:wip:{queue.name}", {f"{due.id}:0": 1})
    start_worker()
    job = queue.enqueue(TASK, ENTRY["prompt"], max_new_tokens=3, ignore_eos=True)
    wait_for_status(job, "finished")
    assert value_of(job)["token_ids"] == ENTRY["ids"][:3]


def test_a_result_is_kept_while_redis_is_away(tmp_path: Path, queue_name: str) -> None:
    folder = tmp_path / "redis"
    server = RedisServer(folder=folder).start()
    environment = {"FASTGPT2_REDIS_URL": server.url, "FASTGPT2_QUEUE": queue_name, "FASTGPT2_MODEL": "demo"}
    log = tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen([*HOLDABLE, "worker"], env={**os.environ, **environment}, stderr=out)
    try:
        with jobs_held():
            with Client(server.url, queue_name) as client:
                job = client.enqueue(ENTRY["prompt"], **LONG)
                wait_until(lambda: job.status() == "started", "the job to start")
            server.stop()
        wait_until(lambda: "cannot be written yet" in log.read_text(), "the worker to notice")
        server = RedisServer(server.port, folder).start()
        with Client(server.url, queue_name) as client:
            assert list(client.job(job.id).result(timeout=30).token_ids[:100]) == ENTRY["ids"]
    finally:
        process.terminate()
        process.wait(60)
        server.stop()
    assert "Traceback" not in log.read_text()


def test_a_worker_appears_again_when_redis_has_forgotten_it(queue_name: str) -> None:
    with RedisServer() as server:
        connection = connect(server.url)
        environment = {"FASTGPT2_REDIS_URL": server.url, "FASTGPT2_QUEUE": queue_name, "FASTGPT2_MODEL": "demo"}
        process = subprocess.Popen(
            [sys.executable, "-m", "fastgpt2", "worker"], env={**os.environ, **environment}, stderr=subprocess.DEVNULL
        )
        try:
            registered = f"rq:workers:{queue_name}"
            wait_until(lambda: connection.scard(registered) == 1, "the worker to register")
            connection.flushall()
            wait_until(lambda: connection.scard(registered) == 1, "the worker to register again")
            (key,) = connection.smembers(registered)
            assert connection.hget(key, "model") == b"demo"
        finally:
            process.terminate()
            assert process.wait(60) == 0
            connection.close()


def test_a_worker_in_the_background_outlives_its_shell(
    redis: Redis, redis_server: RedisServer, queue_name: str
) -> None:
    environment = {"FASTGPT2_REDIS_URL": redis_server.url, "FASTGPT2_QUEUE": queue_name, "FASTGPT2_MODEL": "demo"}
    script = f"nohup {sys.executable} -m fastgpt2 worker > /dev/null 2>&1 & echo $!"
    shell = subprocess.run(
        ["sh", "-c", script], env={**os.environ, **environment}, capture_output=True, text=True, check=True, timeout=60
    )
    pid = int(shell.stdout)
    try:
        with Client(redis_server.url, queue_name) as client:
            wait_until(lambda: redis.scard(f"rq:workers:{queue_name}") == 1, "the worker to register")
            os.kill(pid, signal.SIGHUP)  # nohup has it ignored
            assert client.enqueue("a", max_new_tokens=1).result(timeout=30).usage.completion_tokens == 1
    finally:
        os.kill(pid, signal.SIGTERM)
    wait_until(lambda: redis.scard(f"rq:workers:{queue_name}") == 0, "the worker to sign off")


def test_sigterm_finishes_the_running_job_and_no_other(
    queue: Queue, redis: Redis, start_worker: StartWorker, tmp_path: Path
) -> None:
    process = start_worker(FASTGPT2_MAX_BATCH="1")
    log = tmp_path / "worker-0.log"
    with jobs_held():
        job = queue.enqueue(TASK, ENTRY["prompt"], **LONG)
        waiting = queue.enqueue(TASK, ENTRY["prompt"])
        wait_for_status(job, "started")
        process.terminate()
        wait_until(lambda: "is told to stop: finishing 1 job" in log.read_text(), "the worker to see the signal")
    assert process.wait(60) == 0
    assert status(job) == "finished"
    assert value_of(job)["usage"]["completion_tokens"] == 480
    assert status(waiting) == "queued"
    assert queue.job_ids == [waiting.id]
    assert redis.scard(f"rq:workers:{queue.name}") == 0, "the worker has signed off"


def test_a_second_signal_gives_the_job_back_to_the_front(
    queue: Queue, start_worker: StartWorker, tmp_path: Path
) -> None:
    process = start_worker(FASTGPT2_MAX_BATCH="1")
    log = tmp_path / "worker-0.log"
    with jobs_held():
        job = queue.enqueue(TASK, ENTRY["prompt"], **LONG)
        waiting = queue.enqueue(TASK, ENTRY["prompt"], max_new_tokens=2)
        wait_for_status(job, "started")
        process.terminate()
        wait_until(lambda: "a second signal gives back all" in log.read_text(), "the worker to see the first signal")
        process.terminate()
        assert process.wait(60) == 0
    assert queue.job_ids == [job.id, waiting.id]
    assert status(job) == "queued"
    start_worker(wait=False)
    wait_for_status(job, "finished")
    assert value_of(job)["token_ids"][:100] == ENTRY["ids"]


def test_a_file_tells_probes_that_the_loop_turns(queue: Queue, start_worker: StartWorker, tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    alive.touch()
    os.utime(alive, (1, 1))
    process = start_worker(wait=False, FASTGPT2_ALIVE_FILE=str(alive))

    def is_its_own() -> bool:
        return alive.exists() and alive.stat().st_mtime > 1

    wait_until(is_its_own, "the file that another worker left to be removed, and one to be made")
    with jobs_held():
        for is_busy in (False, True):
            if is_busy:
                wait_for_status(queue.enqueue(TASK, ENTRY["prompt"], **LONG), "started")
            os.utime(alive, (1, 1))
            wait_until(lambda: alive.stat().st_mtime > 1, "the file to be touched", 60)
        process.send_signal(signal.SIGSTOP)
        os.utime(alive, (1, 1))
        assert process.poll() is None
        assert alive.stat().st_mtime == 1, "nobody but the loop touches it"
        process.send_signal(signal.SIGCONT)
    process.terminate()
    assert process.wait(60) == 0
    assert not alive.exists()
    refused = start_worker(wait=False, FASTGPT2_ALIVE_FILE=str(tmp_path / "nowhere" / "alive"))
    assert refused.wait(60) == 2
    log = (tmp_path / "worker-1.log").read_text()
    assert f"--alive-file {tmp_path}/nowhere/alive: cannot be made (No such file or directory)" in log
    assert "Traceback" not in log


def test_sigint_stops_an_idle_worker_at_once(queue: Queue, redis: Redis, start_worker: StartWorker) -> None:
    process = start_worker(FASTGPT2_DRAIN_TIMEOUT="1000")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    assert redis.scard(f"rq:workers:{queue.name}") == 0


@pytest.mark.usefixtures("served")
def test_a_stop_command_ends_a_running_job(queue: Queue, redis: Redis) -> None:
    with jobs_held():
        job = queue.enqueue(TASK, ENTRY["prompt"], **LONG)
        wait_for_status(job, "started")
        send_stop_job_command(redis, job.id, serializer=JSONSerializer)
        wait_for_status(job, "stopped")
    after = queue.enqueue(TASK, ENTRY["prompt"], max_new_tokens=3, ignore_eos=True)
    wait_for_status(after, "finished")
    assert value_of(after)["token_ids"] == ENTRY["ids"][:3]


@pytest.mark.usefixtures("served")
def test_a_job_over_its_time_fails_and_the_worker_goes_on(queue: Queue) -> None:
    with jobs_held():
        job = queue.enqueue(TASK, ENTRY["prompt"], job_timeout=1, **LONG)
        assert "took longer than the 1" in failure(job)
    after = queue.enqueue(TASK, ENTRY["prompt"], max_new_tokens=3, ignore_eos=True)
    wait_for_status(after, "finished")
    assert value_of(after)["token_ids"] == ENTRY["ids"][:3]


def test_suspension_holds_jobs_back(queue: Queue, redis: Redis, start_worker: StartWorker) -> None:
    start_worker()
    suspend(redis)
    try:
        (key,) = redis.smembers(f"rq:workers:{queue.name}")
        wait_until(lambda: redis.hget(key, "state") == b"suspended", "the worker to be suspended")
        job = queue.enqueue(TASK, ENTRY["prompt"], max_new_tokens=2)
        assert status(job) == "queued"
    finally:
        resume(redis)
    wait_for_status(job, "finished")


def test_an_orphaned_worker_ends(redis: Redis, redis_server: RedisServer, queue_name: str) -> None:
    """The supervisor was killed with -9 and could tell the worker nothing."""
    code = (
        "import os, subprocess, sys; os.environ['FASTGPT2_SUPERVISOR_PID'] = str(os.getpid()); "
        "p = subprocess.Popen([sys.executable, '-m', 'fastgpt2', 'worker']); print(p.pid, flush=True); p.wait()"
    )
    environment = {
        **os.environ,
        "FASTGPT2_REDIS_URL": redis_server.url,
        "FASTGPT2_QUEUE": queue_name,
        "FASTGPT2_MODEL": "demo",
    }
    parent = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    wait_until(lambda: redis.scard(f"rq:workers:{queue_name}") == 1, "the worker to register")
    parent.kill()
    parent.wait()
    wait_until(lambda: redis.scard(f"rq:workers:{queue_name}") == 0, "the orphan to sign off")
    wait_until(lambda: has_ended(pid), "the orphan to end")


def test_a_worker_waits_for_redis_to_come_up(tmp_path: Path, queue_name: str) -> None:
    late = RedisServer()
    log = (tmp_path / "log").open("w+")
    process = subprocess.Popen(
        [sys.executable, "-m", "fastgpt2", "worker"],
        env={**os.environ, "FASTGPT2_REDIS_URL": late.url, "FASTGPT2_QUEUE": queue_name, "FASTGPT2_MODEL": "demo"},
        stderr=log,
    )
    try:
        wait_until(lambda: "trying again in" in (tmp_path / "log").read_text(), "the worker to say that it waits")
        with late, Client(late.url, queue_name) as client:
            result = client.enqueue(ENTRY["prompt"], max_new_tokens=4, ignore_eos=True).result(timeout=30)
            assert list(result.token_ids) == ENTRY["ids"][:4]
            process.terminate()
            assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        log.close()
        late.stop()


def test_two_workers_of_one_name(queue: Queue, start_worker: StartWorker, tmp_path: Path) -> None:
    start_worker(FASTGPT2_NAME=queue.name)
    second = start_worker(wait=False, FASTGPT2_NAME=queue.name)
    assert second.wait(60) == 2
    log = (tmp_path / "worker-1.log").read_text()
    assert "give each worker a name of its own" in log
    assert "Traceback" not in log


@pytest.mark.parametrize(
    ("environment", "code", "message"),
    [
        ({"FASTGPT2_MODEL": "/no/such/folder"}, 3, "no such folder"),
        ({"FASTGPT2_MODEL": "gpt2", "HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent"}, 3, "HF_HUB_OFFLINE is set"),
        ({"FASTGPT2_THREADS": "many"}, 2, "FASTGPT2_THREADS: 'many' is not a whole number"),
        ({"FASTGPT2_REDIS_URL": "http://x"}, 2, "the Redis URL cannot be used"),
    ],
)
def test_a_worker_that_cannot_start_says_why(
    start_worker: StartWorker, tmp_path: Path, environment: dict[str, str], code: int, message: str
) -> None:
    process = start_worker(wait=False, **environment)
    assert process.wait(60) == code
    log = (tmp_path / "worker-0.log").read_text()
    assert message in log
    assert "Traceback" not in log
