"""Pieces of text are strings, for all that takes strings, and tell where they belong."""

from __future__ import annotations

import copy
import io
import json
import pickle

import pytest

from fastgpt2 import Piece, TokenLogprob

TOLD = (TokenLogprob(5, "b", -0.5, text_offset=1),)
PIECE = Piece("ab\n", 3, 2, TOLD, 1, choice_index=4)


def test_a_piece_is_its_text() -> None:
    assert isinstance(PIECE, str)
    assert PIECE == "ab\n"
    assert hash(PIECE) == hash("ab\n")
    assert {"ab\n": 1}[PIECE] == 1
    assert "".join([Piece("a", 0, 1), Piece("b", 1, 1)]) == "ab"
    assert not Piece("", 6, 1, TOLD, 1)
    stream = io.StringIO()
    print(PIECE, end="", file=stream)
    stream.writelines([PIECE])
    assert stream.getvalue() == "ab\nab\n"
    assert PIECE.encode() == b"ab\n"
    assert json.dumps(PIECE) == json.dumps("ab\n")
    assert f"{PIECE:>4}" == " ab\n"


@pytest.mark.parametrize("made", [PIECE.text, str(PIECE), PIECE[1:], PIECE.upper(), PIECE + "c", f"{PIECE}"])
def test_what_is_made_of_it_is_a_plain_string(made: str) -> None:
    assert type(made) is str


def test_where_it_belongs() -> None:
    assert (PIECE.at, PIECE.attempt, PIECE.logprobs, PIECE.token_at, PIECE.choice_index) == (3, 2, TOLD, 1, 4)
    plain = Piece("a", 0, 1)
    assert (plain.logprobs, plain.token_at, plain.choice_index) == ((), 0, 0)
    assert not hasattr(plain, "__dict__"), "there are many of them"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_copy_tells_the_same(protocol: int) -> None:
    for other in (pickle.loads(pickle.dumps(PIECE, protocol)), copy.copy(PIECE), copy.deepcopy(PIECE)):
        assert type(other) is Piece
        assert repr(other) == repr(PIECE)


def test_its_repr_is_how_it_is_made() -> None:
    assert repr(Piece("a'", 3, 1)) == """Piece("a'", at=3, attempt=1)"""
    for piece in (PIECE, Piece("", 2, 1, (), 1), Piece("z", 2, 1, choice_index=1)):
        again = eval(repr(piece), {"Piece": Piece, "TokenLogprob": TokenLogprob})
        assert repr(again) == repr(piece)
        assert (again.at, again.token_at, again.choice_index) == (piece.at, piece.token_at, piece.choice_index)
