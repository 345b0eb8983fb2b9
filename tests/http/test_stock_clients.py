"""Programs that others made, in their own settings: the requests that they send, and what they read in the answers.

`stock_requests.json` has the requests: the client with its version and what was run or called, the body, and what the
client reads. Most were taken down while the client ran (`"seen": "run"`), the others follow from its source. Members
that a client reads are paths with a type, such as `choices.0.text: str`. Of a stream, `each` is read in every event,
`first` and `last` in one, and `but_last` in all but the last. docs/clients.md tells people how to set the clients up.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from support.running import StartEndpoint

from fastgpt2.system.up import System

pytestmark = pytest.mark.processes

REQUESTS: list[dict[str, Any]] = json.loads(Path(__file__).with_name("stock_requests.json").read_text("utf-8"))
TYPES: dict[str, type | tuple[type, ...]] = {
    "str": str,
    "int": int,
    "float": (int, float),
    "bool": bool,
    "list": list,
    "dict": dict,
}


def name_of(request: dict[str, Any]) -> str:
    return f"{request['client']}: {request['use'][:60]}"


@pytest.fixture(scope="module")
def http(system: System) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=system.http_url, trust_env=False, timeout=60) as client:
        yield client


@pytest.mark.parametrize("request_", REQUESTS, ids=name_of)
def test_a_stock_client_gets_what_it_reads(http: httpx.Client, request_: dict[str, Any]) -> None:
    answer = http.request(request_["method"], request_["path"], json=spelled_out(request_.get("body")))
    assert answer.status_code == request_.get("status", 200), answer.text
    if request_["reader"] == "status":
        return
    if request_["reader"] != "json":
        check_stream(answer, request_)
        return
    body = answer.json()
    for member in request_["reads"]:
        check_member(body, member)
    for name, value in request_.get("equals", {}).items():
        assert body[name] == value
    assert request_.get("says", "") in answer.text


def spelled_out(body: Any) -> Any:
    """Return a body with each `{"repeated": TEXT, "times": N}` in it as the text that it stands for."""
    if isinstance(body, dict):
        if body.keys() == {"repeated", "times"}:
            return body["repeated"] * body["times"]
        return {name: spelled_out(value) for name, value in body.items()}
    return body


def check_stream(answer: httpx.Response, request: dict[str, Any]) -> None:
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = READERS[request["reader"]](answer.text)
    read: dict[str, list[Any]] = {"each": events, "but_last": events[:-1], "first": events[:1], "last": events[-1:]}
    for which, some in read.items():
        assert some
        for event in some:
            for member in request.get(which, ()):
                check_member(event, member)
    if "tokens" in request:
        counts = [event["usage"]["completion_tokens"] for event in events]
        assert counts == sorted(counts)
        assert counts[-1] == request["tokens"]


def check_member(value: Any, member: str) -> None:
    """Check that a value has a member, named by a path, of the type that the client takes it for."""
    path, _, kind = member.partition(": ")
    whole = value
    for step in path.split("."):
        assert step.isdigit() or step in value, f"{member} is missing: {whole}"
        value = value[int(step) if step.isdigit() else step]
    assert isinstance(value, TYPES[kind]), f"{member} is {value!r}: {whole}"
    # A bool is an int to Python, and to no client.
    assert isinstance(value, bool) == (kind == "bool")


def read_lines(text: str) -> list[Any]:
    """Read a stream as SGLang's benchmark does, which takes each line that is not empty for data."""
    lines = [line.strip().removeprefix("data: ") for line in text.split("\n")]
    return [json.loads(line) for line in lines if line and line != "[DONE]"]


def read_data_lines(text: str) -> list[Any]:
    """Read a stream as guidellm, huggingface_hub and text-generation do, line by line as Python splits them."""
    lines = [line.removeprefix("data:").strip() for line in text.splitlines() if line.startswith("data:")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def read_paragraphs(text: str) -> list[Any]:
    """Read a stream as vLLM's benchmark and aiperf do, which cut it at every two line ends."""
    parts = [part.strip().removeprefix("data: ") for part in text.split("\n\n")]
    return [json.loads(part) for part in parts if part and part != "[DONE]"]


def read_events(text: str) -> list[Any]:
    """Read a stream as the standard has it, as OpenAI's clients and the AI SDK do."""
    events, data = [], list[str]()
    for line in text.split("\n"):
        if line:
            name, _, value = line.partition(":")
            if name == "data":
                data.append(value.removeprefix(" "))
        elif data:
            events.append("\n".join(data))
            data = []
    assert not data, "the last event has no end"
    return [json.loads(event) for event in events if event != "[DONE]"]


READERS: dict[str, Callable[[str], list[Any]]] = {
    "lines": read_lines,
    "data lines": read_data_lines,
    "paragraphs": read_paragraphs,
    "events": read_events,
}


def test_nothing_but_empty_lines_is_sent_while_a_stream_waits(start_endpoint: StartEndpoint) -> None:
    """SGLang's benchmark takes a comment for JSON; 44 of 60 requests that waited for a second failed by it."""
    endpoint = start_endpoint()  # whose queue no worker serves
    for path, body in (
        ("/v1/completions", {"prompt": "a", "stream": True}),
        ("/generate_stream", {"inputs": "a"}),
        ("/", {"inputs": "a", "stream": True}),
    ):
        with httpx.stream("POST", f"{endpoint.url}{path}", json=body, trust_env=False, timeout=60) as answer:
            assert next(answer.iter_raw()) == b"\n"
