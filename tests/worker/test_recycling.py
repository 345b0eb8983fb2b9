"""A worker ends when it has done its share. Memory is that of a real process, which really grows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fastgpt2.worker.recycling import Recycling, private_memory

MIB = 1 << 20

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(
        private_memory() is None, reason="this system does not say how much memory of a process is its own"
    ),
]


def answers(code: str) -> list[str]:
    """Run code in a process of its own, which has `recycling`, started, with 64 MiB; return the lines it prints."""
    prelude = (
        "from fastgpt2.worker.recycling import Recycling, private_memory\n"
        "recycling = Recycling(None, 64 << 20)\n"
        "recycling.start()\n"
    )
    done = subprocess.run([sys.executable, "-c", prelude + code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(("done", "due"), [(0, False), (4, False), (5, True), (9, True)])
def test_jobs(done: int, due: bool) -> None:
    reason = Recycling(5, 1 << 40).due(done, 0, 0.0)
    assert reason == (f"it has taken {done} jobs, and --max-jobs is 5" if due else None)


def test_without_limits_there_is_no_end() -> None:
    recycling = Recycling(None, 1 << 40)
    recycling.start()
    assert recycling.due(10**9, 0, 0.0) is None


def test_growth() -> None:
    # Within the limit; past it; and with what grew being keys and values.
    code = """if True:
        held = bytearray(b"x" * (32 << 20))
        print(recycling.due(0, 0, 1.0))
        held += b"x" * (64 << 20)
        print(recycling.due(0, 96 << 20, 3.0))
        print(recycling.due(0, 0, 5.0))
    """
    within, keys_and_values, past = answers(code)
    assert within == keys_and_values == "None"
    grown = float(past.removeprefix("its own memory has grown by ").split()[0])
    assert 96 <= grown <= 110, past
    assert past.endswith(" MiB, keys and values apart, and --max-growth is 64.0 MiB")


def test_what_was_there_at_the_start_is_no_growth() -> None:
    code = """if True:
        held = bytearray(b"x" * (128 << 20))
        recycling.start()
        print(recycling.due(0, 0, 1.0))
    """
    assert answers(code) == ["None"]


def test_memory_is_looked_at_once_a_second_and_a_reason_stays() -> None:
    code = """if True:
        print(recycling.due(0, 0, 10.0))
        held = bytearray(b"x" * (128 << 20))
        print(recycling.due(0, 0, 10.9))
        print(recycling.due(0, 0, 11.1) is not None)
        del held
        print(recycling.due(0, 0, 13.0) is not None)
    """
    assert answers(code) == ["None", "None", "True", "True"]


def test_only_private_memory_counts(tmp_path: Path) -> None:
    """Neither a mapped file (the weights) counts, nor memory shared with helpers (keys and values)."""
    weights = tmp_path / "weights"
    weights.write_bytes(b"w" * (32 * MIB))
    code = f"""if True:
        import mmap, os
        before = private_memory()
        file = os.open({str(weights)!r}, os.O_RDONLY)
        weights = mmap.mmap(file, 0, prot=mmap.PROT_READ)
        pages = sum(weights[i] for i in range(0, len(weights), mmap.PAGESIZE))
        shared = os.memfd_create("shared")
        os.ftruncate(shared, 32 << 20)
        state = mmap.mmap(shared, 0)
        for i in range(0, len(state), mmap.PAGESIZE):
            state[i] = 1
        print(private_memory() - before)
        own = bytearray(b"x" * (32 << 20))
        print(private_memory() - before)
    """
    neither, own = map(int, answers(code))
    assert neither < 8 * MIB
    assert 32 * MIB <= own < 48 * MIB
