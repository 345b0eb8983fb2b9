"""`fastgpt2 generate`: no queue; load, generate, print."""

from __future__ import annotations

import sys
from time import perf_counter
from typing import Any

from fastgpt2.commands.texts import print_result, request_of


def run(values: dict[str, Any]) -> int:
    from fastgpt2.engine.blas import hold_to_one_thread
    from fastgpt2.engine.engine import Engine

    started = perf_counter()
    request = request_of(values)
    hold_to_one_thread()
    engine = Engine.load(
        values["model"],
        revision=values["revision"],
        max_batch=1,
        prefix_memory=0,  # there is no second prompt
        threads=values["threads"],
        blas=values["blas"],
        weights=values["weights"],
        drafts=values["drafts"],
    )
    sequence = engine.decoder.admit(engine.decoder.prepare(request))
    encoded = perf_counter()
    while not sequence.finished:
        engine.decoder.step()
    result = sequence.result(engine.model)
    if values["timings"]:
        times = engine.load_times
        lines = [
            ("mapped", times.mapped),
            ("tokenizer", times.tokenizer),
            ("loaded and encoded", encoded - started),
            *(("loop in", seconds) for seconds in sequence.step_seconds),
            ("total", perf_counter() - started),
        ]
        for name, seconds in lines:
            print(f"{name} {seconds * 1e3:.2f} ms", file=sys.stderr)
    # With `echo` the text begins with it.
    print_result(result, values, prompt="" if request.echo else None)
    return 0
