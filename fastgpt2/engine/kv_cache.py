"""Keys and values of the tokens seen, in slots allotted once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastgpt2.engine.config import GPT2Config


class KVCache:
    """`n_slots` sequences of up to `n_positions` tokens.

    Attributes:
        keys, values: float32 [n_layer, n_slots, n_head, n_positions, head_dim].
        lengths: how many positions of each slot are filled.

    The arrays are reserved whole but not written, so that the operating system commits memory only as positions fill.
    """

    def __init__(self, config: GPT2Config, n_slots: int) -> None:
        shape = (config.n_layer, n_slots, config.n_head, config.n_positions, config.head_dim)
        self.keys: NDArray[np.float32] = np.empty(shape, np.float32)
        self.values: NDArray[np.float32] = np.empty(shape, np.float32)
        self.lengths = [0] * n_slots
        self._free = list(reversed(range(n_slots)))

    @property
    def free_slots(self) -> int:
        return len(self._free)

    def allot(self) -> int:
        """Take an empty slot. Raises IndexError when none is free: ask `free_slots` first."""
        slot = self._free.pop()
        self.lengths[slot] = 0
        return slot

    def release(self, slot: int) -> None:
        """Give a slot back. Raises ValueError if it is free already."""
        if slot in self._free:
            raise ValueError(f"slot {slot} is free already")
        self._free.append(slot)
