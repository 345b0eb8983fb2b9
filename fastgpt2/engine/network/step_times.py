"""How many sequences a network decodes together, and what rows cost: measured once a machine."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from time import perf_counter

from fastgpt2.engine.machine import Measurements, is_large, usable_memory
from fastgpt2.engine.model.config import GPT2Config
from fastgpt2.engine.network.gpt2 import GPT2
from fastgpt2.engine.network.kv_cache import BLOCK, sequence_bytes
from fastgpt2.engine.network.step import Segment

log = logging.getLogger("fastgpt2.engine")
MOST = 32

# For a small model, whose steps are over before they could be told apart, and where nothing can be measured.
UNMEASURED = 16

# A batch is worth its size if it gives so many times the tokens a second of the best smaller one.
WORTHWHILE = 1.15

# Tokens that each sequence holds at first while steps are timed.
_CONTEXT = 64
_REPEATS = 5

# Rows of one sequence whose steps are timed, for `step_costs.py`.
ROWS = (1, 2, 3, 4, 6, 8, 12, 16)


def slots_to_map(config: GPT2Config) -> int:
    """Sequences to have address space for, before it is known how many pay.

    Linux refuses a private mapping that is larger than all of the memory, whether it will be used or not.
    """
    if not is_large(config):
        return UNMEASURED
    slots = MOST
    while slots > 1 and slots * sequence_bytes(config) > usable_memory() // 2:
        slots //= 2
    return slots


def settle(network: GPT2, calibration: Measurements) -> None:
    """Have a network of `slots_to_map` slots use as many as pay: what was measured here before, or is now."""
    config, most = network.config, network.cache.usable_slots
    if not is_large(config):
        return
    suffix = _circumstances(network)
    # Where there was more memory, more was tried, and what paid there pays here as far as there is room.
    tried = [most << more for more in range(MOST.bit_length()) if most << more <= max(most, MOST)]
    found = (calibration.find(f"batch of up to {upto}, {suffix}") for upto in tried)
    known = next((sequences for sequences in found if sequences is not None), None)
    if known is None:
        room = network.cache.bytes_limit // sequence_bytes(config, _CONTEXT + 2 * BLOCK)
        # A helper that has not come, or memory for too few, is no measure of the machine.
        if room < most or not network.wait_until_ready():
            network.use_slots(min(most, UNMEASURED))
            return
        known = calibration.find_or_measure(f"batch of up to {most}, {suffix}", lambda: measured(network, most))
    network.use_slots(max(1, min(most, known)))


def row_costs(network: GPT2, calibration: Measurements, measure: bool) -> dict[int, float]:
    """Seconds of a step by rows of one sequence, as they were measured here, or are now if that is wanted and pays.

    Empty where it is not known: for a small model, too.
    """
    if not is_large(network.config):
        return {}
    names = {rows: f"microseconds of {rows} rows, {_circumstances(network)}" for rows in ROWS}
    if any(calibration.find(name) is None for name in names.values()):
        if not measure or not network.wait_until_ready():
            return {}
        slot = network.cache.allot(_CONTEXT + max(ROWS))

        def measured_microseconds(rows: int) -> int:
            return round(1e6 * _step_seconds(network, [Segment(slot, [0] * rows, rows)]))

        try:
            for rows, name in names.items():
                calibration.find_or_measure(name, partial(measured_microseconds, rows))
        finally:
            network.cache.release(slot)
    return {rows: (calibration.find(name) or 0) / 1e6 for rows, name in names.items()}


def _circumstances(network: GPT2) -> str:
    """What times depend on, beside the CPU and its BLAS."""
    config = network.config
    shape = f"{config.n_layer}x{config.n_embd}x{config.n_inner}x{config.vocab_size}, {config.n_head} heads"
    return f"{shape}, {network.size} processes, {network.product_name}"


def measured(network: GPT2, most: int) -> int:
    """What `largest_worthwhile` finds by steps of the network itself."""
    started = perf_counter()
    slots = [network.cache.allot(_CONTEXT + _REPEATS + 2) for _ in range(most)]
    try:
        return largest_worthwhile(lambda n: _step_seconds(network, [Segment(slot, [0]) for slot in slots[:n]]), most)
    finally:
        for slot in slots:
            network.cache.release(slot)
        log.debug("steps by sequences measured in %.0f ms", (perf_counter() - started) * 1e3)


def largest_worthwhile(step_seconds: Callable[[int], float], most: int) -> int:
    """The largest power of two, up to `most`, that gives `WORTHWHILE` times as many tokens a second as any smaller one.

    Two may be no faster than one and eight by far: a BLAS has a kernel for one row, and another for many, whose
    overhead two rows do not earn. So it takes two in a row that do not pay to end the search.
    """
    times = {1: step_seconds(1)}
    best, n = 1, 2
    while n <= most and n <= 4 * best:
        times[n] = step_seconds(n)
        if n / times[n] >= WORTHWHILE * best / times[best]:
            best = n
        n *= 2
    steps = ", ".join(f"{rows}: {seconds * 1e3:.1f} ms" for rows, seconds in times.items())
    log.info("%d sequences at once pay on this machine; a step takes, by sequences, %s", best, steps)
    return best


def _step_seconds(network: GPT2, segments: list[Segment]) -> float:
    """Of a step of sequences that hold `_CONTEXT` tokens: the least of some, as what disturbs only ever adds."""
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
    return least
