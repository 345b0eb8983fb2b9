"""A field's check, its error message and its schema come from one description."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from fastgpt2.api.client.enqueue import JobPlan, plan_job
from fastgpt2.api.http.completion_request import CompletionRequest
from fastgpt2.api.http.schemas import body_schema
from fastgpt2.engine.decoding.records import GenerationRequest
from fastgpt2.errors import BadRequest
from fastgpt2.fields import fields_of

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
