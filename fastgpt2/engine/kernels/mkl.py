"""The product by Intel's MKL, on the same mapped panels; the library is PyPI's `mkl`, the extra of that name."""

from __future__ import annotations

import ctypes
import ctypes.util
import platform
import site
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastgpt2.engine.kernels.panels import Array
from fastgpt2.errors import BadRequest

# Whether the extra brings MKL here: as `platform_machine` and `sys_platform` say in pyproject.toml.
HAS_WHEELS = platform.machine() == "x86_64" and sys.platform == "linux"

# Source: oneMKL's mkl_service.h and mkl_cblas.h.
_SEQUENTIAL, _LP64 = 1, 0
_ROW_MAJOR, _NO_TRANSPOSE = 101, 111

# Calls whose arguments are remembered; beyond that, remembering begins anew. A batch makes the same calls at every step
# for as long as it keeps its size.
_MAX_REMEMBERED_CALLS = 4096


class MKLProduct:
    """`cblas_sgemm_batch`, sequential: the engine's processes are the parallelism.

    Raises:
        BadRequest: MKL is not installed, or is one that does not have the function.
    """

    name = "mkl"
    exact = False

    def __init__(self) -> None:
        path = _find()
        if path is None:
            advice = "pip install 'fastgpt2[mkl]', or" if HAS_WHEELS else "PyPI has it for Linux on x86-64 only;"
            raise BadRequest(f"MKL is not installed; {advice} choose another BLAS than mkl")
        try:
            library = ctypes.CDLL(path)
            self._multiply = library.cblas_sgemm_batch
        except (OSError, AttributeError) as reason:
            raise BadRequest(f"{path} cannot be used as MKL ({reason}); choose another BLAS than mkl") from None
        library.MKL_Set_Threading_Layer(_SEQUENTIAL)
        library.MKL_Set_Interface_Layer(_LP64)
        self._multiply.restype = None
        # By the ids of x, panels and out, which are kept beside the arguments, so that no other array can come to have
        # their ids.
        self._remembered: dict[tuple[int, int, int], tuple[tuple[Any, ...], Array, NDArray[Any], Array]] = {}

    def __call__(self, x: Array, panels: NDArray[Any], out: Array) -> None:
        key = (id(x), id(panels), id(out))
        entry = self._remembered.get(key)
        if entry is None:
            if len(self._remembered) >= _MAX_REMEMBERED_CALLS:
                self._remembered.clear()
            entry = self._remembered[key] = (_make_arguments(x, panels, out), x, panels, out)
        if entry[0]:
            self._multiply(*entry[0])


def _make_arguments(x: Array, panels: Array, out: Array) -> tuple[Any, ...]:
    """Return the arguments for one group of n * C equal products, every chunk of rows by every panel; () if n is 0."""
    n, chunks, m, width = out.shape
    if n == 0:
        return ()
    n_index, c_index = (index.ravel() for index in np.indices((n, chunks), np.uint64))

    def addresses(array: Array, panel_stride: int, chunk_stride: int) -> NDArray[np.uint64]:
        start = np.uint64(array.ctypes.data)
        return start + n_index * np.uint64(panel_stride) + c_index * np.uint64(chunk_stride)

    x_addresses = addresses(x, 0, x.strides[1])
    panel_addresses = addresses(panels, panels.strides[0], 0)
    out_addresses = addresses(out, out.strides[0], out.strides[1])
    a, b, c = (ctypes.c_void_p(found.ctypes.data) for found in (x_addresses, panel_addresses, out_addresses))
    # ctypes keeps no reference to what an address points at.
    a._arrays = (x_addresses, panel_addresses, out_addresses)  # type: ignore[attr-defined]
    # The function takes arrays with one entry a group, and there is one group.
    no, rows, columns, depth = _one_int(_NO_TRANSPOSE), _one_int(m), _one_int(width), _one_int(x.shape[3])
    lda, ldb, ldc = (_one_int(array.strides[2] // x.itemsize) for array in (x, panels, out))
    alpha, beta = (ctypes.c_float * 1)(1.0), (ctypes.c_float * 1)(0.0)
    layout, groups, size = ctypes.c_int(_ROW_MAJOR), ctypes.c_int(1), _one_int(n * chunks)
    return (layout, no, no, rows, columns, depth, alpha, a, lda, b, ldb, beta, c, ldc, groups, size)


def _one_int(value: int) -> ctypes.Array[ctypes.c_int]:
    return (ctypes.c_int * 1)(value)


def is_installed() -> bool:
    """Tell whether there is a libmkl_rt to load. Loads nothing."""
    return _find() is not None


def version_key() -> str:
    """Return a name that changes with the MKL that is installed: its file's, without loading it."""
    return Path(_find() or "").resolve().name


def _find() -> str | None:
    """Return the library's path: where pip puts it (the environment's `lib`), else where the system's loader looks."""
    if platform.machine() not in ("x86_64", "AMD64", "i686"):
        return None  # there is none, and to look where the loader looks starts programs
    for prefix in dict.fromkeys((sys.prefix, sys.base_prefix, site.getuserbase())):
        for path in sorted(Path(prefix, "lib").glob("libmkl_rt.so*"), reverse=True):
            return str(path)
    return ctypes.util.find_library("mkl_rt")
