"""Compiled products are right for every shape, give a row its bits whatever stands beside it, and win by the clock."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.running import GOLDEN

from fastgpt2 import Engine
from fastgpt2.engine import machine
from fastgpt2.engine.kernels import mkl
from fastgpt2.engine.kernels.compiled import CompiledProduct
from fastgpt2.engine.kernels.llvm_ir import Registers
from fastgpt2.engine.kernels.panels import COMPILED_WIDTH
from fastgpt2.engine.loading import load_network
from fastgpt2.engine.model.config import read_config
from fastgpt2.errors import BadRequest

FOLDER = GOLDEN / "checkpoints" / "odd_heads"
KINDS = ("float32", "bfloat16", "int8")
# Of CPUs that this one need not be: LLVM makes of wide vectors what there is.
CPUS = (None, Registers(16, 24), Registers(8, 12), Registers(4, 12), Registers(4, 24))

Array = NDArray[np.float32]


@pytest.fixture(scope="module")
def products() -> dict[tuple[str, Registers | None], CompiledProduct]:
    return {(kind, registers): CompiledProduct(kind, registers) for kind in KINDS for registers in CPUS}


def stored(kind: str, rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Return random weights as they lie in a file, and the numbers that they are."""
    if kind == "int8":
        whole = rng.integers(-127, 128, shape).astype(np.int8)
        return whole, whole.astype(np.float64)
    numbers = rng.standard_normal(shape, np.float32)
    if kind == "float32":
        return numbers, numbers.astype(np.float64)
    halves = (numbers.view(np.uint32) >> 16).astype(np.uint16)
    return halves, (halves.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def multiply(product: CompiledProduct, x: Array, panels: NDArray[Any]) -> Array:
    """Multiply rows that lie apart, as in a buffer that is wider, into columns of a wider buffer."""
    rows, n = x.shape[0], panels.shape[0]
    wide = np.full((rows, x.shape[1] + 3), np.nan, np.float32)
    wide[:, : x.shape[1]] = x
    buffer = np.full((rows, n * COMPILED_WIDTH + 8), 7.0, np.float32)
    out = buffer[:, : n * COMPILED_WIDTH].reshape(1, rows, n, COMPILED_WIDTH).transpose(2, 0, 1, 3)
    product(wide[None, None, :, : x.shape[1]], panels[:, None], out)
    assert (buffer[:, n * COMPILED_WIDTH :] == 7.0).all()
    return buffer[:, : n * COMPILED_WIDTH]


@pytest.mark.parametrize("cpu", CPUS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_right_and_a_rows_bits_its_own(
    products: dict[tuple[str, Registers | None], CompiledProduct], kind: str, cpu: Registers | None
) -> None:
    rng = np.random.default_rng(0)
    product = products[kind, cpu]
    for n, n_in in [(1, 1), (2, 3), (3, 4), (5, 33), (9, 70), (11, 768), (2, 3072)]:
        panels, numbers = stored(kind, rng, (n, n_in, COMPILED_WIDTH))
        x = rng.standard_normal((60, n_in), np.float32)
        right = np.einsum("mk,nkp->mnp", x.astype(np.float64), numbers).reshape(60, -1)
        # Sums of float32 products err by some units in the last place of the magnitudes that are added.
        bound = np.einsum("mk,nkp->mnp", np.abs(x).astype(np.float64), np.abs(numbers)).reshape(60, -1) * 1e-5 + 1e-30
        alone = np.concatenate([multiply(product, x[i : i + 1], panels) for i in range(60)])
        assert (np.abs(alone - right) <= bound).all()
        for rows in (2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 17, 24, 25, 40, 60):
            np.testing.assert_array_equal(multiply(product, x[:rows], panels), alone[:rows])


def test_no_panels_and_no_rows_are_no_work(products: dict[tuple[str, Registers | None], CompiledProduct]) -> None:
    """A process has no panels if there are more processes than panels."""
    product = products["int8", None]
    assert multiply(product, np.ones((3, 5), np.float32), np.empty((0, 5, COMPILED_WIDTH), np.int8)).shape == (3, 0)
    assert multiply(product, np.ones((0, 5), np.float32), np.ones((2, 5, COMPILED_WIDTH), np.int8)).shape == (0, 32)


def test_arrays_that_the_code_would_misread_are_refused(
    products: dict[tuple[str, Registers | None], CompiledProduct],
) -> None:
    x, out = np.ones((1, 1, 2, 5), np.float32), np.empty((1, 2, 3, COMPILED_WIDTH), np.float32).transpose(2, 0, 1, 3)
    good = np.ones((3, 1, 5, COMPILED_WIDTH), np.int8)
    products["int8", None](x, good, out)
    for panels in (good.astype(np.float32), good[:, :, ::-1], good[:2], np.ones((3, 1, 6, COMPILED_WIDTH), np.int8)):
        with pytest.raises(ValueError, match="not laid out"):
            products["int8", None](x, panels, out)
    with pytest.raises(ValueError, match="not laid out"):
        products["int8", None](x, good, np.empty((3, 1, 2, COMPILED_WIDTH), np.float32))


def test_auto_measures_once_and_says_what_it_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTGPT2_CACHE", str(tmp_path))
    monkeypatch.setattr(machine, "MIN_BYTES", 0)
    monkeypatch.setattr(mkl, "is_installed", lambda: False)
    config = read_config(FOLDER)
    described = {load_network(FOLDER, config, "m", n_slots=1, size=1, blas="auto").describe() for _ in range(2)}
    (known,) = json.loads((tmp_path / "calibration.json").read_text()).values()
    (name,) = [name for name in known if name.startswith("compiled faster than openblas")]
    assert len(described) == 1
    faster = known[name]["value"]
    assert described.pop().startswith("compiled-float32 in panels of 16" if faster else "openblas-")
    # What was measured is what counts, as its reverse shows.
    path = tmp_path / "calibration.json"
    (cpu,) = json.loads(path.read_text())
    path.write_text(json.dumps({cpu: {**known, name: {**known[name], "value": 1 - faster}}}))
    other = load_network(FOLDER, config, "m", n_slots=1, size=1, blas="auto").describe()
    assert other.startswith("openblas-" if faster else "compiled-float32 in panels of 16")


@pytest.mark.processes
@pytest.mark.parametrize("size", [1, 2])
def test_float32_compiled_gives_the_same_tokens(engine: Engine, size: int) -> None:
    prompts = ["Once upon a time", "The king said", "I", "to be or not to be, that is", "O Romeo, Romeo!"]
    compiled = Engine.load("demo", blas="compiled", threads=size, max_batch=4)
    compiled.warm_up()
    assert compiled.describe() == f"compiled-float32 in panels of 16, {size} process{'es' if size > 1 else ''}"
    ours = compiled.generate(prompts, max_new_tokens=60)
    assert [r.token_ids for r in ours] == [r.token_ids for r in engine.generate(prompts, max_new_tokens=60)]


# An environment without the extra.
WITHOUT = "import sys; sys.modules['llvmlite'] = None; sys.modules['llvmlite.binding'] = None; "


@pytest.mark.processes
@pytest.mark.parametrize("option", ["--weights=int8", "--weights=bfloat16", "--blas=compiled"])
def test_without_the_extra_it_is_said_what_to_install(option: str) -> None:
    command = [sys.executable, "-c", WITHOUT + "from fastgpt2.cli import run; run()"]
    command += ["generate", "--model", "demo", option, "I"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "pip install 'fastgpt2[compact]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_unknown_weights() -> None:
    with pytest.raises(BadRequest, match="weights must be one of float32, bfloat16, int8, not 'int4'"):
        Engine.load("demo", weights="int4")
