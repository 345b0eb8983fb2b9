#!/usr/bin/env python3
# torch and transformers are in a peer's environment, not in the one that the checks run in.
# mypy: disable-error-code="import-not-found,import-untyped,no-any-return,no-untyped-call"
"""The script of a user of transformers: import, load, generate. `cold_start.py` starts it.

    python transformers_generate.py MODEL PROMPT TOKENS

After `test.py` of Narsil's fast_gpt2, the script that the Rust original was compared with: a text-generation pipeline,
greedy, end of text ignored. It prints one line of JSON: the seconds of each part and of each token, and the ids.
"""

from __future__ import annotations

from time import perf_counter

started = perf_counter()

import json  # noqa: E402
import sys  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402

torch_imported = perf_counter()

import transformers  # noqa: E402
from transformers import pipeline  # noqa: E402

imported = perf_counter()


class Stopwatch:
    """A streamer that notes when each token comes; the first thing that it gets is the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.ids: list[int] = []

    def put(self, value: Any) -> None:
        self.times.append(perf_counter())
        self.ids += value.flatten().tolist()

    def end(self) -> None:
        pass


def main() -> None:
    model, prompt, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
    pipe = pipeline("text-generation", model=model, device="cpu", dtype=torch.float32)
    loaded = perf_counter()
    watch = Stopwatch()
    generated = pipe(prompt, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, streamer=watch)
    done = perf_counter()
    steps = [b - a for a, b in zip([loaded, *watch.times[1:]], watch.times[1:], strict=False)]
    result = {
        "version": f"transformers {transformers.__version__}, torch {torch.__version__}",
        "threads": torch.get_num_threads(),
        "imports": imported - started,
        "import_torch": torch_imported - started,
        "loaded": loaded - started,
        "steps": steps,
        "total": done - started,
        "ids": watch.ids[-tokens:],
        "text": generated[0]["generated_text"],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
