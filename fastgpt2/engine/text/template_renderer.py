"""The process that renders chats: a chat template is a program of whoever made the model, and may do anything.

    python -m fastgpt2.engine.text.template_renderer      started by `ChatTemplate`, which writes to its standard input

jinja2's sandbox keeps a template from Python, and the operating system keeps it from taking all time and memory
(`text/trial.py`). A template gets plain values of JSON, and gives a text.
"""

from __future__ import annotations

from typing import Any

import jinja2

from fastgpt2.engine.text.template_environment import RaisedByTemplate, make_environment
from fastgpt2.engine.text.trial import answer_questions, limit_memory

MAX_MEGABYTES = 256
MAX_SECONDS = 1

# As long as a prompt may be.
MAX_RENDERED_BYTES = 1 << 20

# A worker whose model chats asks all the time, and its other jobs wait while a new process starts.
IDLE_SECONDS = 24 * 3600.0

# Earlier ones have holes in their sandbox.
_OLDEST_JINJA = (3, 1, 6)
_MAX_SAID_CHARACTERS = 300

# What no message has: it shows what a template makes of a content.
_PROBE = "\U000f0001probe\U000f0002"

# Behind the last message, it shows where that ends in the prompt. The space shows whether the template cuts it off.
_END = "\U000f0003end\U000f0004 "

# The names under which messages have a model's thoughts. Templates know the first, those of gpt-oss the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")

# Some templates add these to a text without a look whether they are there.
_SPECIAL = dict.fromkeys(("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token"), "")


class Refusal(Exception):
    """Raised with a clause on what cannot be rendered, whose subject is the template."""


class Renderer:
    """What answers in the process: the first question has the templates, all others are chats."""

    def __init__(self) -> None:
        self._sources: dict[str, str] = {}
        self._templates: dict[str, jinja2.Template] = {}
        # By its name, whether a template reads contents that are strings, and such that are lists of parts.
        self._reads_text: dict[str, bool] = {}
        self._reads_parts: dict[str, bool] = {}

    def answer(self, question: dict[str, Any]) -> dict[str, str]:
        """Return what a question came to: `text`, or `error`, a clause whose subject is the template."""
        try:
            if "sources" in question:
                self._compile(question["sources"])
                return {"text": ""}
            return {"text": self._render(question["name"], question["values"], question["continues"])}
        except Refusal as reason:
            return {"error": str(reason)}
        except MemoryError:
            return {"error": f"takes more than {MAX_MEGABYTES} MB"}

    def _compile(self, sources: dict[str, str]) -> None:
        """Compile the templates, and find out by a trial which form of a message's content each of them reads."""
        if tuple(map(int, jinja2.__version__.split(".")[:3])) < _OLDEST_JINJA:
            raise Refusal(f"needs jinja2 3.1.6 or newer, not {jinja2.__version__}: pip install 'fastgpt2[chat]'")
        environment = make_environment()
        for name, source in sources.items():
            try:
                self._templates[name] = environment.from_string(source)
            except MemoryError:
                raise
            except Exception as reason:  # of jinja2's, or of Python's own compiler
                raise Refusal(f"is no template ({_say(reason)})") from None
            self._sources[name] = source
            as_text, as_parts = self._probe(name, _PROBE), self._probe(name, [{"type": "text", "text": _PROBE}])
            self._reads_text[name] = _PROBE in as_text
            # A template that writes any content out as it is writes the names of the parts too.
            writes_names = "'type'" in as_parts or '"type"' in as_parts
            self._reads_parts[name] = _PROBE in as_parts and not writes_names

    def _probe(self, name: str, content: Any) -> str:
        values = {**_SPECIAL, "messages": [{"role": "user", "content": content}], "add_generation_prompt": True}
        try:
            return self._run(name, {**values, "tools": None, "documents": None})
        except Refusal:
            return ""

    def _render(self, name: str, values: dict[str, Any], continues: bool) -> str:
        values["messages"] = [self._adapt(name, message) for message in values["messages"]]
        if not continues:
            return self._run(name, values)
        final = self._mark_end(name, values["messages"][-1])
        text = self._run(name, values)
        at = text.rfind(_END.strip())
        if at < 0 or final.strip() not in text:
            raise Refusal("leaves out the last message or a part of it, so that there is nothing to continue")
        return text[:at] if text.startswith(_END, at) else text[:at].rstrip()

    def _mark_end(self, name: str, message: dict[str, Any]) -> str:
        """Put the mark behind the text of the last message; return that text."""
        content = message.get("content")
        if "content" not in self._sources[name] or not content:
            raise Refusal("reads no content of the last message, so that there is nothing to continue")
        if isinstance(content, str):
            message["content"] = content + _END
            return content
        final: str = content[-1]["text"]
        content[-1]["text"] += _END
        return final

    def _adapt(self, name: str, message: dict[str, Any]) -> dict[str, Any]:
        """Return a message in the form that a template reads: of its content, and of the model's thoughts."""
        content = message.get("content")
        if isinstance(content, list) and not self._reads_parts[name]:
            message["content"] = "\n".join(part["text"] for part in content)
        elif isinstance(content, str) and self._reads_parts[name] and not self._reads_text[name]:
            message["content"] = [{"type": "text", "text": content}]
        thoughts = next((message[member] for member in _REASONING if member in message), None)
        return message if thoughts is None else {"thinking": thoughts, **message, "reasoning_content": thoughts}

    def _run(self, name: str, values: dict[str, Any]) -> str:
        """Return what a template makes of values, as far as it may be."""
        pieces, size = list[str](), 0
        try:
            for piece in self._templates[name].generate(**values):
                pieces.append(piece)
                size += len(piece.encode("utf-8"))
                if size > MAX_RENDERED_BYTES:
                    raise Refusal(f"makes more than {MAX_RENDERED_BYTES} bytes of these messages: shorten them")
        except (Refusal, MemoryError):
            raise
        except RaisedByTemplate as reason:
            raise Refusal(f"refuses these messages: {_shorten(reason)}") from None
        except Exception as reason:  # whatever a program may raise
            raise Refusal(f"cannot render these messages ({_say(reason)})") from None
        return "".join(pieces)


def _say(reason: Exception) -> str:
    """Return the kind of an error of jinja2 or of Python, and what it says."""
    return f"{type(reason).__name__}: {_shorten(reason)}"


def _shorten(reason: Exception) -> str:
    """Return what an error says as one line of bounded length."""
    return " ".join(str(reason).split())[:_MAX_SAID_CHARACTERS]


def main() -> None:
    """Run as the process that renders chats, until the parent ends."""
    limit_memory(MAX_MEGABYTES)
    answer_questions(Renderer().answer, MAX_SECONDS, IDLE_SECONDS)


if __name__ == "__main__":
    main()
