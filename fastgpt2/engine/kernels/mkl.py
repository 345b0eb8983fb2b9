"""Intel's MKL, called on the same mapped panels; from PyPI's `mkl`, the extra of that name."""

from __future__ import annotations

import ctypes
import ctypes.util
import site
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastgpt2.engine.kernels.kernel import Calls
from fastgpt2.errors import BadRequest

Array = NDArray[np.float32]

# oneMKL's mkl_service.h and mkl_cblas.h
_SEQUENTIAL, _LP64 = 1, 0
_ROW_MAJOR, _NO_TRANSPOSE = 101, 111


class MKLProduct:
    """`cblas_sgemm_batch`, sequential: the engine's processes are the parallelism.

    Raises:
        BadRequest: MKL is not installed, or not one that has the function.
    """

    name = "mkl"

    def __init__(self) -> None:
        library = _load()
        library.MKL_Set_Threading_Layer(_SEQUENTIAL)
        library.MKL_Set_Interface_Layer(_LP64)
        self._batch = library.cblas_sgemm_batch
        self._batch.restype = None
        version = ctypes.create_string_buffer(256)
        library.MKL_Get_Version_String(version, 256)
        self.version = version.value.decode("ascii", "replace").strip()
        self._calls = Calls(_arguments)

    def __call__(self, x: Array, panels: NDArray[Any], out: Array) -> None:
        arguments = self._calls.arguments(x, panels, out)
        if arguments:
            self._batch(*arguments)


def _arguments(x: Array, panels: Array, out: Array) -> tuple[Any, ...]:
    """One group of n * C equal products: every chunk of rows by every panel. Empty when there is nothing to do."""
    n, chunks, m, width = out.shape
    n_in = x.shape[3]
    if n == 0:
        return ()
    item = x.itemsize
    n_index, c_index = (i.ravel() for i in np.indices((n, chunks), np.uint64))

    def addresses(array: Array, by_panel: int, by_chunk: int) -> NDArray[np.uint64]:
        return np.uint64(array.ctypes.data) + n_index * np.uint64(by_panel) + c_index * np.uint64(by_chunk)

    def one(kind: Any, value: float) -> Any:
        return (kind * 1)(kind(value))

    pointers = (
        addresses(x, 0, x.strides[1]),
        addresses(panels, panels.strides[0], 0),
        addresses(out, out.strides[0], out.strides[1]),
    )
    as_pointer = [ctypes.c_void_p(p.ctypes.data) for p in pointers]
    integer, real = ctypes.c_int, ctypes.c_float
    no = one(integer, _NO_TRANSPOSE)
    arguments = (
        integer(_ROW_MAJOR),
        *(no, no, one(integer, m), one(integer, width), one(integer, n_in), one(real, 1.0)),
        *(as_pointer[0], one(integer, x.strides[2] // item), as_pointer[1], one(integer, panels.strides[2] // item)),
        *(one(real, 0.0), as_pointer[2], one(integer, out.strides[2] // item)),
        *(integer(1), one(integer, n * chunks)),
    )
    # ctypes keeps no reference to what an address points at.
    as_pointer[0]._arrays = pointers  # type: ignore[attr-defined]
    return arguments


def installed() -> bool:
    """Whether there is a libmkl_rt to load. Loads nothing."""
    return _find() is not None


def version_key() -> str:
    """Of the MKL that is installed, without loading it."""
    return Path(_find() or "").resolve().name


def _find() -> str | None:
    """Where pip puts the library (the environment's `lib`), else where the system's loader finds one."""
    for prefix in dict.fromkeys((sys.prefix, sys.base_prefix, site.getuserbase())):
        for path in sorted(Path(prefix, "lib").glob("libmkl_rt.so*"), reverse=True):
            return str(path)
    return ctypes.util.find_library("mkl_rt")


def _load() -> ctypes.CDLL:
    path = _find()
    if path is None:
        raise BadRequest("MKL is not installed; pip install 'fastgpt2[mkl]', or choose another BLAS than mkl")
    try:
        library = ctypes.CDLL(path)
        _ = library.cblas_sgemm_batch
    except (OSError, AttributeError) as reason:
        raise BadRequest(f"{path} cannot be used as MKL ({reason}); choose another BLAS than mkl") from None
    return library
