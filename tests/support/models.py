"""The shipped model, changed in one point for a test."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from fastgpt2 import Engine
from fastgpt2.engine.model.hub import DEMO_FOLDER
from fastgpt2.engine.text.tokenizer import Tokenizer


def with_end_of_text(tmp_path: Path, token_ids: list[int]) -> Engine:
    """Load the shipped model under a config.json that names other tokens the end of text."""
    folder = shutil.copytree(DEMO_FOLDER, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": token_ids}))
    return Engine.load(str(folder), max_batch=1)


def that_says(word: str, folder: Path) -> Path:
    """Write the shipped model so that its every token is this one, whatever the prompt, and return its folder.

    The last norm gives the token's own row of the table, whatever comes: its weight is 0. All rows are given the length
    1 first, so that no other row's product with this one is as large.
    """
    shutil.copytree(DEMO_FOLDER, folder)
    (token_id,) = Tokenizer.from_folder(DEMO_FOLDER).encode(word)
    tensors = load_file(folder / "model.safetensors")
    table, prefix = next((tensors[name], name.removesuffix("wte.weight")) for name in tensors if "wte" in name)
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    tensors[f"{prefix}ln_f.weight"][:] = 0
    tensors[f"{prefix}ln_f.bias"][:] = 10 * table[token_id]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder
