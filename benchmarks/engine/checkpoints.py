"""Checkpoints of gpt2's size whose texts repeat themselves, read as English, or never repeat.

    python benchmarks/engine/checkpoints.py english OUT
    python benchmarks/engine/checkpoints.py repeating OUT
    python benchmarks/engine/checkpoints.py unrepeating OUT

`drafts.py` needs them: how many guesses come true depends on the text. `english` gives the demo model's texts, word for
word, at the cost of gpt2: its heads and vectors are filled up with zeros, and a zero takes a multiplication as any
other number does. Layer norms must not see a difference: so the mean, which they subtract anyway, is taken out of the
residual stream, and their gains make up for the variance that the zeros take away. The layers that the demo model does
not have multiply random weights by zeros, as the gains of their layer norms are zero. Were these weights zeros too, the
layers would be alike, and a program that keeps equal tensors once, as OpenVINO does, would read fewer bytes than gpt2
has. `repeating` has random weights, with which the same tokens follow each other over and over. In `unrepeating` the
position's vector outweighs the token's, so that each token is another one.

All of them have the demo model's tokenizer.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

import fastgpt2
from fastgpt2.engine.model.config import read_config
from fastgpt2.engine.model.generation_config import read_generation_config
from fastgpt2.engine.model.weights import expected_shapes

DEMO = Path(fastgpt2.__file__).parent / "models" / "demo"
SAFETENSORS, CONFIG = "model.safetensors", "config.json"
SIZES = {"n_embd": 768, "n_head": 12, "n_positions": 1024}
N_EMBD, N_HEAD = SIZES["n_embd"], SIZES["n_head"]
# The logit of tokens that the demo model does not have. The last number of a vector is 1 behind the last layer norm;
# its weight is this for those tokens, and zero for every token of the demo model.
NEVER = -1e4
SEED = 2019
# Standard deviation of the table of positions, by kind.
PLACES = {"repeating": 0.02, "unrepeating": 2.0}

Array = NDArray[np.float64]
Shapes = dict[str, tuple[int, ...]]
Tensors = dict[str, NDArray[np.float32]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("english", *PLACES))
    parser.add_argument("folder", type=Path, metavar="OUT")
    parser.add_argument("--layers", type=int, default=12, help="default: 12, as gpt2 has")
    parser.add_argument("--vocabulary", type=int, default=50257, help="tokens; default: 50257, as gpt2 has")
    options = parser.parse_args()
    kind, folder = options.kind, options.folder
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((DEMO / CONFIG).read_text())
    if options.layers < config["n_layer"] or options.vocabulary < config["vocab_size"]:
        parser.error("the demo model has {n_layer} layers and {vocab_size} tokens: fewer have no room".format(**config))
    # With the zeros the variance is smaller, so what a layer norm adds to it must be smaller too.
    epsilon = config["layer_norm_epsilon"] * config["n_embd"] / N_EMBD
    config |= {
        **SIZES,
        "n_layer": options.layers,
        "vocab_size": options.vocabulary,
        "layer_norm_epsilon": epsilon,
        "tie_word_embeddings": kind != "english",
        "dtype": "float32",
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2))
    shutil.copy(DEMO / "tokenizer.json", folder)
    shapes = expected_shapes(read_config(folder))
    tensors = english(shapes) if kind == "english" else at_random(shapes, PLACES[kind])
    save_file(tensors, folder / SAFETENSORS)


def at_random(shapes: Shapes, places: float) -> Tensors:
    """Return weights as they are before training (Radford et al. 2019).

    Args:
        places: standard deviation of the table of positions.
    """
    rng = np.random.default_rng(SEED)
    generation = read_generation_config(DEMO, read_config(DEMO))
    layers = sum(name.endswith("ln_1.weight") for name in shapes)
    deep = 0.02 / math.sqrt(2 * layers)
    tensors = {}
    for name, shape in shapes.items():
        if name == "lm_head.weight":
            continue
        if name.endswith("bias"):
            tensors[name] = np.zeros(shape, np.float32)
        elif ".ln_" in name or name == "ln_f.weight":
            tensors[name] = np.ones(shape, np.float32)
        else:
            scale = places if name == "wpe.weight" else deep if name.endswith("c_proj.weight") else 0.02
            tensors[name] = (rng.standard_normal(shape, np.float32) * scale).astype(np.float32)
    # Texts should not end early: the token that ends a text gets a vector of zeros.
    tensors["wte.weight"][list(generation.eos_token_ids)] = 0.0
    return tensors


def english(shapes: Shapes) -> Tensors:
    """Return the demo model's weights, filled up with zeros to gpt2's shapes."""
    config = read_config(DEMO)
    demo = {
        name.removeprefix("transformer."): x.astype(np.float64) for name, x in load_file(DEMO / SAFETENSORS).items()
    }
    n, heads = config.n_embd, config.n_head
    dim, wide_dim = n // heads, N_EMBD // N_HEAD
    narrower = math.sqrt(n / N_EMBD)
    # Where the columns of query, key and value go: each head stays a head.
    place = np.concatenate([np.arange(dim) + head * wide_dim for head in range(heads)])
    qkv = np.concatenate([place + i * N_EMBD for i in range(3)])
    # Attention divides scores by the root of a head's dimension, which is larger now.
    sharper = np.concatenate([np.full(n, math.sqrt(wide_dim / dim)), np.ones(2 * n)])

    def centred(x: Array) -> Array:
        mean: Array = x.mean(axis=-1, keepdims=True)
        return x - mean

    tensors = {name: np.zeros(shape) for name, shape in shapes.items()}

    def put(name: str, x: Array) -> None:
        tensors[name][tuple(slice(size) for size in x.shape)] = x

    put("wte.weight", centred(demo["wte.weight"]))
    put("wpe.weight", centred(demo["wpe.weight"]))
    put("ln_f.weight", demo["ln_f.weight"] * narrower)
    put("ln_f.bias", demo["ln_f.bias"])
    # Not tied to `wte`: the output of the last layer norm has a mean, so this table must keep its own.
    put("lm_head.weight", demo["wte.weight"])
    tensors["lm_head.weight"][config.vocab_size :, -1] = NEVER
    tensors["ln_f.bias"][-1] = 1.0
    for a in [f"h.{i}." for i in range(config.n_layer)]:
        for norm in ("ln_1", "ln_2"):
            put(f"{a}{norm}.weight", demo[f"{a}{norm}.weight"] * narrower)
            put(f"{a}{norm}.bias", demo[f"{a}{norm}.bias"])
        tensors[f"{a}attn.c_attn.weight"][:n, qkv] = demo[f"{a}attn.c_attn.weight"] * sharper
        tensors[f"{a}attn.c_attn.bias"][qkv] = demo[f"{a}attn.c_attn.bias"] * sharper
        tensors[f"{a}attn.c_proj.weight"][place, :n] = centred(demo[f"{a}attn.c_proj.weight"])
        for name in ("mlp.c_fc.weight", "mlp.c_fc.bias"):
            put(f"{a}{name}", demo[f"{a}{name}"])
        for name in ("attn.c_proj.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"):
            put(f"{a}{name}", centred(demo[f"{a}{name}"]))
    rng = np.random.default_rng(SEED)
    for name, x in tensors.items():
        if x.ndim == 2 and name.startswith("h.") and int(name.split(".")[1]) >= config.n_layer:
            x[:] = rng.standard_normal(x.shape, np.float32) * 0.02
    return {name: x.astype(np.float32) for name, x in tensors.items()}


if __name__ == "__main__":
    main()
