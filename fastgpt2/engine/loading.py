"""A model folder -> a network: in which layout, by which BLAS, packed where, on how many processes."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import numpy as np

from fastgpt2.engine.blas import cpu_name, hold_to_one_thread, numpys_kernel, usable_cores
from fastgpt2.engine.cache import cache_folder
from fastgpt2.engine.calibration import Calibration, Kernel, choose_width, faster, width_of
from fastgpt2.engine.checkpoint import Checkpoint
from fastgpt2.engine.config import GPT2Config
from fastgpt2.engine.gpt2 import DEFAULT_MAX_ROWS, GPT2, PREFILL_ROWS_BESIDE
from fastgpt2.engine.helper import Shape
from fastgpt2.engine.pack_plan import Layout
from fastgpt2.engine.packing import Packed, pack_path, packed_in_cache, packed_in_memory
from fastgpt2.engine.products import NumpyProduct, product_named
from fastgpt2.engine.sizing import is_large
from fastgpt2.errors import ModelError

log = logging.getLogger("fastgpt2.engine")


def load_network(
    folder: Path,
    config: GPT2Config,
    model: str,
    *,
    n_slots: int,
    size: int,
    blas: str,
    kv_memory: int | None = None,
) -> GPT2:
    """
    Args:
        model: its name, for people.
        n_slots: sequences that it has room for.
        size: processes to run it on, from `processes_for`.
        blas: openblas, mkl, or auto for the faster of those that are here.
        kv_memory: bytes for keys and values; None for what so many sequences can take at most.

    Raises:
        ModelError: the checkpoint cannot be used, or there is no memory for it.
        BadRequest: MKL is asked for and not here.
    """
    # Threads of BLAS beside processes that spin for each other would cost a hundredfold.
    hold_to_one_thread()
    checkpoint = Checkpoint.open(folder)
    calibration = measured_here(config)
    kernel = Kernel(NumpyProduct(), calibration)
    packed = pack(checkpoint, config, model, kernel, calibration)
    kernel = _with_blas(blas, kernel, calibration, config, packed)
    shape = Shape(n_slots, max(DEFAULT_MAX_ROWS, n_slots + PREFILL_ROWS_BESIDE), size)
    return GPT2(config, packed, kernel, shape, kv_memory)


def pack_model(folder: Path, config: GPT2Config, model: str) -> Packed:
    """The packed file of a model in the cache, of a small one too.

    Raises:
        ModelError: as `load_network`, or the cache cannot be written.
    """
    # What is measured for the layout is measured as a worker multiplies.
    hold_to_one_thread()
    calibration = measured_here(config)
    return pack(Checkpoint.open(folder), config, model, Kernel(NumpyProduct(), calibration), calibration, always=True)


def measured_here(config: GPT2Config) -> Calibration:
    """What is known of this machine, for large models kept in the cache."""
    folder = None
    if is_large(config):
        try:
            folder = cache_folder()
        except OSError:
            log.debug("no cache folder to keep measurements in")
    return Calibration(folder, f"{numpys_kernel()}, numpy {np.__version__}, {cpu_name()}")


def layout_for(config: GPT2Config, kernel: Kernel, calibration: Calibration) -> Layout:
    """The layout that this machine multiplies best with."""
    parts = usable_cores()
    choices = {
        n_in: choose_width(kernel, calibration, n_in, timed=is_large(config))
        for n_in in (config.n_embd, config.n_inner)
    }
    name = "-".join(str(choice or f"plain{parts}") for choice in dict.fromkeys(choices.values()))
    return Layout(name, lambda n_in, n_out: width_of(choices[n_in], n_out, parts))


def pack(
    checkpoint: Checkpoint,
    config: GPT2Config,
    model: str,
    kernel: Kernel,
    calibration: Calibration,
    always: bool = False,
) -> Packed:
    """The packed file: in the cache if the model is large, or `always`; else, or where that cannot be, in memory.

    Raises:
        ModelError: as `load_network`. With `always`, also when the cache cannot be written.
    """
    layout = layout_for(config, kernel, calibration)
    try:
        path = pack_path(cache_folder(), checkpoint, model, layout)
        if always or is_large(config) or path.exists():
            return packed_in_cache(path, checkpoint, config, model, layout, progress=sys.stderr.isatty())
    except OSError as reason:
        if always:
            raise ModelError(f"the packed weights cannot be kept ({reason}); set FASTGPT2_CACHE to a folder") from None
        if is_large(config):
            log.warning(
                "the packed weights cannot be kept (%s); this process makes panels of them in memory of its own, "
                "%.0f MB, as every other will, and once more at every start. Set FASTGPT2_CACHE to a folder that can "
                "be written",
                reason,
                4 * config.n_parameters / 1e6,
            )
    try:
        return packed_in_memory(checkpoint, config, model, layout)
    except OSError as reason:
        raise ModelError(f"no memory to hold the weights of {model} ({reason})") from None


def _with_blas(blas: str, kernel: Kernel, calibration: Calibration, config: GPT2Config, packed: Packed) -> Kernel:
    if blas == "auto":
        from fastgpt2.engine.mkl import installed, version_key

        if not is_large(config) or not installed():
            return kernel
        width = packed.tensors.tensors["h.0.mlp.c_fc.weight"].shape[2]

        def measure() -> int:
            return int(faster(kernel, Kernel(product_named("mkl"), calibration), config.n_embd, width))

        blas = "mkl" if calibration.get(f"mkl {version_key()} faster {config.n_embd}x{width}", measure) else "openblas"
    return kernel if blas == "openblas" else Kernel(product_named(blas), calibration)
