"""A job as it lies in Redis, read without trust: the call that it asks for, and the text of its failure."""

from __future__ import annotations

import base64
import binascii
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fastgpt2.protocol.untrusted import MAX_PAYLOAD_BYTES, read

# The most bytes of the text of a failure, without its packing.
MAX_FAILURE_BYTES = 1 << 20

# The fields of a job that hold what the model reads: a prompt, or a chat.
PROMPT_FIELDS = ("prompt", "messages", "documents", "tools", "chat_template_kwargs")

# What stands in place of a prompt where prompts are not shown.
HIDDEN = "[prompt]"

# A shorter prompt is hidden only where it stands in quotes: its letters may be in any sentence.
_LEAST_HIDDEN = 8

# Messages quote the beginning of a long prompt: what begins with this many of its characters is hidden.
_HIDDEN_FROM = 24

# The prompt's text may stand in a chat's messages, and in arguments of calls within them: how deeply it is looked for,
# and in how many texts.
_MAX_DEPTH = 8
_MAX_TEXTS = 200

# What a chat template says is its author's own sentence, which may quote any part of any message. It is hidden as a
# whole if it has this many characters in a row of what the model reads, or a shorter text as a word.
_TEMPLATE_SAYS = re.compile(r"(the chat template (?:refuses these messages: |cannot render these messages \())([^\n]+)")
_LEAST_QUOTED = 12


@dataclass(frozen=True, slots=True)
class Call:
    """The call in a job's data.

    Attributes:
        function: its name, with its module's.
    """

    function: str
    args: list[Any]
    kwargs: dict[str, Any]

    @property
    def prompt(self) -> Any:
        """The prompt, or the messages of a chat, which has no prompt; of any type, None if there is neither."""
        prompt = self.args[0] if self.args else self.kwargs.get("prompt")
        return prompt or self.kwargs.get("messages") or prompt

    @property
    def secrets(self) -> list[Any]:
        """All that the model reads, and that is not shown where prompts are not."""
        return [*self.args[:1], *(self.kwargs[name] for name in PROMPT_FIELDS if name in self.kwargs)]


def read_call(data: bytes, most_bytes: int = MAX_PAYLOAD_BYTES) -> Call | None:
    """Return the call in the data of a job, which RQ packs by zlib or not.

    Args:
        most_bytes: the limit for the data without their packing.

    Returns:
        None if the data are too large, or no call of plain values.
    """
    inflater = zlib.decompressobj()
    try:
        plain = inflater.decompress(data, most_bytes)
        if inflater.unconsumed_tail:
            return None
    except zlib.error:
        plain = data
    try:
        function, _, args, kwargs = read(plain, most_bytes)
    except (ValueError, TypeError):
        return None
    if not isinstance(function, str) or not isinstance(args, list | tuple) or not isinstance(kwargs, dict):
        return None
    return Call(function, list(args), {name: value for name, value in kwargs.items() if isinstance(name, str)})


def read_failure(packed: bytes) -> str:
    """Return the text that RQ keeps of a failure: its last line is the error, what comes before a traceback.

    Returns:
        At most `MAX_FAILURE_BYTES` of it; "" if there is none that can be read.
    """
    try:
        inflater = zlib.decompressobj()
        return inflater.decompress(base64.b64decode(packed), MAX_FAILURE_BYTES).decode("utf-8", "replace")
    except (binascii.Error, ValueError, zlib.error):
        return ""


def split_failure(text: str) -> tuple[str, str]:
    """Return the name of the error's class, without its module, and the sentence, of a failure's text.

    The name is "" where the last line is no error of Python.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    found = re.fullmatch(r"([\w.]+)(?:: (.*))?", lines[-1]) if lines else None
    if found is None:
        return "", lines[-1] if lines else "no reason was recorded"
    return found[1].rpartition(".")[2], found[2] or found[1]


def hide_prompts(text: str, prompts: Iterable[Any]) -> str:
    """Return a text without the prompts that may stand in it, whole or their beginnings, quoted or not.

    Args:
        prompts: each a text, token ids, or a part of a chat.
    """
    prompts = list(prompts)
    text = _TEMPLATE_SAYS.sub(lambda said: said[1] + HIDDEN if _quotes(said[2], prompts) else said[0], text)
    secrets = [secret for prompt in prompts for secret in _texts_of(prompt)]
    for secret in sorted(set(secrets), key=len, reverse=True):
        forms = {secret, repr(secret)[1:-1], json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1]}
        for form in sorted(forms, key=len, reverse=True):
            text = _hide(text, form)
    return text


def _quotes(sentence: str, prompts: Iterable[Any]) -> bool:
    """Tell whether a sentence of a chat template may hold a part of what the model reads."""
    said = _as_said(sentence)
    texts = {_as_said(found) for prompt in prompts for found in _strings_in(prompt, _MAX_DEPTH)} - {""}
    short = [re.escape(one) for one in texts if len(one) < _LEAST_QUOTED]
    if short and re.search(rf"(?<!\w)(?:{'|'.join(short)})(?!\w)", said):
        return True
    read = "\n".join(one for one in texts if len(one) >= _LEAST_QUOTED)
    return any(said[at : at + _LEAST_QUOTED] in read for at in range(len(said) - _LEAST_QUOTED + 1))


def _as_said(text: str) -> str:
    """Return a text as the sentence of a template has it, which is one line, whatever its capitals."""
    return " ".join(text.casefold().split())


def _texts_of(prompt: Any) -> list[str]:
    if isinstance(prompt, list | tuple) and prompt and all(isinstance(one, int) for one in prompt):
        return [", ".join(map(str, prompt[:_MAX_TEXTS]))]
    return [found for _, found in zip(range(_MAX_TEXTS), _strings_in(prompt, _MAX_DEPTH), strict=False) if found]


def _strings_in(value: Any, depth: int) -> Iterator[str]:
    """Yield the strings in a value, but those that name a message's role or the kind of its part."""
    if isinstance(value, str):
        yield value
    elif depth and isinstance(value, Mapping):
        for name, inner in value.items():
            if name not in ("role", "type"):
                yield from _strings_in(inner, depth - 1)
    elif depth and isinstance(value, list | tuple):
        for inner in value:
            yield from _strings_in(inner, depth - 1)


def _hide(text: str, form: str) -> str:
    if len(form) < _LEAST_HIDDEN:
        for quote in "'\"":
            text = text.replace(f"{quote}{form}{quote}", HIDDEN)
        return text
    head, at, kept = form[:_HIDDEN_FROM], 0, []
    while (found := text.find(head, at)) >= 0:
        kept += [text[at:found], HIDDEN]
        # Character by character: a copy of each place would take the square of the length.
        at = found + len(head)
        while at < len(text) and at - found < len(form) and text[at] == form[at - found]:
            at += 1
    return "".join([*kept, text[at:]])
