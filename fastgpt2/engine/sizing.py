"""What is decided by a model's size, before anything heavy is imported."""

from __future__ import annotations

import platform
import sys

from fastgpt2.engine.blas import fair_share_of_cores
from fastgpt2.engine.config import GPT2Config

# Below this, sharing saves less than a file in the cache costs, and a helper process more than it brings.
MIN_BYTES = 64 << 20


def is_large(config: GPT2Config) -> bool:
    """Whether its weights are worth a file in the cache and more than one process."""
    return 4 * config.n_parameters >= MIN_BYTES


def processes_for(config: GPT2Config, threads: int | None) -> int:
    """Processes to run a model on: as many as asked for, else this process's share of the cores if it is large.

    One where processes cannot see each other's writes in order: they can on x86, by its memory model, and elsewhere
    that is not relied on. No more than the model has heads.
    """
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "i686"):
        return 1
    if threads is None:
        threads = fair_share_of_cores() if is_large(config) else 1
    return min(threads, config.n_head)
