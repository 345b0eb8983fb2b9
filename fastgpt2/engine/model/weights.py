"""The weights of a GPT-2: the tensors that a checkpoint must hold, and views on those of a packed file."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fastgpt2.engine.kernels.panels import Array, Panels
from fastgpt2.engine.model.checkpoint import Checkpoint
from fastgpt2.engine.model.config import GPT2Config
from fastgpt2.errors import CheckpointError

# Causal masks that older exports carry; the attention here needs none.
_MASKS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")

# Exports of the whole language model put it before every name, those of the bare transformer do not.
_PREFIX = "transformer."


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer, y = x @ weight + bias; weight as panels, bias [weight.columns]."""

    weight: Panels
    bias: Array


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """The parameters of a layer norm: weight [n_embd], bias [n_embd]."""

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

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.c_attn, self.attn_c_proj, self.c_fc, self.mlp_c_proj


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights of a model, as views on a packed file.

    Attributes:
        wte: [vocab_size, n_embd] if the output has a table of its own; None if `lm_head` serves both.
        wpe: [n_positions, n_embd].
        lm_head: the token table as panels of its transpose, [n_embd, vocab_size].
    """

    wte: Array | None
    wpe: Array
    blocks: tuple[Block, ...]
    ln_f: LayerNorm
    lm_head: Panels

    def embedding(self, token_id: int) -> Array:  # [n_embd]
        return self.lm_head.column(token_id) if self.wte is None else self.wte[token_id]


def view_weights(packed: Checkpoint, config: GPT2Config) -> Weights:
    """Return views on the tensors of a file that `packing` wrote for this configuration."""

    def vector(name: str) -> Array:
        return packed.float32(name)[: config.n_embd]

    def norm(name: str) -> LayerNorm:
        return LayerNorm(vector(f"{name}.weight"), vector(f"{name}.bias"))

    def panels(name: str) -> Panels:
        scales = scales_name(name)
        return Panels(packed.view(name)[:, None], packed.float32(scales) if scales in packed.tensors else None)

    def linear(name: str) -> Linear:
        return Linear(panels(f"{name}.weight"), packed.float32(f"{name}.bias"))

    tied = config.tie_word_embeddings
    return Weights(
        wte=None if tied else packed.float32("wte.weight")[: config.vocab_size],
        wpe=packed.float32("wpe.weight")[: config.n_positions],
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
        lm_head=panels("wte.weight" if tied else "lm_head.weight"),
    )


def scales_name(weight: str) -> str:
    """Return the name of the tensor of a packed file that holds the scales of an int8 weight."""
    return f"{weight}.scales"


def expected_shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    """Return every tensor that the configuration implies, without the `transformer.` prefix, and its shape."""
    n, inner = config.n_embd, config.n_inner
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (config.vocab_size, n), "wpe.weight": (config.n_positions, n)}
    linears = {"attn.c_attn": (n, 3 * n), "attn.c_proj": (n, n), "mlp.c_fc": (n, inner), "mlp.c_proj": (inner, n)}
    for i in range(config.n_layer):
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"h.{i}.{norm}.weight": (n,), f"h.{i}.{norm}.bias": (n,)}
        for name, shape in linears.items():
            shapes |= {f"h.{i}.{name}.weight": shape, f"h.{i}.{name}.bias": shape[1:]}
    return {**shapes, "ln_f.weight": (n,), "ln_f.bias": (n,), "lm_head.weight": (config.vocab_size, n)}


def match_names(checkpoint: Checkpoint, config: GPT2Config) -> dict[str, str]:
    """Return name without prefix -> name in the file, for the tensors that the model uses.

    Every other tensor is a causal mask, or an output table beside a token table that serves as one.

    Raises:
        CheckpointError: a tensor is missing, surplus, misshapen or stored twice; the message names file and tensor.
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
