"""A short run in which masters are lost; `make chaos` does a long one."""

from __future__ import annotations

from pathlib import Path

import pytest

from chaos.failovers import run

pytestmark = pytest.mark.processes


def test_no_acknowledged_job_is_lost_with_its_master(tmp_path: Path) -> None:
    report = run(tmp_path, "replica", seed=45, kinds=["kill", "hang"], workers=2, callers=1)
    assert report.wrong == [], "".join(log.read_text("utf-8", "replace")[-6000:] for log in tmp_path.glob("*.log"))
    assert report.lost == report.told == 0
    assert report.ends == {"finished": report.acknowledged}
    assert report.acknowledged > 20
    assert report.counts["mapped prompts"] > 0
    assert report.counts["requests"] > 0
    assert len(report.failovers) == 2
    assert report.back["max"] < 90
