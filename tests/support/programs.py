"""Programs that no Python package brings: where they are, and what a test does without them."""

from __future__ import annotations

import os
import shutil

import pytest

# Debian's package of each.
PACKAGES = {
    "promtool": "prometheus",
    "prometheus": "prometheus",
    "redis-cli": "redis-tools",
    "systemd-analyze": "systemd",
    "systemd-sysusers": "systemd",
}


def find_program(name: str) -> str:
    """Return where a program is. Skips the test where it is not; fails it in continuous integration, which has to."""
    found = shutil.which(name)
    if found is None:
        reason = f"no {name} on PATH: apt-get install {PACKAGES[name]}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return found
