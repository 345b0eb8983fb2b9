"""A field's check, its error message and its schema come from one description."""

from __future__ import annotations

import json
import pickle
from array import array
from dataclasses import FrozenInstanceError
from decimal import Decimal
from enum import IntEnum, StrEnum
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from fastgpt2.api.client.enqueue import JobPlan, plan_job
from fastgpt2.api.http.completion_request import CompletionRequest
from fastgpt2.api.http.schemas import body_schema
from fastgpt2.engine.decoding.records import GenerationRequest
from fastgpt2.errors import BadRequest, PromptTooLong
from fastgpt2.fields import fields_of
from fastgpt2.protocol.messages import job_to_kwargs

REFUSED: list[tuple[str, Any, str]] = [
    ("max_new_tokens", 1.5, "max_new_tokens must be a whole number, not 1.5"),
    ("max_new_tokens", 1 << 21, "max_new_tokens must be between 0 and 1048576, not 2097152"),
    ("logprobs", True, "logprobs must be a whole number, not true"),
    ("echo", 1, "echo must be true or false, not 1"),
    ("stop", {"x": 1}, "stop must be a string or a list of strings, not an object"),
    ("timeout", "5", 'timeout must be a number of seconds, not the string "5"'),
    ("timeout", 0, "timeout must be more than 0 and at most 100000000 seconds, not 0"),
    ("priority", "urgent", "priority must be one of high, normal, low, not 'urgent'"),
    ("result_ttl", 0, "result_ttl must be a whole number of seconds from 1 to 100000000, not 0"),
]


@pytest.mark.parametrize(("name", "value", "message"), REFUSED)
def test_a_value_is_refused_in_the_same_words_everywhere(name: str, value: Any, message: str) -> None:
    with pytest.raises(BadRequest) as caught:
        plan_job("a", {name: value})
    assert str(caught.value) == message
    known = fields_of(CompletionRequest)
    if name in known and value is not None:
        with pytest.raises(BadRequest) as caught:
            CompletionRequest(**{name: value})
        assert str(caught.value) == message


def test_a_message_stays_as_it_was_made() -> None:
    plan = plan_job([1, 2], {"stop": "x", "timeout": 5})
    assert plan.request == GenerationRequest((1, 2), stop=("x",))
    assert repr(plan.options.timeout) == "5"
    assert pickle.loads(pickle.dumps(plan)) == plan
    with pytest.raises(FrozenInstanceError):
        plan.request.echo = True  # type: ignore[misc]


def test_a_schema_has_the_bounds_of_the_checks() -> None:
    schema = body_schema(JobPlan, required=["prompt"])
    assert schema["required"] == ["prompt"]
    assert schema["additionalProperties"] is False
    logprobs = {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 20}, {"type": "null"}]}
    assert schema["properties"]["logprobs"] == schema["properties"]["prompt_logprobs"] == logprobs
    assert list(schema["properties"]) == list(fields_of(JobPlan))


class Four(IntEnum):
    FOUR = 4


class Word(StrEnum):
    def __str__(self) -> str:
        return "another text"

    LOW = "low"


class ArrowScalar:
    """A single value as pyarrow has it."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def as_py(self) -> Any:
        return self._value

    def __repr__(self) -> str:
        return f"<{self._value!r}>"


class ArrowArray:
    """A column as pyarrow has it: its items are pyarrow's too."""

    def __init__(self, *values: Any) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Any:
        return map(ArrowScalar, self._values)


FOURS = [
    4, 4.0, Four.FOUR, Decimal(4), Fraction(8, 2), np.int64(4), np.uint8(4), np.float32(4), np.float64(4), np.array(4),
    np.array(4.0), ArrowScalar(4), ArrowScalar(4.0), json.loads("4.0"), json.loads("4e0"),
]  # fmt: skip


@pytest.mark.parametrize("four", FOURS, ids=lambda value: f"{type(value).__name__} {value}")
def test_a_whole_number_by_any_type_is_kept_as_python_s_own(four: Any) -> None:
    wholes = ("max_new_tokens", "min_new_tokens", "logprobs", "top_k", "seed", "n", "no_repeat_ngram_size", "best_of")
    plan = plan_job(
        [four, 4],
        {
            **dict.fromkeys((*wholes, "job_timeout", "result_ttl", "truncate_prompt_tokens"), four),
            "stop_token_ids": [four],
            "suppress_tokens": (four, four),
            "bad_words": [[four]],
            "logit_bias": {4 if isinstance(four, np.ndarray) else four: four},
        },
    )
    kept = [getattr(plan.request, name) for name in wholes]
    request = plan.request
    assert isinstance(request.prompt, tuple)
    assert request.suppress_tokens is not None
    assert request.bad_words is not None
    assert request.logit_bias is not None
    kept += [*request.prompt, *request.stop_token_ids, *request.suppress_tokens, *request.bad_words[0]]
    kept += [*request.logit_bias, plan.job_timeout, plan.result_ttl, request.truncate_prompt_tokens]
    assert {(type(one), one) for one in kept} == {(int, 4)}
    fours: dict[str, Any] = dict.fromkeys((*wholes, "truncate_prompt_tokens"), 4)
    lists: dict[str, Any] = {"stop_token_ids": (4,), "suppress_tokens": (4, 4), "bad_words": ((4,),)}
    assert request == GenerationRequest((4, 4), **fours, **lists, logit_bias={4: 4.0})
    assert json.loads(json.dumps(job_to_kwargs(request, plan.options)))["prompt"] == [4, 4]


NOT_WHOLE: list[tuple[Any, str]] = [
    ("5", 'the string "5"'),
    ("a\nb", 'the string "a\\nb"'),
    ("x" * 1000, 'the string "' + "x" * 100 + '"'),
    (True, "true"),
    (np.False_, "false"),
    (4.5, "4.5"),
    (np.float32(4.5), "4.5"),
    (json.loads("1e400"), "inf"),
    (float("nan"), "nan"),
    (Decimal("4.5"), "4.5"),
    (Decimal("sNaN"), "Decimal"),
    ([4], "a list"),
    (np.array([4]), "a list"),
    (np.array([[4]]), "ndarray"),
    ({"a": 4}, "an object"),
    (b"4", "bytes"),
    (4 + 0j, "complex"),
    (np.timedelta64(4, "ns"), "timedelta64"),
    (ArrowScalar("4"), 'the string "4"'),
]


@pytest.mark.parametrize(("value", "said"), NOT_WHOLE, ids=[said[:20] for _, said in NOT_WHOLE])
def test_what_is_no_whole_number_is_named_with_its_type(value: Any, said: str) -> None:
    for name in ("max_new_tokens", "top_k", "seed"):
        with pytest.raises(BadRequest) as caught:
            plan_job("a", {name: value})
        assert str(caught.value) == f"{name} must be a whole number, not {said}"
    if not isinstance(value, list | np.ndarray):
        with pytest.raises(BadRequest, match="stop_token_ids, a list, must hold token ids, not "):
            plan_job("a", {"stop_token_ids": [3, value]})


def test_numbers_beyond_the_bounds_are_shown_as_they_came() -> None:
    for value, said in ((1e300, "1" + "0" * 15), (10**5000, "a number of thousands of digits"), (np.int64(-7), "-7")):
        with pytest.raises(BadRequest) as caught:
            plan_job("a", {"max_new_tokens": value})
        assert str(caught.value).startswith("max_new_tokens must be between 0 and 1048576, not ")
        assert said in str(caught.value) or value == 1e300
        assert len(str(caught.value)) < 200


def test_numbers_flags_and_strings_of_other_libraries() -> None:
    for half in (0.5, np.float32(0.5), np.float64(0.5), np.array(0.5), Decimal("0.5"), Fraction(1, 2)):
        request = plan_job("a", {"temperature": half, "logit_bias": {"7": half}, "timeout": half}).request
        assert (type(request.temperature), request.temperature) == (float, 0.5)
        assert request.logit_bias == {7: 0.5}
    for yes in (True, np.True_, np.array(True), ArrowScalar(True)):
        assert plan_job("a", {"echo": yes, "stream": yes}).request.echo is True
    for wrong in (1, 1.0, np.int64(1), "true"):
        with pytest.raises(BadRequest, match="echo must be true or false, not "):
            plan_job("a", {"echo": wrong})
    texts: list[Any] = ["low", np.str_("low"), np.array("low"), Word.LOW, ArrowScalar("low")]
    for text in texts:
        plan = plan_job(text, {"stop": text, "regex": text, "priority": text, "bad_words": [text]})
        request = plan.request
        kept = [request.prompt, *request.stop, request.regex, plan.priority, *(request.bad_words or ())]
        assert [(type(one), one) for one in kept] == [(str, "low")] * 5


def test_lists_of_other_libraries() -> None:
    rows: list[Any] = [np.array([1, 2]), np.array([1.0, 2.0]), array("l", [1, 2]), ArrowArray(1, 2), range(1, 3)]
    for ids in rows:
        request = plan_job(ids, {"stop_token_ids": ids, "suppress_tokens": ids, "bad_words": [ids]}).request
        assert request == GenerationRequest((1, 2), stop_token_ids=(1, 2), suppress_tokens=(1, 2), bad_words=((1, 2),))
        assert json.dumps(job_to_kwargs(request, plan_job("", {}).options))
    for words in (np.array(["a", "b"]), np.array(["a", "b"], object), ArrowArray("a", "b"), ("a", "b")):
        request = plan_job("x", {"stop": words, "bad_words": words}).request
        assert request == GenerationRequest("x", stop=("a", "b"), bad_words=("a", "b"))
        assert GenerationRequest("x", choices=words).choices == ("a", "b")  # type: ignore[arg-type]
    assert plan_job("x", {"stop": iter(["a", "b"])}).request.stop == ("a", "b")
    no_lists: list[Any] = [np.array([[1, 2]]), {1, 2}, {1: 2}, b"ab", np.array(3)]
    for wrong in no_lists:
        with pytest.raises(BadRequest, match="prompt must be a string or a list of token ids, not "):
            plan_job(wrong, {})


class Endless:
    """An array that has more items than any memory."""

    ndim = 1

    def __len__(self) -> int:
        return 1 << 40

    def __iter__(self) -> Any:
        raise AssertionError("it was read")

    tolist = __iter__


def test_a_list_s_length_is_looked_at_before_its_items() -> None:
    with pytest.raises(PromptTooLong, match="prompt has 1099511627776 tokens; the limit is 131072: shorten it"):
        plan_job(Endless(), {})
    for name in ("stop", "stop_token_ids", "suppress_tokens", "bad_words", "choices"):
        with pytest.raises(BadRequest, match=f"^{name} holds 1099511627776 "):
            plan_job("a", {name: Endless()})
    with pytest.raises(BadRequest, match="bad_words must hold words of 1 to 256 tokens, not of 1099511627776"):
        plan_job("a", {"bad_words": [Endless()]})


@pytest.mark.parametrize("key", [7, 7.0, "7", "7.0", np.int64(7), np.str_("7")])
def test_the_token_of_a_bias_by_any_key(key: Any) -> None:
    bias = plan_job("a", {"logit_bias": {key: 1}}).request.logit_bias
    assert bias == {7: 1.0}
    assert [type(token) for token in bias] == [int]


@pytest.mark.parametrize("key", ["7.5", "-7", "7e0", "7.", "", "x", True, 7.5, None, "1" * 11, float("inf")])
def test_what_is_no_token_of_a_bias(key: Any) -> None:
    with pytest.raises(BadRequest, match=r"logit_bias holds .*, which is no token id"):
        plan_job("a", {"logit_bias": {key: 1}})
