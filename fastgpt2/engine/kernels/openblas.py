"""The product by the BLAS that numpy brought: OpenBLAS, in the wheels of PyPI."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastgpt2.engine.kernels.panels import Array

# OpenBLAS's question for its kernels, as the names are in newer and in older builds.
_CORE_NAME_SYMBOLS = ("scipy_openblas_get_corename64_", "scipy_openblas_get_corename", "openblas_get_corename")


class NumpyProduct:
    """`np.matmul`, which calls the BLAS that numpy brought."""

    name = "openblas"
    exact = False

    def __call__(self, x: Array, panels: NDArray[Any], out: Array) -> None:
        np.matmul(x, panels, out=out)


def identify_blas() -> str:
    """Return numpy's BLAS and the kernels that it chose for this CPU, as one name: "openblas-SkylakeX".

    Two processes in which this name is the same multiply alike. It is part of the key of what was measured.
    """
    # The wheels' OpenBLAS lies beside numpy. Asking it directly takes a tenth of the time that threadpoolctl takes.
    for path in (Path(np.__file__).parent.parent / "numpy.libs").glob("*openblas*"):
        library = ctypes.CDLL(str(path))
        for symbol in _CORE_NAME_SYMBOLS:
            if hasattr(library, symbol):
                get_core_name = getattr(library, symbol)
                get_core_name.restype = ctypes.c_char_p
                return f"openblas-{(get_core_name() or b'unknown').decode()}"
    import threadpoolctl

    for library_info in threadpoolctl.threadpool_info():
        if library_info["user_api"] == "blas":
            return f"{library_info['internal_api']}-{library_info.get('architecture') or platform.machine()}"
    return f"blas-{platform.machine()}"
