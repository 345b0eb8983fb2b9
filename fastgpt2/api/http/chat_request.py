"""The body of `POST /v1/chat/completions`: OpenAI's fields, vLLM's, and this package's own; and the job it asks for.

Source: OpenAI's API reference, "Create chat completion", and vLLM's `ChatCompletionRequest`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

from fastgpt2.api.client.enqueue import JobPlan, plan_job
from fastgpt2.api.http.openai_request import OpenAIRequest, in_order, take_fields, translate, without_model
from fastgpt2.engine.decoding.chat_options import Documents, Messages, TemplateValues, Tools
from fastgpt2.engine.decoding.records import Logprobs, NewTokens
from fastgpt2.errors import BadRequest, FastGPT2Error
from fastgpt2.fields import Field, fields_of, only, refusal

EXAMPLE = '{"model": "MODEL", "messages": [{"role": "user", "content": "Hello"}]}'

_NO_TOKENS_ADDED = "must be false or left out: the chat template says which special tokens stand in a chat"
_TOOL_CHOICES = ("none", "auto", "required")


def _check_tool_choice(name: str, value: Any) -> str:
    """Return the choice; "required" for a function that is named, as neither can be had."""
    if isinstance(value, dict):
        return "required"
    if value not in _TOOL_CHOICES:
        raise refusal(name, f"one of {', '.join(_TOOL_CHOICES)}, or an object that names a function", value)
    return str(value)


_TOOL_CHOICE = Field(
    {"anyOf": [{"type": "string", "enum": list(_TOOL_CHOICES)}, {"type": "object", "additionalProperties": True}]},
    _check_tool_choice,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest(OpenAIRequest):
    """The body of a request, checked when made.

    Raises:
        BadRequest: a field has a wrong type, is out of bounds, or asks for what there is not.
    """

    messages: Annotated[Messages, "The chat so far, the oldest message first."]
    max_completion_tokens: Annotated[NewTokens, "As many as there is room for by default."] | None = None
    max_tokens: Annotated[NewTokens, "The older name of `max_completion_tokens`."] | None = None
    logprobs: Annotated[bool, "Each choice tells how likely its tokens are."] = False
    top_logprobs: Annotated[Logprobs, "With `logprobs`: the likeliest tokens of each place, too."] | None = None
    tools: Annotated[Tools, "For a template that reads them, and with `tool_choice: none` only."] = ()
    tool_choice: Annotated[str, _TOOL_CHOICE, "A text is never read as a call of a tool."] | None = None

    add_generation_prompt: Annotated[bool, "True by default, unless the last message is continued."] | None = None
    continue_final_message: Annotated[bool, "The answer continues the last message."] = False
    add_special_tokens: Annotated[bool, only(False, _NO_TOKENS_ADDED)] = False
    echo: Annotated[bool, "With `continue_final_message`: the answer begins with the last message."] = False
    documents: Annotated[Documents, "For a template that reads them."] = ()
    chat_template_kwargs: Annotated[TemplateValues, "Further values for the template."] | None = None

    def __post_init__(self) -> None:
        OpenAIRequest.__post_init__(self)
        if self.top_logprobs is not None and not self.logprobs:
            raise BadRequest("top_logprobs goes with logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise BadRequest("max_tokens and max_completion_tokens are both given; they are the same: leave one out")
        if self.tools and self.tool_choice != "none":
            raise BadRequest(
                "tools must be left out, or stand beside tool_choice: none; an answer is text here, and is not read as "
                "a call of a tool"
            )
        if self.tool_choice == "required":
            raise BadRequest("tool_choice must be none, auto or left out: an answer is not read as a call of a tool")
        if self.echo and not self.continue_final_message:
            raise BadRequest("echo goes with continue_final_message: true")

    @property
    def echoed(self) -> str:
        """Return the text with which each answer begins: that of the last message, if it is asked for."""
        content = self.messages[-1].get("content", "") if self.echo else ""
        return content if isinstance(content, str) else "\n".join(part["text"] for part in content)

    def plan(self) -> JobPlan:
        """Return the plan of the job.

        Raises:
            BadRequest: what is asked cannot be; the message has the names of a job's fields.
        """
        most = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        messages = tuple(map(_with_read_arguments, self.messages))
        return plan_job(
            "", self.job_fields(self.stream, messages=messages, max_new_tokens=most, logprobs=logprobs, echo=False)
        )


def _with_read_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message whose calls of tools have their arguments as objects, as templates want them, and not as JSON.

    As vLLM does.
    """
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return {**message, "tool_calls": [_with_object(call) for call in calls]}


def _with_object(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


@dataclass(frozen=True, slots=True)
class Chat:
    """A request, checked, and what it comes to.

    Attributes:
        plans: its job, alone.
        asked: the fields that were given, in one order, to compare with another request.
    """

    request: ChatRequest
    plans: list[JobPlan]
    asked: list[tuple[str, Any]]

    def without_model(self) -> Chat:
        """Return the same with a job that names no model."""
        return replace(self, plans=without_model(self.plans))


def parse_chat(body: Mapping[str, Any]) -> Chat:
    """Read the body of a request; null stands for a default.

    Raises:
        BadRequest: a field is unknown, of a wrong type, out of bounds, or asks for what there is not.
    """
    given = take_fields(body, fields_of(ChatRequest))
    if "messages" not in given:
        raise BadRequest(f"messages is missing: send {EXAMPLE}")
    try:
        request = ChatRequest(**given)
        return Chat(request, [request.plan()], in_order(given))
    except BadRequest as error:
        raise translate_chat_error(error) from None


def translate_chat_error(error: FastGPT2Error, request: ChatRequest | None = None) -> FastGPT2Error:
    """Return the error with our fields by the names of this API; see `translate`."""
    older = request is not None and request.max_tokens is not None
    names = {
        "max_new_tokens": "max_tokens" if older else "max_completion_tokens",
        "min_new_tokens": "min_tokens",
        "shorten the prompt": "leave out the oldest messages, or shorten the chat",
    }
    return translate(error, names, fields_of(ChatRequest), request)
