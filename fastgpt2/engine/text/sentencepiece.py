"""Models of sentencepiece: the file is read without the sentencepiece package, and becomes a tokenizer.

The file is one message of protocol buffers; its fields are in sentencepiece's `src/sentencepiece_model.proto`. Of its
pieces, transformers makes either the vocabulary of a class of its own, or, as `pipeline` does here, a tokenizer that
follows the model's own settings.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgpt2.engine.text.tokenizer_base import SPACE
from fastgpt2.errors import TokenizerError

if TYPE_CHECKING:
    import tokenizers

UNIGRAM = 1
# The types of pieces.
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4

# What no real model comes near. The work for a piece's merges grows with its squared length.
MAX_PIECES = 1 << 20
MAX_PIECE_CHARACTERS = 1024
MAX_SQUARED_CHARACTERS = 1 << 27

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


@dataclass(slots=True)
class Piece:
    """One token: its text, its score (a log probability, or the negated rank of a merge) and its type."""

    text: str
    score: float
    type: int


@dataclass(slots=True)
class SentencePieceModel:
    """The fields of a model's file, under their own names; the defaults are those of sentencepiece."""

    pieces: list[Piece] = field(default_factory=list)
    model_type: int = UNIGRAM
    byte_fallback: bool = False
    unk_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    unk_piece: str = "<unk>"
    bos_piece: str = "<s>"
    eos_piece: str = "</s>"
    charsmap: bytes | None = None
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True

    def ids(self) -> dict[str, int]:
        """Return the id of each piece; of pieces with one text, the last one's."""
        return {piece.text: index for index, piece in enumerate(self.pieces)}

    def scores(self) -> list[tuple[str, float]]:
        """Return the text and the score of each piece."""
        return [(piece.text, piece.score) for piece in self.pieces]

    def added_tokens(self) -> list[tokenizers.AddedToken]:
        """Return what is looked for in the text before all else: control symbols, and symbols that users defined."""
        from tokenizers import AddedToken

        return [
            AddedToken(piece.text, normalized=False, special=piece.type == CONTROL)
            for piece in self.pieces
            if piece.type in (CONTROL, USER_DEFINED)
        ]


# The fields of the messages by their numbers: name and, for the wire, type.
_TRAINER_FIELDS = {
    3: ("model_type", int),
    35: ("byte_fallback", bool),
    40: ("unk_id", int),
    41: ("bos_id", int),
    42: ("eos_id", int),
    45: ("unk_piece", str),
    46: ("bos_piece", str),
    47: ("eos_piece", str),
}
_NORMALIZER_FIELDS = {
    2: ("charsmap", bytes),
    3: ("add_dummy_prefix", bool),
    4: ("remove_extra_whitespaces", bool),
    5: ("escape_whitespaces", bool),
}


def parse_sentencepiece(data: bytes, path: Path) -> SentencePieceModel:
    """Parse a model of sentencepiece.

    Raises:
        TokenizerError: the data are no such model, or hold what no tokenizer can be made of.
    """
    model = SentencePieceModel()
    try:
        for number, value in _fields(memoryview(data)):
            if number == 1:
                model.pieces.append(_piece(_message(value)))
                if len(model.pieces) > MAX_PIECES:
                    raise ValueError(f"more than {MAX_PIECES} pieces")
            elif number in (2, 3):
                _assign(model, _message(value), _TRAINER_FIELDS if number == 2 else _NORMALIZER_FIELDS)
        if not model.pieces:
            raise ValueError("no pieces")
    except (ValueError, struct.error) as reason:
        raise TokenizerError(f"{path}: not a model of sentencepiece ({reason})") from None
    if model.charsmap is not None:
        check_charsmap(model.charsmap, path)
    return model


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield number and value of each field of a message; raise ValueError if it is malformed."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            value, position = _varint(message, position)
            yield number, value
            continue
        if kind == _LENGTH:
            size, position = _varint(message, position)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"a field of wire type {kind}")
        if size > len(message) - position:
            raise ValueError("a field goes beyond the end")
        yield number, message[position : position + size]
        position += size


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= len(message) or shift > 63:
            raise ValueError("a broken number")
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & ((1 << 64) - 1), position
        shift += 7


def _message(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where a message should be")
    return value


def _piece(message: memoryview) -> Piece:
    piece = Piece("", 0.0, NORMAL)
    for number, value in _fields(message):
        if number == 1:
            piece.text = _text(value)
        elif number == 2:
            (piece.score,) = struct.unpack("<f", _message(value))
        elif number == 3:
            piece.type = _signed(value)
    if len(piece.text) > MAX_PIECE_CHARACTERS:
        raise ValueError(f"a piece of more than {MAX_PIECE_CHARACTERS} characters")
    if not math.isfinite(piece.score):
        raise ValueError("a score that is no number")
    return piece


def _assign(model: SentencePieceModel, message: memoryview, known: dict[int, tuple[str, type]]) -> None:
    """Set the attributes of the model that a message names."""
    for number, value in _fields(message):
        name, kind = known.get(number, ("", int))
        if not name:
            continue
        read: Any
        if kind is str:
            read = _text(value)
        elif kind is bytes:
            read = bytes(_message(value)) or None
        else:
            read = kind(_signed(value))
        setattr(model, name, read)


def _text(value: int | memoryview) -> str:
    return bytes(_message(value)).decode("utf-8")


def _signed(value: int | memoryview) -> int:
    """Return a number of 32 bits with its sign: a negative one is written with 64."""
    if not isinstance(value, int):
        raise ValueError("a message where a number should be")
    value &= (1 << 32) - 1
    return value - (1 << 32) if value >> 31 else value


def decode_charsmap(text: object, path: Path) -> bytes:
    """Return the bytes of a charsmap as `tokenizer.json` has it, in base64; raise TokenizerError if it is not that."""
    try:
        return base64.b64decode(text if isinstance(text, str) else "!", validate=True)
    except (binascii.Error, ValueError):
        raise TokenizerError(f"{path}: precompiled_charsmap is not base64") from None


def check_charsmap(charsmap: bytes, path: Path) -> None:
    """Check that no text leads out of a normalizer's table, which the tokenizers library trusts.

    The table is a double-array trie (Aoe 1989; the layout is that of darts-clone) of 32-bit units, and the strings that
    its values point to. A unit's children are looked up at `base ^ byte`, for any byte.

    Raises:
        TokenizerError: the table is damaged, or made to do harm.
    """
    import numpy as np

    try:
        (size,) = struct.unpack_from("<I", charsmap)
        units = np.frombuffer(charsmap, "<u4", size // 4, 4).astype(np.int64)
        strings = charsmap[4 + size :]
        strings.decode("utf-8")
        index = np.arange(len(units))
        base = index ^ ((units >> 10) << ((units & (1 << 9)) >> 6))
        # A unit with its highest bit set is a value, and has no children.
        inner = (units >> 31) == 0
        inside = (base[inner] | 0xFF) < len(units)
        values = units[base[inner & ((units >> 8) & 1 == 1)]] & ((1 << 31) - 1) if inside.all() else np.array([-1])
        starts = np.frombuffer(strings + b"\0", np.uint8)
        sound = size % 4 == 0 and len(units) > 0 and ((values >= 0) & (values < len(starts))).all()
        sound = sound and bool(((starts[values] & 0xC0) != 0x80).all())
    except (ValueError, struct.error):
        sound = False
    if not sound:
        raise TokenizerError(f"{path}: precompiled_charsmap is damaged")


def merges_by_id(ids: dict[str, int]) -> list[tuple[str, str]]:
    """Return every way to put a token together of two, for a BPE whose merges are ranked by the ids of their results.

    Source: `generate_merges` in transformers/tokenization_utils_base.py.
    """
    _bound_splits(ids)
    merges = []
    for token, rank in ids.items():
        for split in range(1, len(token)):
            left, right = token[:split], token[split:]
            if left in ids and right in ids:
                merges.append((rank, len(left), len(right), left, right))
    merges.sort(key=lambda merge: merge[:3])
    return [(left, right) for *_, left, right in merges]


def _merges_by_score(model: SentencePieceModel, names: dict[int, str]) -> list[tuple[str, str]]:
    """Return the merges of a BPE ranked by the scores of their results, as sentencepiece does; of normal pieces only.

    Source: `SpmConverter.build_tokenizer_from_spm_proto` in transformers/convert_slow_tokenizer.py.
    """
    normal = {
        names[index]: (piece.score, index)
        for index, piece in enumerate(model.pieces)
        if piece.type == NORMAL and index in names
    }
    _bound_splits(normal)
    merges = []
    for token, (score, index) in normal.items():
        for split in range(1, len(token)):
            left, right = token[:split], token[split:]
            if left in normal and right in normal:
                merges.append((-score, index, left, right))
    return [(left, right) for *_, left, right in sorted(merges)]


def _bound_splits(tokens: dict[str, Any]) -> None:
    if sum(len(token) ** 2 for token in tokens) > MAX_SQUARED_CHARACTERS:
        raise TokenizerError("the tokens of a model of sentencepiece are too long to be split in every way")


def pipeline(model: SentencePieceModel, legacy: bool, names: dict[int, str] | None = None) -> tokenizers.Tokenizer:
    """Return a tokenizer that follows a model's own settings.

    Source: `SpmConverter.build_tokenizer_from_spm_proto` in transformers/convert_slow_tokenizer.py.

    Args:
        model: what the file says.
        legacy: whether every chunk between added tokens begins with a space, and not only the first.
        names: other names for some of the pieces of a BPE, by their ids.
    """
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    if model.model_type == UNIGRAM:
        texts = dict(enumerate(piece.text for piece in model.pieces))
        backend = tokenizers.Tokenizer(models.Unigram(model.scores(), model.unk_id, model.byte_fallback))
    else:
        texts = {index: text for text, index in _renamed(model.ids(), names or {}).items()}
    users = [texts[index] for index, piece in enumerate(model.pieces) if piece.type == USER_DEFINED and index in texts]
    if model.model_type != UNIGRAM:
        backend = tokenizers.Tokenizer(
            models.BPE(
                vocab={text: index for index, text in texts.items()},
                merges=_merges_by_score(model, texts),
                unk_token=model.unk_piece,
                fuse_unk=True,
                byte_fallback=model.byte_fallback,
                ignore_merges=bool(users),
            )
        )
    backend.normalizer = normalizers.Sequence(_normalizers(model, legacy))
    steps: list[Any] = []
    if model.add_dummy_prefix:
        steps.append(pre_tokenizers.Metaspace(SPACE, "always" if legacy else "first", split=False))
    if users:
        longest_first = sorted(users, key=len, reverse=True)
        steps.append(pre_tokenizers.Split(tokenizers.Regex("|".join(map(re.escape, longest_first))), "isolated"))
    if steps:
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    parts: list[Any] = [decoders.Replace(SPACE, " ")]
    if model.byte_fallback:
        parts.append(decoders.ByteFallback())
    if model.add_dummy_prefix:
        parts += [decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    elif model.byte_fallback:
        parts.append(decoders.Fuse())
    backend.decoder = decoders.Sequence(parts)
    return backend


def _renamed(ids: dict[str, int], names: dict[int, str]) -> dict[str, int]:
    """Return the ids of the tokens, some of which have other names; a name that another token keeps is not given."""
    kept = {text for text, index in ids.items() if index not in names}
    return {(names[i] if names.get(i, text) not in kept and i in names else text): i for text, i in ids.items()}


def _normalizers(model: SentencePieceModel, legacy: bool) -> list[Any]:
    from tokenizers import Regex, normalizers

    steps: list[Any] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.escape_whitespaces:
        steps.append(normalizers.Replace(" ", SPACE))
    if model.add_dummy_prefix and legacy:
        # The pre-tokenizer adds no prefix where there is one, and sentencepiece does.
        steps.append(normalizers.Replace(Regex(rf"\A{SPACE}"), SPACE * 2))
    return steps
