"""The product of the BLAS that numpy brought: OpenBLAS in the wheels of PyPI."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


def numpys_kernel() -> str:
    """The BLAS that numpy brought and the kernels that it chose for this CPU: "openblas-SkylakeX".

    Two processes of one name multiply alike: it is part of a packed file's name.
    """
    # The wheels' OpenBLAS lies beside numpy; asking it directly takes a tenth of the time that threadpoolctl takes.
    for path in (Path(np.__file__).parent.parent / "numpy.libs").glob("*openblas*"):
        library = ctypes.CDLL(str(path))
        for symbol in ("scipy_openblas_get_corename64_", "scipy_openblas_get_corename", "openblas_get_corename"):
            if hasattr(library, symbol):
                corename = getattr(library, symbol)
                corename.restype = ctypes.c_char_p
                return f"openblas-{(corename() or b'unknown').decode()}"
    import threadpoolctl

    for library_info in threadpoolctl.threadpool_info():
        if library_info["user_api"] == "blas":
            return f"{library_info['internal_api']}-{library_info.get('architecture') or platform.machine()}"
    return f"blas-{platform.machine()}"


class NumpyProduct:
    """By the BLAS that numpy brought: OpenBLAS in the wheels of PyPI."""

    name = "openblas"

    def __call__(self, x: Array, panels: NDArray[Any], out: Array) -> None:
        np.matmul(x, panels, out=out)
