"""What a test needs of the machine."""

from __future__ import annotations

import pytest

from fastgpt2.engine.machine import can_share_steps

# Elsewhere the engine gives one process to whoever asks for two.
needs_helpers = pytest.mark.skipif(not can_share_steps(), reason="processes share a model on x86 Linux only")

# A parameter of a fixture that loads an engine with two processes.
TWO_PROCESSES = pytest.param("two processes", marks=[pytest.mark.processes, needs_helpers])
