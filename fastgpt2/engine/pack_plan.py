"""What a packed file consists of, before a byte of it is written.

It is a standard safetensors file with the checkpoint's own names. Weights of linear layers [K, N] are stored as panels
[n, K, P] (see `panels.py`), and so is the transpose of the token table, a column of which is a token's embedding;
biases are filled up with zeros to whole panels, other tensors to multiples of 64 bytes, so that every tensor is
aligned. Causal masks are left out. Panels may be bfloat16 or int8 instead of float32, the latter with a float32 tensor
of scales, `NAME.scales`, one a column.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fastgpt2.engine.checkpoint import Checkpoint
from fastgpt2.engine.config import GPT2Config
from fastgpt2.engine.panels import STORED, panel_count, scales_of, stored_as, to_panels
from fastgpt2.engine.weights import expected_shapes, match_names, scales_name

Array = NDArray[np.float32]

# In the file's name: a release that writes another form looks for another name.
FORMAT = 2
ALIGNMENT = 64
_FLOATS = ALIGNMENT // 4
# Converted and written at a time, so that packing takes little memory beside the file's own pages.
CHUNK_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Layout:
    """The width of the panels of a matrix, by its numbers of rows (K) and columns (N), and what they are stored as."""

    name: str
    width: Callable[[int, int], int]
    weights: str = "float32"


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of a packed file: safetensors' name of its dtype, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


_ITEM_BYTES = {name: np.dtype(kind).itemsize for name, kind in STORED.values()}


class Plan:
    """The tensors of a packed file, and where their numbers come from."""

    def __init__(self, checkpoint: Checkpoint, names: dict[str, str], tensors: dict[str, Stored], weights: str) -> None:
        self.checkpoint, self._names, self.tensors, self._weights = checkpoint, names, tensors, weights

    @classmethod
    def of(cls, checkpoint: Checkpoint, config: GPT2Config, layout: Layout) -> Plan:
        """
        Raises:
            CheckpointError: as `packed_in_cache`.
        """
        names = match_names(checkpoint, config)
        logical = expected_shapes(config)
        head = "wte.weight" if config.tie_word_embeddings else "lm_head.weight"
        tensors: dict[str, Stored] = {}
        for name in names:
            shape = logical[name]
            if name == head or (len(shape) == 2 and name.startswith("h.")):
                n_out, n_in = shape if name == head else shape[::-1]
                width = layout.width(n_in, n_out)
                n = panel_count(n_out, width)
                tensors[name] = Stored(STORED[layout.weights][0], (n, n_in, width))
                if layout.weights == "int8":
                    tensors[scales_name(name)] = Stored("F32", (n * width,))
            elif name.endswith("bias") and ".ln_" not in name and name != "ln_f.bias":
                n_in = logical[name.removesuffix("bias") + "weight"][0]
                width = layout.width(n_in, shape[0])
                tensors[name] = Stored("F32", (panel_count(shape[0], width) * width,))
            else:
                tensors[name] = Stored("F32", (-(-shape[0] // _FLOATS) * _FLOATS, *shape[1:]))
        return cls(checkpoint, names, tensors, layout.weights)

    @property
    def data_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def write(self, file: BinaryIO, model: str, sealed: int, progress: Callable[[int], object]) -> None:
        """Header and tensors, a piece at a time; `progress` gets the number of bytes of each."""
        file.write(self._header(model, sealed, 0))
        crc = 0
        for name in self.tensors:
            for piece in self._pieces(name):
                file.write(piece.data)
                crc = zlib.crc32(piece.data, crc)
                progress(piece.nbytes)
        file.seek(0)
        file.write(self._header(model, sealed, crc))

    def _pieces(self, name: str) -> Iterator[NDArray[Any]]:
        """The stored form of a tensor, contiguous, some megabytes at a time."""
        shape = self.tensors[name].shape
        if name not in self._names:
            (weight,) = (weight for weight in self._names if scales_name(weight) == name)
            for columns in self._columns(weight):
                yield scales_of(columns)
            yield np.zeros(shape[0] - self._n_out(weight), np.float32)
            return
        stored = self._names[name]
        source_shape = self.checkpoint.tensors[stored].shape
        if len(shape) < 3:
            tail = np.zeros((shape[0] - source_shape[0], *shape[1:]), np.float32)
            step = max(1, CHUNK_BYTES // (4 * math.prod(shape[1:])))
            for at in range(0, source_shape[0], step):
                yield self.checkpoint.float32(stored, slice(at, at + step))
            yield tail
            return
        for columns in self._columns(name):
            yield to_panels(stored_as(self._weights, columns), shape[2])

    def _n_out(self, weight: str) -> int:
        return self.checkpoint.tensors[self._names[weight]].shape[1 if weight.startswith("h.") else 0]

    def _columns(self, weight: str) -> Iterator[Array]:
        """Of a weight, or of the transpose of a token table: [K, some whole panels], until there are none left."""
        _, n_in, width = self.tensors[weight].shape
        step = max(1, CHUNK_BYTES // (4 * n_in * width)) * width
        for at in range(0, self._n_out(weight), step):
            columns, stored = slice(at, at + step), self._names[weight]
            if weight.startswith("h."):
                yield self.checkpoint.float32(stored, (slice(None), columns))
            else:
                yield self.checkpoint.float32(stored, columns).T

    def _header(self, model: str, sealed: int, crc: int) -> bytes:
        """Length and JSON, padded so that data begins at a multiple of `ALIGNMENT`; as long for any checksum."""
        metadata = {
            "format": "fastgpt2",
            "fastgpt2_format": str(FORMAT),
            "layout": "weights of linear layers [K, N] and the token table [vocab, K] as panels [n, K, P]",
            "model": model,
            "source": json.dumps(sorted({str(info.file.resolve()) for info in self.checkpoint.tensors.values()})),
            "source_identity": self.checkpoint.identity,
            "sealed": str(sealed),
            "crc32": f"{crc:08x}",
        }
        header: dict[str, object] = {"__metadata__": metadata}
        at = 0
        for name, tensor in self.tensors.items():
            stop = at + tensor.nbytes
            header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [at, stop]}
            at = stop
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % ALIGNMENT)
        return struct.pack("<Q", len(text)) + text
