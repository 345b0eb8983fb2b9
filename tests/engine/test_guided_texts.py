"""Guided texts of the engine: they keep their form, and are the same whatever is guessed, drawn or decoded beside."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from fastgpt2 import Engine, GenerationResult
from fastgpt2.engine.decoding.grammar_trial import Trial
from fastgpt2.errors import BadRequest

PROMPT = "Once upon a time there was a little"
SCHEMA = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 9}, "age": {"type": "integer", "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    "minItems": 2,
    "maxItems": 3,
}
GUIDES: list[dict[str, Any]] = [
    {"choices": [" dog", " dog and a cat", " horse"]},
    {"regex": r" [a-z]{3,12} [a-z]{3,12}( and [a-z]{2,7}){4}\."},
    {"json_schema": SCHEMA},
]
WAYS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.2, "seed": 4},
    {"temperature": 0.9, "seed": 4, "top_p": 0.8, "repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 2, "presence_penalty": 1.0},
]


@pytest.fixture(autouse=True)
def _untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start no process."""
    monkeypatch.setattr(Trial, "run", lambda *_: "")


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load("demo", max_batch=4, threads=1, drafts="off")


def matches(text: str, guide: dict[str, Any]) -> bool:
    if "choices" in guide:
        return text in guide["choices"]
    if "regex" in guide:
        return re.fullmatch(guide["regex"], text) is not None
    jsonschema.validate(json.loads(text), guide["json_schema"])
    return True


def told(result: GenerationResult) -> tuple[Any, ...]:
    return result.text, result.token_ids, result.finish_reason, result.stop_reason


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("guide", GUIDES)
def test_texts_keep_their_form_to_the_end(engine: Engine, guide: dict[str, Any], way: dict[str, Any]) -> None:
    for ignore_eos in (False, True):
        result = engine.generate(PROMPT, max_new_tokens=120, ignore_eos=ignore_eos, **guide, **way)
        assert result.finish_reason == "stop"
        assert matches(result.text, guide)


@pytest.fixture(scope="module", params=[3, "int8"])
def guessing(request: pytest.FixtureRequest) -> Iterator[Engine]:
    engine = Engine.load("demo", max_batch=4, threads=1, drafts=request.param)
    yield engine
    engine.decoder.model.close()


def test_guesses_change_no_text(engine: Engine, guessing: Engine) -> None:
    accepted = 0
    for guide in GUIDES:
        for way in WAYS:
            ours = guessing.generate(PROMPT, max_new_tokens=120, **guide, **way)
            assert told(ours) == told(engine.generate(PROMPT, max_new_tokens=120, **guide, **way))
            accepted += ours.drafting.accepted
    assert accepted > 10


def test_texts_side_by_side_are_those_of_each_alone(engine: Engine) -> None:
    prompts = [PROMPT, "The", PROMPT, "My name is", PROMPT]
    for guide in GUIDES:
        options: dict[str, Any] = {"max_new_tokens": 120, "temperature": 1.1, "seed": 9, **guide}
        together = engine.generate(prompts, **options)
        assert [told(result) for result in together] == [told(engine.generate(prompt, **options)) for prompt in prompts]
        several = engine.generate(PROMPT, **options, n=6)
        alone = [engine.generate(PROMPT, **options, choice_index=index) for index in range(6)]
        assert [told(text) for text in (several, *several.alternatives)] == [told(text) for text in alone]


def test_a_choice_comes_with_its_log_probability(engine: Engine) -> None:
    result = engine.generate(PROMPT, choices=GUIDES[0]["choices"], logprobs=0)
    assert result.logprobs is not None
    assert result.cumulative_logprob == pytest.approx(sum(one.logprob or 0.0 for one in result.logprobs))
    without = engine.generate(PROMPT, choices=GUIDES[0]["choices"])
    assert without.cumulative_logprob == result.cumulative_logprob
    # Of a single choice, it is how likely the text is.
    text = " girl who"
    (alone,) = engine.generate([PROMPT], choices=[text], logprobs=0)
    assert alone.text == text
    scored = engine.generate([*engine.tokenizer.encode(PROMPT), *alone.token_ids], max_new_tokens=0, prompt_logprobs=0)
    assert scored.prompt_logprobs is not None
    known = [one.logprob or 0.0 for one in scored.prompt_logprobs[-len(alone.token_ids) :]]
    assert alone.cumulative_logprob == pytest.approx(sum(known[: len(alone.token_ids)]), abs=1e-4)


def test_a_text_that_is_cut_short_begins_one_of_its_form(engine: Engine) -> None:
    result = engine.generate(PROMPT, json_schema=SCHEMA, max_new_tokens=7)
    assert result.finish_reason == "length"
    assert engine.generate(PROMPT, json_schema=SCHEMA, max_new_tokens=120).text.startswith(result.text)


def test_a_stop_token_ends_a_text_only_where_it_is_complete(engine: Engine) -> None:
    """It would be a part of the text otherwise."""
    a, b, aa = (engine.tokenizer.encode(text)[0] for text in ("a", "b", "aa"))
    assert engine.tokenizer.token_bytes(aa) != b"aa", "there is one way to write the text"
    result = engine.generate(PROMPT, regex="a{3}b{0,9}", stop_token_ids=[b], logit_bias={a: 90, b: 100})
    assert (result.text, result.stop_reason) == ("aaa", b)
    with pytest.raises(BadRequest, match="every token that may come next would end the text"):
        engine.generate(PROMPT, regex="a{3}", stop_token_ids=[a])


def test_a_prompt_that_ends_within_a_character_adds_nothing_to_the_text(engine: Engine) -> None:
    half = next(i for i in range(engine.tokenizer.vocab_size) if engine.tokenizer.token_bytes(i) == b"\xc3")
    for echo in (False, True):
        result = engine.generate([*engine.tokenizer.encode("a"), half], choices=["xyz", "éa"], echo=echo)
        assert result.text in (("a\ufffdxyz", "a\ufffdéa") if echo else ("xyz", "éa"))


def test_a_grammar_of_nothing_is_refused(engine: Engine) -> None:
    with pytest.raises(BadRequest, match="regex allows no text but an empty one"):
        engine.generate(PROMPT, regex="()")
