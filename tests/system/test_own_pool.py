"""`fastgpt2 batch --model ID` starts Redis and workers for its run alone, and leaves nothing behind at any end."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.running import GOLDEN, HOLDABLE, has_ended, jobs_held, wait_until
from test_up import descendants

from fastgpt2 import cli
from fastgpt2.engine.machine import usable_cores
from fastgpt2.engine.model.hub import DEMO_FOLDER
from fastgpt2.errors import FastGPT2Error
from fastgpt2.events import make_event
from fastgpt2.protocol.connection import connect
from fastgpt2.system import own_pool, pool, up
from fastgpt2.system.own_pool import OwnPool, RunningPool, pool_of_run
from fastgpt2.system.redis_server import RedisServer
from fastgpt2.system.worker_output import WorkerOutput, show_beside_bar

ENTRIES: list[dict[str, Any]] = json.loads((GOLDEN / "demo_continuations.json").read_text("utf-8"))["continuations"]
ENTRY = next(entry for entry in ENTRIES if "\n" not in entry["prompt"])
NOWHERE = "redis://127.0.0.1:1/0"
READY = "worker of this run's own with demo ready after"


class Batch:
    """A run of `fastgpt2 batch --model demo --workers 1`, or with other options, on prompts that are all the same.

    Args:
        lines: how many lines the input has.
        short: how many of them, the first ones, ask for two tokens.

    Attributes:
        temporary: the folder in which Redis's own is made.
    """

    def __init__(
        self,
        folder: Path,
        temporary: str,
        *options: str,
        lines: int = 3,
        short: int = 0,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        self.temporary = Path(temporary)
        self.output, self.log = folder / "out.jsonl", folder / "err"
        asked = [{"prompt": ENTRY["prompt"]} | ({"max_new_tokens": 2} if n < short else {}) for n in range(lines)]
        (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked), "utf-8")
        command = [*HOLDABLE, "batch", "in.jsonl", "-o", "out.jsonl", "--ignore-eos"]
        for option, value in (("--model", "demo"), ("--workers", "1")):
            command += [] if option in options else [option, value]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, *options],
                env={**os.environ, "TMPDIR": temporary, "FASTGPT2_REDIS_URL": NOWHERE},
                cwd=folder,
                stderr=log,
                preexec_fn=prepare,
            )

    def results(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.output.read_text().splitlines()]

    def wait_for_lines(self, count: int) -> set[int]:
        """Wait until the output has this many lines; return the ids of the processes below the command."""
        wait_until(
            lambda: (
                self.process.poll() is not None
                or (self.output.exists() and self.output.read_bytes().count(b"\n") >= count)
            ),
            f"{count} lines of output",
        )
        assert self.process.poll() is None, self.log.read_text()
        return descendants(self.process.pid)

    def left_behind(self) -> list[str]:
        return [path.name for path in self.temporary.iterdir()]


Start = Callable[..., Batch]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[Batch] = []
    # In the test's own folder, the path of a socket would be too long.
    with tempfile.TemporaryDirectory(prefix="own-") as temporary:

        def start(*options: str, **others: Any) -> Batch:
            started.append(Batch(tmp_path, temporary, *options, **others))
            return started[-1]

        yield start
        for batch in started:
            batch.process.kill()
            batch.process.wait()
            print(batch.log.read_text())  # shown if the test fails


@pytest.mark.processes
def test_a_run_needs_no_pool_and_replaces_what_dies(start: Start) -> None:
    """Redis and the worker are killed on the way: all lines come all the same, and nothing is left."""
    with jobs_held():
        options = ["--max-new-tokens", "100", "--in-flight", "2", "--served-model-name", "mine"]
        batch = start(*options, lines=10, short=2)
        pids = batch.wait_for_lines(2)
        assert len(pids) == 2, "Redis and a worker"
        (folder,) = batch.temporary.iterdir()
        assert folder.stat().st_mode & 0o777 == 0o700
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    assert batch.process.wait(60) == 0, batch.log.read_text()
    assert len(batch.results()) == 10
    assert [result["text"] for result in batch.results()[2:]] == [ENTRY["text"]] * 8
    assert {result["model"] for result in batch.results()} == {"mine"}
    assert batch.left_behind() == []
    first, *others = batch.log.read_text().splitlines()
    assert READY in first
    assert first.endswith("; FASTGPT2_REDIS_URL, which is set, is not used")
    log = "\n".join(others)
    assert "the embedded Redis has ended with status -9; starting it again" in log
    assert "worker 1 was killed by SIGKILL; starting it again in 0.5 s" in log
    assert "Traceback" not in log


@pytest.mark.processes
@pytest.mark.parametrize("signums", [[signal.SIGINT, signal.SIGINT], [signal.SIGTERM]])
def test_a_stop_keeps_what_is_written_and_leaves_nothing(start: Start, signums: list[int]) -> None:
    with jobs_held():
        batch = start("--max-new-tokens", "300", "--max-batch", "2", lines=20, short=2)
        pids = batch.wait_for_lines(2)
        connection = connect(f"unix://{next(batch.temporary.iterdir())}/redis.sock")
        wait_until(lambda: not connection.keys("rq:results:*"), "Redis to be rid of what is written")
        connection.close()
        for signum in signums:
            batch.process.send_signal(signum)
        assert batch.process.wait(60) == 130
    assert all(map(has_ended, pids))
    assert batch.left_behind() == []
    text, results = batch.log.read_text(), batch.results()
    assert len(results) == 2
    assert "interrupted: out.jsonl holds 2 results; the same command goes on from there" in text
    assert "Traceback" not in text
    assert "WARNING" not in text


@pytest.mark.processes
def test_nothing_outlives_a_run_that_is_killed(start: Start) -> None:
    """Nor does it need a standard error."""
    with jobs_held():
        batch = start("--max-new-tokens", "300", "--max-batch", "2", lines=20, short=1, prepare=lambda: os.close(2))
        pids = batch.wait_for_lines(1)
        batch.process.kill()
        batch.process.wait()
    wait_until(lambda: all(map(has_ended, pids)), "Redis and the worker to end")


@pytest.mark.processes
def test_a_model_that_cannot_be_used_ends_the_run_in_its_own_words(start: Start, tmp_path: Path) -> None:
    folder = shutil.copytree(DEMO_FOLDER, tmp_path / "model")
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(100_000)
    damaged = start("--model", str(folder), "--workers", "2")
    assert damaged.process.wait(60) == 3
    (line,) = damaged.log.read_text().splitlines()
    assert line.startswith("fastgpt2 batch: ")
    assert "model.safetensors: damaged or not a safetensors file" in line
    assert damaged.left_behind() == []


def values_of(*options: str) -> dict[str, Any]:
    return cli.resolve_values(cli.COMMANDS["batch"], cli.read_arguments("batch", ["in.txt", *options]))


@pytest.mark.processes
def test_a_worker_that_always_dies_ends_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "import sys; print('fastgpt2 worker: out of luck', file=sys.stderr); sys.exit(7)"
    monkeypatch.setattr(up, "COMMAND", (sys.executable, "-c", code))
    monkeypatch.setattr(pool, "MAX_BACK_OFF_SECONDS", 0.01)
    monkeypatch.setattr(own_pool, "set_up_logging", lambda *_: None)
    run = OwnPool(values_of("--model", "demo", "--workers", "1"))
    with pytest.raises(FastGPT2Error, match="worker 1 ended with status 7, 6 times in a row; giving up"), run:
        pytest.fail("no worker was ready")
    assert "fastgpt2 worker: out of luck" in capsys.readouterr().err


class TestWhichPool:
    def test_a_model_starts_one_and_its_options_reach_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FASTGPT2_REDIS_URL", NOWHERE)
        monkeypatch.setenv("FASTGPT2_THREADS", "1")
        run = pool_of_run(values_of("--model", "demo", "--weights", "int8", "--kv-memory", "1MB", "--in-flight", "1"))
        assert isinstance(run, OwnPool)
        assert run._values["weights"] == "int8"
        assert (run._values["kv_memory"], run._values["log_level"]) == (10**6, "WARNING")
        assert run._values["workers"] == 1, "no more than jobs at once"

    @pytest.mark.parametrize(
        ("machine", "options", "count"),
        [
            ("x86_64", [], usable_cores()),
            ("x86_64", ["--threads", "512"], 1),
            # There a worker has one core, whatever was asked for.
            ("aarch64", ["--threads", "512"], usable_cores()),
        ],
    )
    def test_workers_take_all_cores(
        self, monkeypatch: pytest.MonkeyPatch, machine: str, options: list[str], count: int
    ) -> None:
        monkeypatch.setattr(sys, "platform", "linux")
        monkeypatch.setattr(platform, "machine", lambda: machine)
        run = pool_of_run(values_of("--model", "demo", *options))
        assert isinstance(run, OwnPool)
        assert run._values["workers"] == count

    def test_settings_of_a_shell_change_nothing_for_a_running_pool(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("MODEL", "WORKERS", "THREADS", "LOG_LEVEL"):
            monkeypatch.setenv(f"FASTGPT2_{name}", {"MODEL": "demo", "LOG_LEVEL": "info"}.get(name, "2"))
        monkeypatch.setenv("FASTGPT2_REDIS_URL", NOWHERE)
        run = pool_of_run(values_of())
        assert isinstance(run, RunningPool)
        assert run.redis_url == NOWHERE

    def test_a_variable_of_its_own_starts_one_unless_a_redis_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FASTGPT2_BATCH_MODEL", "demo")
        assert isinstance(pool_of_run(values_of()), OwnPool)
        assert isinstance(pool_of_run(values_of("--redis-url", NOWHERE)), RunningPool)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--model", "demo", "--redis-url", NOWHERE], "names a Redis whose workers run already; give only one of"),
            (
                ["--workers", "2", "--drafts", "off"],
                "--workers, --drafts: this is for workers that the run starts itself",
            ),
            (
                ["--served-model-name", "a,b"],
                "without --model, --served-model-name is the model for lines that name none",
            ),
            (["--log-level", "info"], "--log-level: this is for workers that the run starts itself; give --model ID"),
            (["--model", "demo", "--durability", "replica"], "the Redis that --model starts has no replica"),
        ],
    )
    def test_what_does_not_go_together_is_told_before_anything_is_touched(
        self, options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        monkeypatch.chdir(tmp_path)
        Path("in.txt").write_text("My name is\n")
        Path("out.jsonl").write_text("precious\n")
        assert cli.main(["batch", "in.txt", "-o", "out.jsonl", "--restart", *options]) == 2
        assert message in capsys.readouterr().err
        assert Path("out.jsonl").read_text() == "precious\n"

    def test_a_redis_that_is_missing_is_told_with_the_way_out(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        (tmp_path / "in.txt").write_text("My name is\n")
        assert cli.main(["batch", str(tmp_path / "in.txt"), "--redis-url", NOWHERE]) == 4
        assert "`fastgpt2 up` starts a Redis with workers, and --model ID starts both" in capsys.readouterr().err


class TestPrivateRedis:
    @pytest.mark.processes
    def test_it_listens_on_a_socket_and_on_no_port(self) -> None:
        with RedisServer(is_private=True) as server:
            connection = connect(server.url)
            assert connection.info("server")["tcp_port"] == 0
            assert server.socket is not None
            assert server.socket.stat().st_mode & 0o077 == 0
            assert server.folder.stat().st_mode & 0o077 == 0
            connection.close()

    @pytest.mark.parametrize("name", ["a b?c#d%e", "x" * 90])
    def test_whatever_the_temporary_folder_is_called(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        with tempfile.TemporaryDirectory(dir="/tmp", prefix="own-") as parent:
            folder = Path(parent) / name
            folder.mkdir()
            monkeypatch.setattr(tempfile, "tempdir", str(folder))
            server = RedisServer(is_private=True)
            assert server.socket is not None
            assert len(os.fsencode(server.socket)) < 103
            kwargs = connect(server.url).connection_pool.connection_kwargs
            assert kwargs["path"] == str(server.socket)
            server.stop()


class TestOutput:
    """Of workers: what is shown of it, and what is not."""

    def test_lines_of_all_workers_come_once_and_reasons_when_they_are_asked_for(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        output = WorkerOutput(shows_jobs=False)
        lines = [
            "2026-11-29 23:31:12,084 WARNING demo: num_beams is not applied",
            "2026-11-29 23:31:12,112 WARNING demo: num_beams is not applied",
            "2026-11-29 23:31:13,000 WARNING vm.worker-1.ab: job 77 failed: prompt tokens 600 and",
            "fastgpt2 worker: no such model",
            "Traceback (most recent call last):",
            "Traceback (most recent call last):",
        ]
        os.write(output.writer, ("\n".join(lines) + "\n").encode())
        output.settle()
        assert output.reason == "no such model"
        assert capsys.readouterr().err.splitlines() == [lines[0], lines[4], lines[5]]
        output.show_reasons()
        output.show_reasons()
        assert capsys.readouterr().err.splitlines() == [lines[3]]
        output.close()

    def test_events_are_treated_alike(self, capsys: pytest.CaptureFixture[str]) -> None:
        output = WorkerOutput(shows_jobs=False)
        told = (
            ("WARNING", "demo: num_beams is not applied"),
            ("WARNING", "demo: num_beams is not applied"),
            ("WARNING", "vm.worker-1.ab: job 77 of request r-1 failed: prompt tokens 600 and"),
            ("ERROR", "fastgpt2 worker: no such model"),
            ("INFO", "\U0001f600" * 30_000),
        )
        lines = [make_event(level, "fastgpt2", text, 1e9 + at, {"pid": at}) for at, (level, text) in enumerate(told)]
        os.write(output.writer, ("\n".join(lines) + "\n").encode())
        output.settle()
        assert output.reason == "no such model"
        assert capsys.readouterr().err.splitlines() == [lines[0], lines[4]]
        output.show_reasons()
        assert capsys.readouterr().err.splitlines() == [lines[3]]
        output.close()

    def test_a_bar_makes_way(self, capsys: pytest.CaptureFixture[str]) -> None:
        from tqdm import tqdm

        with tqdm(total=3, file=sys.stderr, ascii=True, ncols=40) as bar:
            bar.update()
            show_beside_bar("worker 1 has ended")
        shown = capsys.readouterr().err
        assert any(part.strip() == "worker 1 has ended" for part in shown.replace("\n", "\r").split("\r"))
