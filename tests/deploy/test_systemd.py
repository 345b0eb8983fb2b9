"""The units of deploy/systemd: by systemd's own checkers, and held to the settings that there are."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from support.compose import ROOT
from support.programs import find_program

from fastgpt2 import settings
from fastgpt2.api.http.serve import SHUTDOWN_SECONDS
from fastgpt2.cli import COMMANDS
from fastgpt2.errors import BadRequest, ModelError
from fastgpt2.setting import Setting

FOLDER = ROOT / "deploy" / "systemd"
UNITS = sorted(path.name for path in FOLDER.glob("*.service"))
VARIABLES = re.compile(r"^#?(FASTGPT2_\w+)=(.*)$", re.MULTILINE)


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units in a folder of the test's own, with a program that is here in place of the installed one."""
    program = tmp_path / "fastgpt2"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    for name in UNITS:
        text = (FOLDER / name).read_text("utf-8").replace("/opt/fastgpt2/bin/fastgpt2", str(program))
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.processes
def test_systemd_finds_nothing_wrong(units: Path) -> None:
    paths = [str(units / name.replace("@.", "@gpt2.")) for name in UNITS]
    done = subprocess.run(
        [find_program("systemd-analyze"), "verify", "--man=no", *paths], capture_output=True, text=True, timeout=60
    )
    # What is misspelt is a warning, and the exit status is 0.
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.processes
@pytest.mark.parametrize("name", UNITS)
def test_a_unit_has_few_rights(units: Path, name: str) -> None:
    """systemd counts from 0.0, for no right at all, to 10.0; a service without any of the options has 9.6."""
    command = [find_program("systemd-analyze"), "security", "--offline=true", "--threshold=20", str(units / name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


@pytest.mark.processes
def test_systemd_makes_the_user() -> None:
    command = [find_program("systemd-sysusers"), "--dry-run", str(FOLDER / "fastgpt2.sysusers")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "User=fastgpt2" in (FOLDER / UNITS[0]).read_text("utf-8")


def options(name: str) -> dict[str, list[str]]:
    """Return the options of a unit's service; systemd lets an option stand several times."""
    found: dict[str, list[str]] = {}
    for line in (FOLDER / name).read_text("utf-8").partition("[Service]\n")[2].partition("\n[")[0].splitlines():
        if line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def test_variables_are_settings_of_the_commands_that_units_run() -> None:
    readers = {"fastgpt2.env": {"pool", "api", "pack"}, "pool.env": {"pool"}, "api.env": {"api"}}
    known = {setting.variable: setting for setting in vars(settings).values() if isinstance(setting, Setting)}
    for file, commands in readers.items():
        proposed = VARIABLES.findall((FOLDER / file).read_text("utf-8"))
        assert proposed
        for variable, value in proposed:
            setting = known[variable]
            takes = {taken.variable for command in commands for taken in COMMANDS[command].settings}
            assert variable in takes, (file, variable)
            if value:
                setting.parse(value)
    for name in UNITS:
        for file in options(name)["EnvironmentFile"]:
            assert (FOLDER / Path(file).name.replace("-%i", "")).exists()


def test_a_unit_that_is_told_to_stop_has_time_to_and_what_cannot_work_is_not_tried_again() -> None:
    worker, api = options("fastgpt2-pool@.service"), options("fastgpt2-api.service")
    assert int(worker["TimeoutStopSec"][0]) >= settings.DRAIN_TIMEOUT.resolve(None) + 15
    assert int(api["TimeoutStopSec"][0]) >= SHUTDOWN_SECONDS + 5
    never = [str(error.exit_code) for error in (BadRequest, ModelError)]
    assert worker["RestartPreventExitStatus"] == [" ".join(never)]
    assert api["RestartPreventExitStatus"] == never[:1]


def test_the_two_units_have_the_same_rights() -> None:
    marks = [(FOLDER / name).read_text("utf-8").partition("UMask=")[2].partition("\n[Install]")[0] for name in UNITS]
    assert marks[0] == marks[1]
