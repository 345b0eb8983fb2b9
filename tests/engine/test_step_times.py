"""What steps take is measured when a large model is first loaded; from then on its own steps teach better."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastgpt2 import Engine
from fastgpt2.engine import machine
from fastgpt2.engine.decoding import decoder
from fastgpt2.engine.figure import Figure
from fastgpt2.engine.kernels import choice
from fastgpt2.engine.loading import load_network
from fastgpt2.engine.machine import MEASUREMENTS_FILE, MEASUREMENTS_LOCK, Measurements, locked, usable_memory
from fastgpt2.engine.model.config import GPT2Config, read_config
from fastgpt2.engine.model.hub import DEMO_FOLDER
from fastgpt2.engine.network import step_times
from fastgpt2.engine.network.batch_limit import largest_that_pays
from fastgpt2.engine.network.gpt2 import GPT2
from fastgpt2.engine.network.kv_cache import sequence_bytes
from fastgpt2.engine.network.step_times import ROWS, UNMEASURED_SLOTS, choose_slots, row_costs, rows_name, slots_to_map
from fastgpt2.worker.batch import Batch


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
    ((name, figure),) = json.loads((tmp_path / "calibration.json").read_text())["a"].items()
    found = figure["value"]
    assert name.startswith("batch of up to 8, 5x224x896x2048, 7 heads, 1 processes, openblas-")
    assert found in (1, 2, 4, 8)
    assert network.cache.usable_slots == network.cache.free_slots == found
    assert network.cache.bytes_reserved == 0, "what was measured with is given back"
    # As an old version wrote it: a first guess, which the steps of jobs correct.
    (tmp_path / "calibration.json").write_text(json.dumps({"a": {name: 2}}))
    network.cache.use_slots(8)
    choose_slots(network, Measurements(tmp_path, "a"))
    assert network.cache.usable_slots == 2
    for odd, taken in ((0, 1), (5, 4), (1 << 30, 8)):
        (tmp_path / "calibration.json").write_text(json.dumps({"a": {name: odd}}))
        network.cache.use_slots(8)
        choose_slots(network, Measurements(tmp_path, "a"))
        assert network.cache.usable_slots == taken, "whatever a file says, within what there is"


def test_what_was_measured_with_more_memory_is_known_with_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker's container has less than that of the one which packs; with more memory than then, more is tried."""
    monkeypatch.setattr(step_times, "is_large", lambda config: config.n_layer > 0)
    config = read_config(DEMO_FOLDER)
    tried: list[int] = []

    def settled(slots: int, pays: int) -> int:
        def measured(_network: GPT2, most: int) -> Figure:
            tried.append(most)
            return Figure(pays)

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


def test_while_another_process_measures_a_usual_number_is_taken(
    network: GPT2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_times, "is_large", lambda config: config.n_layer > 0)
    monkeypatch.setattr(machine, "MEASURING_WAIT_SECONDS", 0.0)
    monkeypatch.setattr(step_times, "UNMEASURED_SLOTS", 4)
    with locked(tmp_path / MEASUREMENTS_LOCK):
        choose_slots(network, Measurements(tmp_path, "a"))
        assert row_costs(network, Measurements(tmp_path, "a"), measure=True) == {}
    assert network.cache.usable_slots == 4
    assert not (tmp_path / MEASUREMENTS_FILE).exists()


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


class SimulatedMachine:
    """A machine on which a step of the demo model takes as long as the real model's would, by a clock of its own.

    A row costs little beside the first: 32 sequences pay.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        forward = GPT2.forward

        def timed(network: GPT2, segments: Any, *more: Any) -> Any:
            self.now += self.step_seconds(sum(len(segment.ids) for segment in segments))
            return forward(network, segments, *more)

        monkeypatch.setattr(GPT2, "forward", timed)
        monkeypatch.setattr(decoder, "perf_counter", lambda: self.now)

    @staticmethod
    def step_seconds(rows: int) -> float:
        return 0.017 + 0.0008 * (rows - 1)


@pytest.fixture
def busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with what a busy machine told: 8 sequences pay, and a step takes four times as long as it does."""
    monkeypatch.setenv("FASTGPT2_CACHE", str(tmp_path))
    monkeypatch.setattr(machine, "MIN_BYTES", 0)
    monkeypatch.setattr(choice, "measure_fastest_width", lambda _kernel, _n_in: Figure(64, 0.03, 5))
    with monkeypatch.context() as measuring:
        measuring.setattr(step_times, "measure_slots", lambda _network, _most: Figure(8, 0.03, 5))
        measuring.setattr(step_times, "measure_rows", four_times_too_slow)
        assert load().max_batch == 8
    return tmp_path


def four_times_too_slow(network: GPT2) -> dict[str, Figure]:
    times = {rows: round(4e6 * SimulatedMachine.step_seconds(rows)) for rows in ROWS}
    return {rows_name(network, rows): Figure(time, 0.03, 5) for rows, time in times.items()}


def load(**options: Any) -> Engine:
    return Engine.load("demo", threads=1, blas="openblas", prefix_memory=0, **options)


def figures(folder: Path) -> dict[str, int]:
    (known,) = json.loads((folder / MEASUREMENTS_FILE).read_text()).values()
    return {name: figure["value"] for name, figure in known.items()}


PROMPTS = [f"{word} {word} the" for word in ("I", "king", "moon", "thou", "Watson", "and", "night", "my")] * 8


def test_a_worker_finds_its_way_back_from_what_a_busy_machine_told(busy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SimulatedMachine(monkeypatch)
    engine = load()
    batch = Batch(engine)
    assert (engine.max_batch, batch.room()) == (8, 8)
    texts = [result.text for result in engine.generate(PROMPTS, max_new_tokens=24, ignore_eos=True)]
    assert (engine.max_batch, batch.room()) == (32, 32)
    engine.learnt_times.keep()
    kept = figures(busy)
    assert [value for name, value in kept.items() if name.startswith("batch of up to 32")] == [32]
    rows = engine.decoder.model
    for size in (8, 16):
        expected = 1e6 * SimulatedMachine.step_seconds(size)
        assert kept[rows_name(rows, size)] == pytest.approx(expected, rel=0.05), "no longer four times that"
    # The next start begins there. And the texts are those that there would have been.
    assert load().max_batch == 32
    if engine.decoder.model.exact:
        fixed = load(max_batch=8)
        assert [one.text for one in fixed.generate(PROMPTS, max_new_tokens=24, ignore_eos=True)] == texts
        assert fixed.max_batch == 8, "what somebody has set stays"


@pytest.mark.parametrize("drafts", ["off", 2])
def test_figures_of_rows_are_written_all_together_or_not_at_all(
    busy: Path, monkeypatch: pytest.MonkeyPatch, drafts: str | int
) -> None:
    """Who does not reckon with rows learns what they take all the same, of the sizes of its batches alone."""
    SimulatedMachine(monkeypatch)
    engine = load(drafts=drafts)
    engine.generate(PROMPTS, max_new_tokens=24, ignore_eos=True)
    engine.learnt_times.keep()
    kept = figures(busy)
    rows = [kept[rows_name(engine.decoder.model, size)] for size in (1, 2, 32)]
    assert rows == pytest.approx([1e6 * SimulatedMachine.step_seconds(size) for size in (1, 2, 32)], rel=0.05)
    # Where nobody has measured them, there is nothing to compare them with.
    monkeypatch.setenv("FASTGPT2_CACHE", str(busy / "another"))
    monkeypatch.setattr(step_times, "measure_slots", lambda _network, _most: Figure(8, 0.03, 5))
    engine = load(drafts=drafts)
    engine.generate(PROMPTS, max_new_tokens=24, ignore_eos=True)
    engine.learnt_times.keep()
    kept = figures(busy / "another")
    assert [value > 8 for name, value in kept.items() if name.startswith("batch of up to 32")] == [True]
    assert not [name for name in kept if name.startswith("microseconds")]


def test_nothing_new_is_not_written_again(busy: Path) -> None:
    engine = load()
    before = (busy / MEASUREMENTS_FILE).stat()
    engine.learnt_times.keep()
    assert (busy / MEASUREMENTS_FILE).stat() == before
