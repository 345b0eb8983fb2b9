"""The operations of a forward step, compiled for this CPU by LLVM; llvmlite, an extra, is imported late or not at all.

Each stands under the name that NumPy's form has in `operations.py`. Its instructions are written by the module that the
operation is named after: `product.py`, `layer_norm.py`, `activation.py`, `attention_compiled.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fastgpt2.engine.kernels.attention import AttentionArrays
from fastgpt2.engine.kernels.attention_compiled import CompiledAttention
from fastgpt2.engine.kernels.kernel import Kernel
from fastgpt2.engine.kernels.machine_code import MachineCode, load_code
from fastgpt2.engine.kernels.operations import Attention, Integers, LinearShare, Operations, Rows
from fastgpt2.engine.kernels.panels import COMPILED_WIDTH, STORED_TYPES, Array, Panels
from fastgpt2.engine.kernels.program import Call, Meeting, NativeCall, arguments_of, meet

if TYPE_CHECKING:
    from fastgpt2.engine.kernels.instruction_set import InstructionSet
    from fastgpt2.engine.kernels.ir import Module

# What a packed row takes at most beside its own float32: scales and sums of groups, and the last word's filling.
_MORE_PACKED_BYTES = 512


class CompiledProduct:
    """Rows by panels of `COMPILED_WIDTH` columns, of one kind of weights.

    Args:
        weights: one of `STORED_TYPES`.
        code: of another instruction set than this CPU's best one.

    Raises:
        BadRequest: llvmlite is not installed, or is too old.
    """

    exact = True

    def __init__(self, weights: str, code: MachineCode | None = None) -> None:
        self.name = f"compiled-{weights}"
        self._weights, self._packed, self._zeros = weights, np.empty(0, np.uint8), np.zeros(0, np.float32)
        self.code = code or load_code(f"product {weights}", lambda module, isa: _write_product(module, isa, weights))

    def linear(
        self, x: Array, share: LinearShare, out: Array, rows: Rows, then: LinearShare | None = None
    ) -> NativeCall:
        """Return the call for rows @ weight + bias; raise ValueError if arrays do not lie as the code takes them to."""
        panels, own = share.panels, out[:, share.columns()]
        weights, following = panels.array, (then or share).panels.array
        dtype = STORED_TYPES[self._weights].numpy
        dense = weights.flags.c_contiguous and x.strides[1] == 4 and out.strides[1] == 4
        fits = x.shape[1] >= panels.n_in and own.shape[1] == panels.columns
        panel_shape = -(-panels.n_in // panels.per_word), COMPILED_WIDTH * panels.per_word
        if not (dense and fits and weights.dtype == dtype and weights.shape[2:] == panel_shape):
            raise ValueError(f"not laid out for compiled code of {dtype}: {x.shape}, {weights.shape}, {out.shape}")
        # With room for all rows that x may come to have: what is not used is not committed.
        packed = self._room(x.shape[0] * (4 * panels.n_in + _MORE_PACKED_BYTES))
        bias = self._zeros_of(panels.columns) if share.bias is None else share.bias
        scales = bias if panels.scales is None else panels.scales
        pack = arguments_of(x, x.strides[0], panels.n_in, rows, packed)
        multiply = arguments_of(
            *(packed, panels.n_in, weights, len(weights), following, scales, bias, own, own.strides[0], rows)
        )
        operations = ((self.code.address("pack_rows"), pack), (self.code.address("multiply"), multiply))
        return NativeCall(operations, (x, packed, weights, following, scales, bias, out, rows))

    def _zeros_of(self, size: int) -> Array:
        if self._zeros.size < size:
            self._zeros = np.zeros(size, np.float32)
        return self._zeros

    def _room(self, size: int) -> NDArray[np.uint8]:
        """Return memory for packed rows; one product at a time uses it."""
        if self._packed.size < size:
            self._packed = np.empty(size, np.uint8)
        return self._packed


def _write_product(module: Module, instructions: InstructionSet, weights: str) -> None:
    from fastgpt2.engine.kernels.product import write_product

    write_product(module, weights, instructions)


class CompiledOperations(Operations):
    """The operations of `Operations`, compiled, with products by any kernel.

    Args:
        kernel, activation, epsilon, most_rows: as for `Operations`.

    Raises:
        BadRequest: llvmlite is not installed, or cannot be used.
    """

    def __init__(self, kernel: Kernel, activation: str, epsilon: float, most_rows: int) -> None:
        super().__init__(kernel, activation, epsilon, most_rows)
        self._code = load_step_code(activation)
        self._product = kernel.product if isinstance(kernel.product, CompiledProduct) else None

    def embed(
        self, table: Panels | Array, wpe: Array, ids: Integers, positions: Integers, x: Array, rows: Rows
    ) -> Call:
        if self._product is None or not isinstance(table, Panels):
            return super().embed(table, wpe, ids, positions, x, rows)
        scales = wpe if table.scales is None else table.scales
        arguments = arguments_of(ids, positions, rows, table.array, scales, wpe, x, x.strides[0], table.n_in)
        keep = (ids, positions, rows, table, wpe, x)
        return NativeCall([(self._product.code.address("embed"), arguments)], keep)

    def layer_norm(self, x: Array, added: Array | None, weight: Array, bias: Array, out: Array, rows: Rows) -> Call:
        n_embd, other = x.shape[1], x if added is None else added
        arguments = arguments_of(
            *(x, x.strides[0], other, other.strides[0], weight, bias, out, out.strides[0], rows, n_embd),
            *(float(self._epsilon), 1.0 / n_embd),
        )
        name = "layer_norm" if added is None else "add_layer_norm"
        return NativeCall([(self._code.address(name), arguments)], (x, other, weight, bias, out, rows))

    def linear(self, x: Array, share: LinearShare, out: Array, rows: Rows, then: LinearShare | None = None) -> Call:
        if self._product is None:
            return super().linear(x, share, out, rows)
        return self._product.linear(x, share, out, rows, then)

    def activation(self, x: Array, rows: Rows) -> Call:
        arguments = arguments_of(x, x.strides[0], rows, x.shape[1])
        return NativeCall([(self._code.address("activation"), arguments)], (x, rows))

    def attention(self, arrays: AttentionArrays, heads: tuple[int, int]) -> Attention:
        return CompiledAttention(arrays, heads)

    def meet(self, meeting: Meeting) -> Call:
        return meet(meeting)


def load_step_code(activation: str) -> MachineCode:
    """Return norms and an activation function. Raises BadRequest if llvmlite is not installed, or cannot be used."""
    return load_code(f"step {activation}", lambda module, _instructions: _write_step(module, activation))


def _write_step(module: Module, activation: str) -> None:
    from fastgpt2.engine.kernels.activation import write_activation
    from fastgpt2.engine.kernels.layer_norm import write_layer_norm

    write_layer_norm(module)
    write_activation(module, activation)
