"""One forward step of a GPT-2 for a ragged set of rows: any mix of prompts being read and tokens being decoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastgpt2.engine.config import GPT2Config
from fastgpt2.engine.kv_cache import KVCache
from fastgpt2.engine.ops import ACTIVATIONS, layer_norm, linear, softmax_in_place
from fastgpt2.engine.weights import Block, Weights

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Segment:
    """The next tokens of one sequence.

    Attributes:
        slot: the sequence's slot in the KV cache.
        ids: the tokens that follow what the slot holds, at least one.
        n_logits: for how many of the last of these tokens logits are wanted (0 in the midst of a prompt, else 1).
    """

    slot: int
    ids: Sequence[int]
    n_logits: int = 1


class GPT2:
    """The network. Holds no state beside its weights; what was seen is in the KV cache."""

    def __init__(self, config: GPT2Config, weights: Weights) -> None:
        self.config = config
        self.weights = weights
        self._activation = ACTIVATIONS[config.activation_function]

    def forward(self, segments: Sequence[Segment], cache: KVCache) -> Array:
        """Run the segments' tokens, append their keys and values to the cache, and return logits.

        Args:
            segments: one a sequence; all their tokens run through the linear layers as one [rows, n_embd] array.
            cache: holds what came before; a slot must have room for its segment's tokens.

        Returns:
            float32 [sum of n_logits, vocab_size], in the order of the segments.
        """
        weights, epsilon = self.weights, self.config.layer_norm_epsilon
        starts = [cache.lengths[s.slot] for s in segments]
        ids = np.concatenate([np.asarray(s.ids, np.intp) for s in segments])
        positions = np.concatenate([np.arange(a, a + len(s.ids)) for a, s in zip(starts, segments, strict=True)])
        masks = [_future(a, len(s.ids)) for a, s in zip(starts, segments, strict=True)]
        x = weights.wte[ids] + weights.wpe[positions]  # [rows, n_embd]
        for i, block in enumerate(weights.blocks):
            qkv = linear(layer_norm(x, block.ln_1, epsilon), block.c_attn)  # [rows, 3 n_embd]
            x += linear(self._attend(i, qkv, segments, masks, cache), block.attn_c_proj)
            x += self._mlp(layer_norm(x, block.ln_2, epsilon), block)
        for segment in segments:
            cache.lengths[segment.slot] += len(segment.ids)
        wanted = layer_norm(x[_rows_with_logits(segments)], weights.ln_f, epsilon)
        return wanted @ weights.lm_head.T

    def _mlp(self, x: Array, block: Block) -> Array:  # [rows, n_embd] -> [rows, n_embd]
        return linear(self._activation(linear(x, block.c_fc)), block.mlp_c_proj)

    def _attend(
        self,
        layer: int,
        qkv: Array,
        segments: Sequence[Segment],
        masks: Sequence[NDArray[np.bool_] | None],
        cache: KVCache,
    ) -> Array:
        """Causal multi-head attention, a sequence at a time: qkv [rows, 3 n_embd] -> [rows, n_embd]."""
        n_head, head_dim = self.config.n_head, self.config.head_dim
        scale = np.float32(self.config.attention_scale(layer))
        out = np.empty((qkv.shape[0], n_head, head_dim), np.float32)
        row = 0
        for segment, mask in zip(segments, masks, strict=True):
            start, count = cache.lengths[segment.slot], len(segment.ids)
            stop = start + count
            # [count, 3, n_head, head_dim] -> three of [n_head, count, head_dim]
            q, k, v = qkv[row : row + count].reshape(count, 3, n_head, head_dim).transpose(1, 2, 0, 3)
            keys = cache.keys[layer, segment.slot, :, :stop]  # [n_head, stop, head_dim]
            values = cache.values[layer, segment.slot, :, :stop]
            keys[:, start:] = k
            values[:, start:] = v
            scores: Array = np.matmul(q * scale, keys.transpose(0, 2, 1), dtype=np.float32)  # [n_head, count, stop]
            if mask is not None:
                scores[:, mask] = -np.inf
            softmax_in_place(scores)
            out[row : row + count] = (scores @ values).transpose(1, 0, 2)
            row += count
        return out.reshape(qkv.shape[0], n_head * head_dim)


def _future(start: int, count: int) -> NDArray[np.bool_] | None:
    """[count, start + count], true where a position lies after the row's own, start + i; None where none does."""
    return np.triu(np.ones((count, start + count), np.bool_), start + 1) if count > 1 else None


def _rows_with_logits(segments: Sequence[Segment]) -> NDArray[np.intp]:
    rows: list[int] = []
    stop = 0
    for segment in segments:
        stop += len(segment.ids)
        rows.extend(range(stop - segment.n_logits, stop))
    return np.array(rows, np.intp)
