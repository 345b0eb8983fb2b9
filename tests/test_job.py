"""Requests and results on their way through Redis."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fastgpt2.engine.generation import GenerationRequest, GenerationResult, Timings, Usage
from fastgpt2.errors import BadRequest, FastGPT2Error
from fastgpt2.worker.job import parse_request, request_to_kwargs, result_from_json, result_to_json

RESULT = GenerationResult("héllo 🦜", (5, 7), "stop", Usage(3, 2), Timings(0.25, 0.5, 1.0), "demo")


def test_a_result_survives_the_journey() -> None:
    value = json.loads(json.dumps(result_to_json(RESULT, 0.25)))
    assert result_from_json(value) == RESULT
    assert value["usage"] == {"prompt_tokens": 3, "completion_tokens": 2}
    assert value["version"] == 1
    assert RESULT.usage.total_tokens == 5


@pytest.mark.parametrize("value", [None, [], {}, {"version": 2}, {"version": 1}, {"version": 1, "text": "a"}])
def test_what_is_no_result_is_refused(value: object) -> None:
    with pytest.raises(FastGPT2Error, match=r"not a result|a damaged result"):
        result_from_json(value)


@pytest.mark.parametrize(
    "request_",
    [
        GenerationRequest("My name is"),
        GenerationRequest("", max_new_tokens=5, stop=("\n", "é"), ignore_eos=True),
    ],
)
def test_a_request_survives_the_journey(request_: GenerationRequest) -> None:
    kwargs = json.loads(json.dumps(request_to_kwargs(request_)))
    assert parse_request([], kwargs) == request_


def test_the_prompt_may_come_first() -> None:
    assert parse_request(("hi",), {"stop": "x"}) == GenerationRequest("hi", stop=("x",))


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ([], {}, "prompt is missing"),
        (["a", "b"], {}, "2 positional arguments"),
        (["a"], {"prompt": "b"}, "given twice"),
        (["a"], {"max_tokens": 3}, "unknown field 'max_tokens'; known are prompt, max_new_tokens"),
        (["a"], {"temperature": 0.7}, "temperature is refused: fastgpt2 decodes greedily"),
        (["a"], {"top_p": 0.7}, "top_p is refused: .* nothing to sample"),
        (["a"], {"max_new_tokens": 1.5}, "max_new_tokens must be a whole number, not float"),
        ([{"a": 1}], {}, "prompt must be a string or a list of token ids, not dict"),
        ("ab", {}, "not a list and a mapping"),
        ([], [], "not a list and a mapping"),
    ],
)
def test_bad_arguments_are_named(args: Any, kwargs: Any, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        parse_request(args, kwargs)
