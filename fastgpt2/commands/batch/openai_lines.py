"""The lines of OpenAI's batches: a request for completions or for a chat a line, and a line of answer for each.

Sources: OpenAI's API reference, "Batch", the request input and the request output objects; vLLM's `run_batch`, which
has the same lines. A request that an endpoint would refuse has that endpoint's status and error as its response; a line
that is no request to an endpoint has no response, but an error.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastgpt2.api.client.outcome import Outcome, unwrap
from fastgpt2.api.http.chat import chat_object
from fastgpt2.api.http.chat_request import Chat, parse_chat, translate_chat_error
from fastgpt2.api.http.completion_request import Completion, parse_completion, translate_error
from fastgpt2.api.http.completions import completion_object
from fastgpt2.api.http.responses import BadField, error_object
from fastgpt2.commands.batch.lines import Line, RawLineReader, decode_line, digest_of, parse_json
from fastgpt2.commands.batch.records import Origin, Record, read_name
from fastgpt2.engine.decoding.records import GenerationResult
from fastgpt2.errors import BadRequest, FastGPT2Error
from fastgpt2.protocol.keys import Priority

COMPLETIONS_URL, CHATS_URL = "/v1/completions", "/v1/chat/completions"
_ID_PREFIX = "batch_req_"
MAX_ID_CHARACTERS = 512

# The names that this API has for our options.
_NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}


class NoRequest(BadRequest):
    """Raised if a line is no request that can be made to an endpoint.

    Attributes:
        code: the error's, for programs.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class OpenAILineReader(RawLineReader):
    """Turns OpenAI's lines into jobs.

    Args:
        options: the fields of a request that the command line gives, for bodies that do not say otherwise.
        priority: of all jobs whose bodies name none.
        timeout: the seconds from its enqueueing that each job may take.
    """

    def __init__(self, options: Mapping[str, Any], priority: Priority, timeout: float | None) -> None:
        self._defaults = {_NAMES.get(name, name): value for name, value in options.items()}
        self._priority = priority
        self._timeout = timeout

    def _line(self, raw: bytes, number: int) -> Line:
        row: dict[str, Any] = {"custom_id": None}
        digest = digest_of(raw)
        try:
            value = _parse_line(raw)
            row["custom_id"] = _check_custom_id(value)
            url, given = _check_request(value)
            defaults = self._defaults if url == COMPLETIONS_URL else _in_chats(self._defaults, given)
            body = {**defaults, **given}
            # The digests of completions are those that earlier releases have written.
            of_url = [] if url == COMPLETIONS_URL else [url]
            digest = digest_of(json.dumps([row["custom_id"], body, *of_url], sort_keys=True).encode())
            completion = self._parse(url, body)
        except BadRequest as error:
            return Line(error, digest, row, number)
        return Line(completion.plans[0], digest, row, number, completion)

    def _too_long(self, error: BadRequest) -> BadRequest:
        return NoRequest("line_too_long", str(error))

    def _parse(self, url: str, body: dict[str, Any]) -> Completion | Chat:
        given = {"priority": self._priority, **body}
        completion = parse_completion(given) if url == COMPLETIONS_URL else parse_chat(given)
        if completion.request.stream:
            raise BadField("stream", "stream must be false or left out in a batch: a line has one answer")
        plans = [replace(plan, options=replace(plan.options, timeout=self._timeout)) for plan in completion.plans]
        return replace(completion, plans=plans)


def _in_chats(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults of completions as a chat has them, whose body has these fields."""
    own = {name: value for name, value in defaults.items() if name != "logprobs"}
    if defaults.get("logprobs") is not None:
        own.update(logprobs=True, top_logprobs=defaults["logprobs"])
    if given.get("max_completion_tokens") is not None:
        own.pop("max_tokens", None)
    return own


def looks_like_request(raw: bytes) -> bool:
    """Tell whether a line is one of OpenAI's batches, by its fields."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and {"custom_id", "body"} <= value.keys()


def _parse_line(raw: bytes) -> dict[str, Any]:
    try:
        value = parse_json(decode_line(raw))
    except BadRequest as reason:
        raise NoRequest("invalid_json", str(reason)) from None
    if not isinstance(value, dict):
        raise NoRequest("invalid_request", "the line is no object with custom_id, method, url and body")
    return value


def _check_custom_id(value: dict[str, Any]) -> str:
    custom_id = value.get("custom_id")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= MAX_ID_CHARACTERS:
        raise NoRequest("invalid_custom_id", f"custom_id must be a string of 1 to {MAX_ID_CHARACTERS} characters")
    return custom_id


def _check_request(value: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the url and the body of a line."""
    if value.get("method", "POST") != "POST":
        raise NoRequest("invalid_method", f"method must be POST, not {str(value['method'])[:20]!r}")
    url = value.get("url")
    if not isinstance(url, str) or url not in (COMPLETIONS_URL, CHATS_URL):
        raise NoRequest(
            "invalid_url",
            f"url must be {COMPLETIONS_URL} or {CHATS_URL}, not {str(url)[:100]!r}: GPT-2 continues texts, and has no "
            "embeddings",
        )
    for name in value:
        if name not in ("custom_id", "method", "url", "body"):
            raise NoRequest("invalid_request", f"unknown field {name[:100]!r}; known are custom_id, method, url, body")
    body = value.get("body")
    if not isinstance(body, dict):
        raise NoRequest("invalid_body", f"body must be an object, as {url} takes it")
    return url, body


class OpenAIRecords:
    """Records as OpenAI's batches have them. The id tells which line a record belongs to."""

    has_rows = False

    def make(self, line: Line, index: int, mark: str, outcomes: Sequence[Outcome]) -> Record:
        del index  # OpenAI's lines have no number; custom_id tells them apart
        response, error = _respond(line, outcomes)
        return {
            "id": f"{_ID_PREFIX}{line.digest}-{mark}",
            "custom_id": line.row.get("custom_id"),
            "response": response,
            "error": error,
        }

    def origin(self, record: Any) -> Origin:
        response = record["response"]
        failed = record["error"] is not None or response["status_code"] != 200
        return read_name(record["id"].removeprefix(_ID_PREFIX), failed)

    def error(self, record: Record) -> tuple[str, str]:
        if record["error"] is not None:
            return record["error"]["code"], record["error"]["message"]
        error = record["response"]["body"]["error"]
        return error["code"] or error["type"], error["message"]

    def tokens(self, record: Record) -> int:
        response = record["response"]
        if response is None or response["status_code"] != 200:
            return 0
        count: int = response["body"]["usage"]["completion_tokens"]
        return count


OPENAI_RECORDS = OpenAIRecords()


def _respond(line: Line, outcomes: Sequence[Outcome]) -> tuple[Record | None, Record | None]:
    """Return the response and the error of a line, one of which is None."""
    request_id = f"req_{uuid.uuid4().hex}"
    try:
        results = [unwrap(outcome) for outcome in outcomes]
    except FastGPT2Error as reason:
        if isinstance(reason, NoRequest):
            return None, {"code": reason.code, "message": str(reason)}
        error = _translate(reason, line.completion)
        status, body = error.http_status, error_object(error, openai=True)
    else:
        assert line.completion is not None
        status, body = 200, _answer(line.completion, results)
    return {"status_code": status, "request_id": request_id, "body": body}, None


def _translate(error: FastGPT2Error, completion: Completion | Chat | None) -> FastGPT2Error:
    """Return the error of a line's job, or of its body, as the route says it that the line is for."""
    if isinstance(completion, Chat):
        return translate_chat_error(error, completion.request)
    return translate_error(error, None if completion is None else completion.request)


def _answer(completion: Completion | Chat, results: list[GenerationResult]) -> Record:
    answer_id = str(uuid.uuid4())
    if isinstance(completion, Chat):
        return dict(chat_object(answer_id, completion, results[0]))
    return dict(completion_object(answer_id, completion, results))
