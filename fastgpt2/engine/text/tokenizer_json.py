"""The file `tokenizer.json`: parsed by the tokenizers library as a whole, and by Python only as far as needed.

Most of the file is the vocabulary and its merges. What this package has to know of the rest stands before them in every
file that the library has written. So that beginning is parsed alone; a file in another order is parsed as a whole.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgpt2.engine.model.files import open_file, parse_json, read_file, why_not_read
from fastgpt2.engine.model.lfs_pointer import explain_pointer, is_pointer
from fastgpt2.engine.text.bounds import check_added
from fastgpt2.errors import TokenizerError
from fastgpt2.fields import why_no_json

if TYPE_CHECKING:
    import tokenizers

# Far beyond any GPT-2 vocabulary: a larger file is damaged, or made to do harm.
MAX_TOKENIZER_BYTES = 64 << 20

_HEAD_FIELDS = frozenset({"added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder"})
_OPEN = re.compile(r"\s*\{")
_KEY = re.compile(r'\s*"(\w+)"\s*:\s*')
_COMMA = re.compile(r"\s*,")


def read_text(path: Path) -> str:
    """Read a tokenizer's file as UTF-8.

    Raises:
        TokenizerError: the file is too large, cannot be read or is not UTF-8.
    """
    return _decode(path, read_bytes(path))


def read_bytes(path: Path) -> bytes:
    """Read a tokenizer's file of at most `MAX_TOKENIZER_BYTES`; raise TokenizerError if that cannot be done."""
    return read_file(path, MAX_TOKENIZER_BYTES, TokenizerError)


def check_size(path: Path) -> None:
    """Raise TokenizerError unless a file that the library is to open is a regular one of at most as many bytes."""
    try:
        fd = open_file(path)
    except OSError as reason:
        raise TokenizerError(why_not_read(path, reason)) from None
    size = os.fstat(fd).st_size
    os.close(fd)
    if size > MAX_TOKENIZER_BYTES:
        raise TokenizerError(f"{path}: {size} bytes; a file of this kind has at most {MAX_TOKENIZER_BYTES}")


def _decode(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as reason:
        raise TokenizerError(
            f"{path}: not a tokenizer that can be read: no UTF-8 text ({reason.reason} at byte {reason.start})"
        ) from None


class TokenizerJson:
    """A `tokenizer.json` that was read.

    Attributes:
        text: the file's text.
        backend: the pipeline that the file describes.
        charsmap: the table of a sentencepiece normalizer that stands in the file, or None.
    """

    def __init__(self, path: Path) -> None:
        """Read and parse the file.

        Raises:
            TokenizerError: the file cannot be read, or is no tokenizer.
        """
        import tokenizers

        self.path = path
        self.text = read_text(path)
        if is_pointer(path):
            raise TokenizerError(explain_pointer(path))
        self._head = _parse_head(path, self.text)
        self.charsmap = self._find_charsmap()
        self._check_added()
        self.backend: tokenizers.Tokenizer = tokenizers.Tokenizer.from_str(self.text)

    @property
    def added_tokens(self) -> list[dict[str, Any]]:
        """Return the file's own list of added tokens."""
        tokens = self._head.get("added_tokens") or []
        if not isinstance(tokens, list) or not all(isinstance(token, dict) for token in tokens):
            raise TokenizerError(f"{self.path}: added_tokens is not a list of objects")
        return tokens

    def _check_added(self) -> None:
        """Check what the normalizer would make of the added tokens, as soon as the library reads them."""
        normalizer = self._head.get("normalizer")
        contents = [token.get("content") for token in self.added_tokens if token.get("normalized") is not False]
        if isinstance(normalizer, dict):
            check_added(normalizer, [content for content in contents if isinstance(content, str)])

    @property
    def mentions_bytes(self) -> bool:
        """Tell whether a part of the pipeline works on bytes, as GPT-2's does."""
        return '"ByteLevel"' in self.text

    def model(self) -> dict[str, Any]:
        """Parse the whole file, and return the field `model`, which has the vocabulary."""
        model = parse_json(self.text).get("model")
        if not isinstance(model, dict):
            raise TokenizerError(f"{self.path}: model is not an object")
        return model

    def _find_charsmap(self) -> bytes | None:
        """Return the first charsmap of the normalizers; check all, since the library trusts them."""
        normalizer = self._head.get("normalizer")
        parts = [normalizer] if isinstance(normalizer, dict) else []
        found = None
        while parts:
            part = parts.pop(0)
            if not isinstance(part, dict):
                continue
            if part.get("type") == "Precompiled" and part.get("precompiled_charsmap"):
                from fastgpt2.engine.text.sentencepiece import check_charsmap, decode_charsmap

                charsmap = decode_charsmap(part["precompiled_charsmap"], self.path)
                check_charsmap(charsmap, self.path)
                found = found or charsmap
            inner = part.get("normalizers")
            parts = (inner if isinstance(inner, list) else []) + parts
        return found


def _parse_head(path: Path, text: str) -> dict[str, Any]:
    """Return the fields of the file before `model` or, if some are missing there, all fields."""
    decoder = json.JSONDecoder()
    head: dict[str, Any] = {}
    try:
        if brace := _OPEN.match(text):
            position = brace.end()
            while key := _KEY.match(text, position):
                if key[1] == "model" and head.keys() >= _HEAD_FIELDS:
                    return head
                if key[1] == "model":
                    break
                head[key[1]], position = decoder.raw_decode(text, key.end())
                comma = _COMMA.match(text, position)
                if comma is None:
                    break
                position = comma.end()
        whole = parse_json(text)
    except (ValueError, RecursionError) as reason:
        raise TokenizerError(
            f"{path}: not a tokenizer that can be read: no valid JSON ({why_no_json(reason)})"
        ) from None
    if not isinstance(whole, dict):
        raise TokenizerError(f"{path}: not a tokenizer that can be read: no JSON object")
    return whole
