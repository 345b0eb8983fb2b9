"""The shipped model, changed in one point for a test."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from fastgpt2 import Engine
from fastgpt2.engine.model.hub import DEMO_FOLDER


def with_end_of_text(tmp_path: Path, token_ids: list[int]) -> Engine:
    """Load the shipped model under a config.json that names other tokens the end of text."""
    folder = shutil.copytree(DEMO_FOLDER, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": token_ids}))
    return Engine.load(str(folder), max_batch=1)
