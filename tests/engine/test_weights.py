"""Compact weights are rounded as documented, packed beside the float32 file, and computed with as they are stored."""

from __future__ import annotations

import math
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from support.machines import needs_helpers
from support.running import GOLDEN

from fastgpt2 import Engine
from fastgpt2.cli import main
from fastgpt2.engine import machine
from fastgpt2.engine.kernels import machine_code, product
from fastgpt2.engine.kernels.panels import compute_scales, narrow
from fastgpt2.engine.loading import load_network
from fastgpt2.engine.model.config import read_config
from fastgpt2.engine.network.gpt2 import GPT2
from fastgpt2.engine.network.step import Segment
from fastgpt2.errors import CheckpointError

Array = NDArray[np.float32]

DEMO = Path(str(GOLDEN.parent.parent / "fastgpt2" / "models" / "demo"))
IDS = [5, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTGPT2_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def load(folder: Path, weights: str) -> GPT2:
    config = read_config(folder)
    return load_network(folder, config, "m", n_slots=1, size=1, blas="openblas", weights=weights)


def logits(network: GPT2, ids: list[int]) -> Array:
    slot = network.cache.allot()
    found = network.forward([Segment(slot, ids, len(ids))]).copy()
    network.cache.release(slot)
    return found


def test_bfloat16_is_rounded_to_the_nearest() -> None:
    """bfloat16 has 8 bits of precision, so that its numbers from 1 on are 2**-7 apart."""
    step = 2.0**-7
    given = [1.0, 1 + step, 1 + 0.49 * step, 1 + 0.51 * step, 1 + 0.5 * step, 1 + 1.5 * step, -(1 + 0.51 * step), 0.0]
    nearest = [1.0, 1 + step, 1.0, 1 + step, 1.0, 1 + 2 * step, -(1 + step), 0.0]
    bits = narrow("bfloat16", np.array([given], np.float32))
    assert bits.dtype == np.uint16
    # The upper half of a float32, by its definition.
    assert [struct.unpack(">f", struct.pack(">HH", int(b), 0))[0] for b in bits[0]] == nearest
    largest, infinite, undefined = (
        struct.unpack(">f", struct.pack(">HH", int(b), 0))[0]
        for b in narrow("bfloat16", np.array([[3.4e38, np.inf, np.nan]], np.float32))[0]
    )
    assert (largest, infinite) == (math.inf, math.inf)
    assert math.isnan(undefined)


def test_int8_has_a_scale_a_column() -> None:
    columns = np.array([[1.27, -10.0, 0.0], [0.6, 5.0, 0.0], [-0.014, 0.05, 0.0]], np.float32)
    # 1.27 in 127 steps is 0.01 a step; 5 is half of 10, so 63.5 steps, as near to 63 as to 64, and 64 is even.
    np.testing.assert_allclose(compute_scales(columns), [0.01, 10 / 127, 0.0], rtol=1e-6)
    whole = narrow("int8", columns)
    assert whole.dtype == np.int8
    assert whole[:, 0].tolist() == [127, 60, -1]
    assert whole[:, 1:].tolist() == [[-127, 0], [64, 0], [1, 0]]


def rounded(kind: str, columns: Array) -> Array:
    """Round a weight [K, N] as it should be rounded, by code of the test's own."""
    if kind == "bfloat16":
        flat = [struct.unpack(">H", struct.pack(">f", x)[:2])[0] << 16 for x in columns.ravel().tolist()]
        low = np.array(flat, np.uint32).view(np.float32)
        high = (np.array(flat, np.uint32) + np.uint32(1 << 16)).view(np.float32)
        numbers = columns.ravel()
        nearest = np.where(np.abs(numbers - low) <= np.abs(high - numbers), low, high)
        return nearest.reshape(columns.shape).astype(np.float32)
    step = np.abs(columns).max(axis=0) / 127
    whole: Array = np.round(columns / np.where(step == 0, 1, step)) * step
    return whole.astype(np.float32)


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
@pytest.mark.parametrize("name", ["odd_heads", "untied", "masks_misaligned"])
def test_what_is_computed_is_float32_of_the_rounded_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    """Compact weights that are widened must give what a checkpoint of the rounded numbers gives in float32.

    Where the CPU has instructions for them, what they are multiplied with is rounded, too: the result is nearly that.
    """
    source = GOLDEN / "checkpoints" / name
    folder = shutil.copytree(source, tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    untied = "lm_head.weight" in tensors
    for key, value in tensors.items():
        bare = key.removeprefix("transformer.")
        if bare.startswith("h.") and value.ndim == 2 and value.dtype == np.float32:
            tensors[key] = rounded(kind, value)
        elif bare == ("lm_head.weight" if untied else "wte.weight"):
            tensors[key] = np.ascontiguousarray(rounded(kind, value.T).T)
    save_file(tensors, folder / "model.safetensors")
    vocabulary = read_config(folder).vocab_size
    ids = [i % vocabulary for i in IDS]
    right = logits(load(folder, "float32"), ids)
    largest = float(np.abs(right).max())
    np.testing.assert_allclose(logits(load(source, kind), ids), right, rtol=0, atol=0.05 * largest)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(machine_code, "_loaded", {})
    monkeypatch.setattr(product, "form_of", product.Widened)
    found = logits(load(source, kind), ids)
    np.testing.assert_allclose(found, right, rtol=0, atol=1e-4 * largest)
    # And the rounding is seen at all.
    assert float(np.abs(found - logits(load(source, "float32"), ids)).max()) > 1e-3 * float(np.abs(right).max())


@pytest.mark.parametrize(("kind", "dtype"), [("bfloat16", "BF16"), ("int8", "I8")])
@pytest.mark.usefixtures("_measured_once")
def test_packed_once_beside_the_float32_file(
    cache: Path, monkeypatch: pytest.MonkeyPatch, kind: str, dtype: str
) -> None:
    monkeypatch.setattr(machine, "MIN_BYTES", 0)
    folder = GOLDEN / "checkpoints" / "odd_heads"
    load(folder, "float32")
    load(folder, kind)
    (compact,) = cache.glob(f"m-*-{kind}-lines.v*.safetensors")
    assert len(list(cache.glob("*.safetensors"))) == 2
    made = compact.stat()
    again = load(folder, kind)
    assert (compact.stat().st_ino, compact.stat().st_mtime_ns) == (made.st_ino, made.st_mtime_ns)
    assert again.sets[0].packed.path == compact
    with safe_open(compact, framework="numpy") as file:
        scaled = {name for name in file.keys() if name.endswith(".scales")}  # noqa: SIM118  (no mapping)
        stored = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    matrices = {name for name in stored if name == "wte.weight" or (name.startswith("h.") and "_" in name)}
    matrices = {name for name in matrices if name.endswith("weight") and ".ln_" not in name}
    assert {name for name, kind in stored.items() if kind != "F32"} == matrices
    assert {stored[name] for name in matrices} == {dtype}
    assert scaled == ({f"{name}.scales" for name in matrices} if kind == "int8" else set())


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_damaged_weights_are_noticed_as_in_float32(tmp_path: Path, kind: str, value: float) -> None:
    folder = shutil.copytree(DEMO, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("h.1.mlp.c_fc.weight"))
    damaged = tensors[name].astype(np.float32)
    damaged[3, 5] = value
    tensors[name] = damaged
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="not finite"):
        Engine.load(folder, weights=kind).generate("I", max_new_tokens=1)


def test_pack_makes_the_compact_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pack", "demo", "--weights", "int8"]) == 0
    path, size = capsys.readouterr().out.rstrip("\n").split("\t")
    assert main(["pack", "demo", "--weights", "int8", "--verify"]) == 0
    assert capsys.readouterr().out == f"{path}\t{size}\n"
    assert main(["pack", "demo"]) == 0
    float32 = Path(capsys.readouterr().out.partition("\t")[0])
    # A byte a weight instead of four; the demo model's other tensors are some 3% of it.
    assert os.path.getsize(path) < 0.3 * os.path.getsize(float32)  # noqa: PTH202
    assert main(["pack", "demo", "--drafts", "int8"]) == 0
    assert capsys.readouterr().out == f"{float32}\t{float32.stat().st_size}\n{path}\t{size}\n"
    assert main(["pack", "demo", "--weights", "int4"]) == 2
    assert "--weights: 'int4' is not one of float32, bfloat16, int8" in capsys.readouterr().err


@needs_helpers
@pytest.mark.processes
@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_processes_and_batches(kind: str) -> None:
    """The bits of one process are those of two: no sum is split between them."""
    prompts = ["Once upon a time", "The king said", "I", "to be or not to be, that is"]
    alone, team = (Engine.load("demo", weights=kind, threads=threads, max_batch=4) for threads in (1, 2))
    team.warm_up()
    assert team.describe() == f"compiled-{kind} in panels of 16, 2 processes"
    expected = [alone.generate(prompt, max_new_tokens=40).token_ids for prompt in prompts]
    assert [result.token_ids for result in team.generate(prompts, max_new_tokens=40)] == expected
