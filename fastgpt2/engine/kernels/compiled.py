"""The product by float32 or compact weights, compiled for this CPU by LLVM; llvmlite, an extra, is imported here.

NumPy has no product of float32 rows and weights of 8 or 16 bits, and not on every CPU a fast one of few rows. (Numba,
which brings llvmlite along, takes 0.6 s to import instead of 0.15 s, and cannot use its cache in a folder that is
read-only. The code of `llvm_ir.py` is compiled in 0.15 s at every start.)
"""

from __future__ import annotations

import ctypes
import importlib.util
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastgpt2.engine.kernels.kernel import ArgumentCache
from fastgpt2.engine.kernels.llvm_ir import Registers, write_module
from fastgpt2.engine.kernels.panels import COMPILED_WIDTH, STORED_TYPES, Array
from fastgpt2.errors import BadRequest

# void multiply(x, x_stride, w, n, k, out, out_stride, rows), as `write_module` has it.
_POINTER, _INTEGER = ctypes.c_void_p, ctypes.c_int64
_SIGNATURE = (_POINTER, _INTEGER, _POINTER, _INTEGER, _INTEGER, _POINTER, _INTEGER, _INTEGER)


class CompiledProduct:
    """Rows by panels of `COMPILED_WIDTH` columns, of one kind of weights.

    Args:
        weights: one of `STORED_TYPES`.
        registers: to write the code for; None for those of this CPU.

    Raises:
        BadRequest: llvmlite is not installed, or is too old.
    """

    exact = True

    def __init__(self, weights: str, registers: Registers | None = None) -> None:
        self.name = f"compiled-{weights}"
        self._engine = _compile(weights, registers)  # it owns the machine code
        self._multiply = ctypes.CFUNCTYPE(None, *_SIGNATURE)(self._engine.get_function_address("multiply"))
        self._arguments = ArgumentCache(partial(_make_arguments, STORED_TYPES[weights].numpy))

    def __call__(self, x: Array, panels: NDArray[Any], out: Array) -> None:
        self._multiply(*self._arguments.get(x, panels, out))


def _make_arguments(dtype: np.dtype[Any], x: Array, panels: NDArray[Any], out: Array) -> tuple[int, ...]:
    """Return the arrays' addresses and strides; raise ValueError if they do not lie as the code takes them to."""
    n, chunks, m, width = out.shape
    n_in = x.shape[3]
    fits = x.shape == (1, chunks, m, n_in) and panels.shape == (n, 1, n_in, width) and width == COMPILED_WIDTH
    # One chunk, or chunks whose rows lie as those of one would.
    evenly = chunks == 1 or (x.strides[1] == m * x.strides[2] and out.strides[1] == m * out.strides[2])
    dense = panels.flags.c_contiguous and x.strides[3] == 4 and out.strides[3] == 4
    laid_out = not out.size or (evenly and dense and (n == 1 or out.strides[0] == 4 * COMPILED_WIDTH))
    if not (fits and laid_out and panels.dtype == dtype):
        raise ValueError(f"not laid out for compiled code of {dtype}: {x.shape}, {panels.shape}, {out.shape}")
    rows = chunks * m
    return (x.ctypes.data, x.strides[2], panels.ctypes.data, n, n_in, out.ctypes.data, out.strides[2], rows)


def is_installed() -> bool:
    """Tell whether llvmlite is there to import. Imports nothing."""
    return importlib.util.find_spec("llvmlite") is not None


def _compile(weights: str, registers: Registers | None) -> Any:
    try:
        import llvmlite.binding as llvm
    except ImportError as reason:
        raise BadRequest(
            f"compiled products of {weights} weights need llvmlite ({reason}): pip install 'fastgpt2[compact]'"
        ) from None
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features()
    registers = registers or Registers.of({name for name, there in features.items() if there})
    try:
        parsed = llvm.parse_assembly(write_module(weights, registers))
        parsed.verify()
    except RuntimeError as reason:
        raise BadRequest(f"this llvmlite cannot be used ({reason}): pip install -U 'fastgpt2[compact]'") from None
    target = llvm.Target.from_default_triple()
    machine = target.create_target_machine(llvm.get_host_cpu_name(), features.flatten(), opt=3, jit=True)
    engine = llvm.create_mcjit_compiler(parsed, machine)
    engine.finalize_object()
    return engine
