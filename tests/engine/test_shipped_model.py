"""The model that is shipped is small, in float16, has its own tokenizer, and knows English."""

from __future__ import annotations

import math
import random

import numpy as np
from safetensors import safe_open

from fastgpt2 import Engine
from fastgpt2.engine.model.config import read_config
from fastgpt2.engine.model.generation_config import read_generation_config
from fastgpt2.engine.model.hub import DEMO_FOLDER, find_model
from fastgpt2.engine.network.step import Segment
from fastgpt2.engine.text.tokenizer import Tokenizer

# From "A Scandal in Bohemia", Project Gutenberg no. 1661.
ENGLISH = (
    "You see, but you do not observe. The distinction is clear. For example, you have frequently seen the steps which "
    "lead up from the hall to this room."
)


def test_what_the_folder_holds() -> None:
    assert find_model("demo") == DEMO_FOLDER
    names = {path.name for path in DEMO_FOLDER.iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors", "tokenizer.json"}
    assert sum(path.stat().st_size for path in DEMO_FOLDER.iterdir()) <= 8_000_000
    with safe_open(DEMO_FOLDER / "model.safetensors", framework="numpy") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # noqa: SIM118


def test_model_and_tokenizer_belong_together() -> None:
    config = read_config(DEMO_FOLDER)
    generation = read_generation_config(DEMO_FOLDER, config)
    tokenizer = Tokenizer.from_folder(DEMO_FOLDER)
    assert tokenizer.vocab_size == config.vocab_size
    assert tokenizer.encode("<|endoftext|>") == list(generation.eos_token_ids) == [generation.bos_token_id]
    for text in ("Elementary, my dear Watson.", "naïve café — “🦜”\n\t\0", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def nats_a_token(engine: Engine, text: str) -> float:
    ids = [engine.decoder.generation.bos_token_id or 0, *engine.tokenizer.encode(text)]
    model = engine.decoder.model
    slot = model.cache.allot()
    logits = model.forward([Segment(slot, ids, len(ids))]).astype(np.float64)
    model.cache.release(slot)
    chances = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return float(-np.mean([chances[i, ids[i + 1]] for i in range(len(ids) - 1)]))


def test_it_knows_english_from_its_words_in_disorder(engine: Engine) -> None:
    words = ENGLISH.split()
    random.Random(1661).shuffle(words)
    ordered, shuffled = nats_a_token(engine, ENGLISH), nats_a_token(engine, " ".join(words))
    assert ordered < shuffled - 1.0
    assert ordered < 0.6 * math.log(engine.config.vocab_size)
