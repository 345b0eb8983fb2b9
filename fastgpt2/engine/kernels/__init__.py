"""What a step computes, on arrays: products, norms, attention, in NumPy and compiled; uses errors and machine."""

from __future__ import annotations

from fastgpt2.engine.kernels.kernel import Kernel, Product
from fastgpt2.engine.kernels.openblas import NumpyProduct
from fastgpt2.engine.kernels.operations import Operations


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


def make_operations(kernel: Kernel, activation: str, epsilon: float, most_rows: int) -> Operations:
    """Return the operations of a step, compiled if the kernel asks for that; see `Operations`."""
    if kernel.compiled:
        from fastgpt2.engine.kernels.compiled import CompiledOperations

        return CompiledOperations(kernel, activation, epsilon, most_rows)
    return Operations(kernel, activation, epsilon, most_rows)
