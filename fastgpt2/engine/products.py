"""The one product that everything is made of: a few rows by panels of weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


class Product(Protocol):
    """Multiplies chunks of rows by panels, on the calling thread, with the GIL released."""

    name: str

    def __call__(self, x: Array, panels: NDArray[Any], out: Array) -> None:
        """out[n, c] = x[0, c] @ panels[n, 0]; x [1, C, m, K], panels [n, 1, K, P], out [n, C, m, P], a strided view.

        Panels of int8 are multiplied as the whole numbers that they hold.

        The three arrays must be long-lived: a product may remember their addresses.
        """


class Calls:
    """What a foreign function is called with, worked out once for each three arrays.

    They are the same for as long as a batch keeps its size; beyond so many, it begins anew.
    """

    def __init__(self, arguments: Callable[[Array, NDArray[Any], Array], tuple[Any, ...]], most: int = 4096) -> None:
        self._arguments, self._most = arguments, most
        # The arrays are kept beside the arguments, so that no other array can come to have their ids.
        self._known: dict[tuple[int, int, int], tuple[Any, ...]] = {}

    def arguments(self, x: Array, panels: NDArray[Any], out: Array) -> tuple[Any, ...]:
        key = (id(x), id(panels), id(out))
        known = self._known.get(key)
        if known is None:
            if len(self._known) >= self._most:
                self._known.clear()
            known = self._known[key] = (self._arguments(x, panels, out), x, panels, out)
        found: tuple[Any, ...] = known[0]
        return found


class NumpyProduct:
    """By the BLAS that numpy brought: OpenBLAS in the wheels of PyPI."""

    name = "openblas"

    def __call__(self, x: Array, panels: NDArray[Any], out: Array) -> None:
        np.matmul(x, panels, out=out)


def product_named(name: str) -> Product:
    """
    Raises:
        BadRequest: that BLAS, or llvmlite for compact weights, is not here.
    """
    if name.startswith("compiled-"):
        from fastgpt2.engine.compiled import CompiledProduct

        return CompiledProduct(name.removeprefix("compiled-"))
    if name == "mkl":
        from fastgpt2.engine.mkl import MKLProduct

        return MKLProduct()
    return NumpyProduct()
