"""The figures measured on a machine are found, kept, and used again."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fastgpt2 import Engine
from fastgpt2.engine.kernels.calibration import PLAIN, measure_fastest_width
from fastgpt2.engine.kernels.choice import choose_width, width_of
from fastgpt2.engine.kernels.kernel import Kernel, RowChunks, find_largest_exact_chunk
from fastgpt2.engine.kernels.openblas import NumpyProduct
from fastgpt2.engine.loading import load_network
from fastgpt2.engine.machine import Measurements, usable_memory
from fastgpt2.engine.model.config import GPT2Config, read_config
from fastgpt2.engine.model.hub import DEMO_FOLDER
from fastgpt2.engine.network import step_times
from fastgpt2.engine.network.gpt2 import GPT2
from fastgpt2.engine.network.kv_cache import sequence_bytes
from fastgpt2.engine.network.step_times import UNMEASURED_SLOTS, choose_slots, largest_that_pays, slots_to_map

Array = NDArray[np.float32]


class Rounding:
    """A BLAS that takes another kernel for more than `most` rows: the same product, but for its last bit."""

    name = "rounding"
    exact = False

    def __init__(self, most: int) -> None:
        self.most = most

    def __call__(self, x: Array, panels: Array, out: Array) -> None:
        out[...] = np.einsum("ocmk,nokp->ncmp", x, panels, optimize=False)
        if x.shape[2] > self.most:
            out[...] = np.nextafter(out, np.float32(np.inf))


@pytest.mark.parametrize(("most", "found"), [(2, 2), (3, 3), (4, 4), (7, 7), (16, 16), (40, 16)])
def test_the_largest_chunk_is_where_the_bits_change(most: int, found: int) -> None:
    assert find_largest_exact_chunk(Rounding(most), 24, 16) == found


def test_no_chunk_at_all_when_even_two_differ() -> None:
    class Noise:
        name = "noise"
        exact = False
        calls = 0

        def __call__(self, x: Array, panels: Array, out: Array) -> None:
            Noise.calls += 1
            out[...] = x[0, :, :, :1] + np.float32(Noise.calls) + panels[0, 0, 0, 0]

    assert find_largest_exact_chunk(Noise(), 24, 16) == 0


def test_chunks_of_what_was_found() -> None:
    def row_chunks(most: int) -> RowChunks:
        return Kernel(Rounding(most)).row_chunks(24, 16)

    # Few enough to be chance count as none: all rows go at once, and a single row alone.
    assert row_chunks(3) == RowChunks(None, 1, exact=False)
    assert not row_chunks(3).exact
    assert row_chunks(10) == RowChunks(10, 2, exact=True)
    assert row_chunks(10).exact


@pytest.mark.parametrize("most", [4, 5, 8, 10, 15, 16])
def test_rows_go_in_equal_chunks_of_no_more_than_that(most: int) -> None:
    for rows in range(1, 300):
        chunks, m = RowChunks(most, 2, exact=True).split(rows)
        assert 2 <= m <= most
        assert rows <= chunks * m < rows + max(chunks, 2)
    assert RowChunks(None, 1, exact=False).split(77) == (1, 77)
    assert RowChunks(None, 1, exact=False).split(1) == (1, 1)


def test_panels_of_a_plain_layout_are_shared_evenly() -> None:
    for parts in (1, 2, 3, 8):
        for n_out in (1, 16, 768, 3072, 50257):
            width = width_of(PLAIN, n_out, parts)
            assert width % 16 == 0
            assert width <= 1024
            panels = -(-n_out // width)
            assert panels % parts == 0 or n_out < parts * width
    assert width_of(PLAIN, 3072, 2) == 768
    assert width_of(32, 3072, 2) == 32


def test_the_fastest_width_is_the_one_that_takes_the_least_time() -> None:
    class Slow:
        """A BLAS that is quick for panels of 32 columns, and takes a nap for any other."""

        name = "slow"
        exact = False

        def __call__(self, x: Array, panels: Array, out: Array) -> None:  # noqa: ARG002
            if panels.shape[3] != 32 and panels.shape[0] > 1:
                time.sleep(0.01)

    assert measure_fastest_width(Kernel(Slow()), 24) == 32


def test_what_was_measured_is_kept_by_machine(tmp_path: Path) -> None:
    def never() -> int:
        raise AssertionError("measured again")

    assert Measurements(tmp_path, "a").find_or_measure("x", lambda: 1) == 1
    assert Measurements(tmp_path, "b").find_or_measure("x", lambda: 2) == 2
    assert Measurements(tmp_path, "a").find_or_measure("x", never) == 1
    assert Measurements(tmp_path, "b").find_or_measure("x", never) == 2
    assert json.loads((tmp_path / "calibration.json").read_text()) == {"a": {"x": 1}, "b": {"x": 2}}
    assert [path.name for path in tmp_path.iterdir()] == ["calibration.json"]


def test_a_folder_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    measurements = Measurements(tmp_path / "file" / "cache", "a")
    assert measurements.find_or_measure("x", lambda: 1) == 1
    assert measurements.find_or_measure("x", lambda: 2) == 1


def test_a_small_models_width_needs_no_clock(tmp_path: Path) -> None:
    measurements = Measurements(tmp_path, "a")
    assert choose_width(Kernel(Rounding(16), measurements), measurements, 24, timed=False) == 64
    assert choose_width(Kernel(Rounding(3)), measurements, 24, timed=False) == PLAIN


def test_numpys_own_product_is_right() -> None:
    rng = np.random.default_rng(0)
    x, panels = rng.standard_normal((1, 2, 7, 33), np.float32), rng.standard_normal((3, 1, 33, 16), np.float32)
    out = np.empty((3, 2, 7, 16), np.float32)
    NumpyProduct()(x, panels, out)
    np.testing.assert_allclose(out, np.einsum("cmk,nkp->ncmp", x[0], panels[:, 0], dtype=np.float64), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("milliseconds", "most", "expected", "tried"),
    [
        # Eight for the price of one, sixteen for more than twice that of eight over 1.15.
        ([10, 10, 10, 10, 17.5, 35], 32, 8, 6),
        ([10, 10, 10, 10, 17.3, 35], 32, 16, 6),
        ([10, 10, 10, 10, 10, 10], 32, 32, 6),
        ([10, 10, 10, 10, 10, 10], 20, 16, 5),
        ([10, 20, 40, 80, 160, 320], 32, 1, 3),
        # Two rows are no bargain, four are.
        ([33, 77, 55, 56, 90, 130], 32, 32, 6),
        ([10], 1, 1, 1),
    ],
)
def test_as_many_sequences_as_pay(milliseconds: list[float], most: int, expected: int, tried: int) -> None:
    asked = []

    def step_seconds(n: int) -> float:
        asked.append(n)
        return milliseconds[n.bit_length() - 1] / 1e3

    assert largest_that_pays(step_seconds, most) == expected
    assert asked == [1 << i for i in range(tried)]


@pytest.fixture
def network() -> GPT2:
    config = read_config(DEMO_FOLDER)
    return load_network(DEMO_FOLDER, config, "demo", n_slots=8, size=1, blas="openblas")


def test_the_batch_of_a_large_model_is_measured_once(
    network: GPT2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_times, "is_large", lambda config: config.n_layer > 0)
    choose_slots(network, Measurements(tmp_path, "a"))
    ((name, found),) = json.loads((tmp_path / "calibration.json").read_text())["a"].items()
    assert name.startswith("batch of up to 8, 5x224x896x2048, 7 heads, 1 processes, openblas-")
    assert found in (1, 2, 4, 8)
    assert network.cache.usable_slots == network.cache.free_slots == found
    assert network.cache.bytes_reserved == 0, "what was measured with is given back"
    (tmp_path / "calibration.json").write_text(json.dumps({"a": {name: 2}}))
    network.cache.use_slots(8)
    choose_slots(network, Measurements(tmp_path, "a"))
    assert network.cache.usable_slots == 2


def test_what_was_measured_with_more_memory_is_known_with_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker's container has less than that of the one which packs; with more memory than then, more is tried."""
    monkeypatch.setattr(step_times, "is_large", lambda config: config.n_layer > 0)
    config = read_config(DEMO_FOLDER)
    tried: list[int] = []

    def settled(slots: int, pays: int) -> int:
        def measured(_network: GPT2, most: int) -> int:
            tried.append(most)
            return pays

        monkeypatch.setattr(step_times, "measure_slots", measured)
        network = load_network(DEMO_FOLDER, config, "m", n_slots=slots, size=1, blas="openblas")
        choose_slots(network, Measurements(tmp_path, "a"))
        return network.cache.usable_slots

    assert settled(8, 4) == 4
    assert settled(16, 16) == 16, "there is room for more than was tried"
    assert settled(8, 0) == 4
    assert settled(4, 0) == 4
    assert settled(2, 0) == 2
    assert tried == [8, 16]


def test_without_the_memory_for_a_measurement_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_times, "is_large", lambda config: config.n_layer > 0)
    config = read_config(DEMO_FOLDER)
    kv_memory = sequence_bytes(config)
    network = load_network(DEMO_FOLDER, config, "m", n_slots=32, size=1, blas="openblas", kv_memory=kv_memory)
    choose_slots(network, Measurements(tmp_path, "a"))
    assert network.cache.usable_slots == UNMEASURED_SLOTS
    assert not list(tmp_path.iterdir())


def test_slots_of_a_large_model_are_no_more_than_the_system_maps() -> None:
    assert slots_to_map(read_config(DEMO_FOLDER)) == UNMEASURED_SLOTS
    huge = GPT2Config(n_layer=1 << 20, n_embd=1600, n_head=25, n_inner=6400)
    assert slots_to_map(huge) == 1
    config = GPT2Config(n_layer=48, n_embd=1600, n_head=25, n_inner=6400)
    slots = slots_to_map(config)
    assert slots & (slots - 1) == 0
    assert slots == 1 or slots * sequence_bytes(config) <= usable_memory() // 2
    assert slots == 32 or 2 * slots * sequence_bytes(config) > usable_memory() // 2


def test_a_small_models_batch_needs_no_measurement() -> None:
    assert Engine.load("demo").max_batch == 16
    assert Engine.load("demo", max_batch=3).max_batch == 3
