"""GPT-2's forward step for a ragged set of rows: any mix of prompts that are read and sequences that are decoded.

Each process of a team carries out its shard of the step: of every matrix some panels of columns, of the attention some
heads. The processes meet wherever one needs what another has computed; all of that lies in buffers that they share.
What is cheap, layer norms and residuals, every process computes for itself.

Sources of the arithmetic: Radford et al. 2019; `transformers/models/gpt2/modeling_gpt2.py` and
`transformers/activations.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastgpt2.engine.kernels.kernel import Kernel
from fastgpt2.engine.kernels.panels import Array, Panels
from fastgpt2.engine.model.config import GPT2Config
from fastgpt2.engine.model.packing import PackedFile
from fastgpt2.engine.model.weights import LayerNorm, Linear, Weights
from fastgpt2.engine.network.arena import Arena, Spec
from fastgpt2.engine.network.attention import Attention
from fastgpt2.engine.network.kv_cache import BLOCK, KVCache
from fastgpt2.engine.network.step import Step, control_spec

# The arrays that the processes of a team write for each other, one for each operation.
BUFFERS = ("qkv", "attended", "projected", "inner", "reduced", "logits")

# Rows that several functions pass over are taken in parts of this many numbers, with as many of scratch: both stay in
# the second-level cache.
IN_CACHE = 1 << 15

# Prepared views are kept for at most this many different numbers of rows.
_MOST_VIEWS = 64


@dataclass(frozen=True, slots=True)
class WeightSet:
    """A packed file, the weights in it as the arithmetic takes them, and the kernel that multiplies them."""

    packed: PackedFile
    weights: Weights
    kernel: Kernel


def buffer_name(index: int, name: str) -> str:
    """Return what the arena calls the buffer of a network's set of weights."""
    return f"{index} {name}"


@dataclass(frozen=True, slots=True)
class Shape:
    """The size of a network's state: how many sequences, tokens in a step at most, and processes."""

    n_slots: int
    max_rows: int
    size: int


def state_specs(config: GPT2Config, sets: Sequence[WeightSet], shape: Shape) -> dict[str, Spec]:
    """Return the arrays that the processes of a team share: barrier, keys and values, and each set's `BUFFERS`."""
    specs = {"control": control_spec(shape.size, shape.max_rows), **KVCache.specs(config, shape.n_slots)}
    # With room for rows that fill up a last chunk. Chunks are equal, so that fewer than one row a chunk is added, of
    # chunks of two.
    rows = shape.max_rows + shape.max_rows // 2 + 64
    for index, weight_set in enumerate(sets):
        block = weight_set.weights.blocks[0]
        columns = {
            "qkv": block.c_attn.weight.columns,
            "attended": config.n_embd,
            "projected": block.attn_c_proj.weight.columns,
            "inner": block.c_fc.weight.columns,
            "reduced": block.mlp_c_proj.weight.columns,
            "logits": weight_set.weights.lm_head.columns,
        }
        specs.update({buffer_name(index, name): ((rows, columns[name]), np.float32) for name in BUFFERS})
    return specs


def make_shards(
    config: GPT2Config,
    sets: Sequence[WeightSet],
    cache: KVCache,
    arena: Arena,
    share: tuple[int, int],
    meet: Callable[[], None],
) -> list[Shard]:
    """Return one process's shard of the network by each set of weights."""
    return [
        Shard(config, weight_set, cache, {name: arena[buffer_name(index, name)] for name in BUFFERS}, share, meet)
        for index, weight_set in enumerate(sets)
    ]


class Shard:
    """One process's share of the network. It holds no state between steps but views.

    Args:
        buffers: by the names of `BUFFERS`.
        share: this process's rank, and the number of processes.
        meet: returns when every process has called it.
    """

    def __init__(
        self,
        config: GPT2Config,
        weight_set: WeightSet,
        cache: KVCache,
        buffers: Mapping[str, Array],
        share: tuple[int, int],
        meet: Callable[[], None],
    ) -> None:
        rank, size = share
        weights, kernel = weight_set.weights, weight_set.kernel
        self._config, self._weights, self._buffers, self._kernel = config, weights, buffers, kernel
        self._share, self._meet = share, meet
        self._activation = ACTIVATIONS[config.activation_function]
        self._epsilon = np.float32(config.layer_norm_epsilon)
        heads = config.n_head * rank // size, config.n_head * (rank + 1) // size
        row_chunks = kernel.attention_row_chunks(cache.values.shape[3], config.head_dim, BLOCK)
        self._attention = Attention(config, cache, heads, buffers["qkv"], buffers["attended"], row_chunks)
        rows = buffers["qkv"].shape[0]
        self._x, self._normed, self._last = (np.zeros((rows, config.n_embd), np.float32) for _ in range(3))
        self._scale = np.zeros((rows, 1), np.float32)
        self._scratch = np.zeros(max(IN_CACHE, buffers["inner"].shape[1]), np.float32)
        self._blocks = [tuple(self._share_of(linear) for linear in block.linears) for block in weights.blocks]
        head = weights.lm_head
        first, last = head.share(rank, size)
        self._head = head.array[first:last]
        self._head_scales = None if head.scales is None else head.scales[first * head.width : last * head.width]
        self._views: dict[int, _Views] = {}

    @property
    def exact(self) -> bool:
        """Tell whether every product gives a row the same bits whatever rows stand beside it."""
        panels = [*(linear.weight for linear in self._weights.blocks[0].linears), self._weights.lm_head]
        return all(self._kernel.row_chunks(p.n_in, p.width).exact for p in panels) and self._attention.exact

    def _share_of(self, linear: Linear) -> _Linear:
        weight = linear.weight
        first, last = weight.share(*self._share)
        columns = slice(first * weight.width, last * weight.width)
        scales = None if weight.scales is None else weight.scales[columns]
        return _Linear(weight.array[first:last], scales, linear.bias[columns])

    def run(self, step: Step) -> None:
        """Run this share of a step. Afterwards, the first rows of the buffer "logits" are those that were wanted."""
        weights, epsilon, product, meet = self._weights, self._epsilon, self._kernel.product, self._meet
        v = self._views_for(step.rows)
        self._embed(step, v.x)
        self._attention.prepare(step)
        for layer, (block, shares) in enumerate(zip(weights.blocks, self._blocks, strict=True)):
            c_attn, attn_c_proj, c_fc, mlp_c_proj = shares
            for x, normed, scale in v.norms:
                layer_norm(x, block.ln_1, epsilon, normed, scale)
            product(v.qkv.x, c_attn.panels, v.qkv.out)
            c_attn.scale_and_add_bias(v.qkv.own)
            meet()
            self._attention.run(layer)
            meet()
            product(v.projected.x, attn_c_proj.panels, v.projected.out)
            attn_c_proj.scale_and_add_bias(v.projected.own)
            meet()
            np.add(v.x, v.projected.all, out=v.x)
            for x, normed, scale in v.norms:
                layer_norm(x, block.ln_2, epsilon, normed, scale)
            product(v.inner.x, c_fc.panels, v.inner.out)
            for inner, scratch in v.activations:
                c_fc.scale_and_add_bias(inner)
                self._activation(inner, scratch)
            meet()
            product(v.reduced.x, mlp_c_proj.panels, v.reduced.out)
            mlp_c_proj.scale_and_add_bias(v.reduced.own)
            meet()
            np.add(v.x, v.reduced.all, out=v.x)
        self._logits(step, v.x)
        meet()

    def _embed(self, step: Step, x: Array) -> None:
        row = 0
        for segment, start in zip(step.segments, step.starts, strict=True):
            for position, token_id in enumerate(segment.ids, start):
                np.add(self._weights.embedding(token_id), self._weights.wpe[position], out=x[row])
                row += 1

    def _logits(self, step: Step, x: Array) -> None:
        wanted = step.rows_with_logits()
        n = len(wanted)
        if not n:
            return
        for row, source in enumerate(wanted):
            self._last[row] = x[source]
        layer_norm(self._last[:n], self._weights.ln_f, self._epsilon, self._normed[:n], self._scale[:n])
        logits = self._views_for(n).logits
        self._kernel.product(logits.x, self._head, logits.out)
        if self._head_scales is not None:
            np.multiply(logits.own, self._head_scales, out=logits.own)

    def _views_for(self, rows: int) -> _Views:
        known = self._views.get(rows)
        if known is not None:
            return known
        if len(self._views) >= _MOST_VIEWS:
            self._views.clear()
        buffers, block = self._buffers, self._weights.blocks[0]
        inner = self._view(self._normed, block.c_fc.weight, buffers["inner"], rows)
        inner_parts = [inner.own[part] for part in _parts_in_cache(rows, inner.own.shape[1])]
        norms = _parts_in_cache(rows, self._config.n_embd)
        self._views[rows] = views = _Views(
            x=self._x[:rows],
            norms=[(self._x[part], self._normed[part], self._scale[part]) for part in norms],
            activations=[(own, self._scratch[: own.size].reshape(own.shape)) for own in inner_parts],
            qkv=self._view(self._normed, block.c_attn.weight, buffers["qkv"], rows),
            projected=self._view(buffers["attended"], block.attn_c_proj.weight, buffers["projected"], rows),
            inner=inner,
            reduced=self._view(buffers["inner"], block.mlp_c_proj.weight, buffers["reduced"], rows),
            logits=self._view(self._normed, self._weights.lm_head, buffers["logits"], rows),
        )
        return views

    def _view(self, x: Array, weight: Panels, out: Array, rows: int) -> _Product:
        """Return the first rows of `x` and `out`, which a weight's panels are multiplied from and to."""
        chunks, m = self._kernel.row_chunks(weight.n_in, weight.width).split(rows)
        first, last = weight.share(*self._share)
        width, n_in = weight.width, weight.n_in
        in_chunks = out[: chunks * m].reshape(chunks, m, weight.columns // width, width)
        return _Product(
            x=x[: chunks * m].reshape(chunks, m, x.shape[1])[None, :, :, :n_in],
            out=in_chunks.transpose(2, 0, 1, 3)[first:last],
            own=out[:rows, first * width : last * width],
            all=out[:rows, : self._config.n_embd],
        )


def _parts_in_cache(rows: int, columns: int) -> list[slice]:
    """Cut rows into parts that stay in the cache while several functions pass over them."""
    step = max(1, IN_CACHE // max(1, columns))
    return [slice(at, min(at + step, rows)) for at in range(0, rows, step)]


@dataclass(frozen=True, slots=True)
class _Linear:
    """One process's share of a linear layer."""

    panels: NDArray[Any]
    scales: Array | None
    bias: Array

    def scale_and_add_bias(self, product: Array) -> None:
        """Turn rows by panels into what the layer gives, in place."""
        if self.scales is not None:
            np.multiply(product, self.scales, out=product)
        np.add(product, self.bias, out=product)


@dataclass(frozen=True, slots=True)
class _Product:
    """Views for one product.

    Attributes:
        x: [1, C, m, K], for the kernel.
        out: [n, C, m, P], for the kernel.
        own: [rows, n * P], the columns of this share.
        all: [rows, n_embd], the columns of all shares up to n_embd.
    """

    x: Array
    out: Array
    own: Array
    all: Array


@dataclass(frozen=True, slots=True)
class _Views:
    """Views for a step of one number of rows.

    Attributes:
        norms: x, where its normed rows go, and room for their scales; in parts of the rows.
        activations: this share of the inner layer, and scratch of its shape; in parts of the rows.
    """

    x: Array
    norms: list[tuple[Array, Array, Array]]
    activations: list[tuple[Array, Array]]
    qkv: _Product
    projected: _Product
    inner: _Product
    reduced: _Product
    logits: _Product


def layer_norm(x: Array, norm: LayerNorm, epsilon: np.float32, out: Array, scale: Array) -> None:
    """Normalize rows: Ba et al. 2016, with the biased variance, as torch.nn.LayerNorm.

    x, out [rows, n_embd]; scale [rows, 1], overwritten.
    """
    per_column = np.float32(1.0 / x.shape[1])
    np.add.reduce(x, axis=1, keepdims=True, out=scale)
    scale *= per_column
    np.subtract(x, scale, out=out)
    np.vecdot(out, out, out=scale[:, 0])
    scale *= per_column
    scale += epsilon
    np.sqrt(scale, out=scale)
    out /= scale
    out *= norm.weight
    out += norm.bias


def gelu_new(x: Array, scratch: Array) -> None:
    """Apply Hendrycks & Gimpel 2016's tanh approximation: 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))."""
    np.multiply(x, x, out=scratch)
    scratch *= np.float32(0.044715 * math.sqrt(2.0 / math.pi))
    scratch += np.float32(math.sqrt(2.0 / math.pi))
    scratch *= x
    np.tanh(scratch, out=scratch)
    scratch += np.float32(1.0)
    x *= np.float32(0.5)
    x *= scratch


def gelu(x: Array, scratch: Array) -> None:
    """Multiply x with the normal distribution function of x."""
    np.multiply(x, np.float32(math.sqrt(0.5)), out=scratch)
    scratch[...] = _erf(scratch)
    scratch += np.float32(1.0)
    x *= np.float32(0.5)
    x *= scratch


def _erf(x: Array) -> NDArray[np.float64]:
    """Return erf(x), which numpy lacks: Abramowitz & Stegun 7.1.26, absolute error below 1.5e-7; float64 inside."""
    magnitude = np.abs(x, dtype=np.float64)
    t = 1.0 / (1.0 + 0.3275911 * magnitude)
    poly = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    result: NDArray[np.float64] = np.copysign(1.0 - poly * np.exp(-magnitude * magnitude), x)
    return result


def quick_gelu(x: Array, scratch: Array) -> None:
    np.multiply(x, np.float32(1.702), out=scratch)
    _sigmoid(scratch)
    x *= scratch


def silu(x: Array, scratch: Array) -> None:
    scratch[...] = x
    _sigmoid(scratch)
    x *= scratch


def _sigmoid(x: Array) -> None:
    # By tanh, which saturates where exp would overflow.
    x *= np.float32(0.5)
    np.tanh(x, out=x)
    x += np.float32(1.0)
    x *= np.float32(0.5)


def relu(x: Array, scratch: Array) -> None:  # noqa: ARG001  (as the others)
    np.maximum(x, np.float32(0.0), out=x)


def tanh(x: Array, scratch: Array) -> None:  # noqa: ARG001
    np.tanh(x, out=x)


# Each works in place, with scratch of x's shape. gelu_fast, gelu_new and gelu_pytorch_tanh are one formula.
ACTIVATIONS: dict[str, Callable[[Array, Array], None]] = {
    "gelu_new": gelu_new,
    "gelu_fast": gelu_new,
    "gelu_pytorch_tanh": gelu_new,
    "gelu": gelu,
    "quick_gelu": quick_gelu,
    "relu": relu,
    "silu": silu,
    "swish": silu,
    "tanh": tanh,
}
