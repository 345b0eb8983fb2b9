"""Logging of the commands that run for long: one handler on standard error."""

from __future__ import annotations

import logging
import sys


def set_up_logging(level: str) -> None:
    """This package at `level`, the libraries' warnings with it."""
    logging.basicConfig(
        level=logging.WARNING, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s", force=True
    )
    logging.getLogger("fastgpt2").setLevel(level)
    # Has a handler of its own: its warnings would come twice.
    logging.getLogger("huggingface_hub").propagate = False
