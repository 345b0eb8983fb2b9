"""The sentences of errors have the names that a route has for a job's fields."""

from __future__ import annotations

import pytest

from fastgpt2.api.http.field_names import rename_fields
from fastgpt2.errors import BadRequest, IdempotencyMismatch, PromptTooLong

NAMES = {"prompt": "inputs", "max_new_tokens": "max_tokens", "regex": "grammar"}


@pytest.mark.parametrize(
    ("message", "renamed"),
    [
        ("prompt tokens 5: shorten the prompt by 3", "inputs tokens 5: shorten inputs by 3"),
        ("of the model's 8 positions this prompt needs 9", "of the model's 8 positions inputs needs 9"),
        ("prompt_logprobs is 5, max_new_tokens is 6", "prompt_logprobs is 5, max_tokens is 6"),
        ("stop holds 'the prompt', prompt", "stop holds 'the prompt', inputs"),
        (r'prompt must be x, not "a \"prompt\" b"', r'inputs must be x, not "a \"prompt\" b"'),
        ("the job's prompt, the jobs' regex", "the job's inputs, the jobs' grammar"),
        (r"'it\'s a \"prompt\"', prompt", r"'it\'s a \"prompt\"', inputs"),
        ("regex cannot be used: unclosed group in prompt", "grammar cannot be used: unclosed group in prompt"),
        ("prompting a reprompt", "prompting a reprompt"),
    ],
)
def test_names_change_and_a_caller_s_words_do_not(message: str, renamed: str) -> None:
    for kind in (BadRequest, PromptTooLong):
        error = rename_fields(kind(message), NAMES)
        assert (type(error), str(error)) == (kind, renamed)


def test_errors_about_something_else_stay() -> None:
    other = IdempotencyMismatch("the prompt differs")
    assert rename_fields(other, NAMES) is other
    same = BadRequest("the prompt")
    assert rename_fields(same, {}) is same
