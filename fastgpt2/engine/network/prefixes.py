"""Prefixes: keys and values that were computed, kept for prompts that begin alike, in blocks within a bound of memory.

They lie in memory of the process that asks, whatever helpers it has, and are copied into a sequence's slot and out of
it between steps. A copy has the bits of its original, so a sequence goes on from it as from keys and values of its own.
"""

from __future__ import annotations

import itertools
from array import array
from collections import OrderedDict
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastgpt2.engine.kernels.attention import BLOCK
from fastgpt2.engine.model.config import GPT2Config
from fastgpt2.engine.network.arena import PAGE, Arena
from fastgpt2.engine.network.kv_cache import KVCache
from fastgpt2.errors import BadRequest, ModelError

# By default, prefixes get one byte for this many bytes of keys and values, in addition to these.
SHARE = 8

# Two million tokens: what is kept of them beside their keys and values takes some 30 MB.
MOST_BLOCKS = 1 << 16

# A block is found by the number of the entry for the block before it and by its own tokens. By all of them, not by a
# hash: another prompt's keys and values would give another prompt's text.
Key = tuple[int, bytes]
_ROOT = 0
_KEY_BYTES = BLOCK * array("i").itemsize


class Entry(NamedTuple):
    """A block that is kept, in `row`. Its number is never used twice: one whose predecessor has gone is not found."""

    number: int
    row: int


class Prefixes:
    """Blocks of BLOCK positions each; the least recently used make way for others.

    Args:
        memory: bytes, enough for a block. Address space for them is taken now, memory as blocks come.

    Raises:
        ModelError: the system does not give that much address space.
    """

    def __init__(self, config: GPT2Config, memory: int) -> None:
        self._block_bytes = block_bytes(config)
        self.n_blocks = min(memory // PAGE * PAGE // self._block_bytes, MOST_BLOCKS)
        self.bytes_limit = self.n_blocks * self._block_bytes
        # Keys, then values: all of a block lies together.
        block_shape = (2, config.n_layer, config.n_head, BLOCK * config.head_dim)
        try:
            arena = Arena({"blocks": ((self.n_blocks, *block_shape), np.float32)})
        except (OSError, ValueError, OverflowError) as reason:
            raise ModelError(
                f"no memory for {self.bytes_limit} bytes of prefixes ({reason}); set a smaller prefix_memory, or 0"
            ) from None
        # Filling them takes a third of the time.
        arena.advise("blocks", "MADV_HUGEPAGE")
        self._blocks: NDArray[np.float32] = arena["blocks"]
        # The least recently used first, and no block before those that follow it in a prompt: so the block that goes
        # first has none behind it.
        self._entries: OrderedDict[Key, Entry] = OrderedDict()
        self._numbers = itertools.count(_ROOT + 1)
        self._rows_used = 0

    @property
    def bytes_committed(self) -> int:
        return self._rows_used * self._block_bytes

    def copy_to(self, cache: KVCache, slot: int, ids: Seq[int]) -> int:
        """Fill an empty slot with what is kept of these tokens, from the first on. Return how many tokens that were."""
        chain = self._find(ids, len(ids) // BLOCK)
        for number, (_, entry) in enumerate(chain):
            for part, kept in zip(cache.block(slot, number), self._blocks[entry.row], strict=True):
                np.copyto(part, kept.reshape(part.shape))
        self._touch(chain)
        cache.lengths[slot] = len(chain) * BLOCK
        return len(chain) * BLOCK

    def known(self, ids: Seq[int]) -> int:
        """Return of how many of these tokens, from the first on, `copy_to` would fill a slot."""
        return len(self._find(ids, len(ids) // BLOCK)) * BLOCK

    def keep(self, cache: KVCache, slot: int, ids: Seq[int]) -> None:
        """Keep what a slot holds of its sequence's tokens, in whole blocks, as far as it is not kept already.

        Of more blocks than there is room for at all, the first ones are kept.
        """
        count = min(min(len(ids), cache.lengths[slot]) // BLOCK, self.n_blocks)
        chain = self._find(ids, count)
        # Before others make way, so that none of these does.
        self._touch(chain)
        for tokens in itertools.islice(_by_block(ids, count), len(chain), None):
            row = self._free_row()
            for part, kept in zip(cache.block(slot, len(chain)), self._blocks[row], strict=True):
                np.copyto(kept.reshape(part.shape), part)
            key = (chain[-1][1].number if chain else _ROOT, tokens)
            chain.append((key, Entry(next(self._numbers), row)))
            self._entries[key] = chain[-1][1]
        self._touch(chain)

    def _find(self, ids: Seq[int], count: int) -> list[tuple[Key, Entry]]:
        """Return the entries of a prompt's first `count` blocks, up to the first block that is not kept."""
        chain: list[tuple[Key, Entry]] = []
        parent = _ROOT
        for tokens in _by_block(ids, count):
            entry = self._entries.get((parent, tokens))
            if entry is None:
                break
            chain.append(((parent, tokens), entry))
            parent = entry.number
        return chain

    def _touch(self, chain: Seq[tuple[Key, Entry]]) -> None:
        for key, _ in reversed(chain):
            self._entries.move_to_end(key)

    def _free_row(self) -> int:
        """Return a row that no entry has. An interruption before an entry has it loses the row, and nothing else."""
        if self._rows_used < self.n_blocks:
            self._rows_used += 1
            return self._rows_used - 1
        return self._entries.popitem(last=False)[1].row


def _by_block(ids: Seq[int], count: int) -> Iterator[bytes]:
    """Return the tokens of each of the first `count` blocks, as bytes."""
    data = array("i", ids[: count * BLOCK]).tobytes()
    return (data[at : at + _KEY_BYTES] for at in range(0, len(data), _KEY_BYTES))


def block_bytes(config: GPT2Config) -> int:
    """Return the bytes of the keys and values of BLOCK positions, in all layers."""
    return 2 * 4 * BLOCK * config.n_layer * config.n_embd


def prefixes_within(config: GPT2Config, memory: int | None, kv_memory: int) -> Prefixes | None:
    """Return the place for prefixes; None if there is to be none, or the default has no room for a block.

    Args:
        memory: bytes, 0 for none; None for a share of `kv_memory`, the bytes for keys and values of what runs.

    Raises:
        BadRequest: `memory` has no room for one block.
        ModelError: the system does not give that much address space.
    """
    least = -(-block_bytes(config) // PAGE) * PAGE
    if memory is not None and memory != 0 and memory < least:
        raise BadRequest(
            f"prefix_memory is {memory} bytes; a block of {BLOCK} of this model's positions needs {least}, "
            "and 0 turns reuse off"
        )
    wanted = kv_memory // SHARE if memory is None else memory
    return Prefixes(config, wanted) if wanted >= least else None
