"""The messages of a chat, and how the model's template makes a prompt of them: checks, bounds and schemas.

The names are those of transformers' `apply_chat_template` and of OpenAI's API. Imports nothing heavy.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from functools import partial
from typing import Annotated, Any, TypeAlias

from fastgpt2.engine.decoding.options import TextOptions
from fastgpt2.errors import BadRequest, PromptTooLong
from fastgpt2.fields import Field, described, is_listed, items_of, plain, refusal, shown, why_no_json

MAX_MESSAGES = 4096
MAX_ROLE_CHARACTERS = 64
# OpenAI's own bound.
MAX_TOOLS = 128
MAX_DOCUMENTS = 1024
MAX_TEMPLATE_VALUES = 64

# As much as a text that is a prompt may have; each of the fields here, as JSON.
MAX_CHAT_BYTES = 1 << 20

Object: TypeAlias = dict[str, Any]

# The names under which clients send a part of a message that is text, each with the member that has it.
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}

# What a message may have in place of a content.
_INSTEAD_OF_CONTENT = ("tool_calls", "function_call", "refusal")

# What a template gets by fields of their own.
_OWN_VALUES = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template")


def _as_json(name: str, value: Any) -> Any:
    """Return a value as JSON reads it: what other libraries have for objects, lists and numbers as Python's own.

    Raises:
        BadRequest: it is no JSON, or no Unicode.
        PromptTooLong: it is larger than a prompt may be.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=_as_known)
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise BadRequest(f"{name} is not valid Unicode: lone surrogate U+{ord(text[error.start]):04X}") from None
    except (TypeError, ValueError, RecursionError) as reason:
        raise BadRequest(f"{name} is no JSON ({why_no_json(reason)[:100]})") from None
    if size > MAX_CHAT_BYTES:
        raise PromptTooLong(f"{name} has {size} bytes of JSON; the limit is {MAX_CHAT_BYTES}: shorten it")
    return json.loads(text)


def _as_known(value: Any) -> Any:
    """Return what `json` knows for an object that it does not: of a dataclass, of pydantic, of numpy, any mapping."""
    if isinstance(value, Mapping):
        return dict(value)
    if callable(getattr(value, "model_dump", None)):
        return value.model_dump()
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if is_listed(value):
        return list(items_of(value))
    found = plain(value)
    if found is value:
        raise TypeError(f"{type(value).__name__} is no value of JSON")
    return found


def _check_messages(name: str, value: Any) -> tuple[Object, ...]:
    if not is_listed(value):
        raise refusal(name, 'a list of messages, such as [{"role": "user", "content": "Hello"}]', value, of_type=True)
    if not len(value):
        raise BadRequest(f"{name} is an empty list: give at least one message")
    if len(value) > MAX_MESSAGES:
        raise BadRequest(f"{name} holds {len(value)} messages; the limit is {MAX_MESSAGES}: leave out the oldest")
    return tuple(_check_message(f"{name}[{number}]", one) for number, one in enumerate(_as_json(name, value)))


def _check_message(name: str, value: Any) -> Object:
    """Return a message without the members that are null, as transformers does: many templates would write "None"."""
    if not isinstance(value, dict):
        raise BadRequest(
            f'{name} must be an object, such as {{"role": "user", "content": "Hello"}}, not {described(value)}'
        )
    message = {member: one for member, one in value.items() if one is not None}
    role = message.get("role")
    if not isinstance(role, str) or not 1 <= len(role) <= MAX_ROLE_CHARACTERS:
        raise BadRequest(
            f"{name}.role must be a string of 1 to {MAX_ROLE_CHARACTERS} characters, such as user, assistant or "
            f"system, not {described(role)}"
        )
    content = message.get("content")
    if isinstance(content, list):
        message["content"] = [_check_part(f"{name}.content[{at}]", part) for at, part in enumerate(content)]
    elif content is None:
        if not any(member in message for member in _INSTEAD_OF_CONTENT):
            raise BadRequest(f"{name}.content is missing: give a string")
    elif not isinstance(content, str):
        raise refusal(f"{name}.content", "a string, or a list of parts that are text", content, of_type=True)
    return message


def _check_part(name: str, part: Any) -> Object:
    """Return a part of a message's content, by the names that templates know it by."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        raise refusal(name, 'an object, such as {"type": "text", "text": "Hello"}', part, of_type=True)
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in _TEXT_PARTS:
        raise BadRequest(f"{name} is of the type {shown(kind)}; GPT-2 reads text alone: leave that part out")
    text = part.get(_TEXT_PARTS[kind])
    if not isinstance(text, str):
        raise refusal(f"{name}.{_TEXT_PARTS[kind]}", "a string", text, of_type=True)
    return {"type": "text", "text": text}


def _check_objects(most: int, what: str, name: str, value: Any) -> tuple[Object, ...]:
    if not is_listed(value):
        raise refusal(name, f"a list of {what}, each an object", value, of_type=True)
    if len(value) > most:
        raise BadRequest(f"{name} holds {len(value)} {what}; the limit is {most}")
    checked = tuple(_as_json(name, value))
    for number, one in enumerate(checked):
        if not isinstance(one, dict):
            raise refusal(f"{name}[{number}]", "an object", one, of_type=True)
    return checked


def _check_template_values(name: str, value: Any) -> Object | None:
    if not isinstance(value, Mapping):
        raise refusal(name, "an object of values for the chat template", value, of_type=True)
    if len(value) > MAX_TEMPLATE_VALUES:
        raise BadRequest(f"{name} holds {len(value)} values; the limit is {MAX_TEMPLATE_VALUES}")
    checked: Object = _as_json(name, value)
    for key in checked:
        if not key.isidentifier():
            raise BadRequest(f"{name} holds {shown(key)}, which is no name that a template could have")
        if key == "chat_template":
            raise BadRequest(f"{name} holds chat_template: a template comes with the model, not with a request")
        if key in _OWN_VALUES:
            raise BadRequest(f"{name} holds {key}, which is a field of its own: give it beside {name}")
    return checked or None


def _object_field(check: Callable[[str, Any], Any]) -> Field:
    return Field({"type": "object", "additionalProperties": True}, check)


def _objects_field(most: int, what: str) -> Field:
    schema = {"type": "array", "items": {"type": "object", "additionalProperties": True}, "maxItems": most}
    return Field(schema, partial(_check_objects, most, what))


_PART_SCHEMA = {
    "type": "object",
    "properties": {"type": {"type": "string", "enum": list(_TEXT_PARTS)}, "text": {"type": "string"}},
    "required": ["type"],
    "additionalProperties": True,
}
_CONTENT_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART_SCHEMA}, {"type": "null"}]}
_MESSAGE_SCHEMA = {
    "type": "object",
    "properties": {
        "role": {"type": "string", "minLength": 1, "maxLength": MAX_ROLE_CHARACTERS},
        "content": _CONTENT_SCHEMA,
    },
    "required": ["role"],
    "additionalProperties": True,
}
_MESSAGES_SCHEMA = {"type": "array", "items": _MESSAGE_SCHEMA, "minItems": 1, "maxItems": MAX_MESSAGES}

Messages = Annotated[tuple[Object, ...], Field(_MESSAGES_SCHEMA, _check_messages)]
Tools = Annotated[tuple[Object, ...], _objects_field(MAX_TOOLS, "tools")]
Documents = Annotated[tuple[Object, ...], _objects_field(MAX_DOCUMENTS, "documents")]
TemplateValues = Annotated[Mapping[str, Any], _object_field(_check_template_values)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions(TextOptions):
    """The messages that a text answers, and what else the model's chat template makes a prompt of.

    Args:
        messages: the chat so far, the oldest first: objects with a `role`, a `content` and whatever else the template
            reads. The content is a string, or a list of parts that are text. None for a prompt that is no chat.
        add_generation_prompt: the prompt ends with what begins the assistant's answer. None is True, or False beside
            `continue_final_message`.
        continue_final_message: the text continues the last message, and does not begin a new one.
        tools: descriptions of functions, as JSON schemas, for templates that read them.
        documents: texts that the answer may draw on, for templates that read them.
        chat_template_kwargs: further values, by the names that the template has for them.
    """

    messages: Messages | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    tools: Tools = ()
    documents: Documents = ()
    chat_template_kwargs: TemplateValues | None = None

    def check_chat(self) -> None:
        """Raise BadRequest if a field that shapes a chat stands without one, or two of them exclude each other."""
        if self.messages is None:
            for name in CHAT_FIELDS[1:]:
                if getattr(self, name) not in (None, False, ()):
                    raise BadRequest(f"{name} goes with messages, and there are none: leave it out")
        elif self.add_generation_prompt and self.continue_final_message:
            raise BadRequest(
                "add_generation_prompt and continue_final_message are both true: a text begins a new message, or "
                "continues the last one; leave one out"
            )

    @property
    def adds_generation_prompt(self) -> bool:
        """Tell whether the prompt ends with what begins the assistant's answer."""
        given = self.add_generation_prompt
        return not self.continue_final_message if given is None else given

    def template_values(self) -> Object:
        """Return what the template gets of the request, by the names that transformers gives it."""
        return {
            **(self.chat_template_kwargs or {}),
            "messages": list(self.messages or ()),
            "tools": list(self.tools) or None,
            "documents": list(self.documents) or None,
            "add_generation_prompt": self.adds_generation_prompt,
        }


# The fields of a chat, by which one mapping of fields is told from another.
CHAT_FIELDS = (
    "messages", "add_generation_prompt", "continue_final_message", "tools", "documents", "chat_template_kwargs",
)  # fmt: skip


def is_messages(value: Any) -> bool:
    """Tell whether a prompt, as a program gives it, is a list of messages, as transformers' pipelines take one."""
    return isinstance(value, list | tuple) and len(value) > 0 and all(map(_is_message, value[:1]))


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and "role" in value and not {"prompt", "messages"} & value.keys()
