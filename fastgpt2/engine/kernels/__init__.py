"""Rows times panels of weights: the products that everything else is made of; uses nothing but errors and machine."""

from __future__ import annotations

from fastgpt2.engine.kernels.kernel import Product
from fastgpt2.engine.kernels.openblas import NumpyProduct


def product_named(name: str) -> Product:
    """
    Raises:
        BadRequest: that BLAS, or llvmlite for compact weights, is not here.
    """
    if name.startswith("compiled-"):
        from fastgpt2.engine.kernels.compiled import CompiledProduct

        return CompiledProduct(name.removeprefix("compiled-"))
    if name == "mkl":
        from fastgpt2.engine.kernels.mkl import MKLProduct

        return MKLProduct()
    return NumpyProduct()
