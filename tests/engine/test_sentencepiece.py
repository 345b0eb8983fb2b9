"""Models of sentencepiece are read without its package, and whatever else is in such a file is a sentence."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest
from support.running import GOLDEN

from fastgpt2.engine.text import sentencepiece
from fastgpt2.engine.text.sentencepiece import (
    CONTROL,
    NORMAL,
    USER_DEFINED,
    check_charsmap,
    merges_by_id,
    parse_sentencepiece,
    pipeline,
)
from fastgpt2.errors import TokenizerError

PATH = Path("folder/spiece.model")
UNKNOWN, BYTE = 2, 6


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def message(field: int, value: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(value)) + value


def piece(text: str, score: float = 0.0, kind: int = NORMAL) -> bytes:
    return message(1, message(1, text.encode()) + b"\x15" + struct.pack("<f", score) + number(3, kind))


def bpe(*pieces: bytes, trainer: bytes = b"", normalizer: bytes = number(3, 0) + number(4, 0)) -> bytes:
    return b"".join(pieces) + message(2, number(3, 2) + trainer) + message(3, normalizer)


def test_fields_are_read_and_others_have_their_defaults() -> None:
    data = (
        piece("<unk>", 0.0, UNKNOWN)
        + piece("<s>", 0.0, CONTROL)
        + piece("▁a", -1.5)
        + message(1, message(1, b"b"))
        + message(2, number(3, 2) + number(35, 1) + number(40, 0) + number(41, -1) + message(47, "</é>".encode()))
        + message(3, number(3, 0) + message(1, b"its name"))
        + message(4, b"samples")
        + number(200, 5)
        + varint(201 << 3 | 1)
        + bytes(8)
        + varint(202 << 3 | 5)
        + bytes(4)
    )
    model = parse_sentencepiece(data, PATH)
    assert [(one.text, one.score, one.type) for one in model.pieces] == [
        ("<unk>", 0.0, UNKNOWN),
        ("<s>", 0.0, CONTROL),
        ("▁a", -1.5, NORMAL),
        ("b", 0.0, NORMAL),
    ]
    assert (model.model_type, model.byte_fallback, model.unk_id, model.bos_id, model.eos_id) == (2, True, 0, -1, 2)
    assert (model.eos_piece, model.bos_piece, model.charsmap) == ("</é>", "<s>", None)
    assert (model.add_dummy_prefix, model.remove_extra_whitespaces, model.escape_whitespaces) == (False, True, True)


def test_controls_are_special_tokens_and_symbols_of_users_are_not() -> None:
    data = bpe(piece("<unk>", 0.0, UNKNOWN), piece("<s>", 0.0, CONTROL), piece("<usr>", 0.0, USER_DEFINED), piece("a"))
    tokens = parse_sentencepiece(data, PATH).added_tokens()
    assert [(token.content, token.special, token.normalized) for token in tokens] == [
        ("<s>", True, False),
        ("<usr>", False, False),
    ]


def test_merges_are_ranked_by_the_ids_of_what_they_make() -> None:
    ids = {"a": 0, "b": 1, "c": 2, "abc": 3, "ab": 4, "bc": 5}
    assert merges_by_id(ids) == [("a", "bc"), ("ab", "c"), ("a", "b"), ("b", "c")]


def test_a_merge_with_a_better_score_comes_first() -> None:
    """ "abc" is a+bc where "bc" has the better score, whatever the ids are."""
    letters = [piece("<unk>", 0.0, UNKNOWN), piece("a", -9.0), piece("b", -9.0), piece("c", -9.0)]
    first = parse_sentencepiece(bpe(*letters, piece("ab", -2.0), piece("bc", -1.0)), PATH)
    other = parse_sentencepiece(bpe(*letters, piece("ab", -1.0), piece("bc", -2.0)), PATH)
    assert pipeline(first, legacy=True).encode("abc").tokens == ["a", "bc"]
    assert pipeline(other, legacy=True).encode("abc").tokens == ["ab", "c"]


def test_what_no_piece_has_becomes_bytes_or_the_unknown_piece() -> None:
    byte_pieces = [piece(f"<0x{value:02X}>", 0.0, BYTE) for value in "é".encode()]
    letters = [piece("<unk>", 0.0, UNKNOWN), piece("a")]
    plain = parse_sentencepiece(bpe(*letters), PATH)
    with_bytes = parse_sentencepiece(bpe(*letters, *byte_pieces, trainer=number(35, 1)), PATH)
    assert pipeline(plain, legacy=True).encode("aéé").tokens == ["a", "<unk>"]
    backend = pipeline(with_bytes, legacy=True)
    assert backend.encode("aé").tokens == ["a", "<0xC3>", "<0xA9>"]
    assert backend.decode([1, 2, 3]) == "aé"


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "no pieces"),
        (b"\x80", "a broken number"),
        (b"\xff" * 20, "a broken number"),
        (b"\x0a\xff\xff\xff\xff\x0f", "a field goes beyond the end"),
        (b"\x0b", "a field of wire type 3"),
        (b"\x08\x01", "a number where a message should be"),
        (message(1, message(1, b"\xff")), "invalid start byte"),
        (message(1, message(2, b"1234567")), "unpack requires"),
        (message(1, message(3, b"1")), "a message where a number should be"),
        (piece("a", float("nan")), "a score that is no number"),
        (piece("a" * 1025), "a piece of more than 1024 characters"),
    ],
)
def test_what_is_no_model_is_a_sentence(data: bytes, why: str) -> None:
    with pytest.raises(TokenizerError, match=why) as caught:
        parse_sentencepiece(data, PATH)
    assert str(caught.value).startswith("folder/spiece.model: not a model of sentencepiece")


def test_the_work_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentencepiece, "MAX_PIECES", 2)
    with pytest.raises(TokenizerError, match="more than 2 pieces"):
        parse_sentencepiece(piece("a") * 3, PATH)
    monkeypatch.setattr(sentencepiece, "MAX_SQUARED_CHARACTERS", 10)
    with pytest.raises(TokenizerError, match="too long to be split"):
        merges_by_id({"aaaa": 0})


def charsmap_of(kind: str) -> bytes:
    data = (GOLDEN / "tokenizers" / kind / "spiece.model").read_bytes()
    charsmap = parse_sentencepiece(data, PATH).charsmap
    assert charsmap is not None
    return charsmap


def test_a_charsmap_that_leads_out_of_itself_is_refused() -> None:
    """The library would panic over the text that leads there."""
    charsmap = charsmap_of("t5")
    (size,) = struct.unpack_from("<I", charsmap)
    check_charsmap(charsmap, PATH)
    far = struct.pack("<I", 0x001FFFFF << 10)
    damaged = [
        b"",
        charsmap[:3],
        charsmap[:100],
        struct.pack("<I", size + 4) + charsmap[4:],
        struct.pack("<I", 0) + charsmap[4:],
        charsmap[:4] + far + charsmap[8:],
        charsmap[: 4 + size],  # without the strings that its values point to
        charsmap[: 4 + size] + b"\xff" * (len(charsmap) - size - 4),
    ]
    for one in damaged:
        with pytest.raises(TokenizerError, match="precompiled_charsmap is damaged"):
            check_charsmap(one, PATH)


def test_no_charsmap_that_passes_makes_the_library_panic() -> None:
    from tokenizers import normalizers

    charsmap = charsmap_of("t5")
    dice = random.Random(5)
    texts = ["ﬁ ½ \u3000 \uff37", "plain", "日本語", "\x00\u0301é"]
    passed = 0
    for _ in range(300):
        changed = bytearray(charsmap)
        for _ in range(dice.choice((1, 1, 2, 8))):
            changed[dice.randrange(len(changed))] = dice.randrange(256)
        try:
            check_charsmap(bytes(changed), PATH)
        except TokenizerError:
            continue
        passed += 1
        normalizer = normalizers.Precompiled(bytes(changed))
        for text in texts:
            normalizer.normalize_str(text)
    assert passed
