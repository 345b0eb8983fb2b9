"""The body of a completion becomes jobs, by whichever API's names its fields are given; no process is started."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fastgpt2.api.http.completion_request import CompletionRequest, parse_completion, translate_error
from fastgpt2.api.http.responses import BadField
from fastgpt2.engine.decoding.records import GenerationRequest
from fastgpt2.errors import BadRequest

SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}}}
NAMED = {"name": "person", "description": "somebody", "schema": SCHEMA, "strict": True}
OBJECT = {"type": "object"}


def request_of(**body: Any) -> GenerationRequest:
    (plan,) = parse_completion(body).plans
    return plan.request


def test_the_options_of_a_job_have_their_own_names() -> None:
    options: dict[str, Any] = {
        "temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.05, "typical_p": 0.8, "seed": 5, "n": 2, "best_of": 3,
        "presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3,
        "bad_words": ("x", (1, 2)), "suppress_tokens": (3,), "choice_index": 4, "do_sample": True, "ignore_eos": True,
        "stop": ("a",), "stop_token_ids": (7,), "logprobs": 2, "echo": True,
    }  # fmt: skip
    given = request_of(prompt="a", max_tokens=9, min_tokens=8, logit_bias={"12": 3}, **options)
    expected = GenerationRequest(
        "a", max_new_tokens=9, min_new_tokens=8, logit_bias={12: 3.0}, prompt_logprobs=2, **options
    )
    assert given == expected


def test_nothing_is_drawn_unasked_and_null_is_a_default() -> None:
    assert request_of(prompt="a") == GenerationRequest("a", max_new_tokens=16)
    names = CompletionRequest.__dataclass_fields__.keys() - {"prompt"}
    assert request_of(prompt="a", **dict.fromkeys(names)) == GenerationRequest("a", max_new_tokens=16)
    assert not request_of(prompt="a", temperature=0).samples
    assert request_of(prompt="a", temperature=0.01).samples


@pytest.mark.parametrize(
    ("body", "field", "value"),
    [
        ({"choices": ["a", "b"]}, "choices", ("a", "b")),
        ({"guided_choice": ["a", "b"]}, "choices", ("a", "b")),
        ({"structured_outputs": {"choice": ["a", "b"], "regex": None}}, "choices", ("a", "b")),
        ({"regex": "a+"}, "regex", "a+"),
        ({"guided_regex": "a+"}, "regex", "a+"),
        ({"structured_outputs": {"regex": "a+", "disable_any_whitespace": False}}, "regex", "a+"),
        ({"structured_outputs": {"regex": "a+", "disable_fallback": False, "_backend": None}}, "regex", "a+"),
        ({"structured_outputs": {"regex": "a+", "grammar": "", "whitespace_pattern": ""}}, "regex", "a+"),
        ({"json_schema": SCHEMA}, "json_schema", SCHEMA),
        ({"guided_json": SCHEMA}, "json_schema", SCHEMA),
        ({"guided_json": json.dumps(SCHEMA)}, "json_schema", SCHEMA),
        ({"structured_outputs": {"json": SCHEMA}}, "json_schema", SCHEMA),
        ({"structured_outputs": {"json_object": True}}, "json_schema", OBJECT),
        ({"guided_json_object": True}, "json_schema", OBJECT),
        ({"response_format": {"type": "json_object"}}, "json_schema", OBJECT),
        ({"response_format": {"type": "json_schema", "json_schema": NAMED}}, "json_schema", SCHEMA),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}, "json_schema", SCHEMA),
        ({"guided_choice": ["a"], "response_format": {"type": "text"}, "structured_outputs": {}}, "choices", ("a",)),
    ],
)
def test_a_form_by_any_of_its_names(body: dict[str, Any], field: str, value: object) -> None:
    request = request_of(prompt="a", **body)
    found = getattr(request, field)
    assert (json.loads(found) if field == "json_schema" else found) == value
    guides = [name for name in ("choices", "regex", "json_schema") if getattr(request, name) not in ((), None)]
    assert guides == [field]


@pytest.mark.parametrize(
    "body",
    [
        {"response_format": {"type": "text"}},
        {"structured_outputs": {}},
        {"structured_outputs": {"json_object": False, "structural_tag": None, "whitespace_pattern": None}},
        {"guided_json_object": False},
        {"guided_decoding_backend": "xgrammar"},
    ],
)
def test_what_asks_for_no_form(body: dict[str, Any]) -> None:
    assert not request_of(prompt="a", **body).guided


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"guided_choice": "a"}, 'guided_choice must be a list of strings, not the string "a"'),
        ({"guided_regex": ""}, "guided_regex must have 1 to 8192 characters, not 0"),
        ({"guided_json": "{"}, "guided_json is no JSON schema (Expecting"),
        ({"guided_json": 5}, "guided_json must be a JSON schema: an object, not 5"),
        ({"guided_json_object": "yes"}, 'guided_json_object must be true or false, not the string "yes"'),
        ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern must be left out"),
        ({"structural_tag": "{}"}, "structural_tag must be left out: a text is guided by choices, a regular expres"),
        ({"structured_outputs": []}, "structured_outputs must be an object, not a list"),
        ({"structured_outputs": {"lark": "x"}}, "structured_outputs has an unknown part 'lark'; known are choice, "),
        ({"structured_outputs": {"grammar": "x"}}, "structured_outputs.grammar must be left out"),
        ({"structured_outputs": {"disable_any_whitespace": True}}, "structured_outputs.disable_any_whitespace must be"),
        ({"structured_outputs": {"choice": ["a"], "regex": "a"}}, "structured_outputs.choice and structured_outputs.r"),
        ({"response_format": {}}, "response_format must have a type"),
        ({"response_format": {"type": []}}, "response_format.type must be one of text, json_object, json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format must have json_schema, an object"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {}}},
            "response_format.json_schema must have a sch",
        ),
        ({"response_format": {"type": "text", "json_schema": {"schema": 5}}}, "response_format.json_schema.schema mus"),
        ({"response_format": {"type": "json_schema", "json_schema": {**NAMED, "strict": 1}}}, "response_format.json_s"),
        ({"regex": "a", "response_format": {"type": "json_object"}}, "regex and response_format are both given; a t"),
        ({"guided_json": SCHEMA, "structured_outputs": {"regex": "a"}}, "structured_outputs and guided_json are both"),
    ],
)
def test_a_form_that_cannot_be(body: dict[str, Any], message: str) -> None:
    with pytest.raises(BadField) as caught:
        parse_completion({"prompt": "a", **body})
    assert str(caught.value).startswith(message)
    assert caught.value.param in body


@pytest.mark.parametrize(
    ("body", "message", "param", "expected"),
    [
        ({"guided_regex": "(a"}, "regex cannot be used", "guided_regex", "guided_regex cannot be used"),
        ({"regex": "(a"}, "regex cannot be used", "regex", "regex cannot be used"),
        ({"response_format": {"type": "json_object"}}, "json_schema is", "response_format", "response_format is"),
        ({"guided_regex": "a"}, "max_new_tokens is 5", "max_tokens", "max_tokens is 5"),
    ],
)
def test_a_workers_error_names_the_field_as_it_was_given(
    body: dict[str, Any], message: str, param: str, expected: str
) -> None:
    error = translate_error(BadRequest(message), parse_completion(body).request)
    assert isinstance(error, BadField)
    assert (str(error), error.param) == (expected, param)


def test_several_texts_are_one_job_and_bounded() -> None:
    plans = parse_completion({"prompt": ["a", "b"], "n": 3}).plans
    assert [plan.request.n for plan in plans] == [3, 3]
    assert len(parse_completion({"prompt": ["a"] * 256, "n": 4}).plans) == 256
    for body in ({"n": 5}, {"best_of": 5}):
        with pytest.raises(BadRequest, match="prompt holds 256 prompts, for 5 texts each; the limit is 1024"):
            parse_completion({"prompt": ["a"] * 256, **body})


def test_the_best_is_not_streamed() -> None:
    with pytest.raises(BadRequest, match="stream is refused beside a best_of of 3 and an n of 2"):
        parse_completion({"prompt": "a", "n": 2, "best_of": 3, "stream": True})
    assert parse_completion({"prompt": "a", "n": 2, "best_of": 2, "stream": True}).plans[0].options.stream
