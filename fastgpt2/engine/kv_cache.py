"""Keys and values of the tokens seen, in slots allotted once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastgpt2.engine.arena import Arena, Spec
from fastgpt2.engine.config import GPT2Config

# Positions in a block of keys, the width of a panel in the product of queries and keys. Wider ones are faster in a long
# sequence, and read more that is not filled yet in a short one.
BLOCK = 32


class KVCache:
    """`n_slots` sequences of up to `n_positions` tokens.

    Attributes:
        keys: float32 [n_slots, n_layer, blocks, n_head, head_dim, BLOCK]: panels of keys, so that queries are
            multiplied with them by the same kernel as with weights.
        values: float32 [n_slots, n_layer, n_head, blocks * BLOCK, head_dim].
        lengths: how many positions of each slot are filled.

    Memory is committed as positions fill. A slot given back keeps what it has committed for the next sequence, unless
    that is more than a quarter of a slot, which goes back to the system.
    """

    def __init__(self, config: GPT2Config, n_slots: int, arena: Arena) -> None:
        self.keys: NDArray[np.float32] = arena["keys"]
        self.values: NDArray[np.float32] = arena["values"]
        self.lengths = [0] * n_slots
        self._most_kept = config.n_positions // 4
        self._arena = arena
        self._committed = [0] * n_slots
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
    def free_slots(self) -> int:
        return len(self._free)

    def allot(self) -> int:
        """Take an empty slot, the lowest: neighbours are attended together. Raises IndexError when none is free."""
        if not self._free:
            raise IndexError("no slot is free; ask `free_slots` first")
        slot = min(self._free)
        self._free.remove(slot)
        self.lengths[slot] = 0
        return slot

    def release(self, slot: int) -> None:
        """Give a slot back. Raises ValueError if it is free already."""
        if slot in self._free:
            raise ValueError(f"slot {slot} is free already")
        self._free.append(slot)
        self._committed[slot] = max(self._committed[slot], self.lengths[slot])
        if self._committed[slot] > self._most_kept:
            self._arena.give_back("keys", [slot])
            self._arena.give_back("values", [slot])
            self._committed[slot] = 0
