"""Step times: how long steps take by their sequences and by their rows, measured when a model is first loaded.

They tell how many sequences a network decodes together, and what the rows of guesses cost. They are first guesses: the
process learns from its own steps (`batch_limit.py`, `step_costs.py`), and `LearntTimes` writes down what it has learnt,
for the next start. Small models are not measured: their steps are over before they could be told apart.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from time import monotonic

from fastgpt2.engine.figure import Figure
from fastgpt2.engine.kernels.attention import BLOCK
from fastgpt2.engine.kernels.calibration import run_in_turn, spread_of
from fastgpt2.engine.machine import Measurements, is_large, usable_memory
from fastgpt2.engine.model.config import GPT2Config
from fastgpt2.engine.network.batch_limit import BatchLimit, describe_steps, largest_that_pays
from fastgpt2.engine.network.gpt2 import GPT2
from fastgpt2.engine.network.kv_cache import sequence_bytes
from fastgpt2.engine.network.step import Segment
from fastgpt2.engine.network.step_costs import StepCosts

log = logging.getLogger("fastgpt2.engine")

# At most this many sequences are tried.
MOST_SLOTS = 32

# Sequences of a small model, and where nothing can be measured.
UNMEASURED_SLOTS = 16

# Tokens that each sequence holds at first while steps are timed.
_CONTEXT = 64

# Rows of one sequence whose steps are timed, for `StepCosts`; and the most rows of which something may be learnt.
ROWS = (1, 2, 3, 4, 6, 8, 12, 16)
MOST_ROWS = 64

# What was learnt is written down this often at most.
_KEEP_SECONDS = 30.0


def slots_to_map(config: GPT2Config) -> int:
    """Return how many sequences to have address space for, before it is known how many pay.

    Linux refuses a private mapping that is larger than all of the memory, whether it will be used or not.
    """
    if not is_large(config):
        return UNMEASURED_SLOTS
    slots = MOST_SLOTS
    while slots > 1 and slots * sequence_bytes(config) > usable_memory() // 2:
        slots //= 2
    return slots


def choose_slots(network: GPT2, measurements: Measurements) -> None:
    """Have a network of `slots_to_map` slots use as many as pay, as is known of this machine or is measured now.

    What is known is a first guess, however old: the network's own steps correct it at no cost.
    """
    most = network.cache.usable_slots
    if not is_large(network.config):
        return
    # Where there was more memory, more was tried, and what paid there pays here as far as there is room.
    tried = [most << more for more in range(MOST_SLOTS.bit_length()) if most << more <= max(most, MOST_SLOTS)]
    known = [measurements.find(slots_name(network, upto)) for upto in tried]
    found = next((figure for figure in known if figure is not None and not figure.is_asked_for), None)
    if found is None:
        room = network.cache.bytes_limit // sequence_bytes(network.config, _CONTEXT + 2 * BLOCK)
        # A helper that has not joined, or memory for too few sequences, is no measure of the machine.
        if room >= most and network.wait_until_ready():
            name = slots_name(network, most)
            measured = measurements.find_or_measure_all([name], lambda: {name: measure_slots(network, most)})
            found = measured.get(name)
    slots = max(1, min(most, UNMEASURED_SLOTS if found is None else found))
    network.cache.use_slots(1 << (slots.bit_length() - 1))


def measure_slots(network: GPT2, most: int) -> Figure:
    """Return how many sequences pay, of 1, 2, 4 and so on up to `most`."""
    sizes = [1 << i for i in range(most.bit_length())]
    slots = [network.cache.allot(_CONTEXT + 2) for _ in range(most)]
    try:
        _fill(network, slots)
        segments = [Segment(slot, [0]) for slot in slots]
        runs = run_in_turn({size: _step(network, segments[:size]) for size in sizes})
    finally:
        for slot in slots:
            network.cache.release(slot)
    times = {size: runs[size].least for size in sizes}
    best = largest_that_pays(times.__getitem__, most)
    log.info("%d sequences at once pay on this machine; %s", best, describe_steps(times))
    return Figure(best, spread_of(runs.values()), len(runs[1].seconds))


def row_costs(network: GPT2, measurements: Measurements, measure: bool) -> dict[int, float]:
    """Return the seconds of a step by rows of one sequence, measured now if need be and `measure`; {} if not known."""
    if not is_large(network.config):
        return {}
    names = [rows_name(network, rows) for rows in ROWS]
    known = [measurements.find(name) for name in names]
    if any(figure is None or figure.is_asked_for for figure in known):
        if not measure or not network.wait_until_ready():
            return {}
        if len(measurements.find_or_measure_all(names, lambda: measure_rows(network))) < len(names):
            return {}
    figures = {rows: measurements.find(rows_name(network, rows)) for rows in range(1, MOST_ROWS + 1)}
    return {rows: microseconds / 1e6 for rows, microseconds in figures.items() if microseconds}


def measure_rows(network: GPT2) -> dict[str, Figure]:
    """Return the microseconds of a step of each of `ROWS`, by the name of the figure."""
    slot = network.cache.allot(_CONTEXT + max(ROWS))
    try:
        _fill(network, [slot])
        runs = run_in_turn({rows: _step(network, [Segment(slot, [0] * rows, rows)]) for rows in ROWS})
    finally:
        network.cache.release(slot)
    return {
        rows_name(network, rows): Figure(round(1e6 * of_rows.least), of_rows.spread, len(of_rows.seconds))
        for rows, of_rows in runs.items()
    }


class LearntTimes:
    """What a process has learnt from its own steps, on its way to the store.

    Several workers of a machine write what each has learnt, the later over the earlier: all are first guesses of the
    next start. Figures are not kept apart by what else the machine was doing. How sizes compare is learnt from steps
    that followed each other, so a neighbour's load is in both, and what is left of it is learnt anew within seconds.

    Args:
        measurements: the store; None to keep nothing.
    """

    def __init__(self, network: GPT2, measurements: Measurements | None, limit: BatchLimit, costs: StepCosts) -> None:
        self._network, self._measurements, self._limit, self._costs = network, measurements, limit, costs
        self._next_at = monotonic() + _KEEP_SECONDS
        self._kept: dict[str, int] = {}

    def keep_if_due(self) -> None:
        """Write down what was learnt, if that was not done lately."""
        if monotonic() >= self._next_at:
            self.keep()

    def keep(self) -> None:
        """Write down what was learnt, if there is anything new."""
        self._next_at = monotonic() + _KEEP_SECONDS
        if self._measurements is None:
            return
        for figures in (self._slots(), self._rows(self._measurements)):
            new = {name: int(figure) for name, figure in figures.items()}
            if not new.items() <= self._kept.items() and self._measurements.keep(figures):
                self._kept.update(new)

    def _slots(self) -> dict[str, Figure]:
        finding = self._limit.finding
        if finding is None:
            return {}
        name = slots_name(self._network, self._network.cache.n_slots)
        return {name: Figure(finding.sequences, finding.spread, finding.looks)}

    def _rows(self, measurements: Measurements) -> dict[str, Figure]:
        """Return what rows cost. Those of which nothing was learnt keep how they compare with the others."""
        found = {}
        for rows, cost in self._costs.learnt().items():
            name, microseconds = rows_name(self._network, rows), round(1e6 * cost.seconds)
            known = measurements.find(name)
            if cost.looks and rows <= MOST_ROWS:
                found[name] = Figure(microseconds, cost.spread, cost.looks)
            elif known is not None:
                found[name] = Figure(microseconds, known.spread, known.looks, known.date)
        return found


def slots_name(network: GPT2, most: int) -> str:
    """Return the name under which the store has how many of up to `most` sequences pay."""
    return f"batch of up to {most}, {_circumstances(network)}"


def rows_name(network: GPT2, rows: int) -> str:
    """Return the name under which the store has the microseconds of a step of that many rows."""
    return f"microseconds of {rows} rows, {_circumstances(network)}"


def _circumstances(network: GPT2) -> str:
    """Return what times depend on, beside the CPU and its BLAS."""
    config = network.config
    shape = f"{config.n_layer}x{config.n_embd}x{config.n_inner}x{config.vocab_size}, {config.n_head} heads"
    return f"{shape}, {network.size} processes, {network.product_name}"


def _fill(network: GPT2, slots: list[int]) -> None:
    """Write slots as far as steps will read them, so that there is memory behind them."""
    for slot in slots:
        network.cache.keys[slot, :, : -(-_CONTEXT // BLOCK) + 1] = 0
        network.cache.values[slot, :, :, : _CONTEXT + BLOCK] = 0


def _step(network: GPT2, segments: list[Segment]) -> Callable[[], None]:
    """Return a step of sequences that hold `_CONTEXT` tokens. The step has been run once, which prepares it."""
    step = partial(_run_step, network, segments)
    step()
    return step


def _run_step(network: GPT2, segments: list[Segment]) -> None:
    for segment in segments:
        network.cache.lengths[segment.slot] = _CONTEXT
    network.forward(segments)
