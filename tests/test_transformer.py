"""The network against transformers' logits, on tiny random checkpoints of every shape that GPT-2 files come in."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import GOLDEN
from numpy.typing import NDArray

from fastgpt2.engine.checkpoint import Checkpoint
from fastgpt2.engine.config import GPT2Config, read_config
from fastgpt2.engine.kv_cache import KVCache
from fastgpt2.engine.transformer import GPT2, Segment
from fastgpt2.engine.weights import read_weights

CASES = sorted(path.name for path in (GOLDEN / "checkpoints").iterdir())
# Swapping one gelu for another moves these logits by 8e-4, so that a looser bound could hide a bug.
TOLERANCE = 1e-4


def load(folder: Path) -> tuple[GPT2, GPT2Config]:
    config = read_config(folder / "config.json")
    return GPT2(config, read_weights(Checkpoint.open(folder), config)), config


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
def test_logits_equal_those_of_transformers(case: str) -> None:
    model, config = load(GOLDEN / "checkpoints" / case)
    ids, logits = golden(case)
    assert_close(model.forward([Segment(0, ids, len(ids))], KVCache(config, 1)), logits)


@pytest.mark.parametrize("cuts", [range(1, 20), (5, 6, 15), (1,), ()])
def test_logits_do_not_depend_on_how_a_prompt_is_cut(cuts: Sequence[int]) -> None:
    model, config = load(GOLDEN / "checkpoints" / "odd_heads")
    ids, logits = golden("odd_heads")
    cache, bounds = KVCache(config, 1), [0, *cuts, len(ids)]
    got = [model.forward([Segment(0, ids[a:b], b - a)], cache) for a, b in pairwise(bounds)]
    assert_close(np.concatenate(got), logits)


def test_sequences_side_by_side_do_not_disturb_each_other() -> None:
    model, config = load(GOLDEN / "checkpoints" / "inverse_layer_scale")
    ids, logits = golden("inverse_layer_scale")
    cache = KVCache(config, 3)
    # Slot 2 is ahead, slot 0 in the midst of its prompt, slot 1 begins; only some want logits.
    model.forward([Segment(2, ids[:10], 0), Segment(0, ids[:4], 0)], cache)
    out = model.forward([Segment(0, ids[4:9], 2), Segment(1, ids[:3], 0), Segment(2, ids[10:11])], cache)
    assert_close(out, logits[[7, 8, 10]])
    assert cache.lengths == [9, 3, 11]


def test_a_slot_that_is_used_again_has_forgotten() -> None:
    model, config = load(GOLDEN / "checkpoints" / "prefixed")
    ids, logits = golden("prefixed")
    cache = KVCache(config, 1)
    slot = cache.allot()
    model.forward([Segment(slot, list(reversed(ids)), 0)], cache)
    cache.release(slot)
    assert cache.allot() == slot
    assert_close(model.forward([Segment(slot, ids, len(ids))], cache), logits)


def test_slots_are_counted_and_given_back_once() -> None:
    cache = KVCache(GPT2Config(n_layer=1, n_embd=4, n_head=1, n_positions=8), 2)
    slots = {cache.allot(), cache.allot()}
    assert slots == {0, 1}
    assert cache.free_slots == 0
    cache.release(1)
    with pytest.raises(ValueError, match="free already"):
        cache.release(1)
    assert cache.allot() == 1
