"""What one forward step does, as plain numbers: the same for every process that has a share in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Segment:
    """The next tokens of one sequence.

    Attributes:
        slot: the sequence's slot in the KV cache.
        ids: the tokens that follow what the slot holds, at least one.
        n_logits: for how many of the last of these tokens logits are wanted (0 in the midst of a prompt, else 1).
    """

    slot: int
    ids: Sequence[int]
    n_logits: int = 1


@dataclass(frozen=True, slots=True)
class Step:
    """Segments, each with the position of its first token; `by` which of a network's sets of weights, 0 its own."""

    segments: Sequence[Segment]
    starts: Sequence[int]
    by: int = 0

    @property
    def rows(self) -> int:
        return sum(len(segment.ids) for segment in self.segments)

    def rows_with_logits(self) -> list[int]:
        rows: list[int] = []
        stop = 0
        for segment in self.segments:
            stop += len(segment.ids)
            rows.extend(range(stop - segment.n_logits, stop))
        return rows

    def encode(self) -> list[int]:
        """As numbers, for `decode` in another process."""
        numbers = [self.by, len(self.segments)]
        for segment, start in zip(self.segments, self.starts, strict=True):
            numbers += (segment.slot, segment.n_logits, start, len(segment.ids), *segment.ids)
        return numbers

    @classmethod
    def decode(cls, numbers: Sequence[int]) -> Step:
        segments, starts, at = [], [], 2
        for _ in range(numbers[1]):
            slot, n_logits, start, length = numbers[at : at + 4]
            at += 4
            segments.append(Segment(slot, numbers[at : at + length], n_logits))
            starts.append(start)
            at += length
        return cls(segments, starts, numbers[0])


def encoded_size(rows: int, segments: int) -> int:
    """The most numbers that `Step.encode` gives."""
    return 2 + 4 * segments + rows
