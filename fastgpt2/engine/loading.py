"""A model folder -> a network: in which layout, by which BLAS, packed where, on how many processes."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import numpy as np

from fastgpt2.engine.kernels import product_named
from fastgpt2.engine.kernels.calibration import choose_width, faster, width_of
from fastgpt2.engine.kernels.kernel import Kernel
from fastgpt2.engine.kernels.llvm_ir import WIDTH
from fastgpt2.engine.kernels.openblas import NumpyProduct, numpys_kernel
from fastgpt2.engine.machine import Calibration, cache_folder, cpu_name, hold_to_one_thread, is_large, usable_cores
from fastgpt2.engine.model.checkpoint import Checkpoint
from fastgpt2.engine.model.config import GPT2Config
from fastgpt2.engine.model.packing import Layout, Packed, Plan, pack_path, packed_in_cache, packed_in_memory
from fastgpt2.engine.network.gpt2 import DEFAULT_MAX_ROWS, GPT2, PREFILL_ROWS_BESIDE
from fastgpt2.engine.network.helpers import Shape
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
    weights: str = "float32",
    kv_memory: int | None = None,
    draft_weights: str | None = None,
) -> GPT2:
    """
    Args:
        model: its name, for people.
        n_slots: sequences that it has room for.
        size: processes to run it on, from `processes_for`.
        blas: openblas, mkl, compiled, or auto for the fastest of those that are here.
        weights: float32, bfloat16 or int8; the latter two are always multiplied by compiled code.
        kv_memory: bytes for keys and values; None for what so many sequences can take at most.
        draft_weights: another set of weights, for guesses.

    Raises:
        ModelError: the checkpoint cannot be used, or there is no memory for it.
        BadRequest: MKL or llvmlite is asked for and not here.
    """
    # Threads of BLAS beside processes that spin for each other would cost a hundredfold.
    hold_to_one_thread()
    checkpoint = Checkpoint.open(folder)
    calibration = measured_here(config)
    kernel, layout = choose(config, calibration, blas, weights)
    packed = pack(checkpoint, config, model, layout)
    shape = Shape(n_slots, max(DEFAULT_MAX_ROWS, n_slots + PREFILL_ROWS_BESIDE), size)
    draft = None
    if draft_weights is not None:
        drafts_kernel, drafts_layout = choose(config, calibration, blas, draft_weights)
        draft = pack(checkpoint, config, model, drafts_layout), drafts_kernel
    return GPT2(config, packed, kernel, shape, kv_memory, draft)


def pack_model(folder: Path, config: GPT2Config, model: str, blas: str, weights: str) -> Packed:
    """The packed file of a model in the cache, of a small one too; `blas` and `weights` as for `load_network`.

    Raises:
        ModelError: as `load_network`, or the cache cannot be written.
    """
    # What is measured for the layout is measured as a worker multiplies.
    hold_to_one_thread()
    _, layout = choose(config, measured_here(config), blas, weights)
    return pack(Checkpoint.open(folder), config, model, layout, always=True)


def measured_here(config: GPT2Config) -> Calibration:
    """What is known of this machine, for large models kept in the cache."""
    folder = None
    if is_large(config):
        try:
            folder = cache_folder()
        except OSError:
            log.debug("no cache folder to keep measurements in")
    return Calibration(folder, f"{numpys_kernel()}, numpy {np.__version__}, {cpu_name()}")


def choose(config: GPT2Config, calibration: Calibration, blas: str, weights: str) -> tuple[Kernel, Layout]:
    """What multiplies here, and the layout that it multiplies.

    Raises:
        BadRequest: what is asked for is not here.
    """
    if weights != "float32" or blas == "compiled":
        return _compiled(calibration, weights)
    kernel = Kernel(NumpyProduct(), calibration)
    layout = layout_for(config, kernel, calibration)
    if blas == "mkl":
        return Kernel(product_named("mkl"), calibration), layout
    if blas == "openblas" or not is_large(config):
        return kernel, layout
    return _fastest(config, calibration, kernel, layout)


def _compiled(calibration: Calibration, weights: str) -> tuple[Kernel, Layout]:
    layout = Layout("compiled" if weights == "float32" else weights, lambda _n_in, _n_out: WIDTH, weights)
    return Kernel(product_named(f"compiled-{weights}"), calibration), layout


def _fastest(config: GPT2Config, calibration: Calibration, kernel: Kernel, layout: Layout) -> tuple[Kernel, Layout]:
    """Of what is installed, by the clock, once a machine."""
    from fastgpt2.engine.kernels import compiled, mkl

    n_in, width, best = config.n_embd, layout.width(config.n_embd, config.n_inner), kernel.product.name

    def loaded(name: str) -> Kernel:
        return Kernel(product_named(name), calibration)

    if mkl.installed():

        def mkl_is_faster() -> int:
            return int(faster(kernel, loaded("mkl"), n_in, width, width))

        if calibration.get(f"mkl {mkl.version_key()} faster {n_in}x{width}", mkl_is_faster):
            best = "mkl"
    if compiled.available():

        def compiled_is_faster() -> int:
            return int(faster(loaded(best), _compiled(calibration, "float32")[0], n_in, width, WIDTH))

        if calibration.get(f"compiled faster than {best} {n_in}x{width}", compiled_is_faster):
            return _compiled(calibration, "float32")
    # Only now: what is not used is not loaded.
    return (kernel if best == kernel.product.name else loaded(best)), layout


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
    layout: Layout,
    always: bool = False,
) -> Packed:
    """The packed file: in the cache if the model is large, or `always`; else, or where that cannot be, in memory.

    Raises:
        ModelError: as `load_network`. With `always`, also when the cache cannot be written.
    """
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
                Plan.of(checkpoint, config, layout).data_bytes / 1e6,
            )
    try:
        return packed_in_memory(checkpoint, config, model, layout)
    except OSError as reason:
        raise ModelError(f"no memory to hold the weights of {model} ({reason})") from None
