"""What a tokenizer's own steps may make of a text, known before they make it.

A tokenizer.json may have any steps: one that replaces each character by a megabyte, or fourteen that make four of each.
The library runs them all at once and takes the memory that they need; without it, it ends the process. So a bound is
computed first, of the numbers that the steps have. Where a bound is too large for a text, the steps of the normalizer
are run one by one, and none that goes beyond it. What no step can be run for is refused when the tokenizer is loaded.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, TypeAlias

from fastgpt2.errors import TokenizerError

Step: TypeAlias = dict[str, Any]

# A text may grow by this factor. Arabic ligatures and the like grow eleven times, where all of a text is of them.
GROWTH = 16
# A short text may become this long in any case, and none longer than the other number.
FREE_BYTES = 64 << 10
MAX_BYTES = 4 << 20

# Tokens around a text, and copies of it: a tokenizer has two or three of the former, and one of the latter.
MAX_FRAME_TOKENS = 1024
MAX_COPIES = 4
# By how much the pre-tokenizer and the decoder may lengthen a text at most. One step makes three bytes of one, or adds
# a space, and no tokenizer has more than two such steps.
MAX_SPLIT_GROWTH = 64
MAX_DECODED_GROWTH = 64
# A longer token stands for no text; a decoder, or a regular expression in it, would go through it again and again.
MAX_TOKEN_CHARACTERS = 16 << 10

# How many bytes of UTF-8 a byte may become. Source: the FAQ on normalization of unicode.org, and BERT's normalizer.
_FACTORS = {
    "NFC": 3.0,
    "NFD": 3.0,
    "NFKC": 11.0,
    "NFKD": 11.0,
    "Lowercase": 2.0,
    "ByteLevel": 2.0,
    "BertNormalizer": 8.0,
    "Strip": 1.0,
    "StripAccents": 1.0,
    "Nmt": 1.0,
}


def steps_of(part: Any, within: str) -> list[Step]:
    """Return the steps of a part of a pipeline, as its JSON describes it, in their order.

    Args:
        part: an object of the library, or its JSON, or None.
        within: the name of the field in which a sequence has its steps.

    Raises:
        TokenizerError: a step is none.
    """
    if part is not None and not isinstance(part, dict):
        part = json.loads(part.__getstate__())
    found: list[Step] = []
    waiting = [part] if part is not None else []
    while waiting:
        step = waiting.pop(0)
        if not isinstance(step, dict):
            raise TokenizerError(f"a step of its {within} is no object")
        inner = step.get(within)
        if step.get("type") == "Sequence" and isinstance(inner, list):
            waiting[:0] = inner
        else:
            found.append(step)
    return found


def regexes_of(steps: Iterable[Step]) -> list[str]:
    """Return the regular expressions of some steps."""
    patterns = [step.get("pattern") for step in steps]
    found = [pattern.get("Regex") for pattern in patterns if isinstance(pattern, dict)]
    return [regex for regex in found if isinstance(regex, str)]


class Normalization:
    """The steps of a normalizer, and what they may make of a text.

    Args:
        steps: as `steps_of` returns them.
        raw_tokens: the added tokens that are looked for in the text as it comes. The library normalizes each part
            between two of them alone, so that a step that puts something before a text does so before each part.
    """

    def __init__(self, steps: Sequence[Step], raw_tokens: Iterable[str] = ()) -> None:
        self._steps, self._raw_tokens = steps, raw_tokens

    @cached_property
    def _growths(self) -> list[tuple[float, float]]:
        """Return the growth of each step. To find that of a large table takes longer than to encode a prompt."""
        return [_growth(step) for step in self._steps]

    @cached_property
    def _static(self) -> tuple[float, float]:
        """Return the factor and the bytes more, within which every text stays."""
        factor, more = 1.0, 0.0
        for by, plus in self._growths:
            factor, more = factor * by, more * by + plus
        return factor, more

    @cached_property
    def _made(self) -> list[Any]:
        """Return the library's normalizer for each step."""
        from tokenizers import normalizers

        made = []
        for step in self._steps:
            one: Any = normalizers.Sequence([])
            one.__setstate__(json.dumps(step).encode())
            made.append(one)
        return made

    @cached_property
    def _ends_of_parts(self) -> re.Pattern[str] | None:
        """Return what finds the tokens between two parts of a text; None if no step makes more of parts than of all."""
        tokens = sorted(filter(None, self._raw_tokens), key=len, reverse=True)
        if not tokens or not any(more for _, more in self._growths):
            return None
        return re.compile("|".join(map(re.escape, tokens)))

    def objection(self, text: str, what: str, split_growth: float = 1.0) -> str:
        """Return what there is to say if the normalizer makes too much of a text; "" if it does not.

        Args:
            what: what the sentence calls the text.
            split_growth: the factor by which the next step of the pipeline may lengthen the text.
        """
        if not self._steps:
            return ""
        size = len(text.encode("utf-8", "surrogatepass"))
        limit = min(max(FREE_BYTES, GROWTH * size), MAX_BYTES)
        factor, more = self._static
        if (factor * size + more) * split_growth <= limit:
            return ""
        too_long = f"the tokenizer's normalizer would make more than {limit} bytes of {what}"
        ends = self._ends_of_parts
        parts = [part for part in ends.split(text) if part] if ends is not None else [text]
        for step, growth, made in zip(self._steps, self._growths, self._made, strict=True):
            # One step may go beyond the limit by its bound, as most texts do not grow as much.
            if sum(_most_bytes(step, growth, part) for part in parts) > GROWTH * limit:
                return too_long
            parts = [made.normalize_str(part) for part in parts]
            size = sum(len(part.encode()) for part in parts)
            if size > limit:
                return too_long
        return too_long if size * split_growth > GROWTH * limit else ""


def _growth(step: Step) -> tuple[float, float]:
    """Return the factor and the bytes more, within which a step of a normalizer stays."""
    match step:
        case {"type": "Prepend", "prepend": str(text)}:
            size = len(text.encode())  # before each part of a text between two added tokens
            return 1.0 + size, size
        case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": str(content)} if pattern:
            return max(1.0, len(content.encode()) / len(pattern.encode())), 0.0
        case {"type": "Replace", "content": str(content)}:
            size = len(content.encode())
            return 1.0 + size, size
        case {"type": "Precompiled", "precompiled_charsmap": str(charsmap)}:
            return _longest_replacement(charsmap), 0.0
    return _FACTORS.get(str(step.get("type")), float(GROWTH)), 0.0


def _most_bytes(step: Step, growth: tuple[float, float], text: str) -> float:
    """Return how many bytes a step of that growth may make of one text."""
    size = len(text.encode())
    match step:
        case {"type": "Prepend", "prepend": str(prepended)}:
            return size + len(prepended.encode())
        case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": str(content)} if pattern:
            return size + text.count(pattern) * (len(content.encode()) - len(pattern.encode()))
    factor, more = growth
    return factor * size + more


def _longest_replacement(charsmap: str) -> float:
    """Return the bytes of the longest text in a table of sentencepiece's, which a single byte may become."""
    data = base64.b64decode(charsmap)
    trie = int.from_bytes(data[:4], "little")
    return float(max(map(len, data[4 + trie :].split(b"\0")), default=1) or 1)


def split_growth(steps: Iterable[Step]) -> float:
    """Return the factor by which a pre-tokenizer's steps may lengthen a text; raise TokenizerError if too much."""
    factor = 1.0
    for step in steps:
        match step:
            case {"type": "ByteLevel", "add_prefix_space": bool(adds)}:
                factor *= 4.0 if adds else 2.0
            case {"type": "Metaspace", "prepend_scheme": str(scheme)}:
                factor *= 4.0 if scheme == "never" else 6.0
    if factor > MAX_SPLIT_GROWTH:
        raise TokenizerError(
            f"its pre_tokenizer may make a text {factor:.0f} times as long; the limit is {MAX_SPLIT_GROWTH}"
        )
    return factor


def check_frame(steps: Iterable[Step]) -> None:
    """Raise TokenizerError if a post-processor puts very many tokens around a text, or copies of it."""
    tokens, copies = 0, 1
    for step in steps:
        if step.get("type") != "TemplateProcessing":
            continue
        ids = {name: len(token["ids"]) for name, token in step["special_tokens"].items()}
        pieces = [piece for piece in step["single"] if "SpecialToken" in piece]
        tokens += sum(ids.get(piece["SpecialToken"]["id"], 0) for piece in pieces)
        copies *= len(step["single"]) - len(pieces)
    if tokens > MAX_FRAME_TOKENS:
        raise TokenizerError(f"its post_processor puts {tokens} tokens around a text; the limit is {MAX_FRAME_TOKENS}")
    if copies > MAX_COPIES:
        raise TokenizerError(f"its post_processor makes {copies} copies of a text; the limit is {MAX_COPIES}")


def check_decoder(steps: Iterable[Step]) -> None:
    """Raise TokenizerError if a decoder may make very long texts of short tokens."""
    factor = 1.0
    for step in steps:
        if step.get("type") == "Replace":
            by, more = _growth(step)
            factor *= by + more
    if factor > MAX_DECODED_GROWTH:
        raise TokenizerError(
            f"its decoder may make a text {_in_words(factor)} times as long; the limit is {MAX_DECODED_GROWTH}"
        )


def check_added(normalizer: Any, contents: Sequence[str]) -> None:
    """Raise TokenizerError if the normalizer makes too much of an added token, which the library has it do at once."""
    if not contents:
        return
    normalization = Normalization(steps_of(normalizer, "normalizers"))
    for content in contents:
        if objection := normalization.objection(content, f"added token {content[:40]!r}"):
            raise TokenizerError(objection)


def _in_words(factor: float) -> str:
    return f"{factor:.0f}" if factor < 1e6 else "millions of" if math.isfinite(factor) else "any number of"
