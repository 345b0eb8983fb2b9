#!/usr/bin/env python3
"""One peer in one process: load a checkpoint, generate from given ids, print how long it took. Started by `peers.py`.

    python run.py PEER FOLDER '{"prompts": [[ids], ...], "long": [ids], "tokens": 40, "batches": [8, 16], "repeats": 2,
                                "threads": 2}'

PEER is one of `peers.py --help`: fastgpt2, fastgpt2-int8, transformers, openvino-bfloat16, llama.cpp-q8_0 and so on;
FOLDER is the checkpoint, or what `convert.py` made of it. Each peer gets token ids and generates token ids, greedily,
as many as it is told to, whatever they are. None has to make text; only fastgpt2's decoder does, because it always
makes it as it goes. Each cell is run once before it is timed: what a program compiles or allocates for a size of its
batch is not part of the time.

It prints one line of JSON with seconds. It imports fastgpt2 only to measure it: the peers' environments do not have it.
"""

from __future__ import annotations

from time import perf_counter

started = perf_counter()

import json  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the clone's root, where `benchmarks` is

from benchmarks.peers.loaders import LOADERS, Ids, drafts  # noqa: E402


def timed(function: Callable[[], Ids], repeats: int) -> tuple[list[float], Ids]:
    """Return the seconds of each call but the first, and the ids of the last."""
    seconds, ids = [], function()
    for _ in range(repeats):
        began = perf_counter()
        ids = function()
        seconds.append(perf_counter() - began)
    return seconds, ids


def main() -> None:
    peer, folder = sys.argv[1:3]
    name, _, kind = peer.partition("-")
    job = json.loads(sys.argv[3])
    version, imported, generate = LOADERS[name](folder, job, kind)
    loaded = perf_counter()
    prompts, tokens, repeats = job["prompts"], job["tokens"], job["repeats"]
    generate(prompts[:1], 1)
    first = perf_counter()
    answer: dict[str, Any] = {
        "version": version,
        "import": imported - started,
        "load": loaded - imported,
        "first_token": first - loaded,
        "ids": {},
        "batches": {},
    }
    answer["alone"], answer["ids"]["1"] = timed(lambda: generate(prompts[:1], tokens), repeats)
    for batch in job["batches"]:
        answer["batches"][str(batch)], answer["ids"][str(batch)] = timed(
            lambda batch=batch: generate(prompts[:batch], tokens),  # type: ignore[misc]
            repeats,
        )
    answer["prefill"], answer["ids"]["prefill"] = timed(lambda: generate([job["long"]], 1), repeats)
    print(json.dumps({**answer, "drafts": drafts}))


if __name__ == "__main__":
    main()
