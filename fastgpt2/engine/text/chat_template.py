"""A model's chat template: which files have it, and the prompt that it makes of messages.

Source of the files and of their order: `PreTrainedTokenizerBase._from_pretrained` of transformers 5, and
`ProcessorMixin` for the last one. What runs a template is a process of its own (`template_renderer.py`), which is
started if there is a template; jinja2, the extra `chat`, is imported there alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastgpt2.engine.model.config import (
    CHAT_TEMPLATE_FILE,
    CHAT_TEMPLATE_FOLDER,
    PROCESSOR_TEMPLATE_FILE,
    TOKENIZER_CONFIG_FILE,
)
from fastgpt2.engine.model.files import parse_json, read_file
from fastgpt2.engine.text.auto_tokenizer import MAX_SETTINGS_BYTES
from fastgpt2.engine.text.trial import TrialProcess
from fastgpt2.errors import BadRequest, ConfigError, NoChatTemplate

# Ten times the longest that is known, and more of them than any model has.
MAX_TEMPLATE_BYTES = 1 << 18
MAX_TEMPLATES = 16

# The limits of the process, for the message.
_LIMITS = "1 s of computing or 256 MB"

# The names of the template that is taken, and of the one that is taken where there are tools.
_DEFAULT, _WITH_TOOLS = "default", "tool_use"

_REMEDY = (
    "continue prompts (by POST /v1/completions, or on the command line without --chat), or load the model with "
    "--chat-template FILE"
)


class ChatTemplate:
    """The chat templates of one model.

    Attributes:
        objection: why no chat can be answered: a sentence; empty if chats can be answered.
        notes: a sentence for people if the model has a template that cannot be used.
    """

    def __init__(self, sources: Mapping[str, str], where: str = "", objection: str = "") -> None:
        """Compile the templates.

        Args:
            sources: the templates by their names; none, if there is an objection.
            where: the files that have them.
        """
        self.objection = objection
        self.notes = (objection,) if objection else ()
        self._names = frozenset(sources)
        if not sources and not objection:
            self.objection = f"the model has no chat template: {_REMEDY}"
        if sources:
            self._process = TrialProcess("fastgpt2.engine.text.template_renderer", {"sources": dict(sources)})
            problem = self._try(where)
            if problem:
                self.objection = f"{problem}; {_REMEDY}"
                self.notes = (self.objection,)

    def _try(self, where: str) -> str:
        """Return what is wrong with the templates; empty if they can be used."""
        if _DEFAULT not in self._names:
            return f"{where}: of the chat templates {', '.join(sorted(self._names))} none is the default one"
        if find_spec("jinja2") is None:
            return f"{where}: a chat template needs jinja2, which is not installed: pip install 'fastgpt2[chat]'"
        answer = self._process.ask(self._process.first)
        problem = f"takes more than {_LIMITS} for one short message" if answer is None else answer.get("error")
        return f"{where}: the chat template {problem}" if problem else ""

    def close(self) -> None:
        """End the process. The next chat starts another."""
        if self._names:
            self._process.stop()

    def render(self, values: Mapping[str, Any], continues: bool) -> str:
        """Return the prompt that the template makes of a chat.

        Args:
            values: what the template gets, by the names that it has for them, `messages` and `tools` among them.
            continues: the prompt ends where the text of the last message ends.

        Raises:
            NoChatTemplate: there is no template that can be used.
            BadRequest: the template refuses the messages, or cannot render them.
        """
        if self.objection:
            raise NoChatTemplate(self.objection)
        name = _WITH_TOOLS if values.get("tools") is not None and _WITH_TOOLS in self._names else _DEFAULT
        answer = self._process.ask({"name": name, "values": dict(values), "continues": continues})
        if answer is None:
            raise BadRequest(f"the chat template takes more than {_LIMITS} for these messages: change or shorten them")
        if "error" in answer:
            raise BadRequest(f"the chat template {answer['error']}")
        text: str = answer["text"]
        return text


def load_chat_template(folder: Path, path: str | None = None) -> ChatTemplate:
    """Return the chat template of a model.

    Args:
        folder: that of the model's tokenizer.
        path: a file with a template that is taken instead; None for the model's own.

    Raises:
        ConfigError: the file that is given cannot be read or used. What is wrong with a model's own is a note.
    """
    if path is not None:
        try:
            source = _read_template(Path(path).expanduser())
        except ConfigError as reason:
            raise ConfigError(f"the chat template {reason}") from None
        template = ChatTemplate({_DEFAULT: source}, path)
        if template.objection:
            raise ConfigError(template.objection.removesuffix(f"; {_REMEDY}"))
        return template
    try:
        sources, where = find_sources(folder)
    except ConfigError as reason:
        return ChatTemplate({}, objection=f"{reason}; {_REMEDY}")
    return ChatTemplate(sources, str(where))


def find_sources(folder: Path) -> tuple[dict[str, str], Path]:
    """Return the templates that a folder has, by their names, and the file or folder that has them."""
    single, several = folder / CHAT_TEMPLATE_FILE, folder / CHAT_TEMPLATE_FOLDER
    files = {_DEFAULT: single} if single.exists() else {}
    if several.is_dir():
        files.update({file.stem: file for file in sorted(several.glob("*.jinja"))})
    if files:
        _check_count(len(files), several)
        return {name: _read_template(file) for name, file in files.items()}, single if single.exists() else several
    for name in (TOKENIZER_CONFIG_FILE, PROCESSOR_TEMPLATE_FILE):
        found = _read_member(folder / name)
        if found:
            return found, folder / name
    return {}, folder


def _read_template(path: Path) -> str:
    data = read_file(path, MAX_TEMPLATE_BYTES, ConfigError)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as reason:
        raise ConfigError(f"{path}: is not UTF-8 (byte {reason.start})") from None


def _read_member(path: Path) -> dict[str, str]:
    """Return the templates in a JSON file's member `chat_template`: one, or a list of objects with names."""
    if not path.exists():
        return {}
    data = read_file(path, MAX_SETTINGS_BYTES, ConfigError)
    if b"chat_template" not in data:  # as most; to parse thousands of added tokens once more takes a while
        return {}
    try:
        value = parse_json(data)
    except ValueError as reason:
        raise ConfigError(f"{path}: is not JSON ({reason})") from None
    found = value.get("chat_template") if isinstance(value, dict) else None
    if found is None:
        return {}
    if isinstance(found, list) and all(isinstance(one, dict) for one in found):
        found = {one.get("name"): one.get("template") for one in found}
    templates = {_DEFAULT: found} if isinstance(found, str) else found
    if not isinstance(templates, dict) or not all(isinstance(text, str) for pair in templates.items() for text in pair):
        raise ConfigError(f"{path}: chat_template must be a string, or a list of objects with a name and a template")
    _check_count(len(templates), path)
    for text in templates.values():
        if len(text) > MAX_TEMPLATE_BYTES:
            raise ConfigError(f"{path}: chat_template has {len(text)} characters; the limit is {MAX_TEMPLATE_BYTES}")
    return templates


def _check_count(count: int, path: Path) -> None:
    if count > MAX_TEMPLATES:
        raise ConfigError(f"{path}: has {count} chat templates; the limit is {MAX_TEMPLATES}")
