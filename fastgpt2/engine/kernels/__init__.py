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


def keep_code(kernel: Kernel, activation: str, n_head: int, head_dim: int, n_positions: int) -> None:
    """Compile what a model's steps take, and keep it beside the packed weights, for whoever cannot write there."""
    if kernel.compiled:
        from fastgpt2.engine.kernels.attention import BLOCK
        from fastgpt2.engine.kernels.attention_compiled import HeadShape, load_attention_code
        from fastgpt2.engine.kernels.compiled import load_step_code
        from fastgpt2.engine.kernels.machine_code import keep_beside_weights
        from fastgpt2.engine.kernels.program import load_program_code

        load_program_code()
        load_step_code(activation)
        load_attention_code(HeadShape(head_dim, n_head, -(-n_positions // BLOCK) * BLOCK))
        keep_beside_weights()


def make_operations(kernel: Kernel, activation: str, epsilon: float, most_rows: int) -> Operations:
    """Return the operations of a step, compiled if the kernel asks for that; see `Operations`."""
    if kernel.compiled:
        from fastgpt2.engine.kernels.compiled import CompiledOperations

        return CompiledOperations(kernel, activation, epsilon, most_rows)
    return Operations(kernel, activation, epsilon, most_rows)
