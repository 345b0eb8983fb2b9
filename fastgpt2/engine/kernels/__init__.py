"""Rows times panels of weights: the product that everything else is made of; uses errors and machine."""

from __future__ import annotations

from fastgpt2.engine.kernels.kernel import Product
from fastgpt2.engine.kernels.openblas import NumpyProduct


def make_product(name: str) -> Product:
    """Return the product of that name: "openblas", "mkl", or "compiled-" and a kind of weights ("compiled-int8").

    Raises BadRequest if MKL, or llvmlite for a compiled product, is not installed.
    """
    if name.startswith("compiled-"):
        from fastgpt2.engine.kernels.compiled import CompiledProduct

        return CompiledProduct(name.removeprefix("compiled-"))
    if name == "mkl":
        from fastgpt2.engine.kernels.mkl import MKLProduct

        return MKLProduct()
    return NumpyProduct()
