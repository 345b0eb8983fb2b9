"""The network gives transformers' logits, on tiny random checkpoints of every shape that GPT-2 files come in."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.running import GOLDEN

from fastgpt2.engine.kernels import mkl
from fastgpt2.engine.kernels.operations import Operations
from fastgpt2.engine.kernels.program import Call
from fastgpt2.engine.loading import load_network
from fastgpt2.engine.model.config import read_config
from fastgpt2.engine.network.gpt2 import GPT2
from fastgpt2.engine.network.step import Segment

CASES = sorted(path.name for path in (GOLDEN / "checkpoints").iterdir())
# Another gelu than the right one moves these logits by 8e-4, so a looser bound could hide a bug.
TOLERANCE = 1e-4


@pytest.fixture(params=["openblas", "mkl"])
def blas(request: pytest.FixtureRequest) -> str:
    """Return each BLAS; MKL only where it is installed, as the test extra asks for on x86-64."""
    if request.param == "mkl" and not mkl.is_installed():
        pytest.skip("MKL is not installed")
    return str(request.param)


def load(case: str, n_slots: int = 1, blas: str = "openblas", threads: int = 1) -> GPT2:
    folder = GOLDEN / "checkpoints" / case
    config = read_config(folder)
    return load_network(folder, config, case, n_slots=n_slots, size=threads, blas=blas)


def golden(case: str) -> tuple[list[int], NDArray[Any]]:
    stored = np.load(GOLDEN / "checkpoints" / case / "golden.npz")
    return stored["input_ids"].tolist(), stored["logits"]


def assert_close(ours: NDArray[Any], theirs: NDArray[Any]) -> None:
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() / np.abs(theirs).max() < TOLERANCE


def test_all_kinds_of_checkpoint_are_there() -> None:
    assert {"odd_heads", "untied", "float16", "bfloat16", "sharded", "masks_misaligned", "prefixed"} <= set(CASES)
    assert len(CASES) >= 20


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(case: str, blas: str) -> None:
    ids, logits = golden(case)
    assert_close(load(case, blas=blas).forward([Segment(0, ids, len(ids))]), logits)


@pytest.mark.parametrize("cuts", [range(1, 20), (5, 6, 15), (1,), ()])
def test_logits_do_not_depend_on_how_a_prompt_is_cut(cuts: Sequence[int], blas: str) -> None:
    model = load("odd_heads", blas=blas)
    ids, logits = golden("odd_heads")
    bounds = [0, *cuts, len(ids)]
    got = [model.forward([Segment(0, ids[a:b], b - a)]).copy() for a, b in pairwise(bounds)]
    assert_close(np.concatenate(got), logits)


@pytest.mark.processes
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_sequences_side_by_side_do_not_disturb_each_other(threads: int, blas: str) -> None:
    """Slot 2 is ahead, slot 0 is in the midst of its prompt, slot 1 begins; only some rows want logits."""
    model = load("inverse_layer_scale", 3, blas, threads)
    assert model.wait_until_ready()
    ids, logits = golden("inverse_layer_scale")
    model.forward([Segment(2, ids[:10], 0), Segment(0, ids[:4], 0)])
    out = model.forward([Segment(0, ids[4:9], 2), Segment(1, ids[:3], 0), Segment(2, ids[10:11])])
    assert_close(out, logits[[7, 8, 10]])
    assert model.cache.lengths == [9, 3, 11]


def test_a_slot_that_is_used_again_has_forgotten() -> None:
    model = load("prefixed")
    ids, logits = golden("prefixed")
    slot = model.cache.allot()
    model.forward([Segment(slot, list(reversed(ids)), 0)])
    model.cache.release(slot)
    assert model.cache.allot() == slot
    assert_close(model.forward([Segment(slot, ids, len(ids))]), logits)


def test_slots_are_counted_and_given_back_once() -> None:
    cache = load("prefixed", 2).cache
    assert [cache.allot(), cache.allot()] == [0, 1]
    assert cache.free_slots == 0
    with pytest.raises(IndexError, match="no slot is free"):
        cache.allot()
    cache.release(1)
    with pytest.raises(ValueError, match="free already"):
        cache.release(1)
    assert cache.allot() == 1


def test_a_step_of_too_many_tokens_is_refused() -> None:
    model = load("prefixed")
    with pytest.raises(ValueError, match="257 tokens in a step; this network takes 256"):
        model.forward([Segment(0, [1] * 257)])


def test_behind_the_last_attention_only_rows_are_computed_that_logits_are_wanted_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows_of_products = list[int]()
    linear = Operations.linear

    def counted(operations: Operations, x: Any, share: Any, out: Any, rows: Any, then: Any = None) -> Call:
        call = linear(operations, x, share, out, rows, then)

        def count() -> None:
            rows_of_products.append(int(rows[0]))
            call()

        return count

    monkeypatch.setattr(Operations, "linear", counted)
    ids, logits = golden("odd_heads")
    network = load("odd_heads", n_slots=3)
    # Of each layer four products, and the one that makes logits.
    products = 4 * network.config.n_layer + 1
    whole, n = network.forward([Segment(0, ids, len(ids))]).copy(), len(ids)
    assert rows_of_products == [n] * products

    rows_of_products.clear()
    last = network.forward([Segment(1, ids, 1)])
    assert rows_of_products == [n] * (products - 4) + [1] * 4
    assert_close(last, logits[-1:])
    assert_close(last, whole[-1:])

    rows_of_products.clear()
    network.forward([Segment(2, ids[:-1], 0)])
    assert rows_of_products == [n - 1] * (products - 4), "in the midst of a prompt"
    assert_close(network.forward([Segment(2, ids[-1:])]), logits[-1:])
