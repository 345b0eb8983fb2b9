"""An arena: zeroed memory for a model's state, which the operating system commits only where it is written."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fastgpt2.engine.machine import anonymous_file

# Arrays begin at a page, so that one can be given back without touching its neighbour.
PAGE = mmap.PAGESIZE

# An array's shape and dtype.
Spec = tuple[tuple[int, ...], DTypeLike]


class Arena:
    """Named arrays in one anonymous mapping, private to this process or shared with the helpers that open its `fd`.

    The same specifications give the same layout in every process.

    Args:
        specs: shape and dtype by name.
        shared: back the memory with a file descriptor that a helper process can map too.
        fd: that of another process's shared arena with the same specifications; it is not closed here.

    Raises:
        OSError, ValueError: the system does not give that much address space.
    """

    def __init__(self, specs: Mapping[str, Spec], *, shared: bool = False, fd: int | None = None) -> None:
        self._offsets: dict[str, int] = {}
        size = 0
        for name, (shape, dtype) in specs.items():
            self._offsets[name] = size
            size += -(-max(1, math.prod(shape)) * np.dtype(dtype).itemsize // PAGE) * PAGE
        self.fd = fd
        self._owned: int | None = None
        if fd is not None:
            self._map = mmap.mmap(fd, size)
        elif shared:
            self.fd = self._owned = anonymous_file("fastgpt2-state")
            os.ftruncate(self._owned, size)
            self._map = mmap.mmap(self._owned, size)
        else:
            self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._arrays: dict[str, NDArray[Any]] = {
            name: np.frombuffer(self._map, dtype, math.prod(shape), self._offsets[name]).reshape(shape)
            for name, (shape, dtype) in specs.items()
        }

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._arrays[name]

    def give_back(self, name: str, indices: Iterable[int]) -> None:
        """Return the memory of `array[i]` for each of the indices to the system; it reads as zeros afterwards.

        Only whole pages are returned: a small `array[i]` shares its first and its last page with its neighbours.
        """
        array = self._arrays[name]
        advice = getattr(mmap, "MADV_REMOVE" if self.fd is not None else "MADV_DONTNEED", None)
        if advice is None:  # neither Linux nor a BSD
            return
        for index in indices:
            start = self._offsets[name] + index * array.strides[0]
            stop = (start + array.strides[0]) // PAGE * PAGE
            start = -(-start // PAGE) * PAGE
            if stop > start:
                self._map.madvise(advice, start, stop - start)

    def advise(self, name: str, advice: str) -> None:
        """Advise the system to commit an array by huge pages, "MADV_HUGEPAGE", or by single ones, "MADV_NOHUGEPAGE"."""
        # Not every system has the advice, and a kernel without huge pages does not know it.
        with contextlib.suppress(AttributeError, OSError):
            size = -(-self._arrays[name].nbytes // PAGE) * PAGE
            self._map.madvise(getattr(mmap, advice), self._offsets[name], size)

    def __del__(self) -> None:
        if getattr(self, "_owned", None) is not None:
            os.close(self._owned)  # type: ignore[arg-type]
            self._owned = None
