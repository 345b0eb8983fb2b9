"""`GPT2.exact` is true only where a sequence's bits depend neither on its neighbours nor on their lengths.

Tried on every family of OpenBLAS's kernels that this CPU can run, by NumPy's attention, as without the extra `compact`.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fastgpt2.engine.kernels.kernel import MAX_CHUNK, Kernel, RowChunks, find_largest_exact_padded_chunk
from fastgpt2.engine.kernels.openblas import identify_blas

Array = NDArray[np.float32]


class LongSums:
    """A BLAS that takes sums of more than `most` numbers in two halves, and only for more than `rows` rows.

    As OpenBLAS's `interface/level3.c` does above GEMM_Q: the halves of a padded row are not those of the row.
    """

    name = "long sums"
    exact = False

    def __init__(self, most: int, rows: int = 0) -> None:
        self.most, self.rows = most, rows

    def __call__(self, x: Array, panels: Array, out: Array) -> None:
        n = x.shape[3]
        parts = (0, n) if n <= self.most or x.shape[2] <= self.rows else (0, n // 2, n)
        out[...] = 0.0
        for first, last in pairwise(parts):
            out += _add_up(x[..., first:last], panels[:, :, first:last])


class Vectors:
    """A BLAS that adds up in other groups from `least` numbers on, as small kernels do that have vectors along sums."""

    name = "vectors"
    exact = False

    def __init__(self, least: int) -> None:
        self.least = least

    def __call__(self, x: Array, panels: Array, out: Array) -> None:
        n = x.shape[3]
        even = n - n % 4 if n >= self.least else 0
        out[...] = sum(_add_up(x[..., i:even:4], panels[:, :, i:even:4]) for i in range(4))
        out += _add_up(x[..., even:], panels[:, :, even:])


def _add_up(x: Array, panels: Array) -> Array:
    """Return x @ panels in float32, one product after the other: zeros at the end change nothing."""
    total = np.zeros((panels.shape[0], x.shape[1], x.shape[2], panels.shape[3]), np.float32)
    for k in range(x.shape[3]):
        total += x[..., k, None] * panels[:, :, k, None]
    return total


@pytest.mark.parametrize(
    ("product", "found"),
    [
        (LongSums(64), MAX_CHUNK),
        (LongSums(40), 0),
        (LongSums(63), 0),
        # Nothing but more rows than these is summed in halves.
        (LongSums(16, rows=6), 6),
        (LongSums(16, rows=3), 0),
        (Vectors(1 << 20), MAX_CHUNK),
        (Vectors(32), 0),
        (Vectors(4), 0),
    ],
)
def test_zeros_behind_a_row_are_tried_as_rows_beside_it_are(product: LongSums | Vectors, found: int) -> None:
    assert find_largest_exact_padded_chunk(product, 64, 3) == found


def test_every_number_of_positions_can_be_tried() -> None:
    for positions in (1, 2, 3, 15, 33, 100):
        assert find_largest_exact_padded_chunk(LongSums(1 << 20), positions, 2) == MAX_CHUNK


def test_what_was_found_by_rows_alone_is_not_believed() -> None:
    """A `calibration.json` of an earlier version has such figures."""
    kernel = Kernel(LongSums(64), exact_chunks={"openblas exact 1024x64": 16, "openblas exact 64x32": 16})
    kernel.attention_row_chunks(1024, 64, 32)
    assert set(kernel.exact_chunks) - {"openblas exact 1024x64", "openblas exact 64x32"}


def test_attention_takes_as_many_rows_as_both_of_its_products_allow() -> None:
    found = {"openblas exact 64x32": 5, "openblas exact 1024x64 padded": 9}
    assert Kernel(LongSums(64), exact_chunks=found).attention_row_chunks(1024, 64, 32) == RowChunks(5, 2, exact=True)
    found["openblas exact 1024x64 padded"] = 0
    assert not Kernel(LongSums(64), exact_chunks=found).attention_row_chunks(1024, 64, 32).exact


# By a flag of /proc/cpuinfo, the names of OpenBLAS's kernels for such CPUs, and the families that the wheels have.
FAMILIES = {"avx512vl": "SkylakeX", "avx2": "Haswell", "avx": "Sandybridge", "sse4_2": "Nehalem"}
ARM_FAMILIES = ("CORTEXA57", "NEOVERSEN1")


def families() -> list[str]:
    """Return the families that this CPU can run: OpenBLAS runs what it is told to, also where that ends the process."""
    if not identify_blas().startswith("openblas") or not Path("/proc/cpuinfo").exists():
        return []
    if platform.machine() == "aarch64":
        return list(ARM_FAMILIES)
    words = set(Path("/proc/cpuinfo").read_text("utf-8").split())
    return [family for flag, family in FAMILIES.items() if flag in words]


# Prints for models of several shapes whether the network says that it is exact, and whether its bits were the same.
COMPARE = """
import json, sys, tempfile
sys.modules["llvmlite"] = None
from pathlib import Path
import numpy as np
from safetensors.numpy import save_file
from fastgpt2.engine.kernels.openblas import identify_blas
from fastgpt2.engine.loading import load_network
from fastgpt2.engine.model.config import read_config
from fastgpt2.engine.model.weights import expected_shapes
from fastgpt2.engine.network.step import Segment

rng = np.random.default_rng(1)

def load(positions, head_dim):
    folder = Path(tempfile.mkdtemp(dir=sys.argv[1]))
    config = {"model_type": "gpt2", "n_embd": 2 * head_dim, "n_head": 2, "n_layer": 1, "vocab_size": 40}
    (folder / "config.json").write_text(json.dumps({**config, "n_positions": positions}))
    shapes = dict(expected_shapes(read_config(folder)))
    shapes.pop("lm_head.weight", None)
    tensors = {name: rng.standard_normal(shape, np.float32) * 0.3 for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    return load_network(folder, read_config(folder), "random", n_slots=4, size=1, blas="openblas")

def read(network, prompt, piece):
    slot = network.cache.allot()
    for at in range(0, len(prompt), piece):
        segment = Segment(slot, prompt[at : at + piece], int(at + piece >= len(prompt)))
        logits = network.forward([segment])
    return slot, logits[0].copy()

def is_same(network):
    positions = network.config.n_positions
    # Each 36 positions before one at which kernels cut sums, or before the last.
    for length in sorted({min(length, positions - 40) for length in (20, 335, 365, 490, 620, 1000)}):
        prompts = [[int(i) for i in rng.integers(0, 40, n)] for n in (length, length + 36)]
        slots, first = zip(*[read(network, prompt, 256) for prompt in prompts])
        beside = network.forward([Segment(slot, [1]) for slot in slots]).copy()
        for slot in slots:
            network.cache.release(slot)
        for prompt, whole, expected in zip(prompts, first, beside):
            slot, logits = read(network, prompt, 47)
            alone = network.forward([Segment(slot, [1])])[0]
            network.cache.release(slot)
            if not (np.array_equal(logits, whole) and np.array_equal(alone, expected)):
                return False
    return True

found = {}
for positions, head_dim in ((128, 16), (512, 16), (512, 24), (1024, 16)):
    network = load(positions, head_dim)
    found[f"{positions}x{head_dim}"] = [network.exact, is_same(network)]
print(json.dumps([identify_blas(), found]))
"""


@pytest.mark.processes
@pytest.mark.parametrize("family", families())
def test_a_network_that_says_that_it_is_exact_has_the_same_bits_whoever_stands_beside_it(
    family: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", COMPARE, str(tmp_path)],
        env={**os.environ, "OPENBLAS_CORETYPE": family, "FASTGPT2_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    name, found = json.loads(done.stdout)
    assert name.lower() == f"openblas-{family.lower()}"
    assert {shape for shape, (exact, same) in found.items() if exact and not same} == set()
    # What the kernels do keep to is not given up: Haswell's alone take rows that are left over in another way.
    assert found["128x16"][0] == (family != "Haswell")
    if family == "SkylakeX":
        assert found["1024x16"][0]
