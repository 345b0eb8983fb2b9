"""GPT-2's forward step for a ragged set of rows: any mix of prompts that are read and sequences that are decoded.

Each process of a team carries out its shard of the step: of every matrix some panels of columns, of the attention some
heads. The processes meet wherever one needs what another has computed; all of that lies in buffers that they share.
What is cheap, layer norms and residuals, every process computes for itself. A shard is a list of operations
(`kernels/operations.py`), made once: `_write_all_rows` is the table of contents.

Sources of the arithmetic: Radford et al. 2019; `transformers/models/gpt2/modeling_gpt2.py` and
`transformers/activations.py`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fastgpt2.engine.kernels import make_operations
from fastgpt2.engine.kernels.attention import AttentionArrays, NewTokens
from fastgpt2.engine.kernels.kernel import Kernel
from fastgpt2.engine.kernels.operations import LinearShare, Rows
from fastgpt2.engine.kernels.panels import Array
from fastgpt2.engine.kernels.program import Call, Meeting, Program
from fastgpt2.engine.model.config import GPT2Config
from fastgpt2.engine.model.packing import PackedFile
from fastgpt2.engine.model.weights import Linear, Weights
from fastgpt2.engine.network.arena import Arena, Spec
from fastgpt2.engine.network.kv_cache import KVCache
from fastgpt2.engine.network.step import Step, control_spec

# The arrays that the processes of a team write for each other, one for each operation.
BUFFERS = ("qkv", "attended", "projected", "inner", "reduced", "logits")


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
    meeting: Meeting | None,
) -> list[Shard]:
    """Return one process's shard of the network by each set of weights."""
    return [
        Shard(config, weight_set, cache, {name: arena[buffer_name(index, name)] for name in BUFFERS}, share, meeting)
        for index, weight_set in enumerate(sets)
    ]


class Shard:
    """One process's share of the network. It holds no state between steps.

    Args:
        buffers: by the names of `BUFFERS`.
        share: this process's rank, and the number of processes.
        meeting: where the processes wait for each other; None for one that is alone.
    """

    def __init__(
        self,
        config: GPT2Config,
        weight_set: WeightSet,
        cache: KVCache,
        buffers: Mapping[str, Array],
        share: tuple[int, int],
        meeting: Meeting | None,
    ) -> None:
        rank, size = share
        weights = weight_set.weights
        self._config, self._weights, self._buffers, self._meeting = config, weights, buffers, meeting
        most_rows = buffers["qkv"].shape[0]
        # Of all rows, and of those that logits are wanted of.
        self._x, self._wanted_x, self._wanted_attended, self._normed = (
            np.zeros((most_rows, config.n_embd), np.float32) for _ in range(4)
        )
        self._ids, self._positions = np.zeros(most_rows, np.int64), np.zeros(most_rows, np.int64)
        # How many rows a step has, and how many of them logits are wanted of.
        self._rows, self._wanted = np.zeros(1, np.int64), np.zeros(1, np.int64)
        operations = make_operations(
            weight_set.kernel, config.activation_function, config.layer_norm_epsilon, most_rows
        )
        scales = [config.attention_scale(layer) for layer in range(config.n_layer)]
        arrays = AttentionArrays(buffers["qkv"], buffers["attended"], cache.keys, cache.values, scales)
        heads = config.n_head * rank // size, config.n_head * (rank + 1) // size
        self._operations, self._attention = operations, operations.attention(arrays, heads)
        self._linears = [[_share_of(linear, share) for linear in block.linears] for block in weights.blocks]
        first, _ = weights.lm_head.share_of_columns(*share)
        self._head = LinearShare(weights.lm_head.share(*share), None, first)
        self._all_rows, self._wanted_rows = Program(self._write_all_rows()), Program(self._write_wanted_rows())
        self._last_meet = operations.meet(meeting) if meeting is not None else None

    @property
    def exact(self) -> bool:
        """Tell whether every operation gives a row the same bits whatever rows stand beside it."""
        panels = [*(linear.weight for linear in self._weights.blocks[0].linears), self._weights.lm_head]
        return self._operations.is_exact(panels) and self._attention.exact

    def run(self, step: Step) -> None:
        """Run this share of a step. Afterwards, the first rows of the buffer "logits" are those that were wanted."""
        tokens, ids, positions = list[NewTokens](), list[int](), list[int]()
        for segment, start in zip(step.segments, step.starts, strict=True):
            n = len(segment.ids)
            tokens.append(NewTokens(segment.slot, start, len(ids), n))
            ids += segment.ids
            positions += range(start, start + n)
        self._rows[0] = rows = len(ids)
        self._ids[:rows], self._positions[:rows] = ids, positions
        self._attention.prepare(tokens)
        self._all_rows.run()
        if wanted := step.rows_with_logits():
            self._wanted[0] = count = len(wanted)
            # mode: with another one, NumPy would write into a copy first.
            for array, chosen in ((self._x, self._wanted_x), (self._buffers["attended"], self._wanted_attended)):
                np.take(array, wanted, axis=0, out=chosen[:count], mode="clip")
            self._wanted_rows.run()
        if self._meeting is not None and self._last_meet is not None:
            self._meeting.arrived_at = time.monotonic()
            self._last_meet()

    def _write_all_rows(self) -> Iterator[Call]:
        """Yield the operations of all rows: all layers up to the attention of the last one.

        What follows that attention is read of those rows alone that logits are wanted of: of a prompt, of its last one.
        """
        table = self._weights.lm_head if self._weights.wte is None else self._weights.wte
        yield self._operations.embed(table, self._weights.wpe, self._ids, self._positions, self._x, self._rows)
        added = None
        for layer in range(self._config.n_layer):
            if layer > 0:
                yield from self._write_projections(layer - 1, self._x, self._buffers["attended"], self._rows)
                added = self._buffers["reduced"]
            yield from self._write_attention(layer, added)

    def _write_wanted_rows(self) -> Iterator[Call]:
        """Yield the operations of rows that logits are wanted of: what follows the attention of the last layer."""
        do, ln_f, wanted = self._operations, self._weights.ln_f, self._wanted
        yield from self._write_projections(self._config.n_layer - 1, self._wanted_x, self._wanted_attended, wanted)
        yield do.layer_norm(self._wanted_x, self._buffers["reduced"], ln_f.weight, ln_f.bias, self._normed, wanted)
        yield do.linear(self._normed, self._head, self._buffers["logits"], wanted, then=self._linears[0][0])

    def _write_attention(self, layer: int, added: Array | None) -> Iterator[Call]:
        """Yield a layer's operations up to its attention, for all rows; `added` is added to x before."""
        do, b, ln_1 = self._operations, self._buffers, self._weights.blocks[layer].ln_1
        c_attn, attn_c_proj, *_ = self._linears[layer]
        yield do.layer_norm(self._x, added, ln_1.weight, ln_1.bias, self._normed, self._rows)
        yield do.linear(self._normed, c_attn, b["qkv"], self._rows, then=attn_c_proj)
        yield from self._meet()
        yield self._attention.call(layer)
        yield from self._meet()

    def _write_projections(self, layer: int, x: Array, attended: Array, rows: Rows) -> Iterator[Call]:
        """Yield a layer's operations behind its attention. What "reduced" has then is still to be added to x."""
        do, b, ln_2 = self._operations, self._buffers, self._weights.blocks[layer].ln_2
        _, attn_c_proj, c_fc, mlp_c_proj = self._linears[layer]
        then = self._linears[layer + 1][0] if layer + 1 < self._config.n_layer else self._head
        yield do.linear(attended, attn_c_proj, b["projected"], rows, then=c_fc)
        yield from self._meet()
        yield do.layer_norm(x, b["projected"], ln_2.weight, ln_2.bias, self._normed, rows)
        yield do.linear(self._normed, c_fc, b["inner"], rows, then=mlp_c_proj)
        yield do.activation(b["inner"][:, c_fc.columns()], rows)
        yield from self._meet()
        yield do.linear(b["inner"], mlp_c_proj, b["reduced"], rows, then=then)
        yield from self._meet()

    def _meet(self) -> Iterator[Call]:
        if self._meeting is not None:
            yield self._operations.meet(self._meeting)


def _share_of(linear: Linear, share: tuple[int, int]) -> LinearShare:
    first, last = linear.weight.share_of_columns(*share)
    return LinearShare(linear.weight.share(*share), linear.bias[first:last], first)
