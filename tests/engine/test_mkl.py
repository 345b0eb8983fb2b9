"""MKL multiplies the same panels, asked for by name or chosen by measurement."""

from __future__ import annotations

import ctypes.util
import json
import platform
import re
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from support.running import GOLDEN

from fastgpt2 import Engine
from fastgpt2.engine import machine
from fastgpt2.engine.kernels import machine_code, mkl
from fastgpt2.engine.loading import load_network
from fastgpt2.engine.model.config import read_config
from fastgpt2.errors import BadRequest

ROOT = Path(__file__).parents[2]
FOLDER = GOLDEN / "checkpoints" / "odd_heads"

needs_mkl = pytest.mark.skipif(not mkl.is_installed(), reason="MKL is not installed")


@needs_mkl
@pytest.mark.parametrize(
    ("n", "chunks", "m", "n_in", "width"), [(1, 1, 1, 5, 16), (3, 2, 7, 33, 32), (5, 1, 2, 768, 64)]
)
def test_a_product(n: int, chunks: int, m: int, n_in: int, width: int) -> None:
    """The rows lie apart, as in a buffer that is wider, and the result goes into columns of a wider buffer."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, chunks, m, n_in + 3), np.float32)[..., :n_in]
    panels = rng.standard_normal((n, 1, n_in, width), np.float32)
    buffer = np.full((chunks * m, n * width + 8), 7.0, np.float32)
    out = buffer[:, : n * width].reshape(chunks, m, n, width).transpose(2, 0, 1, 3)
    product = mkl.MKLProduct()
    for _ in range(2):  # the second time with what it remembers of the first
        product(x, panels, out)
        right = np.einsum("cmk,nkp->ncmp", x[0], panels[:, 0], dtype=np.float64)
        np.testing.assert_allclose(out, right, rtol=0, atol=1e-4)
        out[...] = 0
    assert (buffer[:, n * width :] == 7.0).all()


@needs_mkl
def test_no_panels_are_no_work() -> None:
    """A process has no panels if there are more processes than panels."""
    nothing = np.empty((0, 1, 5, 16), np.float32)
    mkl.MKLProduct()(np.ones((1, 1, 2, 5), np.float32), nothing, np.empty((0, 1, 2, 16), np.float32))


@needs_mkl
def test_auto_measures_once_and_says_what_it_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTGPT2_CACHE", str(tmp_path))
    monkeypatch.setattr(machine, "MIN_BYTES", 0)
    # The third that might be taken; `test_compiled.py` has it.
    monkeypatch.setattr(machine_code, "is_installed", lambda: False)
    config = read_config(FOLDER)
    described = {load_network(FOLDER, config, "m", n_slots=1, size=1, blas="auto").describe() for _ in range(2)}
    (known,) = json.loads((tmp_path / "calibration.json").read_text()).values()
    (name,) = [name for name in known if name.startswith("mkl libmkl_rt") and " faster " in name]
    faster = known[name]["value"]
    assert len(described) == 1
    assert described.pop().startswith("mkl in panels" if faster else "openblas-")
    # What was measured is what counts, as its reverse shows.
    (cpu,) = json.loads((tmp_path / "calibration.json").read_text())
    changed = {cpu: {**known, name: {**known[name], "value": 1 - faster}}}
    (tmp_path / "calibration.json").write_text(json.dumps(changed))
    other = load_network(FOLDER, config, "m", n_slots=1, size=1, blas="auto").describe()
    assert other.startswith("openblas-" if faster else "mkl in panels")


@pytest.mark.parametrize(
    ("has_wheels", "advice"),
    [(True, "pip install 'fastgpt2[mkl]', or"), (False, "PyPI has it for Linux on x86-64 only;")],
)
def test_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch, has_wheels: bool, advice: str) -> None:
    monkeypatch.setattr(mkl, "_find", lambda: None)
    monkeypatch.setattr(machine_code, "is_installed", lambda: False)
    monkeypatch.setattr(mkl, "HAS_WHEELS", has_wheels)
    assert Engine.load("demo", blas="auto").describe().startswith("openblas-")
    message = f"MKL is not installed; {advice} choose another BLAS than mkl"
    with pytest.raises(BadRequest, match=f"^{re.escape(message)}$"):
        Engine.load("demo", blas="mkl")


def test_an_arm_machine_is_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ctypes.util.find_library` starts up to three programs, at every start of a large model."""
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(ctypes.util, "find_library", lambda _: pytest.fail("searched"))
    monkeypatch.setattr(sys, "prefix", "/nowhere")
    monkeypatch.setattr(sys, "base_prefix", "/nowhere")
    assert not mkl.is_installed()
    assert mkl.version_key() == Path().resolve().name


def test_the_extra_brings_it_where_the_message_says_so() -> None:
    """What pip would do on these machines, by the marker in pyproject.toml."""
    (line,) = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]["mkl"]
    marker = Requirement(line).marker
    assert marker is not None
    for system, machine_name, brings in (
        ("linux", "x86_64", True),
        ("linux", "aarch64", False),
        ("darwin", "arm64", False),
        # The last MKL for macOS is of 2023.
        ("darwin", "x86_64", False),
    ):
        assert marker.evaluate({"sys_platform": system, "platform_machine": machine_name}) is brings
    assert marker.evaluate() is mkl.HAS_WHEELS


def test_what_cannot_be_loaded_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "libmkl_rt.so.9").write_bytes(b"not a library")
    monkeypatch.setattr(mkl, "_find", lambda: str(tmp_path / "libmkl_rt.so.9"))
    with pytest.raises(BadRequest, match=r"libmkl_rt\.so\.9 cannot be used as MKL"):
        Engine.load("demo", blas="mkl")


def test_a_blas_that_nobody_knows() -> None:
    with pytest.raises(BadRequest, match="blas must be one of auto, openblas, mkl, compiled, not 'atlas'"):
        Engine.load("demo", blas="atlas")
