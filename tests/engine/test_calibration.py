"""The figures measured on a machine are found, kept, and used again."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fastgpt2.engine.figure import TRUSTED_SPREAD
from fastgpt2.engine.kernels import calibration
from fastgpt2.engine.kernels.calibration import PLAIN, measure_fastest_width, run_in_turn, spread_of
from fastgpt2.engine.kernels.choice import choose_width, width_of
from fastgpt2.engine.kernels.kernel import Kernel, RowChunks, find_largest_exact_chunk
from fastgpt2.engine.kernels.openblas import NumpyProduct
from fastgpt2.engine.machine import Measurements

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
                time.sleep(0.002)

    assert measure_fastest_width(Kernel(Slow()), 24) == 32


class Clock:
    """A clock that runs only while somebody works: on the wall, and by how much of that this thread had a processor."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall = self.cpu = 0.0
        monkeypatch.setattr(calibration, "perf_counter", lambda: self.wall)
        monkeypatch.setattr(calibration, "thread_time", lambda: self.cpu)

    def work(self, wall: float, cpu: float | None = None) -> None:
        self.wall += wall
        self.cpu += wall if cpu is None else cpu


def test_what_is_compared_is_run_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = Clock(monkeypatch), []

    def work(name: str, seconds: float) -> None:
        order.append(name)
        clock.work(seconds)

    runs = run_in_turn({"a": lambda: work("a", 0.010), "b": lambda: work("b", 0.020)})
    assert order == ["a", "b"] * 5
    assert [runs[name].least for name in "ab"] == pytest.approx([0.010, 0.020])
    assert spread_of(runs.values()) == pytest.approx(0.0)


def test_while_the_machine_is_busy_more_is_run_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    # Busy at first: then the calm runs are the most.
    pace = itertools.chain([0.050] * 4, itertools.repeat(0.010))
    runs = run_in_turn({"a": lambda: clock.work(next(pace))})
    assert runs["a"].least == pytest.approx(0.010)
    assert runs["a"].spread == pytest.approx(0.0)
    assert len(runs["a"].seconds) == 9
    # Busy all the time.
    waves = itertools.cycle([0.010, 0.050, 0.050])
    runs = run_in_turn({"a": lambda: clock.work(next(waves))})
    assert len(runs["a"].seconds) == 12
    assert runs["a"].spread == pytest.approx(4.0)
    # Where each run is long, few must do.
    runs = run_in_turn({"a": lambda: clock.work(3.0, cpu=1.0)})
    assert len(runs["a"].seconds) == 3


def test_another_program_on_the_same_core_shows_although_all_runs_take_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    runs = run_in_turn({"a": lambda: clock.work(0.020, cpu=0.010)})
    assert runs["a"].spread == pytest.approx(1.0)
    assert runs["a"].spread > TRUSTED_SPREAD


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
