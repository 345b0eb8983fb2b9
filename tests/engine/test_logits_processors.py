"""Logits processors do to scores what transformers' own do, and what is pushed can be taken back.

tests/golden/make_processors.py asked transformers.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.processed import Case, cases, golden
from support.running import GOLDEN

from fastgpt2 import Engine
from fastgpt2.engine.decoding.chooser import Chooser, new_chooser
from fastgpt2.engine.decoding.logits_processors import LogitsProcessors
from fastgpt2.engine.decoding.records import GenerationRequest
from fastgpt2.engine.decoding.sampler import Scratch
from fastgpt2.engine.model.generation_config import GenerationConfig
from fastgpt2.engine.model.hub import DEMO_FOLDER
from fastgpt2.errors import BadRequest

VOCAB_SIZE = 12
PENALISED = [case for case in cases if not case.draws]
NEW_TOKENS = 24

# ------------------------------------------------------------------------------------- as transformers has it


@pytest.mark.parametrize("case", PENALISED, ids=lambda case: case.name)
def test_scores_are_those_of_transformers(case: Case) -> None:
    scores = case.processed()
    left = np.flatnonzero(np.isfinite(scores))
    if case.left is None:
        assert np.array_equal(left, case.ids)
    else:
        assert (len(left), hashlib.sha256(left.astype("<i4").tobytes()).hexdigest()) == case.left
    assert np.allclose(scores[case.ids], case.scores, rtol=1e-6, atol=1e-6)


def test_the_cases_change_scores_in_many_ways() -> None:
    """None of the options is without effect in all cases."""
    changed = set[str]()
    for case in PENALISED:
        if case.left is None and len(case.options) == 1:
            plain = case.row[case.ids]
            if len(case.ids) < len(case.row) or not np.array_equal(plain, case.scores):
                changed |= case.options.keys()
    assert changed == {
        "repetition_penalty", "no_repeat_ngram_size", "bad_words", "suppress_tokens", "logit_bias", "min_new_tokens",
    }  # fmt: skip


@pytest.fixture(scope="module", params=["demo", "openai-gpt2"])
def engine(request: pytest.FixtureRequest) -> Engine:
    model = request.param if request.param == "demo" else GOLDEN / "zoo" / request.param
    return Engine.load(model, max_batch=4, threads=1, prefix_memory=0, drafts="off")


@pytest.mark.parametrize("kind", sorted({text["kind"] for text in golden["texts"]}))
def test_greedy_texts_are_those_of_transformers(engine: Engine, kind: str) -> None:
    """Whole texts, of two models: by the options of `generate`."""
    name = "demo" if engine.model == "demo" else "openai-gpt2"
    by_ends: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    for text in golden["texts"]:
        if (text["model"], text["kind"]) == (name, kind):
            by_ends.setdefault(tuple(text["options"].get("ends", ())), []).append(text)
    for ends, texts in by_ends.items():
        engine.decoder.generation = GenerationConfig(0, ends)
        results = engine.run([request_of(text) for text in texts])
        for text, result in zip(texts, results, strict=True):
            assert list(result.token_ids) == text["new"], text["prompt"]


def request_of(text: dict[str, Any]) -> GenerationRequest:
    options = {key: value for key, value in text["options"].items() if key != "ends"}
    return GenerationRequest(tuple(text["ids"]), max_new_tokens=NEW_TOKENS, **options)


def test_the_texts_are_of_the_shipped_model() -> None:
    digest = hashlib.sha256((DEMO_FOLDER / "model.safetensors").read_bytes()).hexdigest()
    assert digest == golden["model_sha256"]
    for model, least in (("demo", 10), ("openai-gpt2", 4)):
        kinds = [text["kind"] for text in golden["texts"] if text["model"] == model]
        assert min(kinds.count(kind) for kind in kinds) >= least


# ------------------------------------------------------------------------------------------ push and pop


PENALTIES = {
    "repetition_penalty": st.sampled_from((0.5, 1.3)),
    "no_repeat_ngram_size": st.integers(1, 4),
    "presence_penalty": st.sampled_from((-1.0, 0.7)),
    "frequency_penalty": st.sampled_from((-0.5, 0.3)),
    "logit_bias": st.just({3: 2.0}),
    "suppress_tokens": st.just((1,)),
}
WORDS = [(0,), (1, 2), (2, 1), (3, 3, 3), (0, 1, 2, 3)]


def apply(processors: LogitsProcessors) -> list[float]:
    scores = np.linspace(-4, 4, VOCAB_SIZE, dtype=np.float32)
    processors.apply(scores)
    return scores.tolist()  # type: ignore[no-any-return]


@given(
    st.fixed_dictionaries({}, optional=PENALTIES),
    st.lists(st.integers(0, 3), min_size=1, max_size=8),
    st.lists(st.one_of(st.integers(0, 3), st.none()), max_size=60),
)
def test_what_was_taken_back_leaves_no_trace(
    options: dict[str, Any], prompt: list[int], changes: list[int | None]
) -> None:
    """A number is pushed, None takes the last one back; beside it, processors are made anew of what is there."""
    request = GenerationRequest("", **options)
    processors, text = LogitsProcessors(request, prompt, WORDS), list[int]()
    for change in changes:
        if change is not None:
            processors.push(change)
            text.append(change)
        elif text:
            processors.pop()
            text.pop()
        fresh = LogitsProcessors(request, prompt, WORDS)
        for token_id in text:
            fresh.push(token_id)
        assert apply(processors) == apply(fresh)


def test_more_tokens_than_room_was_made_for() -> None:
    """The different tokens of a text are kept in arrays, which grow."""
    request = GenerationRequest("", repetition_penalty=2.0, frequency_penalty=1.0)
    processors = LogitsProcessors(request, range(700))
    for token_id in range(650, 2000):
        processors.push(token_id)
    scores = np.full(2100, 4.0, np.float32)
    processors.apply(scores)
    expected = np.full(2100, 4.0)
    expected[:2000] = 2.0
    expected[650:2000] -= 1.0
    assert scores.tolist() == expected.tolist()
    for _ in range(1350):
        processors.pop()
    scores = np.full(2100, 4.0, np.float32)
    processors.apply(scores)
    assert scores.tolist() == [2.0] * 700 + [4.0] * 1400


def test_neutral_values_are_no_processors() -> None:
    neutral = GenerationRequest(
        "", repetition_penalty=1, no_repeat_ngram_size=0, presence_penalty=0, frequency_penalty=0.0, logit_bias={},
        bad_words=(), suppress_tokens=(),
    )  # fmt: skip
    assert not LogitsProcessors(neutral, [1, 2])
    assert new_chooser(neutral, 0, [1, 2], (), None, frozenset({0}), 3, Scratch(VOCAB_SIZE)) is None


# ---------------------------------------------------------------------------------------- everything is banned


def chooser(**options: Any) -> Chooser:
    made = new_chooser(GenerationRequest("", **options), 0, [1], (), None, frozenset({5}), 0, Scratch(VOCAB_SIZE))
    assert made is not None
    return made


@pytest.mark.parametrize("drawn", [{}, {"temperature": 1.0, "seed": 1}], ids=["greedy", "drawn"])
def test_where_everything_is_banned_token_0_is_taken(drawn: dict[str, Any]) -> None:
    """As in transformers' greedy search, whose argmax over nothing but -inf is 0; there, a draw is an error."""
    row = np.linspace(-4, 4, VOCAB_SIZE, dtype=np.float32)
    one = chooser(suppress_tokens=tuple(range(VOCAB_SIZE)), **drawn)
    assert [one.choose(row) for _ in range(3)] == [0, 0, 0]
    assert row.tolist() == np.linspace(-4, 4, VOCAB_SIZE, dtype=np.float32).tolist(), "the logits are changed"
    # Of one token that is left, it is this one.
    one = chooser(suppress_tokens=tuple(i for i in range(VOCAB_SIZE) if i != 7), **drawn)
    assert one.choose(row) == 7


def test_a_text_of_banned_tokens_goes_on_to_its_end() -> None:
    engine = Engine.load("demo", max_batch=2, drafts="off")
    options: dict[str, Any] = {"no_repeat_ngram_size": 1, "logit_bias": {5: -100.0}, "seed": 3, "temperature": 1.0}
    result = engine.generate("My name is", max_new_tokens=200, ignore_eos=True, **options)
    assert len(set(result.token_ids)) == 200
    ids = list(engine.tokenizer.encode("My name is"))
    assert not set(ids) & set(result.token_ids)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"suppress_tokens": [2048]}, "suppress_tokens holds token id 2048, and the model's vocabulary has 2048"),
        ({"logit_bias": {5000: 1.0}}, "logit_bias holds token id 5000, and the model's vocabulary has 2048"),
        ({"bad_words": [[1, 4000]]}, "bad_words holds token id 4000, and the model's vocabulary has 2048"),
    ],
)
def test_tokens_that_the_model_does_not_have_are_refused(options: dict[str, Any], said: str) -> None:
    engine = Engine.load("demo", max_batch=1)
    with pytest.raises(BadRequest, match=said):
        engine.generate("My name is", **options)


# --------------------------------------------------------------------------------------------- bad words


def test_a_string_is_banned_as_it_stands_and_behind_a_space(engine: Engine) -> None:
    prepared = engine.decoder.prepare(GenerationRequest("a", bad_words=("the", " my", (7,))))
    expected = [engine.tokenizer.encode(text) for text in ("the", " the", " my")]
    assert list(prepared.bad_words) == [*map(tuple, expected), (7,)]


def test_the_end_of_a_text_is_never_a_bad_word_and_may_be_suppressed() -> None:
    """As in transformers. A text that would end at once ends, unless the end is among `suppress_tokens`."""
    engine = Engine.load("demo", max_batch=2, drafts="off")
    plain = engine.generate("My name is", max_new_tokens=8)
    end = plain.token_ids[2]
    engine.decoder.generation = GenerationConfig(0, (end,))
    banned = engine.generate("My name is", max_new_tokens=8, bad_words=[[end]])
    assert (banned.token_ids, banned.finish_reason) == (plain.token_ids[:3], "stop")
    suppressed = engine.generate("My name is", max_new_tokens=8, suppress_tokens=[end])
    assert suppressed.token_ids[:2] == plain.token_ids[:2]
    assert end not in suppressed.token_ids
    assert suppressed.finish_reason == "length"


def test_golden_files_are_small() -> None:
    assert sum((GOLDEN / f"processors.{end}").stat().st_size for end in ("json", "npz")) < 1 << 19
