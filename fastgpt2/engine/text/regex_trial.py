"""The trial of a prompt: where a tokenizer has regular expressions that may take any time, a process cuts it first.

    python -m fastgpt2.engine.text.regex_trial      started by `RegexTrial`, which writes to its standard input

The library's regular expressions go back and try again: "(a+)+b" takes longer than anybody waits for thirty letters,
and while it does, no other thread of the process runs. Most expressions of tokenizers cannot do that, by their form or
as they are known. For any other a process goes through each prompt within limits; then the library itself does.
"""

from __future__ import annotations

import contextlib
import json
import re
from typing import TYPE_CHECKING, Any

from fastgpt2.engine.text.trial import TrialProcess, answer_questions, limit_memory
from fastgpt2.errors import BadRequest

if TYPE_CHECKING:
    import tokenizers

MAX_MEGABYTES = 1024
MAX_SECONDS = 2

# What stands for one character: an escape, a class without another in it, or itself. Then how often; or a new choice.
_ONE = r"\\[pP]\{\^?\w+\}|\\[sSdDwWhHnrtvf]|\\x[0-9a-fA-F]{2}|\\x\{[0-9a-fA-F]+\}|\\[^\w]|[^\\()\[\]{}*+?|^$]"
_CLASS = r"\[\^?(?:\\[pP]\{\^?\w+\}|\\.|[^\\\[\]&])+\]"
_ATOM = re.compile(
    rf"(?:{_ONE}|{_CLASS})(?:(?P<range>\?|\{{\d{{0,2}},\d{{1,2}}\}})|(?P<open>[*+]|\{{\d{{1,2}},\}})|\{{\d{{1,2}}\}})?|\|",
    re.S,
)
# Each of these in a choice multiplies the ways to match one place.
_MOST_RANGES = 2

# Expressions of well-known tokenizers that are not of this form, and do no harm: those of the classes of transformers,
# of GPT-2, of GPT-4 and its relatives, of Llama 3 and of Qwen 2.
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_KNOWN = frozenset(
    {
        r"\A +| +\z",
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        *(
            _CONTRACTIONS + rf"|[^\r\n\p{{L}}\p{{N}}]?{words}|\p{{N}}{digits}"
            rf"| ?[^\s{letters}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            for words, letters in ((r"\p{L}+", r"\p{L}"), (r"[\p{L}\p{M}]+", r"\p{L}\p{M}"))
            for digits in ("", "{1,3}")
        ),
    }
)


def is_harmless(regex: str) -> bool:
    """Tell whether a regular expression goes through any text in a time that the text's length explains."""
    return regex in _KNOWN or _is_plain(regex)


def _is_plain(regex: str) -> bool:
    """Tell whether each choice of an expression is a row of characters, of which the last may take all that it gets.

    Such a choice never goes back over what it has taken.
    """
    at, ranges, is_last, atoms = len(r"\A") if regex.startswith(r"\A") else 0, 0, False, 0
    while at < len(regex):
        atom = _ATOM.match(regex, at)
        if atom is None or (is_last and atom[0] != "|"):
            return False
        if atom[0] == "|":
            if not atoms:
                return False
            ranges, is_last, atoms = 0, False, 0
        else:
            ranges, is_last, atoms = ranges + (atom["range"] is not None), atom["open"] is not None, atoms + 1
        if ranges > _MOST_RANGES:
            return False
        at = atom.end()
    return atoms > 0


class RegexTrial(TrialProcess):
    """The process that tries the prompts of one tokenizer."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        super().__init__("fastgpt2.engine.text.regex_trial", _pipeline(backend))
        self._last: str | None = None

    def run(self, text: str, what: str) -> None:
        """Raise BadRequest if the tokenizer takes more time or memory than it may for a text, called `what`."""
        if text == self._last:
            return
        if self.ask(text) is None:
            raise BadRequest(
                f"the tokenizer's regular expressions take more than {MAX_SECONDS} s or {MAX_MEGABYTES} MB for {what}: "
                "change it, or give token ids"
            )
        self._last = text


def _pipeline(backend: tokenizers.Tokenizer) -> dict[str, Any]:
    """Return the tokenizer with all that cuts a text, and without its vocabulary, as JSON."""
    flags = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    added = [token for _, token in sorted(backend.get_added_tokens_decoder().items())]
    parts: dict[str, Any] = {"normalizer": backend.normalizer, "pre_tokenizer": backend.pre_tokenizer}
    fields = {name: json.loads(part.__getstate__()) if part is not None else None for name, part in parts.items()}
    fields["added_tokens"] = [
        {"id": n, **{flag: getattr(token, flag) for flag in flags}} for n, token in enumerate(added, 1)
    ]
    fields["model"] = {"type": "WordLevel", "vocab": {"?": 0}, "unk_token": "?"}
    return {"tokenizer": json.dumps(fields), "splits_special": backend.encode_special_tokens}


class _Cutter:
    """What answers in the process: the first question is the tokenizer, all others are texts."""

    def __init__(self) -> None:
        self._backend: tokenizers.Tokenizer | None = None

    def answer(self, question: Any) -> bool:
        if self._backend is None:
            import tokenizers

            self._backend = tokenizers.Tokenizer.from_str(question["tokenizer"])
            self._backend.encode_special_tokens = question["splits_special"]
            return True
        # What the library says of a text, it says again.
        with contextlib.suppress(BaseException):
            self._backend.encode(question)
        return True


def main() -> None:
    """Run as the process that tries prompts, until the parent ends."""
    limit_memory(MAX_MEGABYTES)
    answer_questions(_Cutter().answer, MAX_SECONDS)


if __name__ == "__main__":
    main()
