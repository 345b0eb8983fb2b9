"""The weights of a GPT-2: the tensors that a checkpoint must hold, and views on those of a packed file."""

from __future__ import annotations

from dataclasses import dataclass

from fastgpt2.engine.kernels.panels import Array, Panels
from fastgpt2.engine.model.checkpoint import Checkpoint
from fastgpt2.engine.model.config import GPT2Config

# The token table, and the output's table. The first one serves as both if the file has no second one.
TABLE = "wte.weight"
HEAD = "lm_head.weight"


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
        wte: [vocab_size, n_embd] if the output has a table of its own; None if `lm_head` serves as both.
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

    def panels(name: str, n_in: int) -> Panels:
        scales = scales_name(name)
        return Panels(packed.view(name)[:, None], n_in, packed.float32(scales) if scales in packed.tensors else None)

    def linear(name: str, n_in: int = config.n_embd) -> Linear:
        return Linear(panels(f"{name}.weight", n_in), packed.float32(f"{name}.bias"))

    own_head = HEAD in packed.tensors
    return Weights(
        wte=packed.float32(TABLE)[: config.vocab_size] if own_head else None,
        wpe=packed.float32("wpe.weight")[: config.n_positions],
        blocks=tuple(
            Block(
                ln_1=norm(f"h.{i}.ln_1"),
                c_attn=linear(f"h.{i}.attn.c_attn"),
                attn_c_proj=linear(f"h.{i}.attn.c_proj"),
                ln_2=norm(f"h.{i}.ln_2"),
                c_fc=linear(f"h.{i}.mlp.c_fc"),
                mlp_c_proj=linear(f"h.{i}.mlp.c_proj", config.n_inner),
            )
            for i in range(config.n_layer)
        ),
        ln_f=norm("ln_f"),
        lm_head=panels(HEAD if own_head else TABLE, config.n_embd),
    )


def scales_name(weight: str) -> str:
    """Return the name of the tensor of a packed file that holds the scales of an int8 weight."""
    return f"{weight}.scales"


def expected_shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    """Return every tensor that the configuration implies, without the `transformer.` prefix, and its shape."""
    n, inner = config.n_embd, config.n_inner
    shapes: dict[str, tuple[int, ...]] = {TABLE: (config.vocab_size, n), "wpe.weight": (config.n_positions, n)}
    linears = {"attn.c_attn": (n, 3 * n), "attn.c_proj": (n, n), "mlp.c_fc": (n, inner), "mlp.c_proj": (inner, n)}
    for i in range(config.n_layer):
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"h.{i}.{norm}.weight": (n,), f"h.{i}.{norm}.bias": (n,)}
        for name, shape in linears.items():
            shapes |= {f"h.{i}.{name}.weight": shape, f"h.{i}.{name}.bias": shape[1:]}
    return {**shapes, "ln_f.weight": (n,), "ln_f.bias": (n,), HEAD: (config.vocab_size, n)}
