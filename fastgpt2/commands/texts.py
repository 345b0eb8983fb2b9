"""A prompt from the command line, and a result onto standard output: what several commands share."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgpt2.engine.generation import GenerationRequest, GenerationResult


def request_of(values: dict[str, Any]) -> GenerationRequest:
    """
    Raises:
        BadRequest: a value is out of bounds.
    """
    from fastgpt2.engine.generation import GenerationRequest

    stop = (values["stop"],) if values["stop"] else ()
    return GenerationRequest(values["prompt"], values["max_new_tokens"], stop, values["ignore_eos"])


def print_result(result: GenerationResult, values: dict[str, Any], prompt: str | None = None) -> None:
    """The text after its prompt, as far as that is known here; or, if asked for, all as JSON."""
    if values["json"]:
        from fastgpt2.worker.job import result_to_json

        print(json.dumps(result_to_json(result, result.timings.queue_seconds)))
        return
    print((values.get("prompt", "") if prompt is None else prompt) + result.text)
