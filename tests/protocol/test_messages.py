"""Requests and results on their way through Redis."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from typing import Any

import pytest

from fastgpt2.api.client.enqueue import JobFields
from fastgpt2.commands.batch.lines import _LINE_FIELDS
from fastgpt2.engine.decoding.records import (
    Drafting,
    GenerationRequest,
    GenerationResult,
    RequestFields,
    Timings,
    TokenLogprob,
    Usage,
)
from fastgpt2.errors import BadRequest, FastGPT2Error
from fastgpt2.protocol.messages import (
    JobOptions,
    Piece,
    describe_result,
    entry_to_piece,
    job_to_kwargs,
    parse_job,
    piece_to_entry,
    result_from_json,
    result_to_json,
)

RESULT = GenerationResult(
    "héllo 🦜", (5, 7), "stop", Usage(3, 2, 1), Timings(0.25, 0.5, 1.0), "demo", drafting=Drafting(steps=1)
)


def test_a_result_survives_the_journey() -> None:
    value = json.loads(json.dumps(result_to_json(RESULT, 0.25)))
    assert result_from_json(value) == RESULT
    assert value["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "cached_tokens": 1}
    assert value["drafting"] == {"steps": 1, "drafted": 0, "accepted": 0}
    assert value["version"] == 1
    assert "logprobs" not in value
    assert RESULT.usage.total_tokens == 5


def test_how_guesses_fared_survives_the_journey() -> None:
    result = replace(RESULT, drafting=Drafting(steps=5, drafted=7, accepted=4))
    value = json.loads(json.dumps(result_to_json(result, 0.25)))
    assert result_from_json(value) == result
    assert value["drafting"] == {"steps": 5, "drafted": 7, "accepted": 4}
    times = "queue 250.0 ms, prefill 500.0 ms, decode 1000.0 ms"
    assert describe_result(value) == (f"3 (1 cached) + 2 tokens, stop; 5 steps, 4 of 7 guesses came true; {times}")
    assert describe_result(result_to_json(RESULT, 0.25)) == f"3 (1 cached) + 2 tokens, stop; {times}"


def test_log_probabilities_survive_the_journey() -> None:
    first = TokenLogprob(5, "hé", -0.5, (TokenLogprob(5, "hé", -0.5), TokenLogprob(9, r"bytes:\xf0", -1.25)))
    result = replace(RESULT, logprobs=(first, TokenLogprob(7, "<|endoftext|>", -2.0, text_offset=7)))
    value = json.loads(json.dumps(result_to_json(result, 0.25)))
    assert result_from_json(value) == result
    assert value["logprobs"] == [
        {
            "token_id": 5,
            "token": "hé",
            "logprob": -0.5,
            "text_offset": 0,
            "top": [
                {"token_id": 5, "token": "hé", "logprob": -0.5},
                {"token_id": 9, "token": r"bytes:\xf0", "logprob": -1.25},
            ],
        },
        {"token_id": 7, "token": "<|endoftext|>", "logprob": -2.0, "text_offset": 7},
    ]
    nothing = replace(RESULT, token_ids=(), logprobs=(), finish_reason="cancelled")
    assert result_from_json(json.loads(json.dumps(result_to_json(nothing, 0.25)))) == nothing


def test_what_is_special_and_why_it_stopped_survive_the_journey() -> None:
    end = TokenLogprob(7, "</s>", -2.0, (TokenLogprob(7, "</s>", -2.0, special=True),), 2, special=True)
    for reason in ("</s>", 7, 0, ""):
        result = replace(RESULT, logprobs=(TokenLogprob(5, "hé", -0.5), end), stop_reason=reason)
        value = json.loads(json.dumps(result_to_json(result)))
        assert value["stop_reason"] == reason
        assert "special" not in value["logprobs"][0]
        assert value["logprobs"][1]["special"] is value["logprobs"][1]["top"][0]["special"] is True
        assert result_from_json(value) == replace(result, timings=replace(RESULT.timings, queue_seconds=0.0))
    # An earlier release says nothing of either.
    assert "stop_reason" not in result_to_json(RESULT)
    assert result_from_json(result_to_json(RESULT)).stop_reason is None


@pytest.mark.parametrize("reason", [True, 1.5, [7], {}])
def test_a_damaged_reason_of_a_stop_is_refused(reason: object) -> None:
    with pytest.raises(FastGPT2Error, match="a damaged result"):
        result_from_json({**result_to_json(RESULT), "stop_reason": reason})


def test_a_prompt_s_log_probabilities_survive_the_journey() -> None:
    first, second = TokenLogprob(5, "A", None), TokenLogprob(6, " b", -1.5, (TokenLogprob(6, " b", -1.5),), 1)
    result = replace(RESULT, prompt_logprobs=(first, second))
    value = json.loads(json.dumps(result_to_json(result, 0.25)))
    assert result_from_json(value) == result
    assert "logprobs" not in value
    assert value["prompt_logprobs"] == [
        {"token_id": 5, "token": "A", "logprob": None, "text_offset": 0},
        {
            "token_id": 6,
            "token": " b",
            "logprob": -1.5,
            "text_offset": 1,
            "top": [{"token_id": 6, "token": " b", "logprob": -1.5}],
        },
    ]


def test_a_seed_and_the_other_texts_survive_the_journey() -> None:
    """A seed has up to 64 bits, and 0 is one; a text's index, its sum of log probabilities and its end are its own."""
    for drawn in (replace(RESULT, seed=seed) for seed in (0, -1, (1 << 64) - 1)):
        assert result_to_json(drawn)["seed"] == drawn.seed
        assert result_from_json(json.loads(json.dumps(result_to_json(drawn, 0.25)))) == drawn
    told = (TokenLogprob(5, "hé", -0.5),)
    second = replace(RESULT, text="b", token_ids=(9,), finish_reason="length", choice_index=1, logprobs=told, seed=3)
    third = replace(RESULT, text="c", usage=Usage(3, 7), stop_reason="x", choice_index=2, cumulative_logprob=-1.5)
    result = replace(RESULT, seed=3, cumulative_logprob=0.0, alternatives=(second, third))
    value = json.loads(json.dumps(result_to_json(result, 0.25)))
    assert result_from_json(value) == result
    assert (value["seed"], value["cumulative_logprob"]) == (3, 0.0)
    assert "choice_index" not in value
    assert [(one["text"], one["choice_index"]) for one in value["alternatives"]] == [("b", 1), ("c", 2)]
    assert [one["timings"]["queue_seconds"] for one in value["alternatives"]] == [0.25, 0.25]
    for other in value["alternatives"]:
        assert not {"version", "model", "alternatives"} & set(other)
    assert "seed" not in result_to_json(RESULT)
    times = "queue 250.0 ms, prefill 500.0 ms, decode 1000.0 ms"
    assert describe_result(value) == f"3 (1 cached) + 11 tokens in 3 texts, stop; seed 3; {times}"


def test_what_alternatives_have_of_their_own_is_passed_over() -> None:
    value = result_to_json(replace(RESULT, alternatives=(RESULT,)), 0.25)
    value["alternatives"][0]["alternatives"] = [3]
    value["alternatives"][0]["of another kind"] = 7
    assert result_from_json(value) == replace(RESULT, alternatives=(RESULT,))


DAMAGE: dict[str, list[Any]] = {
    "seed": [True, 1.5, "3", [3], {}],
    "choice_index": [True, 1.5, "3", [3], {}],
    "cumulative_logprob": [True, "-1", [1], {}],
    "text": [None, 3, ["a"], b"a"],
    "token_ids": [None, 3, ["a"], [True], [1.5]],
}


@pytest.mark.parametrize("damage", [{name: value} for name, values in DAMAGE.items() for value in values])
def test_damaged_texts_are_refused_also_among_the_alternatives(damage: dict[str, Any]) -> None:
    value = result_to_json(replace(RESULT, alternatives=(RESULT,)))
    damaged = {**value, "alternatives": [{**value["alternatives"][0], **damage}]}
    for one in ({**value, **damage}, damaged):
        with pytest.raises(FastGPT2Error, match="a damaged result"):
            result_from_json(one)


@pytest.mark.parametrize("alternatives", [3, {}, "a", None, True, [3], ["a"], [[]], [None], [{}], [{"text": "a"}]])
def test_what_are_no_alternatives_is_refused(alternatives: object) -> None:
    with pytest.raises(FastGPT2Error, match="a damaged result"):
        result_from_json({**result_to_json(RESULT), "alternatives": alternatives})


def test_a_piece_says_which_text_it_belongs_to() -> None:
    """And the entry of a first text is what it was before there were several."""
    assert set(piece_to_entry(Piece("a", 0, 1))) == {"attempt", "at", "text"}
    told = (TokenLogprob(5, "a", -0.5),)
    for piece in (Piece("a", 3, 1, choice_index=2), Piece("a", 0, 2, told, 4, choice_index=7), Piece("a", 3, 1)):
        entry = {name.encode(): str(value).encode() for name, value in piece_to_entry(piece).items()}
        assert repr(entry_to_piece(entry)) == repr(piece)
        for index in (b"-1", b"x", b"1.0", b""):
            with pytest.raises(ValueError, match=r"is no number of what comes before|invalid literal"):
                entry_to_piece({**entry, b"choice_index": index})


def test_a_piece_can_tell_the_tokens_so_far() -> None:
    piece = Piece("a", 3, 1, choice_index=2, usage=Usage(7, 5, 2))
    entry = {name.encode(): str(value).encode() for name, value in piece_to_entry(piece).items()}
    assert set(entry) == {
        b"attempt",
        b"at",
        b"text",
        b"choice_index",
        b"prompt_tokens",
        b"completion_tokens",
        b"cached_tokens",
    }
    assert entry_to_piece(entry) == piece
    for damaged in ({b"prompt_tokens": b"-1"}, {b"completion_tokens": b"x"}, {b"cached_tokens": b""}):
        with pytest.raises(ValueError, match=r"is no number of what comes before|invalid literal"):
            entry_to_piece({**entry, **damaged})


def test_what_the_last_release_wrote_is_read() -> None:
    """The value is as it stands in somebody's Redis."""
    value = json.loads(
        """{"version": 1, "text": "Ab", "token_ids": [5, 7], "finish_reason": "stop",
        "usage": {"prompt_tokens": 3, "completion_tokens": 2},
        "timings": {"queue_seconds": 0.25, "prefill_seconds": 0.5, "decode_seconds": 1.0}, "model": "demo",
        "logprobs": [{"token_id": 5, "token": "A", "logprob": -0.5, "top": [{"token_id": 5, "token": "A",
        "logprob": -0.5}]}, {"token_id": 7, "token": "b", "logprob": -2.0}]}"""
    )
    told = (TokenLogprob(5, "A", -0.5, (TokenLogprob(5, "A", -0.5),)), TokenLogprob(7, "b", -2.0))
    # It guessed nothing, so the second token took a step.
    assert result_from_json(value).drafting == Drafting(steps=1)
    assert result_from_json({**value, "token_ids": []}).drafting == Drafting()
    # It gave one text, and drew nothing.
    old = result_from_json(value)
    assert (old.seed, old.choice_index, old.cumulative_logprob, old.alternatives) == (None, 0, None, ())
    assert result_from_json(value) == replace(RESULT, text="Ab", usage=Usage(3, 2), logprobs=told)


def test_what_a_later_release_may_add_to_the_counts_is_passed_over() -> None:
    value = result_to_json(RESULT, 0.25)
    value["usage"]["of another kind"] = 7
    value["drafting"]["of another kind"] = 7
    assert result_from_json(value) == RESULT


ONE = {"token_id": 1, "token": "a", "logprob": -1}


@pytest.mark.parametrize(
    "logprobs",
    [
        *(3, [3], [{}], {}, "a", [[]], [None]),
        *([{**ONE, "top": 3}], [{**ONE, "top": [3]}], [{**ONE, "top": None}], [{**ONE, "text_offset": "3"}]),
        *(
            [{**ONE, "text_offset": None}],
            [{**ONE, "token_id": True}],
            [{**ONE, "token": 5}],
            [{**ONE, "logprob": "1"}],
            [{**ONE, "special": 1}],
        ),
    ],
)
@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
def test_damaged_log_probabilities_are_refused(name: str, logprobs: object) -> None:
    with pytest.raises(FastGPT2Error, match="a damaged result"):
        result_from_json({**result_to_json(RESULT), name: logprobs})


def test_every_field_of_a_request_can_be_given_everywhere() -> None:
    names = {field.name for field in fields(GenerationRequest)} - {"prompt"}
    assert set(RequestFields.__annotations__) == names
    assert names < set(JobFields.__annotations__)
    assert names < set(_LINE_FIELDS)


@pytest.mark.parametrize("value", [None, [], {}, {"version": 2}, {"version": 1}, {"version": 1, "text": "a"}])
def test_what_is_no_result_is_refused(value: object) -> None:
    with pytest.raises(FastGPT2Error, match=r"not a result|a damaged result"):
        result_from_json(value)


@pytest.mark.parametrize(
    ("request_", "options", "kwargs"),
    [
        (GenerationRequest("My name is"), JobOptions(), {"prompt": "My name is"}),
        (
            GenerationRequest("", max_new_tokens=5, stop=("\n", "é"), ignore_eos=True),
            JobOptions(timeout=2.5),
            {"prompt": "", "max_new_tokens": 5, "stop": ["\n", "é"], "ignore_eos": True, "timeout": 2.5},
        ),
        (
            GenerationRequest("a", stop_token_ids=(5, 0)),
            JobOptions(),
            {"prompt": "a", "stop_token_ids": [5, 0]},
        ),
        (
            GenerationRequest(
                "a", do_sample=True, temperature=0.5, top_k=0, top_p=0.9, min_p=0.05, typical_p=0.9, seed=0
            ),
            JobOptions(),
            {
                "prompt": "a",
                "do_sample": True,
                "temperature": 0.5,
                "top_k": 0,
                "top_p": 0.9,
                "min_p": 0.05,
                "typical_p": 0.9,
                "seed": 0,
            },
        ),
        (
            GenerationRequest("a", n=2, best_of=3, choice_index=5, repetition_penalty=1.2, no_repeat_ngram_size=3),
            JobOptions(),
            {
                "prompt": "a",
                "n": 2,
                "best_of": 3,
                "choice_index": 5,
                "repetition_penalty": 1.2,
                "no_repeat_ngram_size": 3,
            },
        ),
        (
            GenerationRequest("a", presence_penalty=-2, logit_bias={7: -100, 0: 1}, bad_words=("x y", (5, 6))),
            JobOptions(),
            {
                "prompt": "a",
                "presence_penalty": -2,
                "logit_bias": {"7": -100.0, "0": 1.0},
                "bad_words": ["x y", [5, 6]],
            },
        ),
        (
            GenerationRequest("a", frequency_penalty=0, suppress_tokens=(5,), choices=("yes", "no")),
            JobOptions(),
            {"prompt": "a", "frequency_penalty": 0, "suppress_tokens": [5], "choices": ["yes", "no"]},
        ),
        (GenerationRequest("a", regex="a+"), JobOptions(), {"prompt": "a", "regex": "a+"}),
        (
            GenerationRequest("a", json_schema={"type": "object"}),
            JobOptions(),
            {"prompt": "a", "json_schema": '{"type": "object"}'},
        ),
        (
            GenerationRequest((5, 6), 0, logprobs=0, prompt_logprobs=5, echo=True),
            JobOptions(stream=True),
            {
                "prompt": [5, 6],
                "max_new_tokens": 0,
                "logprobs": 0,
                "prompt_logprobs": 5,
                "echo": True,
                "stream": True,
            },
        ),
    ],
)
def test_a_job_survives_the_journey(request_: GenerationRequest, options: JobOptions, kwargs: dict[str, Any]) -> None:
    assert job_to_kwargs(request_, options) == kwargs
    assert parse_job([], json.loads(json.dumps(kwargs))) == (request_, options)
    assert parse_job([kwargs.pop("prompt")], kwargs) == (request_, options)


def test_several_texts_are_streamed_as_long_as_all_are_given() -> None:
    for options in ({"n": 3}, {"n": 3, "best_of": 3}, {"best_of": 1}):
        request, of_worker = parse_job(["a"], {**options, "stream": True})
        assert (request.ranked, of_worker.stream) == (False, True)
    assert parse_job(["a"], {"best_of": 3, "stream": False})[0].ranked


def test_the_prompt_may_come_first() -> None:
    assert parse_job(("hi",), {"stop": "x"}) == (GenerationRequest("hi", stop=("x",)), JobOptions())


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ([], {}, "prompt is missing"),
        (["a", "b"], {}, "2 positional arguments"),
        (["a"], {"prompt": "b"}, "given twice"),
        (
            ["a"],
            {"max_tokens": 3},
            "unknown field 'max_tokens'; max_new_tokens may be meant; known are prompt, max_new",
        ),
        (["a"], {"temprature": 3}, "unknown field 'temprature'; temperature may be meant; known are prompt"),
        (["a"], {"x": 3}, "unknown field 'x'; known are prompt, max_new_tokens"),
        (["a"], {"num_beams": 4}, "num_beams is refused: no beams are searched here; ask for several texts by n"),
        (["a"], {"temperature": "hot"}, 'temperature must be a number, not the string "hot"'),
        (["a"], {"top_p": 1.7}, "top_p must be between 0 and 1, not 1.7"),
        (["a"], {"logit_bias": {"x": 1}}, "logit_bias holds 'x', which is no token id"),
        (["a"], {"n": 0}, "n must be between 1 and 128, not 0"),
        (["a"], {"n": 3, "best_of": 2}, "best_of is 2 and n is 3: raise best_of, which n may not exceed, or lower n"),
        (["a"], {"bad_words": [""]}, "bad_words must hold words of 1 to 256 characters, not of 0"),
        (["a"], {"choices": [""]}, "choices must hold strings of 1 to 1024 characters, not of 0"),
        (["a"], {"n": 2, "best_of": 3, "stream": True}, "stream is refused beside a best_of of 3 and an n of 2: which"),
        (["a"], {"max_new_tokens": 1.5}, "max_new_tokens must be a whole number, not 1.5"),
        ([{"a": 1}], {}, "prompt must be a string or a list of token ids, not an object"),
        (["a"], {"timeout": "5"}, 'timeout must be a number of seconds, not the string "5"'),
        (["a"], {"timeout": True}, "timeout must be a number of seconds, not true"),
        (["a"], {"timeout": 0}, "timeout must be more than 0 and at most 100000000 seconds"),
        (["a"], {"timeout": -1.5}, "timeout must be more than 0"),
        (["a"], {"timeout": math.nan}, "timeout must be more than 0"),
        (["a"], {"timeout": math.inf}, "timeout must be more than 0"),
        (["a"], {"stream": 1}, "stream must be true or false, not 1"),
        ("ab", {}, "not a list and a mapping"),
        ([], [], "not a list and a mapping"),
    ],
)
def test_bad_arguments_are_named(args: Any, kwargs: Any, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        parse_job(args, kwargs)
