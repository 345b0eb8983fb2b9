"""What was measured on a machine is kept with its spread and its date, and is not believed for ever."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from fastgpt2.engine import figure
from fastgpt2.engine.figure import Figure
from fastgpt2.engine.machine import MEASUREMENTS_FILE, MEASUREMENTS_LOCK, Measurements, locked

CALM, BUSY = 0.04, 1.5


def never() -> Figure:
    raise AssertionError("measured again")


def finds(value: int, spread: float = CALM) -> Callable[[], Figure]:
    return lambda: Figure(value, spread, 5)


def ago(**parts: float) -> str:
    return (datetime.now(UTC) - timedelta(**parts)).isoformat()


def write(folder: Path, **figures: Any) -> None:
    (folder / MEASUREMENTS_FILE).write_text(json.dumps({"a": figures}))


def read(folder: Path) -> Any:
    return json.loads((folder / MEASUREMENTS_FILE).read_text())["a"]


def stored(value: int, spread: float | None, date: str, **more: Any) -> dict[str, Any]:
    return {"value": value, "spread": spread, "looks": 5, "date": date, **more}


def test_a_figure_is_kept_with_its_spread_its_looks_and_its_date(tmp_path: Path) -> None:
    assert Measurements(tmp_path, "a").find_or_measure("x", finds(64)) == 64
    kept = read(tmp_path)["x"]
    assert (kept["value"], kept["spread"], kept["looks"]) == (64, CALM, 5)
    assert abs(datetime.now(UTC) - datetime.fromisoformat(kept["date"])) < timedelta(minutes=1)
    assert Measurements(tmp_path, "a").find_or_measure("x", never) == 64


def test_what_was_measured_is_kept_by_machine(tmp_path: Path) -> None:
    assert Measurements(tmp_path, "a").find_or_measure("x", finds(1)) == 1
    assert Measurements(tmp_path, "b").find_or_measure("x", finds(2)) == 2
    assert Measurements(tmp_path, "a").find_or_measure("x", never) == 1
    assert Measurements(tmp_path, "b").find_or_measure("x", never) == 2
    kept = json.loads((tmp_path / MEASUREMENTS_FILE).read_text())
    assert [kept[machine]["x"]["value"] for machine in "ab"] == [1, 2]
    assert {path.name for path in tmp_path.iterdir()} == {MEASUREMENTS_FILE, MEASUREMENTS_LOCK}


def test_a_folder_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    measurements = Measurements(tmp_path / "file" / "cache", "a")
    assert measurements.find_or_measure("x", finds(1)) == 1
    assert measurements.find_or_measure("x", finds(2)) == 1


@pytest.mark.parametrize(
    ("known", "is_believed"),
    [
        (stored(8, CALM, ago(days=29)), True),
        (stored(8, CALM, ago(days=31)), False),
        (stored(8, BUSY, ago(minutes=50)), True),
        (stored(8, BUSY, ago(minutes=70)), False),
        (stored(8, None, ago(days=29)), True),
        (stored(8, None, ago(days=31)), False),
        # Measured in vain lately, on a busy machine: not at every start.
        (stored(8, CALM, ago(days=31), tried=ago(minutes=50)), True),
        (stored(8, CALM, ago(days=31), tried=ago(days=31)), False),
        # The clock was wrong then, or is now.
        (stored(8, CALM, ago(days=-2)), False),
        # As versions before this one wrote it.
        (8, False),
    ],
)
def test_for_how_long_a_figure_is_believed(tmp_path: Path, known: Any, is_believed: bool) -> None:
    write(tmp_path, x=known)
    assert Measurements(tmp_path, "a").find("x") == 8, "it is a first guess all the same"
    assert Measurements(tmp_path, "a").find_or_measure("x", finds(32)) == (8 if is_believed else 32)
    assert Measurements(tmp_path, "a").find_or_measure("x", never) == (8 if is_believed else 32)


@pytest.mark.parametrize(
    ("known", "kept"),
    [
        (stored(8, CALM, ago(days=31)), 8),
        (stored(8, BUSY, ago(hours=2)), 32),
        # Nobody knows how an old version measured it. A look that is no better does not replace it.
        (8, 8),
    ],
)
def test_a_busy_machine_does_not_replace_what_a_calm_one_told(tmp_path: Path, known: Any, kept: int) -> None:
    write(tmp_path, x=known)
    assert Measurements(tmp_path, "a").find_or_measure("x", finds(32, BUSY)) == kept
    assert Measurements(tmp_path, "a").find_or_measure("x", never) == kept, "nor is it tried at every start"
    assert ("tried" in read(tmp_path)["x"]) == (kept == 8)


@pytest.mark.parametrize(
    "content",
    [
        True, 1.5, -1, 1 << 40, "8", None, [], {}, {"value": 8},
        stored(-8, CALM, ago()), stored(1 << 40, CALM, ago()), stored(True, CALM, ago()),
        stored(8, float("nan"), ago()), stored(8, float("inf"), ago()), stored(8, -1.0, ago()), stored(8, True, ago()),
        stored(8, CALM, ago(), looks=-1), stored(8, CALM, ago(), looks=[1]), stored(8, CALM, ago(), tried=3),
        stored(8, CALM, "yesterday"), stored(8, CALM, "2026-11-30" * 100), stored(8, CALM, "9999-99-99"),
        {"value": 8, "looks": 5, "spread": CALM}, {"value": 8, "looks": 5, "spread": CALM, "date": 1e300},
    ],
)  # fmt: skip
def test_what_is_no_figure_is_measured_anew(tmp_path: Path, content: Any) -> None:
    write(tmp_path, x=content, y=stored(3, CALM, ago()))
    measurements = Measurements(tmp_path, "a")
    assert measurements.find("x") is None
    assert measurements.find("y") == 3
    assert measurements.find_or_measure("x", finds(32)) == 32
    assert Measurements(tmp_path, "a").find("x") == 32


def test_figures_of_one_name_are_measured_together(tmp_path: Path) -> None:
    write(tmp_path, x=stored(1, CALM, ago()), y=stored(2, CALM, ago(days=31)))
    together = {"x": Figure(10, CALM), "y": Figure(20, CALM)}
    assert Measurements(tmp_path, "a").find_or_measure_all(["x", "y"], lambda: together) == {"x": 10, "y": 20}


def test_what_was_learnt_is_kept_beside_what_others_have_learnt_meanwhile(tmp_path: Path) -> None:
    one, other = Measurements(tmp_path, "a"), Measurements(tmp_path, "a")
    assert one.keep({"x": Figure(1, CALM), "y": Figure(1, CALM)})
    assert other.keep({"x": Figure(2, CALM)})
    assert one.keep({"z": Figure(3, CALM)})
    known = Measurements(tmp_path, "a")
    assert [known.find(name) for name in "xyz"] == [2, 1, 3]
    # What a busy machine taught does not replace what a calm one told.
    assert one.keep({"x": Figure(9, BUSY)})
    assert Measurements(tmp_path, "a").find("x") == 2


def test_nothing_is_kept_while_another_process_measures(tmp_path: Path) -> None:
    write(tmp_path, x=stored(1, BUSY, ago(days=1)))
    with locked(tmp_path / MEASUREMENTS_LOCK):
        measurements = Measurements(tmp_path, "a")
        assert not measurements.keep({"x": Figure(2, CALM)})
        assert measurements.find_or_measure("x", never) == 1, "what is doubtful is taken rather than waited for"
    assert measurements.keep({"x": Figure(2, CALM)})


def test_where_nothing_can_be_written_what_is_there_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of a worker in a container may be read-only, with the packed file of just that layout in it."""
    write(tmp_path, x=stored(8, BUSY, ago(days=99)))

    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("fastgpt2.engine.machine.locked", refuse)
    monkeypatch.setattr("fastgpt2.engine.machine.create_file", refuse)
    measurements = Measurements(tmp_path, "a")
    assert measurements.find_or_measure("x", never) == 8
    assert measurements.find_or_measure("y", finds(3)) == 3
    assert not measurements.keep({"x": Figure(9, CALM)})


def test_all_is_measured_again_when_that_is_asked_for(tmp_path: Path) -> None:
    write(tmp_path, x=stored(8, CALM, ago(seconds=5)), y=stored(3, CALM, ago(seconds=5)))
    with figure.measuring_again() as began:
        assert Measurements(tmp_path, "a").find_or_measure("x", finds(32)) == 32
        assert Measurements(tmp_path, "a").find_or_measure("x", never) == 32, "once"
    again = Measurements(tmp_path, "a")
    assert again.find_since(began) == {"x": 32}
    assert again.find_or_measure("y", never) == 3


def test_of_what_is_asked_for_a_busy_machine_replaces_what_is_not_known_to_be_better(tmp_path: Path) -> None:
    write(
        tmp_path,
        old=8,
        calm=stored(8, CALM, ago(days=9)),
        busy=stored(8, BUSY, ago(minutes=1)),
        then=stored(8, CALM, ago(days=-9)),
    )
    with figure.measuring_again() as began:
        for name, kept in {"old": 32, "calm": 8, "busy": 32, "then": 32}.items():
            assert Measurements(tmp_path, "a").find_or_measure(name, finds(32, BUSY)) == kept
            assert Measurements(tmp_path, "a").find_or_measure(name, never) == kept, "once"
    assert Measurements(tmp_path, "a").find_since(began).keys() == {"old", "calm", "busy", "then"}


def test_figures_that_belong_together_stay_or_go_together(tmp_path: Path) -> None:
    """Half of them from a busy machine, half from a calm one, they could not be compared."""
    write(tmp_path, x=stored(10, CALM, ago(days=31)), y=stored(20, BUSY, ago(days=31)))
    found = Measurements(tmp_path, "a").find_or_measure_all(
        ["x", "y"], lambda: {"x": Figure(40, BUSY), "y": Figure(80, CALM)}
    )
    assert found == {"x": 10, "y": 20}
    assert Measurements(tmp_path, "a").find("y") == 20


def test_the_file_does_not_grow_beyond_what_is_read(tmp_path: Path) -> None:
    machines = {f"machine {i}": {"x" * 1000: 1} for i in range(1045)}
    (tmp_path / MEASUREMENTS_FILE).write_text(json.dumps(machines))
    Measurements(tmp_path, "a").find_or_measure("x", finds(32))
    assert Measurements(tmp_path, "a").find("x") == 32
    assert (tmp_path / MEASUREMENTS_FILE).stat().st_size < 1 << 20


def test_a_measurement_may_ask_for_others(tmp_path: Path) -> None:
    measurements = Measurements(tmp_path, "a")

    def outer() -> Figure:
        return Figure(10 * measurements.find_or_measure("inner", finds(2)), CALM)

    assert measurements.find_or_measure("outer", outer) == 20
    assert Measurements(tmp_path, "a").find("inner") == 2


MEASURER = """
import logging, sys
from pathlib import Path
from fastgpt2.engine.figure import Figure
from fastgpt2.engine.machine import Measurements

logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")

def measure():
    print("measuring", flush=True)
    return Figure(int(sys.stdin.readline()))

print("found", Measurements(Path(sys.argv[1]), "a").find_or_measure("x", measure), flush=True)
"""


@pytest.mark.processes
def test_two_processes_that_start_together_do_not_measure_each_other(tmp_path: Path) -> None:
    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-u", "-c", MEASURER, str(tmp_path)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    first = start()
    assert first.stdout is not None
    assert first.stdout.readline() == "measuring\n"
    second = start()
    assert second.stdout is not None
    assert second.stdout.readline().startswith("another process measures this machine; waiting")
    # The second waits, and takes what the first finds: were it to measure, it would find 8.
    assert first.communicate("7\n", timeout=60)[0] == "found 7\n"
    assert second.communicate("8\n", timeout=60)[0] == "found 7\n"
    assert first.returncode == second.returncode == 0


@pytest.mark.processes
def test_whoever_dies_while_measuring_keeps_nobody_waiting(tmp_path: Path) -> None:
    command = [sys.executable, "-u", "-c", MEASURER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "measuring\n"
        first.kill()
    assert Measurements(tmp_path, "a").find_or_measure("x", finds(9)) == 9
