"""Stop strings: where one of them ends a text, and how much of the text may still turn out to begin one."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping


class StopStrings:
    """The stop strings of a sequence.

    Special tokens are no part of a text. A stop string that names one, such as "<|im_end|>" or "</s>\\n", is looked for
    in the text with the names of all special tokens written where these stand; any other in the text alone.

    Args:
        strings: at least one.
        special_tokens: the names of the tokenizer's special tokens by their ids.
        begin: where in the text the generated text begins; a stop string does not begin before.
    """

    def __init__(self, strings: tuple[str, ...], special_tokens: Mapping[int, str], begin: int) -> None:
        names = {name for name in special_tokens.values() if name}
        self._naming = [stop for stop in strings if any(name in stop for name in names)]
        self._plain = [stop for stop in strings if stop not in self._naming]
        self._special_tokens = special_tokens if self._naming else {}
        self._longest = max(map(len, strings))
        self._begin = begin
        # The special tokens generated so far: where in the text each stands, and its name.
        self._marks: list[tuple[int, str]] = []

    def find(self, text: str, known: int, token_id: int) -> tuple[int, str] | None:
        """Return where in a text the first stop string begins, and that string; None if there is none.

        Args:
            known: the number of characters in which there is none: it must end behind them, or with the token.
            token_id: the token generated last.
        """
        found = [(text.find(stop, max(self._begin, known - len(stop) + 1)), stop) for stop in self._plain]
        if self._naming:
            found += self._find_naming(text, known, self._special_tokens.get(token_id, ""))
        return min((pair for pair in found if pair[0] >= 0), key=lambda pair: pair[0], default=None)

    def held(self, text: str) -> int:
        """Return the length of the longest end of a text with which a stop string begins: the rest may follow."""
        held = 0
        for stop in self._plain:
            longest = min(len(stop) - 1, len(text) - self._begin)
            held = next((n for n in range(longest, held, -1) if text.endswith(stop[:n])), held)
        if self._naming:
            written, places = self._written_out(text, len(text))
            for stop in self._naming:
                longest = min(len(stop) - 1, len(written))
                begun = next((n for n in range(longest, 0, -1) if written.endswith(stop[:n])), 0)
                if begun:
                    held = max(held, len(text) - places[-begun])
        return held

    def note(self, token_id: int, at: int) -> None:
        """Note where in the text a token stands that was generated, for the stop strings that name special tokens."""
        if token_id in self._special_tokens:
            self._marks.append((at, self._special_tokens[token_id]))

    def _find_naming(self, text: str, known: int, name: str) -> list[tuple[int, str]]:
        """Return what `find` looks for of the stop strings that name special tokens; `name` is the last token's."""
        if known >= len(text) and not name:
            return []
        written, places = self._written_out(text, known)
        # What is new is the name, or the text behind what stood there before.
        new = len(written) - len(name) if name else bisect_right(places, known) - 1
        found = [(written.find(stop, max(0, new - len(stop) + 1)), stop) for stop in self._naming]
        return [(places[at], stop) for at, stop in found if at >= 0]

    def _written_out(self, text: str, known: int) -> tuple[str, list[int]]:
        """Return a text's end with the special tokens' names in it, and for each character its place in the text.

        The end is long enough for a stop string that ends behind the first `known` characters.
        """
        at = max(self._begin, known - self._longest)
        written, places = "", list[int]()
        for place, name in [*(mark for mark in self._marks if at <= mark[0] <= len(text)), (len(text), "")]:
            written += text[at:place] + name
            places += [*range(at, place), *[place] * len(name)]
            at = place
        return written, places
