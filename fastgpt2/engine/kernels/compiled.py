"""The product by float32 or compact weights, compiled for this CPU by LLVM; llvmlite, an extra, is imported here.

NumPy has no product of float32 rows and weights of 8 or 16 bits, and not on every CPU a fast one of few rows. (Numba,
which brings llvmlite along, takes 0.6 s to import instead of 0.15, and cannot use its cache in a folder that is
read-only; the code of `kernel_code.py` is compiled in 0.15 s at every start.)
"""

from __future__ import annotations

import ctypes
import importlib.util
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastgpt2.engine.kernels.kernel import Calls
from fastgpt2.engine.kernels.llvm_ir import WIDTH, Registers, module
from fastgpt2.engine.kernels.panels import STORED
from fastgpt2.errors import BadRequest

Array = NDArray[np.float32]


class CompiledProduct:
    """Rows by panels of `WIDTH` columns, of one kind of weights: "float32", "bfloat16" (as uint16), "int8".

    A row has the same bits whatever rows stand beside it.

    Raises:
        BadRequest: llvmlite is not installed, or too old.
    """

    def __init__(self, weights: str, registers: Registers | None = None) -> None:
        """
        Args:
            registers: to write the code for; None for those of this CPU.
        """
        self.name = f"compiled-{weights}"
        self._engine = _compile(weights, registers)
        integer, pointer = ctypes.c_int64, ctypes.c_void_p
        kind = ctypes.CFUNCTYPE(None, pointer, integer, pointer, integer, integer, pointer, integer, integer)
        self._multiply = kind(self._engine.get_function_address("multiply"))
        self._calls = Calls(partial(_arguments, np.dtype(STORED[weights][1])))

    def __call__(self, x: Array, panels: NDArray[Any], out: Array) -> None:
        self._multiply(*self._calls.arguments(x, panels, out))


def _arguments(dtype: np.dtype[Any], x: Array, panels: NDArray[Any], out: Array) -> tuple[int, ...]:
    """Addresses and strides, of arrays that are seen to be what the code takes them for."""
    n, chunks, m, width = out.shape
    n_in = x.shape[3]
    fits = x.shape == (1, chunks, m, n_in) and panels.shape == (n, 1, n_in, width) and width == WIDTH
    # One chunk, or chunks whose rows lie as those of one would.
    evenly = chunks == 1 or (x.strides[1] == m * x.strides[2] and out.strides[1] == m * out.strides[2])
    dense = panels.flags.c_contiguous and x.strides[3] == 4 and out.strides[3] == 4
    laid_out = not out.size or (evenly and dense and (n == 1 or out.strides[0] == 4 * WIDTH))
    if not (fits and laid_out and panels.dtype == dtype):
        raise ValueError(f"not laid out for compiled code of {dtype}: {x.shape}, {panels.shape}, {out.shape}")
    at = (x.ctypes.data, x.strides[2], panels.ctypes.data, n, n_in, out.ctypes.data, out.strides[2])
    return (*at, chunks * m)


def available() -> bool:
    """Whether llvmlite is there to import. Imports nothing."""
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
        parsed = llvm.parse_assembly(module(weights, registers))
        parsed.verify()
    except RuntimeError as reason:
        raise BadRequest(f"this llvmlite cannot be used ({reason}): pip install -U 'fastgpt2[compact]'") from None
    target = llvm.Target.from_default_triple()
    machine = target.create_target_machine(llvm.get_host_cpu_name(), features.flatten(), opt=3, jit=True)
    engine = llvm.create_mcjit_compiler(parsed, machine)
    engine.finalize_object()
    return engine
