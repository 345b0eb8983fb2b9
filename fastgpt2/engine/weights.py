"""The tensors of a GPT-2, checked against the configuration and converted to what the arithmetic wants."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastgpt2.engine.checkpoint import Checkpoint
from fastgpt2.engine.config import GPT2Config
from fastgpt2.errors import CheckpointError

Array = NDArray[np.float32]

# Causal masks that older exports carry; the attention here needs none.
_MASKS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")
_PREFIX = "transformer."


@dataclass(frozen=True, slots=True)
class Linear:
    """y = x @ weight + bias; weight [n_in, n_out] (GPT-2's Conv1D), bias [n_out]."""

    weight: Array
    bias: Array


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """weight [n_embd], bias [n_embd]."""

    weight: Array
    bias: Array


@dataclass(frozen=True, slots=True)
class Block:
    """One transformer layer, under the checkpoint's names."""

    ln_1: LayerNorm
    c_attn: Linear
    attn_c_proj: Linear
    ln_2: LayerNorm
    c_fc: Linear
    mlp_c_proj: Linear


@dataclass(frozen=True, slots=True)
class Weights:
    """wte [vocab_size, n_embd], wpe [n_positions, n_embd], lm_head [vocab_size, n_embd] (wte itself when tied)."""

    wte: Array
    wpe: Array
    blocks: tuple[Block, ...]
    ln_f: LayerNorm
    lm_head: Array


def read_weights(checkpoint: Checkpoint, config: GPT2Config) -> Weights:
    """Take a GPT-2's weights out of a checkpoint: zero-copy where the file is aligned float32.

    Raises:
        CheckpointError: a tensor is missing, surplus, misshapen or of a type that weights do not come in; the message
            names file and tensor.
    """
    names = match_names(checkpoint, config)

    def take(name: str) -> Array:
        return checkpoint.float32(names[name])

    def norm(name: str) -> LayerNorm:
        return LayerNorm(take(f"{name}.weight"), take(f"{name}.bias"))

    def linear(name: str) -> Linear:
        return Linear(take(f"{name}.weight"), take(f"{name}.bias"))

    wte = take("wte.weight")
    return Weights(
        wte=wte,
        wpe=take("wpe.weight"),
        blocks=tuple(
            Block(
                ln_1=norm(f"h.{i}.ln_1"),
                c_attn=linear(f"h.{i}.attn.c_attn"),
                attn_c_proj=linear(f"h.{i}.attn.c_proj"),
                ln_2=norm(f"h.{i}.ln_2"),
                c_fc=linear(f"h.{i}.mlp.c_fc"),
                mlp_c_proj=linear(f"h.{i}.mlp.c_proj"),
            )
            for i in range(config.n_layer)
        ),
        ln_f=norm("ln_f"),
        lm_head=wte if config.tie_word_embeddings else take("lm_head.weight"),
    )


def expected_shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    """Every tensor that the configuration implies, without the `transformer.` prefix, and its shape."""
    n, inner = config.n_embd, config.n_inner
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (config.vocab_size, n),
        "wpe.weight": (config.n_positions, n),
        "ln_f.weight": (n,),
        "ln_f.bias": (n,),
    }
    for i in range(config.n_layer):
        shapes |= {
            f"h.{i}.ln_1.weight": (n,),
            f"h.{i}.ln_1.bias": (n,),
            f"h.{i}.attn.c_attn.weight": (n, 3 * n),
            f"h.{i}.attn.c_attn.bias": (3 * n,),
            f"h.{i}.attn.c_proj.weight": (n, n),
            f"h.{i}.attn.c_proj.bias": (n,),
            f"h.{i}.ln_2.weight": (n,),
            f"h.{i}.ln_2.bias": (n,),
            f"h.{i}.mlp.c_fc.weight": (n, inner),
            f"h.{i}.mlp.c_fc.bias": (inner,),
            f"h.{i}.mlp.c_proj.weight": (inner, n),
            f"h.{i}.mlp.c_proj.bias": (n,),
        }
    shapes["lm_head.weight"] = (config.vocab_size, n)
    return shapes


def match_names(checkpoint: Checkpoint, config: GPT2Config) -> dict[str, str]:
    """Name without prefix -> name in the file, for the tensors that the model uses; every other one accounted for.

    Raises:
        CheckpointError: as `read_weights`.
    """
    shapes = expected_shapes(config)
    names: dict[str, str] = {}
    for stored, info in checkpoint.tensors.items():
        name = stored.removeprefix(_PREFIX)
        if _MASKS.fullmatch(name):
            continue
        if name not in shapes:
            raise CheckpointError(
                f"{info.file}: unexpected tensor {stored!r}, which a GPT-2 with n_layer {config.n_layer} does not have"
            )
        if name in names:
            raise CheckpointError(f"{info.file}: tensor {name!r} is stored twice, as {stored!r} and {names[name]!r}")
        if info.shape != shapes[name]:
            raise CheckpointError(
                f"{info.file}: tensor {stored!r} has the shape {list(info.shape)}; config.json implies "
                f"{list(shapes[name])}"
            )
        names[name] = stored
    files = ", ".join(sorted({str(info.file) for info in checkpoint.tensors.values()})) or "the checkpoint"
    for name in shapes:
        if name not in names and not (name == "lm_head.weight" and config.tie_word_embeddings):
            raise CheckpointError(f"{files}: tensor {name!r} is missing")
    if config.tie_word_embeddings:
        names.pop("lm_head.weight", None)
    return names
