"""A short soak; `make chaos` runs a long one."""

from __future__ import annotations

from pathlib import Path

import pytest

from chaos.soak import run

pytestmark = pytest.mark.processes


def test_nothing_is_lost_and_nothing_happens_twice(tmp_path: Path) -> None:
    report = run(tmp_path, jobs=150, workers=4, seed=5, faults=12, every=1.0, lasting=False, limit=90.0)
    logs = "".join(log.read_text("utf-8", "replace")[-6000:] for log in tmp_path.glob("pool-*.log"))
    assert report.wrong == [], logs
    assert sum(report.ends.values()) == report.jobs >= 150
    assert report.ends["finished"] > 100
    assert report.faults, "something must have gone wrong"
