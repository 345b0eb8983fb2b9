"""Rows of scores with the same bits on every machine: of a generator's raw numbers, by exact arithmetic.

`tests/golden/make_processors.py` and the tests that read what it made build their scores here.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Half the range, as of a bell between -2 and 2, and what is added.
_SHAPES = {
    "normal": (4.0, 0.0),
    "peaked": (16.0, 0.0),
    "flat": (0.05, 0.0),
    "large": (3000.0, 0.0),
    "positive": (2.0, 10.0),
    "negative": (2.0, -10.0),
    "ties": (8.0, 0.0),
}
KINDS = tuple(_SHAPES)


def make_row(kind: str, vocab_size: int, seed: int) -> NDArray[np.float32]:
    """Make scores float32 [vocab_size]; those of "ties" are multiples of a quarter.

    numpy promises the raw numbers of its generators for all versions, but not what is made of them.
    """
    raw = np.random.PCG64(seed).random_raw(4 * vocab_size)
    # Sums of 24 bits are exact.
    bell = (raw >> np.uint64(40)).astype(np.float64).reshape(4, vocab_size).sum(0) / (1 << 24) - 2.0
    scale, shift = _SHAPES[kind]
    values: NDArray[np.float64] = bell * scale + shift
    if kind == "ties":
        values = np.round(values * 4.0) / 4.0
    return values.astype(np.float32)
