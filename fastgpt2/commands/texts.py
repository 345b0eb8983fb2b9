"""A prompt from the command line, and a result onto standard output: what several commands share."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgpt2.engine.generation import GenerationRequest, GenerationResult
    from fastgpt2.worker.stream import Piece


def request_fields(values: dict[str, Any]) -> dict[str, Any]:
    """What the options say of a request, by the names of its fields."""
    return {
        "max_new_tokens": values["max_new_tokens"],
        "stop": [values["stop"]] if values["stop"] else [],
        "ignore_eos": values["ignore_eos"],
        "min_new_tokens": values["min_new_tokens"],
        "logprobs": values["logprobs"],
        "echo": values["echo"],
    }


def request_of(values: dict[str, Any]) -> GenerationRequest:
    """
    Raises:
        BadRequest: a value is out of bounds.
    """
    from fastgpt2.engine.generation import GenerationRequest

    return GenerationRequest(values["prompt"], **request_fields(values))


def print_result(result: GenerationResult, values: dict[str, Any], prompt: str | None = None) -> None:
    """The text after its prompt, by default that of the command line; or, if asked for, all as JSON."""
    if values["json"]:
        from fastgpt2.worker.job import result_to_json

        print(json.dumps(result_to_json(result, result.timings.queue_seconds)))
        return
    print((_before(values) if prompt is None else prompt) + result.text)


def print_pieces(pieces: Iterable[Piece], values: dict[str, Any]) -> None:
    """The text after its prompt, as it comes."""
    text = ""
    print(_before(values), end="", flush=True)
    for piece in pieces:
        if piece.at < len(text):
            print("\n(started again elsewhere, it comes out otherwise)", file=sys.stderr, flush=True)
            print(_before(values) + text[: piece.at], end="")
        print(piece.text, end="", flush=True)
        text = text[: piece.at] + piece.text
    print(flush=True)


def _before(values: dict[str, Any]) -> str:
    """The prompt, unless it is part of the result's text."""
    prompt: str = "" if values.get("echo") else values.get("prompt", "")
    return prompt
