"""Step times: how long steps take by their sequences and by their rows, measured once a machine.

They tell how many sequences a network decodes together, and what the rows of guesses cost (`decoding/drafter.py`).
Small models are not measured: their steps are over before they could be told apart.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from time import perf_counter

from fastgpt2.engine.kernels.attention import BLOCK
from fastgpt2.engine.machine import Measurements, is_large, usable_memory
from fastgpt2.engine.model.config import GPT2Config
from fastgpt2.engine.network.gpt2 import GPT2
from fastgpt2.engine.network.kv_cache import sequence_bytes
from fastgpt2.engine.network.step import Segment

log = logging.getLogger("fastgpt2.engine")

# At most this many sequences are tried.
MOST_SLOTS = 32

# Sequences of a small model, and where nothing can be measured.
UNMEASURED_SLOTS = 16

# A batch is worth its size if it gives this many times the tokens a second of the best smaller one.
LEAST_BATCH_GAIN = 1.15

# Tokens that each sequence holds at first while steps are timed.
_CONTEXT = 64
_REPEATS = 5

# Rows of one sequence whose steps are timed, for `StepCosts`.
ROWS = (1, 2, 3, 4, 6, 8, 12, 16)


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
    """Have a network of `slots_to_map` slots use as many as pay, as was measured here before or is measured now."""
    config, most = network.config, network.cache.usable_slots
    if not is_large(config):
        return
    suffix = _circumstances(network)
    # Where there was more memory, more was tried, and what paid there pays here as far as there is room.
    tried = [most << more for more in range(MOST_SLOTS.bit_length()) if most << more <= max(most, MOST_SLOTS)]
    found = (measurements.find(f"batch of up to {upto}, {suffix}") for upto in tried)
    known = next((sequences for sequences in found if sequences is not None), None)
    if known is None:
        room = network.cache.bytes_limit // sequence_bytes(config, _CONTEXT + 2 * BLOCK)
        # A helper that has not joined, or memory for too few sequences, is no measure of the machine.
        if room < most or not network.wait_until_ready():
            network.cache.use_slots(min(most, UNMEASURED_SLOTS))
            return
        known = measurements.find_or_measure(f"batch of up to {most}, {suffix}", lambda: measure_slots(network, most))
    network.cache.use_slots(max(1, min(most, known)))


def measure_slots(network: GPT2, most: int) -> int:
    started = perf_counter()
    slots = [network.cache.allot(_CONTEXT + _REPEATS + 2) for _ in range(most)]
    try:
        steps = [Segment(slot, [0]) for slot in slots]
        return largest_that_pays(lambda n: _step_microseconds(network, steps[:n]) / 1e6, most)
    finally:
        for slot in slots:
            network.cache.release(slot)
        log.debug("steps by sequences measured in %.0f ms", (perf_counter() - started) * 1e3)


def largest_that_pays(step_seconds: Callable[[int], float], most: int) -> int:
    """Return the largest power of two, up to `most`, whose batch is worth its size by `LEAST_BATCH_GAIN`.

    Two may be no faster than one and eight faster by far: a BLAS has a kernel for one row, and another for many, whose
    overhead two rows do not earn. So the search ends only when two sizes one after the other do not pay.
    """
    times = {1: step_seconds(1)}
    best, n = 1, 2
    while n <= most and n <= 4 * best:
        times[n] = step_seconds(n)
        if n / times[n] >= LEAST_BATCH_GAIN * best / times[best]:
            best = n
        n *= 2
    steps = ", ".join(f"{rows}: {seconds * 1e3:.1f} ms" for rows, seconds in times.items())
    log.info("%d sequences at once pay on this machine; a step takes, by sequences, %s", best, steps)
    return best


def row_costs(network: GPT2, measurements: Measurements, measure: bool) -> dict[int, float]:
    """Return the seconds of a step by rows of one sequence, measured now if need be and `measure`; {} if not known."""
    if not is_large(network.config):
        return {}
    names = {rows: f"microseconds of {rows} rows, {_circumstances(network)}" for rows in ROWS}
    if any(measurements.find(name) is None for name in names.values()):
        if not measure or not network.wait_until_ready():
            return {}
        slot = network.cache.allot(_CONTEXT + max(ROWS))
        try:
            for rows, name in names.items():
                step = [Segment(slot, [0] * rows, rows)]
                measurements.find_or_measure(name, partial(_step_microseconds, network, step))
        finally:
            network.cache.release(slot)
    return {rows: (measurements.find(name) or 0) / 1e6 for rows, name in names.items()}


def _circumstances(network: GPT2) -> str:
    """Return what times depend on, beside the CPU and its BLAS."""
    config = network.config
    shape = f"{config.n_layer}x{config.n_embd}x{config.n_inner}x{config.vocab_size}, {config.n_head} heads"
    return f"{shape}, {network.size} processes, {network.product_name}"


def _step_microseconds(network: GPT2, segments: list[Segment]) -> int:
    """Return the least time of some steps of sequences that hold `_CONTEXT` tokens: a disturbance only ever adds."""
    cache, least = network.cache, float("inf")
    for segment in segments:
        # Written, so that there is memory behind it to be read.
        cache.keys[segment.slot, :, : -(-_CONTEXT // BLOCK) + 1] = 0
        cache.values[segment.slot, :, :, : _CONTEXT + BLOCK] = 0
    for _ in range(1 + _REPEATS):
        for segment in segments:
            cache.lengths[segment.slot] = _CONTEXT
        started = perf_counter()
        network.forward(segments)
        least = min(least, perf_counter() - started)
    return round(1e6 * least)
