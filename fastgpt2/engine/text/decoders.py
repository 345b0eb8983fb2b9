"""The decoders of the tokenizers library, a token at a time: each gives what no later token can change.

A tokenizer's decoder makes a text of tokens by a few steps, one after the other, over all tokens at once. A stage is
such a step that takes its tokens one by one and holds back what the next ones may still change: the bytes of an
unfinished character, a space that another step may take away. All pieces together are what the library's decoder gives
for all tokens together; `tests/engine/test_detokenizer.py` compares the two over random tokens.

What a step does to one token alone is asked of the library. A stage's state consists of values that never change, so
that `copy.copy` of a stage is a stage of its own; only what the library has answered is shared by all copies.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from fastgpt2.engine.text.bounds import steps_of
from fastgpt2.errors import TokenizerError

UNKNOWN = "\ufffd"

# More than any vocabulary that is known; beyond that, what a step made of earlier tokens is forgotten.
_MAX_KNOWN_TOKENS = 1 << 18

# Source: `PreTrainedTokenizerBase.clean_up_tokenization` of transformers, in its order.
_CLEANED = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"),
    (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip

# As Rust reads two hexadecimal digits, which may be a plus and one.
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2}|\+[0-9A-Fa-f])>")


class Stage:
    """A step of a decoder.

    Attributes:
        is_fixed: what a token gives is the same whatever tokens stand around it, unless it is a text's first.
    """

    is_fixed = False

    def push(self, token: str) -> Iterable[str]:
        """Take the next token, and return what of the step's tokens is sure now."""
        raise NotImplementedError

    def rest(self) -> Iterable[str]:
        """Return what follows if no token does. Nothing changes."""
        return ()

    def whole_rest(self) -> Iterable[str]:
        """Return the same without what stands for unfinished characters."""
        return self.rest()


class EachToken(Stage):
    """A step that goes token by token, and may treat the first one otherwise; the library's own decoder does it.

    Args:
        decoder: the library's; None for a tokenizer without a decoder, whose tokens stand with spaces between them.
    """

    is_fixed = True

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self._is_first = True
        self._known: dict[str, str] = {}

    def push(self, token: str) -> Iterable[str]:
        if self._is_first:
            self._is_first = False
            return (token if self._decoder is None else text_of(self._decoder, (token,)),)
        known = self._known.get(token)
        if known is None:
            if len(self._known) >= _MAX_KNOWN_TOKENS:
                self._known.clear()
            known = self._known[token] = self._inside(token)
        return (known,)

    def _inside(self, token: str) -> str:
        """Return what a token gives that is not the first."""
        if self._decoder is None:
            return " " + token
        return text_of(self._decoder, ("", token)).removeprefix(text_of(self._decoder, ("",)))


class UnlikeTheLast(Stage):
    """The first part of the step CTC: of equal tokens in a row, one stays."""

    def __init__(self) -> None:
        self._last: str | None = None

    def push(self, token: str) -> Iterable[str]:
        if token == self._last:
            return ()
        self._last = token
        return (token,)


class WordEnds(Stage):
    """The step BPEDecoder: a word's end, the token's suffix, is a space unless no token follows."""

    def __init__(self, suffix: str) -> None:
        self._suffix = suffix
        self._if_more = self._if_last = ""

    def push(self, token: str) -> Iterable[str]:
        before = self._if_more
        more, last = token.replace(self._suffix, " "), token.replace(self._suffix, "")
        same = count_same(more, last)
        self._if_more, self._if_last = more[same:], last[same:]
        return (before + more[:same],)

    def rest(self) -> Iterable[str]:
        return (self._if_last,)


class BytesOfTokens(Stage):
    """The step ByteFallback: tokens such as <0x0A> in a row are bytes.

    They are text if all of the row is UTF-8, else each byte is U+FFFD. So a row is held back to its end, unless it has
    gone wrong already.
    """

    is_fixed = True

    def __init__(self) -> None:
        # Of a row: how many bytes, its whole characters, the bytes of an unfinished one, and whether it has gone wrong.
        self._count, self._text, self._unfinished, self._is_wrong = 0, "", b"", False

    def push(self, token: str) -> Iterable[str]:
        byte = byte_of(token)
        if byte is None:
            row = (*self.rest(), token)
            self._count, self._text, self._unfinished, self._is_wrong = 0, "", b"", False
            return row
        self._count += 1
        if self._is_wrong:
            return (UNKNOWN,)
        data = self._unfinished + byte
        try:
            text, used = codecs.utf_8_decode(data, "strict", False)
        except UnicodeDecodeError:
            self._is_wrong, self._text, self._unfinished = True, "", b""
            return (UNKNOWN,) * self._count
        self._text, self._unfinished = self._text + text, data[used:]
        return ()

    def rest(self) -> Iterable[str]:
        return (UNKNOWN,) * self._count if self._unfinished else self.whole_rest()

    def whole_rest(self) -> Iterable[str]:
        return (self._text,) if self._text else ()


class BytesAlone(Stage):
    """The same step as sentencepiece itself does it: a byte that is part of no character is U+FFFD, it alone.

    Source: `SentencePieceProcessor::Decode` in sentencepiece_processor.cc.
    """

    is_fixed = True

    def __init__(self) -> None:
        self._unfinished = b""

    def push(self, token: str) -> Iterable[str]:
        byte = byte_of(token)
        if byte is None:
            row = (*self.rest(), token)
            self._unfinished = b""
            return row
        pieces = []
        data = self._unfinished + byte
        while data:
            try:
                text, used = codecs.utf_8_decode(data, "strict", False)
            except UnicodeDecodeError:
                text, used = UNKNOWN, 1
            if not used:
                break
            pieces.append(text)
            data = data[used:]
        self._unfinished = data
        return pieces

    def rest(self) -> Iterable[str]:
        return (UNKNOWN,) * len(self._unfinished)

    def whole_rest(self) -> Iterable[str]:
        return ()


class ByteLevel(Stage):
    """The step ByteLevel: each character of a token stands for a byte, and the bytes of all tokens are one text."""

    is_fixed = True

    def __init__(self) -> None:
        self._unfinished = b""

    def push(self, token: str) -> Iterable[str]:
        data = self._unfinished + bytes_of(token)
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._unfinished = data[used:]
        return (text,)

    def rest(self) -> Iterable[str]:
        return (UNKNOWN,) if self._unfinished else ()

    def whole_rest(self) -> Iterable[str]:
        return ()


class ReplaceInText(Stage):
    """The step Replace behind one that has made one text of all tokens; also each step of transformers' clean-up."""

    def __init__(self, pattern: str, content: str) -> None:
        self._pattern, self._content = pattern, content
        self._begun = ""

    def push(self, token: str) -> Iterable[str]:
        pattern = self._pattern
        if not self._begun and pattern[0] not in token:
            return (token,)
        *done, left = (self._begun + token).split(pattern)
        longest = min(len(pattern) - 1, len(left))
        begun = next((n for n in range(longest, 0, -1) if left.endswith(pattern[:n])), 0)
        self._begun = left[len(left) - begun :]
        return (self._content.join([*done, left[: len(left) - begun]]),)

    def rest(self) -> Iterable[str]:
        return (self._begun,)


class StripText(Stage):
    """The step Strip behind one that has made one text of all tokens: it takes characters off both ends."""

    def __init__(self, character: str, start: int, stop: int) -> None:
        self._character, self._left, self._stop = character, start, stop
        self._end = ""
        self.is_fixed = stop == 0

    def push(self, token: str) -> Iterable[str]:
        if self._left and token:
            stripped = token.lstrip(self._character)
            taken = min(len(token) - len(stripped), self._left)
            self._left = self._left - taken if not stripped else 0
            token = token[taken:]
        text = self._end + token
        held = min(len(text) - len(text.rstrip(self._character)), self._stop)
        self._end = text[len(text) - held :]
        return (text[: len(text) - held],)


class AllTokens(Stage):
    """A decoder that only the library can run, over all tokens: its text comes at the end."""

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self._tokens: tuple[str, ...] = ()

    def push(self, token: str) -> Iterable[str]:
        self._tokens = (*self._tokens, token)
        return ()

    def rest(self) -> Iterable[str]:
        return (text_of(self._decoder, self._tokens),)


def count_same(one: str, other: str) -> int:
    """Return how many characters two texts have in common at their beginnings."""
    for n, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return n
    return min(len(one), len(other))


def byte_of(token: str) -> bytes | None:
    """Return the byte that a token such as <0x0A> stands for, or None."""
    found = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(found[1], 16)]) if found is not None else None


def bytes_of(token: str) -> bytes:
    """Return the bytes that the characters of a token stand for, or its UTF-8 if one of them stands for none."""
    try:
        return bytes([_BYTE_OF_CHARACTER[c] for c in token])
    except KeyError:
        return token.encode()


def is_library_failure(reason: BaseException) -> bool:
    """Tell whether the tokenizers library may have raised this: a plain Exception, or a panic of Rust's.

    The class of a panic is no Exception, and no module has that class under a name.
    """
    return isinstance(reason, Exception) or type(reason).__name__ == "PanicException"


def said(reason: BaseException) -> str:
    """Return what the library says of a failure, in a line of bounded length."""
    return " ".join(str(reason).split())[:200] or type(reason).__name__


def run_decoder(decoder: Any, tokens: Sequence[str]) -> str:
    """Run the library's decoder; raise TokenizerError if it fails."""
    try:
        return str(decoder.decode(list(tokens)))
    except BaseException as reason:
        if not is_library_failure(reason):
            raise
        raise TokenizerError(f"the tokenizer's decoder cannot make a text of its tokens ({said(reason)})") from None


def text_of(decoder: Any, tokens: Sequence[str]) -> str:
    """Return the library's text of tokens, or the tokens as they stand if the library fails.

    A step decodes many sequences together. An error would end all of them, for the tokens of one.
    """
    try:
        return run_decoder(decoder, tokens)
    except TokenizerError:
        return "".join(tokens)


def is_byte_level(decoder: Any) -> bool:
    """Tell whether a library's decoder takes each character of a token for a byte, and does nothing else."""
    kinds = [part["type"] for part in steps_of(decoder, "decoders")]
    return kinds[:1] == ["ByteLevel"] and set(kinds[1:]) <= {"Fuse"}


def clean_up_stages() -> list[Stage]:
    """Return stages that do what transformers' `clean_up_tokenization` does: they take away spaces before marks."""
    return [ReplaceInText(pattern, content) for pattern, content in _CLEANED]


def clean_up(text: str) -> str:
    """Return a text as transformers' `clean_up_tokenization` does."""
    for pattern, content in _CLEANED:
        text = text.replace(pattern, content)
    return text


def stages_of(decoder: Any, bytes_alone: bool = False) -> list[Stage]:
    """Return the stages that do together what the library's decoder does; None stands for no decoder at all.

    Args:
        bytes_alone: bytes become characters as sentencepiece itself does it (`BytesAlone`).
    """
    if decoder is None:
        return [EachToken(None)]
    stages: list[Stage] = []
    # What the next step takes: tokens, or one text made of all. "pieces" are no tokens any more, nor one text yet.
    takes = "tokens"
    for part in steps_of(decoder, "decoders"):
        kind = part["type"]
        if kind == "Fuse":
            takes = "text"
            continue
        made: list[Stage] = []
        if takes == "tokens":
            made = _stages_of_tokens(part)
        elif takes == "text":
            made = _stages_of_text(part)
        if not made:
            return [AllTokens(decoder)]
        stages += made
        takes = {"ByteLevel": "text", "BPEDecoder": "pieces", "CTC": "pieces"}.get(kind, takes)
    if bytes_alone:
        stages = [BytesAlone() if isinstance(stage, BytesOfTokens) else stage for stage in stages]
    return stages


def _stages_of_tokens(part: dict[str, Any]) -> list[Stage]:
    """Return the stages of a step that takes tokens; [] if there are none for it."""
    match part:
        case {"type": "ByteLevel"}:
            return [ByteLevel()]
        case {"type": "ByteFallback"}:
            return [BytesOfTokens()]
        case {"type": "BPEDecoder", "suffix": str(suffix)}:
            return [WordEnds(suffix)]
        case {"type": "CTC"}:
            return [UnlikeTheLast(), EachToken(_decoder_of(part))]
        # What this step takes off the end of a token, the library may fail to find there.
        case {"type": "Strip", "stop": 0} | {"type": "WordPiece" | "Metaspace" | "Replace"}:
            return [EachToken(_decoder_of(part))]
    return []


def _stages_of_text(part: dict[str, Any]) -> list[Stage]:
    """Return the stages of a step that takes one text, made of all tokens; [] if there are none for it."""
    match part:
        case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": str(content)} if pattern:
            return [ReplaceInText(pattern, content)]
        case {"type": "Strip", "content": str(character), "start": int(start), "stop": int(stop)}:
            return [StripText(character, start, stop)]
    return []


def _decoder_of(part: dict[str, Any]) -> Any:
    """Return the library's decoder for one step."""
    from tokenizers import decoders

    step: Any = decoders.Sequence([])
    step.__setstate__(json.dumps(part).encode())
    return step


def _byte_of_character() -> dict[str, int]:
    """Return GPT-2's printable stand-ins for bytes. Source: `bytes_to_unicode` in OpenAI's gpt-2/src/encoder.py."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(0x100) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()

# The characters that stand for the 256 bytes.
CHARACTERS_OF_BYTES = tuple(_BYTE_OF_CHARACTER)
