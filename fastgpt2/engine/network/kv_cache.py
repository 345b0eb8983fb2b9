"""The KV cache: keys and values of the tokens that were run, in a slot for each sequence, within a bound of memory.

Memory is committed as positions fill, and reserved from the start for as far as the sequence can grow. Slots given back
keep what they have committed for the next sequences, up to a quarter of all slots. When the memory is needed elsewhere,
it goes back to the system.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastgpt2.engine.kernels.attention import BLOCK, MOST_PADDING
from fastgpt2.engine.model.config import GPT2Config
from fastgpt2.engine.network.arena import PAGE, Arena, Spec


class KVCache:
    """The keys and values of `n_slots` sequences of up to `n_positions` tokens.

    Args:
        bytes_limit: that all sequences together may commit, at least `sequence_bytes(config)`; None for no limit.

    Attributes:
        keys: float32 [n_slots, n_layer, blocks, n_head, head_dim, BLOCK]: panels of keys, so that queries are
            multiplied with them by the same kernel as with weights.
        values: float32 [n_slots, n_layer, n_head, blocks * BLOCK, head_dim].
        lengths: how many positions of each slot are filled.
        usable_slots: how many of the slots are given out at most. It may change at any time, to at most `n_slots`: if
            more are in use, no further one is given out until they are fewer.
    """

    def __init__(self, config: GPT2Config, n_slots: int, arena: Arena, bytes_limit: int | None = None) -> None:
        self.keys: NDArray[np.float32] = arena["keys"]
        self.values: NDArray[np.float32] = arena["values"]
        self.lengths = [0] * n_slots
        self.usable_slots = n_slots
        self.bytes_limit = n_slots * sequence_bytes(config) if bytes_limit is None else bytes_limit
        self._config = config
        self._padding = MOST_PADDING if arena.fd is not None else 0
        # Bytes that a free slot keeps, in the mean. Committing memory is dear: 512 positions of gpt2 take 30 ms.
        self._most_kept = sequence_bytes(config, config.n_positions // 4 + self._padding)
        self._arena = arena
        if arena.fd is None:
            # A huge page would commit far more than what is written to it.
            arena.advise("keys", "MADV_NOHUGEPAGE")
            arena.advise("values", "MADV_NOHUGEPAGE")
        # Bytes that a slot in use may come to commit, and bytes that a slot has committed.
        self._reserved, self._committed = [0] * n_slots, [0] * n_slots
        self._free = list(range(n_slots))

    @staticmethod
    def specs(config: GPT2Config, n_slots: int) -> dict[str, Spec]:
        blocks = -(-config.n_positions // BLOCK)
        layers = (n_slots, config.n_layer)
        return {
            "keys": ((*layers, blocks, config.n_head, config.head_dim, BLOCK), np.float32),
            "values": ((*layers, config.n_head, blocks * BLOCK, config.head_dim), np.float32),
        }

    @property
    def n_slots(self) -> int:
        """Return how many slots there are, those that are not to be used included."""
        return len(self.lengths)

    @property
    def free_slots(self) -> int:
        """Return how many slots may still be given out."""
        return max(0, self.usable_slots - (self.n_slots - len(self._free)))

    @property
    def bytes_reserved(self) -> int:
        """Return the bytes that slots in use may come to commit, and that free ones keep committed."""
        return sum(self._reserved) + sum(self._committed[slot] for slot in self._free)

    def use_slots(self, n_slots: int) -> None:
        """Give out only `n_slots` slots from now on; raise ValueError if a slot is in use.

        What slots keep committed goes back to the system.
        """
        if len(self._free) < self.n_slots:
            raise ValueError("slots are in use")
        for slot in self._free:
            self._give_back(slot)
        self.usable_slots = n_slots

    def has_room(self, positions: int | None = None) -> bool:
        """Tell whether `allot` would give a slot."""
        return self.free_slots > 0 and sum(self._reserved) + self._bytes_for(positions) <= self.bytes_limit

    def allot(self, positions: int | None = None) -> int:
        """Give out an empty slot, the lowest: neighbours are attended together. Raises IndexError without room.

        Args:
            positions: how many the sequence will fill at most; None for as many as there are.
        """
        if not self.has_room(positions):
            taken = "the memory for keys and values is taken" if self.free_slots else "no slot is free"
            raise IndexError(f"{taken}; ask `has_room` first")
        slot = min(self._free)
        self._free.remove(slot)
        self._reserved[slot] = max(self._bytes_for(positions), self._committed[slot])
        if self._give_back_free(self.bytes_reserved - self.bytes_limit) > 0:
            # At last, what this slot itself keeps.
            self._give_back(slot)
            self._reserved[slot] = self._bytes_for(positions)
        self.lengths[slot] = 0
        return slot

    def block(self, slot: int, number: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return a block's keys [n_layer, n_head, head_dim, BLOCK] and values [n_layer, n_head, BLOCK, head_dim]."""
        at = number * BLOCK
        return self.keys[slot, :, number], self.values[slot, :, :, at : at + BLOCK]

    def copy(self, source: int, slot: int, length: int) -> int:
        """Fill an empty slot with the first `length` positions of another one; return `length`.

        Raises:
            ValueError: the other one has fewer.
        """
        if length > self.lengths[source]:
            raise ValueError(f"slot {source} has {self.lengths[source]} positions, not {length}")
        for number in range(-(-length // BLOCK)):
            for part, other in zip(self.block(slot, number), self.block(source, number), strict=True):
                np.copyto(part, other)
        self.lengths[slot] = length
        return length

    def truncate(self, slot: int, length: int) -> None:
        """Have a slot hold the first `length` positions that were filled. What is committed stays committed."""
        if length < self.lengths[slot]:
            self._committed[slot] = max(self._committed[slot], self._bytes_for(self.lengths[slot]))
        self.lengths[slot] = length

    def release(self, slot: int) -> None:
        """Take a slot back; raise ValueError if it is free already."""
        if slot in self._free:
            raise ValueError(f"slot {slot} is free already")
        self._free.append(slot)
        self._reserved[slot] = 0
        self._committed[slot] = max(self._committed[slot], self._bytes_for(self.lengths[slot]))
        self._give_back_free(sum(self._committed[kept] for kept in self._free) - self.usable_slots * self._most_kept)

    def _give_back_free(self, excess: int) -> int:
        """Give back at least `excess` bytes of what free slots keep. Return how many are still to go then."""
        # First the slots furthest from those that are given out next.
        for kept in sorted(self._free, reverse=True):
            if excess <= 0:
                break
            excess -= self._committed[kept]
            self._give_back(kept)
        return excess

    def _give_back(self, slot: int) -> None:
        if self._committed[slot]:
            self._arena.give_back("keys", [slot])
            self._arena.give_back("values", [slot])
            self._committed[slot] = 0

    def _bytes_for(self, positions: int | None) -> int:
        """Return the bytes that a slot of this many positions may commit, what is read beyond them included."""
        if not positions:
            return sequence_bytes(self._config, positions)
        return sequence_bytes(self._config, min(positions + self._padding, self._config.n_positions))


def sequence_bytes(config: GPT2Config, positions: int | None = None) -> int:
    """Return the bytes that one sequence of this many positions, or of all, commits: whole blocks, by whole pages."""
    if positions == 0:
        return 0
    most = -(-config.n_positions // BLOCK)
    blocks = most if positions is None else -(-positions // BLOCK)
    # A layer's keys lie together, and so do each head's values. A run that does not begin at a page touches one more.
    head_block = 4 * BLOCK * config.head_dim  # bytes of one block of one head
    runs = ((config.n_layer, config.n_head * head_block), (config.n_layer * config.n_head, head_block))
    total = 0
    for count, size in runs:
        pages = -(-blocks * size // PAGE) + (1 if most * size % PAGE else 0)
        total += min(count * pages, -(-count * most * size // PAGE) + 1) * PAGE
    return total
