"""Stop strings in a text that grows: found where a search of the whole would find them, and never taken back."""

from __future__ import annotations

import random

from fastgpt2.engine.decoding.stop_strings import StopStrings

SPECIAL = {0: "<s>", 1: "</s>", 2: "<|im_end|>", 3: ""}
TOKENS = {10: "a", 11: "b", 12: "ab", 13: "\n", 14: "", 15: "</", 16: "s>", 17: "a</s>"}


def written(tokens: list[int]) -> tuple[str, list[int]]:
    """Return the text of tokens with the names of special ones, and the place of each character in the text alone."""
    text, places, at = "", list[int](), 0
    for token in tokens:
        piece = TOKENS.get(token, SPECIAL.get(token, ""))
        in_text = token in TOKENS
        text += piece
        places += [at + n if in_text else at for n in range(len(piece))]
        at += len(piece) if in_text else 0
    return text, places


def first_stop(tokens: list[int], stops: tuple[str, ...], begin: int) -> tuple[int, str] | None:
    """Search all of the text for the first stop string."""
    plain, (named, places) = "".join(TOKENS.get(token, "") for token in tokens), written(tokens)
    found = []
    for stop in stops:
        naming = any(name and name in stop for name in SPECIAL.values())
        where = named.find(stop) if naming else plain.find(stop)
        if where >= 0:
            found.append((begin + (places[where] if naming else where), stop))
    return min(found, key=lambda pair: pair[0], default=None)


def test_random_texts_token_by_token() -> None:
    dice = random.Random(8)
    ends = 0
    for _ in range(3000):
        few = dice.sample([*SPECIAL, *TOKENS], 4)
        tokens = [dice.choice(few) for _ in range(dice.randint(1, 12))]
        stops = tuple({cut(dice, tokens) for _ in range(dice.randint(1, 3))} - {""}) or ("zzz",)
        echo = dice.choice(("", "ab", "x"))
        ends += check(tokens, stops, echo)
    assert 500 < ends < 2800


def cut(dice: random.Random, tokens: list[int]) -> str:
    """Cut a stop string out of the written text, or one that only begins there."""
    text, _ = written(tokens)
    begin = dice.randrange(len(text) + 1)
    return text[begin : begin + dice.randint(1, 9)] + dice.choice(("", "", "!"))


def check(tokens: list[int], stops: tuple[str, ...], echo: str) -> bool:
    found = StopStrings(stops, SPECIAL, len(echo))
    text, settled = echo, ""
    for number, token in enumerate(tokens, 1):
        known = len(text)
        text += TOKENS.get(token, "")
        found.note(token, len(text))
        got, expected = found.find(text, known, token), first_stop(tokens[:number], stops, len(echo))
        if expected is not None:
            assert got is not None
            assert got[0] == expected[0], (tokens[:number], stops)
            assert text[: got[0]].startswith(settled)
            return True
        assert got is None, (tokens[:number], stops)
        held = found.held(text)
        assert 0 <= held <= len(text) - len(echo)
        assert text[: len(text) - held].startswith(settled)
        settled = text[: len(text) - held]
    return False


def test_by_hand() -> None:
    stops = StopStrings(("</s>\n", "b!"), SPECIAL, 0)
    stops.note(10, 1)
    assert stops.find("a", 0, 10) is None
    stops.note(1, 1)
    assert (stops.find("a", 1, 1), stops.held("a")) == (None, 0)
    stops.note(13, 2)
    assert stops.find("a\n", 1, 13) == (1, "</s>\n")
    # A string without a special token's name reads over special tokens.
    plain = StopStrings(("ab",), SPECIAL, 0)
    for token, text in ((10, "a"), (2, "a"), (11, "ab")):
        plain.note(token, len(text))
    assert plain.find("ab", 1, 11) == (0, "ab")
    # One with a name does not: other special tokens stand between.
    naming = StopStrings(("a</s>",), SPECIAL, 0)
    for token in (10, 2, 1):
        naming.note(token, 1)
        assert naming.find("a", 1, token) is None
    assert naming.held("a") == 0
    # The text may hold the letters of such a name by ordinary tokens.
    assert naming.find("aa</s>", 1, 17) == (1, "a</s>")


def test_what_may_begin_a_stop_string_is_held() -> None:
    naming = StopStrings(("ab<|im_end|>\n",), SPECIAL, 1)
    assert [naming.held(text) for text in ("ab", "xa", "xab", "xabc")] == [0, 1, 2, 0]
    naming.note(2, 3)
    assert (naming.held("xab"), naming.held("xab!")) == (2, 0)
    naming.note(2, 3)
    assert naming.held("xab") == 0
