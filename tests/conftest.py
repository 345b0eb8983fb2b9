"""What the tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastgpt2 import Engine

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def engine() -> Engine:
    """The shipped model. Four slots, so that batches are mixed."""
    return Engine.load("demo", max_batch=4)
