"""How many rows of prompts a step reads beside sequences that decode: as many as there is time for.

Those that decode get a token from each step, so what a step reads of prompts makes them wait. More rows at once are
fewer steps: less work beside the rows, and more sequences that decode together. How long a step takes is learnt from
those before, as it depends on the machine, the model, its weights, and on what else runs.
"""

from __future__ import annotations

# A step in which sequences decode is expected to take no longer than this. On two cores, a step of gpt2 for eight
# sequences and 64 rows of prompts takes 90 ms in float32 by OpenBLAS.
MOST_SECONDS = 0.085

# Rows come in multiples of this: kernels have tiles of rows, and a step's views are prepared once for each number.
ROWS_AT_ONCE = 8

# How many rows of a prompt a sequence that decodes counts for: it wants logits, and is attended for itself.
_DECODING_WEIGHT = 2

# Steps with fewer rows of prompts tell little: they may take no longer than it takes to read the weights.
_LEAST_TOLD = 32

# How much one step counts for what is known. A quicker one counts more, as a disturbance only ever adds. One that takes
# `_DISTURBED` times as long as expected, or longer, was disturbed, and counts as that much.
_WEIGHT, _WEIGHT_IF_QUICKER, _DISTURBED = 0.2, 0.4, 3.0


class PromptRows:
    """The number of rows of prompts beside sequences that decode.

    Args:
        least: rows that are read however long they take, and while nothing is known of the time they take.
        most: rows that are read at most.
        seconds_a_row: what a row takes, if that is known.

    Attributes:
        seconds_a_row: what a row of a prompt is expected to take, its share of all that a step does; None while that
            is not known.
    """

    def __init__(self, least: int, most: int, seconds_a_row: float | None = None) -> None:
        self._least, self._most = least, most
        self.seconds_a_row = seconds_a_row

    def note(self, decoding: int, rows: int, seconds: float) -> None:
        """Learn from the time of a step that read `rows` rows of prompts beside `decoding` sequences."""
        if rows < _LEAST_TOLD:
            return
        a_row, expected = seconds / (rows + _DECODING_WEIGHT * decoding), self.seconds_a_row
        if expected is not None:
            weight = _WEIGHT_IF_QUICKER if a_row < expected else _WEIGHT
            a_row = expected + weight * (min(a_row, _DISTURBED * expected) - expected)
        self.seconds_a_row = a_row

    def beside(self, decoding: int) -> int:
        """Return how many rows of prompts the next step reads beside `decoding` sequences.

        Were the time not in proportion to the rows, the number would still come to where a step takes `MOST_SECONDS`:
        each step tells anew what a row takes in a step of its size.
        """
        if not self.seconds_a_row:
            return self._least
        rows = int(MOST_SECONDS / self.seconds_a_row) - _DECODING_WEIGHT * decoding
        return max(self._least, min(self._most, rows // ROWS_AT_ONCE * ROWS_AT_ONCE))
