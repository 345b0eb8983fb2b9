"""Log probabilities are those that transformers gives; what it does not give is worked out by hand."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

import numpy as np
import pytest
from support.running import GOLDEN

from fastgpt2 import Engine
from fastgpt2.engine.decoding.logprobs import likeliest, token_logprob
from fastgpt2.engine.model.hub import DEMO_FOLDER

golden: dict[str, Any] = json.loads((GOLDEN / "demo_scores.json").read_text("utf-8"))


def test_the_golden_file_belongs_to_the_shipped_model() -> None:
    weights = (DEMO_FOLDER / "model.safetensors").read_bytes()
    assert golden["model_sha256"] == hashlib.sha256(weights).hexdigest()
    assert len(golden["scores"]) == 6


def test_the_same_log_probabilities_as_transformers(engine: Engine) -> None:
    prompts = [entry["prompt"] for entry in golden["scores"]]
    results = engine.generate(prompts, max_new_tokens=20, ignore_eos=True, logprobs=5)
    for entry, result in zip(golden["scores"], results, strict=True):
        assert list(result.token_ids) == entry["ids"]
        assert result.logprobs is not None
        assert [one.token_id for one in result.logprobs] == entry["ids"]
        assert [one.logprob for one in result.logprobs] == pytest.approx(entry["logprobs"], rel=0, abs=1e-4)
        for one, top in zip(result.logprobs, entry["top"], strict=True):
            assert [other.token_id for other in one.top] == [token_id for token_id, _ in top]
            assert [other.logprob for other in one.top] == pytest.approx([value for _, value in top], rel=0, abs=1e-4)
            assert one.top[0] == type(one)(one.token_id, one.token, one.logprob), "greedily, the likeliest is chosen"
        assert "".join(one.token for one in result.logprobs) == result.text


def test_as_many_as_were_asked_for(engine: Engine) -> None:
    def tops(logprobs: int) -> list[int]:
        result = engine.generate("The", max_new_tokens=3, ignore_eos=True, logprobs=logprobs)
        assert result.logprobs is not None
        return [len(one.top) for one in result.logprobs]

    assert tops(0) == [0, 0, 0]
    assert tops(20) == [20, 20, 20]
    assert engine.generate("The", max_new_tokens=3).logprobs is None


def test_by_hand(engine: Engine) -> None:
    logits = np.log(np.array([2, 1, 4, 1], np.float32)) + np.float32(3)
    before = logits.copy()
    entry = token_logprob(engine.tokenizer, logits, 1, 4)
    assert entry.logprob == pytest.approx(np.log(1 / 8), abs=1e-6)
    assert [other.token_id for other in entry.top] == [2, 0, 1, 3]
    assert [math.exp(other.logprob or 0.0) for other in entry.top] == pytest.approx(
        [1 / 2, 1 / 4, 1 / 8, 1 / 8], abs=1e-6
    )
    assert np.array_equal(logits, before)


def test_logits_far_apart_do_not_overflow(engine: Engine) -> None:
    entry = token_logprob(engine.tokenizer, np.array([-2000, 2000], np.float32), 0, 1)
    assert (entry.logprob, entry.top[0].logprob) == (-4000, 0)


@pytest.mark.parametrize(
    ("values", "k", "expected"),
    [
        ([0, 5, 5, 1, 5], 2, [1, 2]),
        ([0, 5, 5, 1, 5], 4, [1, 2, 4, 3]),
        ([7, 7, 7], 1, [0]),
        ([1, 2], 20, [1, 0]),
        ([1, 2], 0, []),
    ],
)
def test_of_equals_the_lower_id_comes_first(values: list[float], k: int, expected: list[int]) -> None:
    assert likeliest(np.array(values, np.float64), k) == expected


def test_tokens_for_people_to_read(engine: Engine) -> None:
    tokenizer = engine.tokenizer
    assert tokenizer.token_text(0) == "<|endoftext|>"
    assert [tokenizer.token_text(i) for i in tokenizer.encode("My name")] == ["My", " name"]
    # A parrot is four bytes, for which this tokenizer has no single token.
    parts = [tokenizer.token_text(i) for i in tokenizer.encode("🦜")]
    assert len(parts) > 1
    assert "".join(part.removeprefix("bytes:") for part in parts) == r"\xf0\x9f\xa6\x9c"
    assert all(part.startswith("bytes:") for part in parts)
    assert tokenizer.token_text(1 << 30) == ""
