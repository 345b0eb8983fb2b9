"""The choice of what multiplies on this machine, and of the panels that it multiplies.

Where operations can be compiled, so are the products: they are the fastest at all numbers of rows, and the only ones
whose bits do not depend on a row's neighbours on every CPU. Else there are numpy's own BLAS and MKL, of which the
faster one is taken unless one is asked for. A large model's choices are measured once and kept; a small model's steps
are over before they could be told apart.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np

from fastgpt2.engine.figure import Figure
from fastgpt2.engine.kernels import machine_code, make_product
from fastgpt2.engine.kernels.calibration import PLAIN, PLAIN_WIDTH, WIDTHS, is_worth_loading, measure_fastest_width
from fastgpt2.engine.kernels.kernel import MAX_CHUNK, Kernel
from fastgpt2.engine.kernels.openblas import NumpyProduct, identify_blas
from fastgpt2.engine.kernels.panels import COMPILED_WIDTH, Layout
from fastgpt2.engine.kernels.program import load_program_code
from fastgpt2.engine.machine import Measurements, cache_folder, cpu_name, is_large, usable_cores
from fastgpt2.errors import BadRequest

if TYPE_CHECKING:
    from fastgpt2.engine.model.config import GPT2Config

log = logging.getLogger("fastgpt2.engine")


def open_measurements(config: GPT2Config) -> Measurements:
    """Return what was measured on this machine; for a large model that is kept in the cache."""
    folder = None
    if is_large(config):
        try:
            folder = cache_folder()
        except OSError:
            log.debug("no cache folder to keep measurements in")
    return Measurements(folder, f"{identify_blas()}, numpy {np.__version__}, {cpu_name()}")


def choose_kernel(config: GPT2Config, measurements: Measurements, blas: str, weights: str) -> tuple[Kernel, Layout]:
    """Return what multiplies a model's weights, and the layout in which it does; raise BadRequest if not installed."""
    compiles = _can_compile()
    if weights != "float32" or blas == "compiled" or (blas == "auto" and compiles):
        name = "compiled" if weights == "float32" else f"{weights}-lines"
        layout = Layout(name, lambda _n_in, _n_out: COMPILED_WIDTH, weights)
        return Kernel(make_product(f"compiled-{weights}"), measurements, compiled=True), layout
    kernel = Kernel(NumpyProduct(), measurements, compiled=compiles)
    layout = _choose_layout(config, kernel, measurements)
    if blas == "mkl" or (blas == "auto" and is_large(config) and _is_mkl_faster(config, measurements, layout)):
        return Kernel(make_product("mkl"), measurements, compiled=compiles), layout
    return kernel, layout


def _can_compile() -> bool:
    """Tell whether operations can be compiled here."""
    if not machine_code.is_installed():
        return False
    try:
        load_program_code()
    except BadRequest as reason:
        log.warning("everything is computed without compiled code: %s", reason)
        return False
    return True


def _is_mkl_faster(config: GPT2Config, measurements: Measurements, layout: Layout) -> bool:
    """Tell whether MKL is there and the faster one for float32 weights. Once that is known, no other is loaded."""
    from fastgpt2.engine.kernels import mkl

    n_in, width = config.n_embd, layout.width(config.n_embd, config.n_inner)

    def measure() -> Figure:
        usual, rival = ((Kernel(make_product(name), measurements), width) for name in ("openblas", "mkl"))
        return is_worth_loading(n_in, usual, rival)

    key = f"mkl {mkl.version_key()} faster {n_in}x{width}"
    return mkl.is_installed() and bool(measurements.find_or_measure(key, measure))


def _choose_layout(config: GPT2Config, kernel: Kernel, measurements: Measurements) -> Layout:
    """Return the layout of float32 weights that this machine multiplies best."""
    parts, timed = usable_cores(), is_large(config)
    choices = {n_in: choose_width(kernel, measurements, n_in, timed) for n_in in (config.n_embd, config.n_inner)}
    names = [f"plain{parts}" if choice == PLAIN else str(choice) for choice in dict.fromkeys(choices.values())]
    return Layout("-".join(names), lambda n_in, n_out: width_of(choices[n_in], n_out, parts))


def choose_width(kernel: Kernel, measurements: Measurements, n_in: int, timed: bool) -> int:
    """Return the choice for matrices of `n_in` rows, one of `WIDTHS` or `PLAIN`; measured, if `timed`."""
    if timed:
        return measurements.find_or_measure(f"width {n_in}", lambda: measure_fastest_width(kernel, n_in))
    # The widest panels that take eight rows at once.
    for width in WIDTHS:
        most = kernel.row_chunks(n_in, width).most
        if most is not None and most >= MAX_CHUNK // 2:
            return width
    return PLAIN


def width_of(choice: int, n_out: int, parts: int) -> int:
    """Return the width of panels of `n_out` columns, by the choice; `parts` processes can share PLAIN ones evenly."""
    if choice != PLAIN:
        return choice
    n = parts * -(-n_out // (parts * PLAIN_WIDTH))
    return -(-n_out // (n * 16)) * 16
