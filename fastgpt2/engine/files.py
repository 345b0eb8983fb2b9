"""The files of a model folder: their names, and the small JSON ones read within bounds. Imports nothing heavy."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from fastgpt2.errors import CheckpointError, FastGPT2Error

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_FILE = "tokenizer.json"
VOCAB_FILE = "vocab.json"
MERGES_FILE = "merges.txt"
# Either the first, or both of the second.
TOKENIZER_FILES = ((TOKENIZER_FILE,), (VOCAB_FILE, MERGES_FILE))
PICKLE_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json")

MAX_INDEX_BYTES = 16 << 20
MAX_SHARDS = 1024


def read_json_object(path: Path, max_bytes: int, error: type[FastGPT2Error]) -> dict[str, Any]:
    """Read a JSON object from a file of bounded size; anything else raises `error` with a message naming the file."""
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise error(f"{path}: {size} bytes; a file of this kind has at most {max_bytes}")
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise error(f"{path}: no such file") from None
    except OSError as reason:
        raise error(f"{path}: cannot be read ({reason.strerror or reason})") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as reason:
        raise error(f"{path}: not valid JSON ({reason})") from None
    if not isinstance(value, dict):
        raise error(f"{path}: not a JSON object but {shown(value)}")
    return value


def read_index(path: Path) -> dict[str, str]:
    """The `weight_map` of an index file: tensor name -> shard file name, each a plain name in the same folder.

    Raises:
        CheckpointError: malformed, or a shard's name leads out of the folder.
    """
    weight_map = read_json_object(path, MAX_INDEX_BYTES, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map is missing or empty")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\\0\ud800-\udfff]{1,255}\.safetensors", file):
            raise CheckpointError(
                f"{path}: tensor {name!r} is said to lie in {repr(file)[:80]}, which is no plain file name"
            )
    if len(set(weight_map.values())) > MAX_SHARDS:
        raise CheckpointError(f"{path}: lists more than {MAX_SHARDS} files")
    return weight_map


def shown(value: object) -> str:
    """A value as a message shows it: JSON, of bounded length."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
