"""What stock clients make of errors: OpenAI's own client, huggingface_hub's, and those that read the sentence only."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import openai
import pytest
from huggingface_hub import InferenceClient, TextGenerationInputGrammarType
from huggingface_hub.errors import (
    GenerationError,
    HfHubHTTPError,
    IncompleteGenerationError,
    OverloadedError,
    TextGenerationError,
    UnknownError,
    ValidationError,
)
from huggingface_hub.inference._common import raise_text_generation_error
from huggingface_hub.utils._http import hf_raise_for_status
from openai import OpenAI
from support.running import StartEndpoint

from fastgpt2 import Client, errors
from fastgpt2.api.http import app  # noqa: F401  the errors that its modules define
from fastgpt2.api.http.requests import ClientGone
from fastgpt2.api.http.responses import BadField, NotReady, respond
from fastgpt2.engine.decoding.records import MAX_PROMPT_BYTES, MAX_PROMPT_TOKENS
from fastgpt2.errors import FastGPT2Error, QueueFull
from fastgpt2.system.up import System

# For each class of errors: OpenAI's type, code and status, whose own client makes a class of the status; and
# text-generation-inference's word, of which huggingface_hub makes a class.
WRONG, SERVER = "invalid_request_error", "server_error"
EXPECTED: dict[str, tuple[str, str | None, int, str]] = {
    "FastGPT2Error": (SERVER, "internal_error", 500, "generation"),
    "BadRequest": (WRONG, None, 400, "validation"),
    "BadField": (WRONG, None, 400, "validation"),
    "PromptTooLong": (WRONG, "context_length_exceeded", 400, "validation"),
    "NoChatTemplate": (WRONG, "no_chat_template", 404, "validation"),
    "ModelUnknown": (WRONG, "model_not_found", 404, "validation"),
    "RequestTooLarge": (WRONG, "request_too_large", 413, "validation"),
    "UnsupportedEncoding": (WRONG, "unsupported_encoding", 415, "validation"),
    "RequestTooSlow": (WRONG, "request_too_slow", 408, "validation"),
    "IdempotencyMismatch": (WRONG, "idempotency_mismatch", 422, "validation"),
    "Unauthorized": ("authentication_error", "invalid_api_key", 401, "invalid_api_key"),
    "TokenMissing": ("authentication_error", "missing_api_key", 401, "missing_api_key"),
    "ForbiddenOrigin": ("permission_error", "forbidden_origin", 403, "forbidden_origin"),
    "JobNotFound": (WRONG, "job_not_found", 404, "job_not_found"),
    "JobNotEnded": (WRONG, "job_not_ended", 409, "job_not_ended"),
    "JobLost": (SERVER, "job_lost", 503, "incomplete_generation"),
    "JobFailed": (SERVER, "job_failed", 502, "generation"),
    "JobCancelled": (SERVER, "job_cancelled", 409, "incomplete_generation"),
    "JobStopped": (SERVER, "job_stopped", 502, "incomplete_generation"),
    "JobTimedOut": (SERVER, "job_timed_out", 504, "incomplete_generation"),
    "PoisonJob": (SERVER, "poison_job", 502, "generation"),
    "ModelError": (SERVER, "model_error", 503, "generation"),
    "ModelNotFound": (SERVER, "model_error", 503, "generation"),
    "ConfigError": (SERVER, "model_error", 503, "generation"),
    "CheckpointError": (SERVER, "model_error", 503, "generation"),
    "TokenizerError": (SERVER, "model_error", 503, "generation"),
    "QueueFull": ("rate_limit_error", "queue_full", 429, "overloaded"),
    "TokenLimitReached": ("rate_limit_error", "rate_limit_exceeded", 429, "overloaded"),
    "QueueUnavailable": (SERVER, "queue_unavailable", 503, "overloaded"),
    "NotDurable": (SERVER, "not_durable", 503, "overloaded"),
    "RedisUnfit": (SERVER, "redis_unfit", 503, "generation"),
    "RedisAccessDenied": (SERVER, "redis_access_denied", 503, "generation"),
    "ResultTimeout": (SERVER, "result_timeout", 504, "incomplete_generation"),
    "ServiceBusy": (SERVER, "service_busy", 503, "overloaded"),
    "ServiceStopping": (SERVER, "service_stopping", 503, "incomplete_generation"),
    "TextReplaced": (SERVER, "text_replaced", 500, "incomplete_generation"),
    "NotReady": (SERVER, "not_ready", 503, "healthcheck"),
}
# Nobody is there any more to read of the first; the second is never raised in an endpoint.
NOT_ANSWERED = {"ClientGone", "RedisServerMissing"}
OF_STATUS = {
    400: openai.BadRequestError,
    401: openai.AuthenticationError,
    403: openai.PermissionDeniedError,
    404: openai.NotFoundError,
    409: openai.ConflictError,
    422: openai.UnprocessableEntityError,
    429: openai.RateLimitError,
}
OF_WORD = {
    "validation": ValidationError,
    "overloaded": OverloadedError,
    "generation": GenerationError,
    "incomplete_generation": IncompleteGenerationError,
}
OWN = (BadField, NotReady, ClientGone)
KNOWN: dict[str, Any] = {
    **{name: value for name, value in vars(errors).items() if isinstance(value, type)},
    **{value.__name__: value for value in OWN},
}


def make(name: str) -> FastGPT2Error:
    kind = KNOWN[name]
    if issubclass(kind, errors.JobFailed):
        error: FastGPT2Error = kind("an-id", "a reason")
    elif kind is QueueFull:
        error = QueueFull("q", 1, 1)
    else:
        error = BadField("top_p", "a sentence") if kind is BadField else kind("a sentence")
    return error


def answer_of(error: FastGPT2Error, path: str) -> httpx.Response:
    """Return the answer as a client gets it."""
    made = respond(error, {"type": "http", "path": path})
    request = httpx.Request("POST", f"http://localhost{path}")
    return httpx.Response(made.status_code, headers=dict(made.headers), content=bytes(made.body), request=request)


def test_every_class_of_errors_is_in_the_table() -> None:
    found, left = set[str](), [FastGPT2Error]
    while left:
        kind = left.pop()
        left += kind.__subclasses__()
        if kind.__module__ == errors.__name__ or kind.__module__.startswith("fastgpt2.api."):
            found.add(kind.__name__)
    assert found == EXPECTED.keys() | NOT_ANSWERED


@pytest.fixture(scope="module")
def ai() -> Iterator[OpenAI]:
    with OpenAI(base_url="http://localhost", api_key="none") as client:
        yield client


@pytest.mark.parametrize("name", EXPECTED)
def test_openais_client_reads_a_code_and_a_type(ai: OpenAI, name: str) -> None:
    kind, code, status, _ = EXPECTED[name]
    answer = answer_of(make(name), "/v1/completions")
    read = ai._make_status_error_from_response(answer)
    assert type(read) is OF_STATUS.get(status, openai.InternalServerError if status >= 500 else openai.APIStatusError)
    assert (read.type, read.code, read.status_code) == (kind, code, status)
    assert read.param == ("top_p" if name == "BadField" else None)
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    assert code is None or re.fullmatch("[a-z]+(_[a-z]+)*", code), "of whole words"


@pytest.mark.parametrize("name", EXPECTED)
def test_huggingface_hub_chooses_a_class_by_the_word(name: str) -> None:
    *_, word = EXPECTED[name]
    answer = answer_of(make(name), "/generate")
    assert answer.json().keys() == {"error", "error_type"}
    assert answer.json()["error_type"] == word
    with pytest.raises(HfHubHTTPError) as refused:
        hf_raise_for_status(answer)
    with pytest.raises(TextGenerationError) as read:
        raise_text_generation_error(refused.value)
    assert read.type is OF_WORD.get(word, UnknownError)
    assert str(make(name)) in str(read.value)


# What programs look for in a sentence: LiteLLM (in lower case), CrewAI, and whoever reads the number.
LITELLM = "this model's maximum context length is"


@pytest.mark.parametrize(
    ("body", "remedy"),
    [
        ({"prompt": "the " * 5000}, "shorten it"),
        ({"prompt": "the " * 600}, "shorten the prompt by at least"),
        ({"prompt": [5] * 512}, "shorten it"),
        ({"prompt": ["a", "the " * 600]}, "shorten the prompt by at least"),
        ({"prompt": "the " * 300, "max_tokens": 400}, "ask for at most"),
        ({"prompt": "a", "max_tokens": 512}, "ask for at most 511"),
        ({"prompt": [5] * 500, "min_tokens": 13, "max_tokens": 13}, "ask for at most 12"),
        ({"prompt": [5] * 513, "max_tokens": 0, "echo": True}, "shorten it"),
    ],
    ids=range(8),
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long_is_told_in_openais_words(
    system: System, body: dict[str, Any], remedy: str, stream: bool
) -> None:
    answer = httpx.post(
        f"{system.http_url}/v1/completions", json={**body, "stream": stream}, trust_env=False, timeout=60
    )
    if stream and answer.status_code == 200:  # the first of two prompts had a token before the second was refused
        assert body["prompt"][0] == "a"
        (told,) = [line for line in answer.text.splitlines() if line.startswith('data: {"error"')]
        error = json.loads(told.removeprefix("data: "))["error"]
    else:
        assert answer.status_code == 400
        error = answer.json()["error"]
    assert (error["code"], error["type"]) == ("context_length_exceeded", WRONG)
    assert error["message"].startswith("This model's maximum context length is 512 tokens: ")
    assert LITELLM in error["message"].lower()
    assert remedy in error["message"]
    assert "_new_tokens" not in error["message"], "the fields have OpenAI's names"


@pytest.mark.parametrize(
    ("prompt", "limit"), [("x" * (MAX_PROMPT_BYTES + 1), MAX_PROMPT_BYTES), ([5] * (MAX_PROMPT_TOKENS + 1), 1 << 17)]
)
def test_so_is_one_that_no_model_takes(system: System, prompt: Any, limit: int) -> None:
    answer = httpx.post(f"{system.http_url}/v1/completions", json={"prompt": prompt}, trust_env=False, timeout=60)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
    assert LITELLM in error["message"].lower()
    assert error["message"].endswith(f"; the limit is {limit}: shorten it")


def test_jobs_that_are_left_behind_tell_it_too(system: System) -> None:
    with httpx.Client(base_url=system.http_url, trust_env=False, timeout=60) as web:
        job = web.post("/v1/jobs", json={"prompt": "the " * 300, "max_new_tokens": 400}).json()
        ended = web.get(f"/v1/jobs/{job['id']}?wait=60").json()
    assert ended["error"]["code"] == "context_length_exceeded"
    assert ended["error"]["message"].startswith("This model's maximum context length is 512 tokens: ")


def test_a_hub_client_meets_its_own_errors(start_endpoint: StartEndpoint, system: System, client: Client) -> None:
    alone = InferenceClient(start_endpoint("--timeout", "0.1", "--max-queue", "1").url)
    with pytest.raises(ValidationError, match="top_p must be"):
        alone.text_generation("a", top_p=7)
    with pytest.raises(IncompleteGenerationError, match="no worker listens"):
        alone.text_generation("a")
    waiting = client.enqueue("a")
    for stream in (False, True):
        with pytest.raises(OverloadedError, match="is full"):
            list(alone.text_generation("a", stream=stream))
    waiting.cancel()
    with pytest.raises(ValidationError, match="max_new_tokens 400 make"):  # a worker says so
        list(InferenceClient(system.http_url).text_generation("the " * 300, max_new_tokens=400, stream=True))


def test_what_is_no_route_is_told_with_what_may_be_meant(system: System) -> None:
    expected = {
        ("POST", "/completions"): "/v1/completions may be meant",
        ("POST", "/v1/v1/completions"): "/v1/completions may be meant",
        ("GET", "/v1/chat/completions"): "this route takes POST",
        ("POST", "/v1/responses"): "/v1/completions may be meant",
        ("POST", "/v1/messages"): "/v1/completions may be meant",
        ("POST", "/api/chat"): "/v1/completions may be meant",
        ("GET", "/models"): "/v1/models may be meant",
        ("POST", "/v1/embeddings"): "/openapi.json tells which routes there are",
        ("GET", "/v1/completions"): "this route takes POST",
        ("PUT", "/health"): "this route takes GET, HEAD",
    }
    with httpx.Client(base_url=system.http_url, trust_env=False) as web:
        for (method, path), hint in expected.items():
            answer = web.request(method, path)
            is_route = hint.startswith("this route")
            code = "method_not_supported" if is_route else "unknown_url"
            assert answer.status_code == (405 if is_route else 404)
            if path.startswith("/v1/"):
                error = answer.json()["error"]
                assert (error["type"], error["param"], error["code"]) == (WRONG, None, code)
                message = error["message"]
            else:
                assert answer.json()["error_type"] == code
                message = answer.json()["error"]
            assert message.startswith(f"{method} {path}: ")
            assert message.endswith(hint)


# Characters that end a line for Python, and so for httpx, in what is one line of JSON.
ENDS = "one\u2028two\u2029three\x85four\x0bfive\x0csix\x1cseven\x1deight\x1enine"


def test_a_text_with_odd_line_ends_stays_in_its_event(system: System) -> None:
    guide = TextGenerationInputGrammarType(type="regex", value=ENDS)
    hub = InferenceClient(system.http_url)
    tokens = list(hub.text_generation("a", grammar=guide, max_new_tokens=200, stream=True, details=True))
    assert tokens[-1].generated_text == f"a{ENDS}"
    body = {"prompt": "a", "choices": [ENDS], "max_new_tokens": 200, "stream": True}
    with httpx.Client(base_url=system.http_url, trust_env=False, timeout=60) as web:
        job = web.post("/v1/jobs", json=body).json()
        for path, method, sent in (
            (f"/v1/jobs/{job['id']}/stream", "GET", None),
            ("/v1/completions", "POST", {"prompt": "a", "guided_choice": [ENDS], "max_tokens": 200, "stream": True}),
        ):
            with web.stream(method, path, json=sent) as answer:
                lines = [line for line in answer.iter_lines() if line]
            assert {line.partition(":")[0] for line in lines} <= {"data", "id", "event", ""}
            events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
            if sent is None:
                assert "".join(event.get("text", "") for event in events) == ENDS
                assert events[-1]["result"]["text"] == ENDS
            else:
                assert "".join(event["choices"][0]["text"] for event in events if event["choices"]) == ENDS
        whole = web.get(f"/v1/jobs/{job['id']}")
        assert len(whole.text.splitlines()) == 1
        assert whole.json()["result"]["text"] == ENDS
