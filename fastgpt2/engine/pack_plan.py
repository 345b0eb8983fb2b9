"""What a packed file consists of, before a byte of it is written.

It is a standard safetensors file with the checkpoint's own names. Weights of linear layers [K, N] are stored as panels
[n, K, P] (see `panels.py`), and so is the transpose of the token table, a column of which is a token's embedding;
biases are filled up with zeros to whole panels, other tensors to multiples of 64 bytes, so that every tensor is
aligned. Causal masks are left out.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from fastgpt2.engine.checkpoint import Checkpoint
from fastgpt2.engine.config import GPT2Config
from fastgpt2.engine.panels import panel_count, to_panels
from fastgpt2.engine.weights import expected_shapes, match_names

Array = NDArray[np.float32]

# In the file's name: a release that writes another form looks for another name.
FORMAT = 2
ALIGNMENT = 64
_FLOATS = ALIGNMENT // 4
# Converted and written at a time, so that packing takes little memory beside the file's own pages.
CHUNK_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Layout:
    """The width of the panels of a matrix, by its numbers of rows (K) and columns (N)."""

    name: str
    width: Callable[[int, int], int]


class Plan:
    """The tensors of a packed file: their shapes, and where their numbers come from."""

    def __init__(self, checkpoint: Checkpoint, names: dict[str, str], shapes: dict[str, tuple[int, ...]]) -> None:
        self.checkpoint, self._names, self.shapes = checkpoint, names, shapes

    @classmethod
    def of(cls, checkpoint: Checkpoint, config: GPT2Config, layout: Layout) -> Plan:
        """
        Raises:
            CheckpointError: as `packed_in_cache`.
        """
        names = match_names(checkpoint, config)
        logical = expected_shapes(config)
        head = "wte.weight" if config.tie_word_embeddings else "lm_head.weight"
        shapes: dict[str, tuple[int, ...]] = {}
        for name in names:
            shape = logical[name]
            if name == head or (len(shape) == 2 and name.startswith("h.")):
                n_out, n_in = shape if name == head else shape[::-1]
                width = layout.width(n_in, n_out)
                shapes[name] = (panel_count(n_out, width), n_in, width)
            elif name.endswith("bias") and ".ln_" not in name and name != "ln_f.bias":
                n_in = logical[name.removesuffix("bias") + "weight"][0]
                width = layout.width(n_in, shape[0])
                shapes[name] = (panel_count(shape[0], width) * width,)
            else:
                shapes[name] = (-(-shape[0] // _FLOATS) * _FLOATS, *shape[1:])
        return cls(checkpoint, names, shapes)

    @property
    def data_bytes(self) -> int:
        return sum(4 * math.prod(shape) for shape in self.shapes.values())

    def write(self, file: BinaryIO, model: str, sealed: int, progress: Callable[[int], object]) -> None:
        """Header and tensors, a piece at a time; `progress` gets the number of bytes of each."""
        file.write(self._header(model, sealed, 0))
        crc = 0
        for name in self.shapes:
            for piece in self._pieces(name):
                file.write(piece.data)
                crc = zlib.crc32(piece.data, crc)
                progress(piece.nbytes)
        file.seek(0)
        file.write(self._header(model, sealed, crc))

    def _pieces(self, name: str) -> Iterator[Array]:
        """The stored form of a tensor, contiguous, some megabytes at a time."""
        shape, stored = self.shapes[name], self._names[name]
        source_shape = self.checkpoint.tensors[stored].shape
        if len(shape) < 3:
            tail = np.zeros((shape[0] - source_shape[0], *shape[1:]), np.float32)
            step = max(1, CHUNK_BYTES // (4 * math.prod(shape[1:])))
            for at in range(0, source_shape[0], step):
                yield self.checkpoint.float32(stored, slice(at, at + step))
            yield tail
            return
        n, n_in, width = shape
        transposed = not name.startswith("h.")  # a token table
        step = max(1, CHUNK_BYTES // (4 * n_in * width)) * width
        for at in range(0, n * width, step):
            columns = slice(at, at + step)
            part = self.checkpoint.float32(stored, columns if transposed else (slice(None), columns))
            yield to_panels(part.T if transposed else part, width)

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
        for name, shape in self.shapes.items():
            stop = at + 4 * math.prod(shape)
            header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, stop]}
            at = stop
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % ALIGNMENT)
        return struct.pack("<Q", len(text)) + text
