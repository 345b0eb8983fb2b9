"""The processes of one network: real helpers, killed, stopped, interrupted and forked."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from support.machines import needs_helpers
from support.running import GOLDEN, wait_until

from fastgpt2 import Engine
from fastgpt2.engine.loading import load_network
from fastgpt2.engine.model.config import read_config
from fastgpt2.engine.network.gpt2 import GPT2
from fastgpt2.engine.network.step import Segment, Step, most_numbers

FOLDER = GOLDEN / "checkpoints" / "odd_heads"

pytestmark = [pytest.mark.processes, needs_helpers]


@pytest.fixture
def network(_count_only_ours: None) -> Iterator[GPT2]:
    made = load_network(FOLDER, read_config(FOLDER), "m", n_slots=2, size=3, blas="openblas")
    assert made.wait_until_ready()
    yield made
    made.close()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def helpers() -> list[int]:
    """Return the ids of this process's helpers, without those of networks that other tests still hold."""
    pids = [pid for pid in children(os.getpid()) if b"fastgpt2.engine.network.helpers" in command_line(pid)]
    return [pid for pid in pids if pid not in _others]


_others: set[int] = set()


@pytest.fixture(autouse=True)
def _count_only_ours() -> None:
    gc.collect()
    _others.clear()
    _others.update(helpers())


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def sleeping(pid: int) -> bool:
    """Tell whether a process waits in the kernel, by what /proc says."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


@contextmanager
def signal_later(pid: int, signum: int) -> Iterator[None]:
    """Send a signal 0.3 s from now, by another process: this one is in the midst of a step by then."""
    code = f"import os, time; time.sleep(0.3); os.kill({pid}, {int(signum)})"
    sender = subprocess.Popen([sys.executable, "-c", code])
    yield
    assert sender.wait(10) == 0


def right(network: GPT2) -> bool:
    golden = np.load(FOLDER / "golden.npz")
    ids = golden["input_ids"].tolist()
    network.cache.lengths[0] = 0
    got: NDArray[np.float32] = network.forward([Segment(0, ids, len(ids))])
    return bool(np.abs(got - golden["logits"]).max() / np.abs(golden["logits"]).max() < 1e-4)


def test_a_step_survives_its_description() -> None:
    step = Step([Segment(3, [5, 6, 7], 0), Segment(0, [9])], [12, 0])
    numbers = step.to_numbers()
    assert Step.from_numbers(numbers) == step
    assert len(numbers) == most_numbers(4, 2)
    assert step.rows == 4
    assert step.rows_with_logits() == [3]


def test_all_take_part(network: GPT2) -> None:
    assert len(helpers()) == 2
    before = [cpu_ticks(pid) for pid in helpers()]
    wait_until(
        lambda: right(network) and all(cpu_ticks(p) > b for p, b in zip(helpers(), before, strict=True)), "work done"
    )


def test_helpers_sleep_when_there_is_nothing_to_do(network: GPT2) -> None:
    assert right(network)
    wait_until(lambda: all(sleeping(pid) for pid in helpers()), "the helpers to sleep")
    before = [cpu_ticks(pid) for pid in helpers()]
    time.sleep(0.5)  # nothing must happen in this time
    assert sum(cpu_ticks(pid) for pid in helpers()) - sum(before) <= 2
    assert right(network)


def test_a_killed_helper_costs_nothing_but_time(network: GPT2, caplog: pytest.LogCaptureFixture) -> None:
    assert right(network)
    os.kill(helpers()[0], signal.SIGKILL)
    assert right(network)
    assert "a helper process of the engine has ended (by signal 9); going on in one process" in caplog.text
    # Others are started, and join.
    assert right(network)
    assert network.wait_until_ready()
    assert len(helpers()) == 2
    assert right(network)


def test_a_helper_killed_in_the_midst_of_a_step(network: GPT2) -> None:
    """The helper is stopped first, so that the step begins and hangs; only then it is killed."""
    victim = helpers()[1]
    os.kill(victim, signal.SIGSTOP)
    with signal_later(victim, signal.SIGKILL):
        assert right(network)


def test_a_stopped_helper_is_waited_for(network: GPT2) -> None:
    victim = helpers()[1]
    os.kill(victim, signal.SIGSTOP)
    with signal_later(victim, signal.SIGCONT):
        assert right(network)
    assert victim in helpers()


def test_an_interrupted_step_leaves_a_network_that_works(network: GPT2) -> None:
    """Ctrl-C comes while stopped helpers keep the step from ending."""
    for pid in helpers():
        os.kill(pid, signal.SIGSTOP)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with signal_later(os.getpid(), signal.SIGINT), pytest.raises(KeyboardInterrupt):
            network.forward([Segment(0, [1, 2, 3])])
    finally:
        signal.signal(signal.SIGINT, before)
    assert right(network)


def test_they_end_with_the_network(network: GPT2) -> None:
    pids = helpers()
    network.close()
    assert not helpers()
    assert not any(command_line(pid) for pid in pids)
    assert right(network)


def test_they_end_when_nobody_has_the_network_any_more() -> None:
    made = load_network(FOLDER, read_config(FOLDER), "m", n_slots=1, size=2, blas="openblas")
    assert made.wait_until_ready()
    assert len(helpers()) == 1
    del made
    gc.collect()
    assert not helpers()


OWNER = """
import sys
from fastgpt2 import Engine
engine = Engine.load("demo", threads=2)
engine.warm_up()
print("ready", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_they_end_with_their_process_however_it_ends(signum: int) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "ready\n"
    (helper,) = children(owner.pid)
    owner.send_signal(signum)
    owner.communicate(timeout=10)
    wait_until(lambda: not command_line(helper), "the helper to end")


FORKED = """
import os, sys
from fastgpt2 import Engine
engine = Engine.load("demo", threads=2)
engine.warm_up()
expected = engine.generate("Once upon a time").text
pid = os.fork()
texts = [engine.generate("Once upon a time").text for _ in range(20)]
engine.warm_up()
texts += [engine.generate("Once upon a time").text for _ in range(20)]
assert set(texts) == {expected}, texts
if pid == 0:
    print("child done", flush=True)
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
print("parent done", flush=True)
"""


def test_a_forked_copy_and_its_original_generate_side_by_side() -> None:
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["child done", "parent done"]


SPAWNED = """
import multiprocessing
from fastgpt2 import Engine

def text(threads):
    return Engine.load("demo", threads=threads).generate("Once upon a time").text

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        texts = pool.map(text, [1, 2, 3])
    assert set(texts) == {text(1)}, texts
"""


def test_it_works_under_spawn(tmp_path: Path) -> None:
    script = tmp_path / "spawned.py"
    script.write_text(SPAWNED)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_engine_gives_the_same_whatever_the_number_of_processes() -> None:
    prompts = ["Once upon a time", "The", "", "It was the best of times, it was the worst of times"]
    texts = []
    for threads in (1, 2):
        engine = Engine.load("demo", threads=threads, max_batch=3)
        engine.warm_up()
        assert engine.decoder.model.ready
        texts.append([result.token_ids for result in engine.generate(prompts, max_new_tokens=40)])
    assert texts[0] == texts[1]


def test_a_helper_whose_parent_has_gone_at_once_says_nothing() -> None:
    order = {
        "config": dataclasses.asdict(read_config(FOLDER)),
        "shape": {"n_slots": 1, "max_rows": 1, "size": 2},
        "sets": [{"weights": "/proc/0/fd/3", "product": "openblas", "exact_chunks": False, "compiled": False}],
        "state": "/proc/0/fd/4",
        "parent": os.getpid(),
        "rank": 1,
        "code": {},
    }
    command = [sys.executable, "-m", "fastgpt2.engine.network.helpers"]
    done = subprocess.run(command, input=f"{json.dumps(order)}\n\0", capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, ""), "its standard input ends with its parent"
