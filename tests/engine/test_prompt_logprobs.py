"""The log probabilities of a prompt's tokens are transformers', in whatever pieces and company it is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.models import with_end_of_text
from support.running import GOLDEN

from fastgpt2 import Engine, TokenLogprob
from fastgpt2.engine.decoding.records import GenerationRequest, GenerationResult
from fastgpt2.engine.decoding.sequence import Sequence
from fastgpt2.engine.model.hub import DEMO_FOLDER
from fastgpt2.engine.network.gpt2 import PREFILL_ROWS_BESIDE
from fastgpt2.errors import BadRequest, CheckpointError

golden: dict[str, Any] = json.loads((GOLDEN / "demo_prompt_scores.json").read_text("utf-8"))
SCORES: list[dict[str, Any]] = golden["scores"]
LONG = SCORES[-1]
continuations: list[dict[str, Any]] = json.loads((GOLDEN / "demo_continuations.json").read_text("utf-8"))[
    "continuations"
]


@pytest.fixture(
    scope="module", params=[1, pytest.param(2, marks=pytest.mark.processes)], ids=["one process", "two processes"]
)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    made = Engine.load("demo", max_batch=4, threads=request.param, drafts="off")
    made.warm_up()
    yield made
    made.decoder.model.close()


def admit(engine: Engine, prompt: str | list[int], max_new_tokens: int, **options: Any) -> Sequence:
    request = GenerationRequest(prompt, max_new_tokens, **options)  # type: ignore[arg-type]
    return engine.decoder.admit(engine.decoder.prepare(request))


def assert_scored_as(told: tuple[TokenLogprob, ...] | None, entry: dict[str, Any], n_top: int = 3) -> None:
    assert told is not None
    assert [one.token_id for one in told] == entry["prompt_ids"]
    assert told[0].logprob is None
    assert told[0].top == ()
    assert [one.logprob for one in told[1:]] == pytest.approx(entry["logprobs"], rel=0, abs=1e-4)
    for one, top in zip(told[1:], entry["top"], strict=True):
        assert [other.token_id for other in one.top] == [token_id for token_id, _ in top[:n_top]]
        assert [other.logprob for other in one.top] == pytest.approx([v for _, v in top[:n_top]], rel=0, abs=1e-4)


def values(told: tuple[TokenLogprob, ...] | None) -> list[float]:
    """Return the log probabilities of all tokens that have one: a prompt's first token has none."""
    assert told is not None
    return [one.logprob for one in told if one.logprob is not None]


def test_the_golden_file_belongs_to_the_shipped_model() -> None:
    weights = (DEMO_FOLDER / "model.safetensors").read_bytes()
    assert golden["model_sha256"] == hashlib.sha256(weights).hexdigest()
    assert len(LONG["prompt_ids"]) > PREFILL_ROWS_BESIDE
    assert any(not entry["prompt"].isascii() for entry in SCORES)


@pytest.mark.parametrize("max_new_tokens", [0, 1, 5])
def test_the_same_as_transformers(engine: Engine, max_new_tokens: int) -> None:
    prompts = [entry["prompt"] for entry in SCORES]
    options: Any = {"max_new_tokens": max_new_tokens, "ignore_eos": True}
    plain = engine.generate(prompts, **options)
    scored = engine.generate(prompts, **options, prompt_logprobs=3)
    for entry, without, result in zip(SCORES, plain, scored, strict=True):
        assert_scored_as(result.prompt_logprobs, entry)
        assert (result.token_ids, result.text) == (without.token_ids, without.text)
        assert len(result.token_ids) == max_new_tokens
        assert (result.finish_reason, result.logprobs, without.prompt_logprobs) == ("length", None, None)
        assert result.usage.prompt_tokens == len(entry["prompt_ids"])
    by_ids = engine.generate([entry["prompt_ids"] for entry in SCORES], **options, prompt_logprobs=3)
    assert [result.prompt_logprobs for result in by_ids] == [result.prompt_logprobs for result in scored]


def test_without_the_likeliest(engine: Engine) -> None:
    result = engine.generate(LONG["prompt"], max_new_tokens=0, prompt_logprobs=0)
    assert_scored_as(result.prompt_logprobs, LONG, n_top=0)


def test_what_follows_goes_on_where_the_prompt_ended(engine: Engine) -> None:
    """A text scored with its continuation has the numbers that generating the continuation gave."""
    entry = continuations[5]
    told = engine.generate(entry["prompt"], max_new_tokens=90, ignore_eos=True, logprobs=2, prompt_logprobs=2)
    whole = engine.generate([*entry["prompt_ids"], *told.token_ids], max_new_tokens=0, prompt_logprobs=2)
    assert told.prompt_logprobs is not None
    assert told.logprobs is not None
    assert values(whole.prompt_logprobs) == pytest.approx(
        [*values(told.prompt_logprobs), *values(told.logprobs)], rel=0, abs=1e-4
    )


@pytest.mark.thorough
@pytest.mark.parametrize("company", [1, 3])
@pytest.mark.parametrize("prompt_tokens", [63, 64, 65, 66, 128, 129])
def test_chunks_and_company_change_nothing(engine: Engine, prompt_tokens: int, company: int) -> None:
    """A prompt read a few rows a step, beside others that decode, scores as one that is read alone.

    On exact machines it has the same bits.
    """
    decoder = engine.decoder
    ids = (LONG["prompt_ids"] * 2)[:prompt_tokens]
    alone = engine.generate(ids, max_new_tokens=3, ignore_eos=True, prompt_logprobs=3)
    for at in range(company):
        admit(engine, continuations[1 + at]["prompt"], 40, ignore_eos=True)
    decoder.step()
    others = list(decoder.running)
    scored = admit(engine, ids, 3, ignore_eos=True, prompt_logprobs=3)
    while decoder.running:
        decoder.step()
    result = scored.result("demo")
    assert result.token_ids == alone.token_ids
    if decoder.model.exact:
        assert result.prompt_logprobs == alone.prompt_logprobs
    assert values(result.prompt_logprobs) == pytest.approx(values(alone.prompt_logprobs), rel=0, abs=1e-4)
    for at, other in enumerate(others):
        assert other.token_ids == continuations[1 + at]["ids"][:40]


def test_rows_with_logits_are_few_a_step(engine: Engine) -> None:
    """By hand: a step reads at most 64 rows of scored prompts, the shortest first, and other prompts beside them."""
    decoder = engine.decoder
    scored = [admit(engine, [7] * n, 1, prompt_logprobs=0) for n in (100, 40)]
    plain = admit(engine, [7] * 200, 1)
    left = []
    while decoder.running:
        decoder.step()
        left.append([len(sequence.pending) for sequence in (*scored, plain) if not sequence.token_ids])
    # All of the second and 24 of the first; of the third what is left of 256. Each ends with its first token.
    assert left[:3] == [[76, 8], [12], []]
    assert [len(sequence.prompt_logprobs) for sequence in scored] == [100, 40]


def test_a_prompt_that_fills_all_positions(engine: Engine) -> None:
    ids = (LONG["prompt_ids"] * 5)[: engine.config.n_positions]
    result = engine.generate(ids, max_new_tokens=0, prompt_logprobs=1)
    assert result.usage.total_tokens == engine.config.n_positions
    assert len(values(result.prompt_logprobs)) == engine.config.n_positions - 1
    shorter = engine.generate(ids[:-1], max_new_tokens=1, ignore_eos=True, prompt_logprobs=1, logprobs=1)
    assert values(result.prompt_logprobs)[:-1] == values(shorter.prompt_logprobs)
    # The last token was scored by the row from which the shorter prompt generates.
    assert result.prompt_logprobs is not None
    assert shorter.logprobs is not None
    assert result.prompt_logprobs[-1].top == shorter.logprobs[0].top
    assert engine.decoder.model.cache.free_slots == 4


@pytest.mark.parametrize("prompt", ["", []])
def test_an_empty_prompt_is_its_one_token(engine: Engine, prompt: Any) -> None:
    (result,) = engine.run([GenerationRequest(prompt, 0, prompt_logprobs=3, echo=True)])
    assert result.prompt_logprobs == (TokenLogprob(0, "<|endoftext|>", None, special=True),)
    assert (result.text, result.usage.prompt_tokens) == ("", 1)
    (result,) = engine.run([GenerationRequest(prompt, 2, prompt_logprobs=3)])
    assert result.prompt_logprobs == (TokenLogprob(0, "<|endoftext|>", None, special=True),)


def test_all_kinds_side_by_side(engine: Engine) -> None:
    requests = []
    for at, entry in enumerate(continuations[:12]):
        prompt = (tuple(entry["prompt_ids"]) * 30)[: 20 + 13 * at] if at % 3 else entry["prompt"]
        of_prompt, of_text = (None, 0, 2)[at % 3], (2, None)[at % 2]
        requests.append(GenerationRequest(prompt, (0, 14, 9, 1)[at % 4], prompt_logprobs=of_prompt, logprobs=of_text))

    def told(result: GenerationResult) -> tuple[Any, ...]:
        return result.text, result.token_ids, result.finish_reason, result.usage

    for request, result in zip(requests, engine.run(requests), strict=True):
        (alone,) = engine.run([request])
        assert told(result) == told(alone)
        assert (result.prompt_logprobs is None) == (request.prompt_logprobs is None)
        if result.prompt_logprobs is not None:
            assert values(result.prompt_logprobs) == pytest.approx(values(alone.prompt_logprobs), rel=0, abs=1e-4)


def test_one_that_is_dropped_within_its_prompt(engine: Engine) -> None:
    sequence = admit(engine, LONG["prompt"], 5, prompt_logprobs=3)
    engine.decoder.step()
    engine.decoder.finish(sequence)
    result = sequence.result("demo", "cancelled")
    assert result.prompt_logprobs is not None
    read = len(result.prompt_logprobs)
    assert read == 1 + PREFILL_ROWS_BESIDE
    begun = {**LONG, "prompt_ids": LONG["prompt_ids"][:read], "logprobs": LONG["logprobs"][: read - 1]}
    assert_scored_as(result.prompt_logprobs, {**begun, "top": LONG["top"][: read - 1]})


def test_values_that_are_not_finite(tmp_path: Any) -> None:
    folder = tmp_path / "model"
    with_end_of_text(tmp_path, [0])
    weights = load_file(folder / "model.safetensors")
    # Not in the first position, so that a prompt's first row is sound.
    weights["wpe.weight"][1] = np.float16("nan")
    save_file(weights, folder / "model.safetensors")
    engine = Engine.load(str(folder), max_batch=1)
    with pytest.raises(CheckpointError, match="not finite"):
        engine.generate("My name is", max_new_tokens=0, prompt_logprobs=0)
    assert engine.decoder.model.cache.free_slots == 1


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-1, "prompt_logprobs must be between 0 and 20, not -1"),
        (21, "prompt_logprobs must be between 0 and 20, not 21"),
        (True, "prompt_logprobs must be a whole number, not true"),
    ],
)
def test_bad_values_are_named(value: Any, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        GenerationRequest("a", prompt_logprobs=value)
