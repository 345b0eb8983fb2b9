"""A container's CPU quota is counted in whole cores, and a model runs on as many processes as this machine can."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from fastgpt2.engine import machine
from fastgpt2.engine.machine import processes_for
from fastgpt2.engine.model.config import read_config
from fastgpt2.engine.model.hub import DEMO_FOLDER


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "150000 100000\n"}, 1),
        ({"cpu.max": "50000 100000\n"}, 1),  # less than one core is one that has to wait, not all of them
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu.max": "nonsense\n"}, None),
        ({}, None),
    ],
    ids=range(8),
)
def test_whole_cores_of_a_quota(tmp_path: Path, files: dict[str, str], cores: int | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert machine._cpu_quota(tmp_path) == cores


DEMO = read_config(DEMO_FOLDER)


@pytest.fixture
def on_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")


@pytest.fixture
def on_x86(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")


@pytest.mark.usefixtures("on_arm")
def test_where_processes_cannot_share_a_model_one_runs_it_and_who_asked_for_more_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert [processes_for(DEMO, threads) for threads in (None, 1)] == [1, 1]
    assert caplog.messages == []
    assert processes_for(DEMO, 2) == 1
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        "threads is 2, but 1 process runs the model: several can share a model only on x86 Linux, and this is aarch64 "
        "Linux; more workers use more cores"
    )


@pytest.mark.usefixtures("on_x86")
def test_a_model_runs_on_no_more_processes_than_it_has_heads(caplog: pytest.LogCaptureFixture) -> None:
    heads = DEMO.n_head
    assert [processes_for(DEMO, threads) for threads in (None, 1, 2, heads)] == [1, 1, 2, heads]
    assert caplog.messages == []
    assert processes_for(DEMO, heads + 1) == heads
    assert caplog.messages == [
        f"threads is {heads + 1}, but {heads} processes run the model: each takes whole heads, of which the model has "
        f"{heads}; more workers use more cores"
    ]


@pytest.mark.processes
def test_who_generates_on_two_cores_of_an_arm_machine_is_told_once() -> None:
    code = "import platform; platform.machine = lambda: 'aarch64'; from fastgpt2.cli import run; run()"
    command = [
        sys.executable,
        "-c",
        code,
        "generate",
        "--model",
        "demo",
        "--threads",
        "2",
        "--max-new-tokens",
        "2",
        "I",
    ]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout[:1]) == (0, "I")
    assert done.stderr.count("\n") == 1
    assert "1 process runs the model" in done.stderr
