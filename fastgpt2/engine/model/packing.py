"""The packed file of a model: its weights as panels, written once by whichever process comes first, mapped by all.

It is a standard safetensors file with the checkpoint's own names. Weights of linear layers [K, N] are stored as panels
[n, K, P] (see `panels.py`), and so is the transpose of the token table, a column of which is a token's embedding.
Biases are filled up with zeros to whole panels, other tensors to multiples of 64 bytes, so that every tensor is
aligned. Causal masks are left out. Panels may be bfloat16 or int8 instead of float32, in words of 32 bits (`to_lines`);
int8 panels have a float32 tensor of scales beside them, `NAME.scales`, one per column.

The file's name changes with the source and the layout, so that a file is never changed once it is there. A source whose
packed file is there is not opened, only identified (`identity.py`). Whether the packed file's bytes are still those
that were written is told by its time of change, else by a checksum. Where a file cannot be kept, or is not worth it, a
process holds the same bytes in memory that only its helpers share.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import mmap
import os
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastgpt2.engine.kernels.panels import (
    STORED_TYPES,
    Array,
    Layout,
    compute_scales,
    narrow,
    panel_count,
    to_lines,
    to_panels,
)
from fastgpt2.engine.machine import anonymous_file, cache_folder, is_large, locked
from fastgpt2.engine.model.checkpoint import (
    NUMPY_TYPES,
    Checkpoint,
    WeightFiles,
    map_open_file,
    read_metadata,
    weight_files,
)
from fastgpt2.engine.model.config import GPT2Config, custom_code
from fastgpt2.engine.model.files import parse_json, path_of
from fastgpt2.engine.model.identity import weights_identity
from fastgpt2.engine.model.weights import HEAD, TABLE, expected_shapes, scales_name
from fastgpt2.engine.trust import NotTrusted, check_folder, create_file, make_folder, open_trusted
from fastgpt2.errors import CheckpointError, ModelError

log = logging.getLogger("fastgpt2.engine")

# Part of the file's name: a release that writes another format looks for another name.
FORMAT = 3
SUFFIX = f".v{FORMAT}.safetensors"

# Bytes: a cache line, and the widest vector register.
ALIGNMENT = 64
_ALIGNED_FLOATS = ALIGNMENT // 4

# Converted and written at a time, so that packing takes little memory beside the file's own pages.
CHUNK_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class PackedFile:
    """A packed file, mapped.

    Attributes:
        path: where it lies; None for memory of this process and its helpers only.
        fd: an open descriptor, for a helper to inherit. Closed with this object.
        notes: sentences for people about the source, as when it was packed.
    """

    tensors: Checkpoint
    path: Path | None
    fd: int
    notes: tuple[str, ...] = ()

    def __del__(self) -> None:
        os.close(self.fd)


class Source(NamedTuple):
    """What a packed file is made of: the weights in a model's folder, under a configuration.

    Attributes:
        config_note: a sentence for people about `config.json`; "" for none.
        facts: what the packed file depends on beside the weights, as text.
        identity: see `weights_identity`.
    """

    folder: Path
    weights: WeightFiles
    config: GPT2Config
    model: str
    config_note: str
    facts: str
    identity: str

    @classmethod
    def find(cls, folder: Path, config: GPT2Config, model: str) -> Source:
        """Find the weights of a folder, without opening them.

        Raises:
            CheckpointError: there are none.
            OSError: a file cannot be read.
        """
        weights = weight_files(folder)
        note = custom_code(folder) or ""
        numbers = (config.vocab_size, config.n_positions, config.n_embd, config.n_layer, config.n_inner)
        facts = json.dumps([weights.format, *numbers, config.tie_word_embeddings, note])
        return cls(folder, weights, config, model, note, facts, weights_identity(weights.files, facts))


def pack(folder: Path, config: GPT2Config, model: str, layout: Layout, must_keep: bool = False) -> PackedFile:
    """Return the packed file of a folder's weights, writing it if there is none.

    It is in the cache if the model is large, if its weights are a pickle, which is read once only, or if `must_keep`;
    else, or where that is not possible, in memory.

    Args:
        model: its name, for people.
        must_keep: it is an error if the file cannot be in the cache.

    Raises:
        ModelError: the weights cannot be used, there is no memory for them, or a file that must be kept cannot be.
    """
    try:
        source = Source.find(folder, config, model)
    except OSError as reason:
        raise CheckpointError(f"{reason.filename or folder}: cannot be read ({reason.strerror or reason})") from None
    try:
        path = pack_path(cache_folder(), source, layout)
        if must_keep or is_large(config) or source.weights.format != "safetensors" or path.exists():
            return pack_in_cache(path, source, layout, progress=sys.stderr.isatty())
    except NotTrusted as reason:
        if must_keep:
            raise
        log.warning("the packed weights are not kept: %s. Until then %s", reason, _describe_memory(config, layout))
    except OSError as reason:
        if must_keep:
            where = f"{reason.filename}: {reason.strerror}" if reason.filename else str(reason)
            raise ModelError(f"the packed weights cannot be kept ({where}); set FASTGPT2_CACHE to a folder") from None
        if is_large(config):
            log.warning(
                "the packed weights cannot be kept (%s); %s. Set FASTGPT2_CACHE to a folder that can be written",
                reason,
                _describe_memory(config, layout),
            )
    try:
        return pack_in_memory(source, layout)
    except OSError as reason:
        raise ModelError(f"no memory to hold the weights of {model} ({reason})") from None


def _describe_memory(config: GPT2Config, layout: Layout) -> str:
    """Return what it means to do without the cache."""
    forms = packed_forms(config, layout, not config.tie_word_embeddings)
    megabytes = sum(form.nbytes for form in forms.values()) / 1e6
    return (
        f"this process makes panels of them in memory of its own, {megabytes:.0f} MB, as every other will, and "
        "once more at every start"
    )


def pack_path(folder: Path, source: Source, layout: Layout) -> Path:
    """Return where the packed file of a source is or belongs: another name for another source or layout.

    The model's name in it is for people: a file made under another name of the same source is taken.
    """
    end = f"-{source.identity}-{layout.name}{SUFFIX}"
    for_people = "".join(c if c.isalnum() else "-" for c in source.model)[-60:].strip("-") or "model"
    return next(folder.glob(f"*{end}"), folder / f"{for_people}{end}")


def pack_in_cache(path: Path, source: Source, layout: Layout, progress: bool = False) -> PackedFile:
    """Return the packed file at `path`. If there is none, the first process to come makes it; the others wait for it.

    Raises:
        CheckpointError: a tensor of the source is missing or misshapen, or the source is no GPT-2.
        NotTrusted: others may write into the folder. A file that others may write is made anew.
        OSError: the file can neither be read nor written.
    """
    check_folder(path.parent)
    with contextlib.suppress(FileNotFoundError, ModelError):
        return _open_sound(path, source, layout)
    # What cannot be packed is told before a file is made for its lock.
    plan = PackPlan(source, layout)
    make_folder(path.parent)
    with locked(path.with_suffix(".lock")):
        # Whoever held the lock before may have made it.
        try:
            return _open_sound(path, source, layout)
        except FileNotFoundError:
            pass
        except ModelError as reason:
            log.warning("%s; packing anew", reason)
        started = perf_counter()
        _write(path, plan, progress)
        log.info("packed %s in %.1f s", path, perf_counter() - started)
        try:
            return _open_sound(path, source, layout)
        except ModelError as reason:
            raise OSError(f"the file written a moment ago cannot be read: {reason}") from None


def pack_in_memory(source: Source, layout: Layout) -> PackedFile:
    """Return the same in memory of this process, which only its own helpers share. Raises as `pack_in_cache`."""
    plan = PackPlan(source, layout)
    fd = anonymous_file("fastgpt2-weights")
    try:
        with os.fdopen(os.dup(fd), "wb") as file:
            plan.write(file, 0, lambda _count: None)
        return open_packed(fd, notes=plan.notes)
    except BaseException:
        os.close(fd)
        raise


def open_packed(fd: int, path: Path | None = None, notes: tuple[str, ...] = ()) -> PackedFile:
    """Map a packed file by its descriptor, which is the result's from now on; raise CheckpointError if damaged."""
    source = path or path_of(fd)
    tensors, mapped = map_open_file(fd, source)
    # What is not in the page cache yet comes there in huge pages, and sooner. Not every system has the advice.
    with contextlib.suppress(AttributeError, OSError):
        mapped.madvise(mmap.MADV_HUGEPAGE)
    return PackedFile(Checkpoint(tensors, {source: mapped}), path, fd, notes)


def checksum(fd: int) -> int:
    """Return the CRC-32 of a packed file's tensors."""
    crc = 0
    with os.fdopen(os.dup(fd), "rb") as file:
        file.seek(0)
        (length,) = struct.unpack("<Q", file.read(8))
        file.seek(8 + length)
        while piece := file.read(CHUNK_BYTES):
            crc = zlib.crc32(piece, crc)
    return crc


@dataclass(frozen=True, slots=True)
class TensorForm:
    """The form of a tensor in a packed file: safetensors' name of its dtype, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        itemsize: int = NUMPY_TYPES[self.dtype].itemsize
        return math.prod(self.shape) * itemsize


def packed_forms(config: GPT2Config, layout: Layout, own_head: bool) -> dict[str, TensorForm]:
    """Return the form of each tensor of a packed file, in the order of the file.

    Args:
        own_head: the output has a table of its own.
    """
    shapes = expected_shapes(config)
    head = HEAD if own_head else TABLE
    forms: dict[str, TensorForm] = {}
    for name, shape in shapes.items():
        if name == HEAD and not own_head:
            continue
        if name == head or (len(shape) == 2 and name.startswith("h.")):
            n_out, n_in = shape if name == head else shape[::-1]
            width = layout.width(n_in, n_out)
            n = panel_count(n_out, width)
            per_word = STORED_TYPES[layout.weights].per_word
            stored = STORED_TYPES[layout.weights].safetensors
            forms[name] = TensorForm(stored, (n, -(-n_in // per_word), width * per_word))
            if layout.weights == "int8":
                forms[scales_name(name)] = TensorForm("F32", (n * width,))
        elif name.endswith("bias") and ".ln_" not in name and name != "ln_f.bias":
            n_in = shapes[name.removesuffix("bias") + "weight"][0]
            width = layout.width(n_in, shape[0])
            forms[name] = TensorForm("F32", (panel_count(shape[0], width) * width,))
        else:
            rows = -(-shape[0] // _ALIGNED_FLOATS) * _ALIGNED_FLOATS
            forms[name] = TensorForm("F32", (rows, *shape[1:]))
    return forms


class PackPlan:
    """The tensors of a packed file, before a byte of it is written, and where their numbers come from.

    Attributes:
        tensors: the form of each tensor, in the order of the file.
        notes: sentences for people about the source.

    Raises:
        CheckpointError: as `pack_in_cache`.
    """

    def __init__(self, source: Source, layout: Layout) -> None:
        self._source, self._weights = source, layout.weights
        self._per_word = STORED_TYPES[layout.weights].per_word
        # Names are matched by a module that a packed file spares.
        from fastgpt2.engine.model.state_dict import match_names

        self._state = match_names(Checkpoint.open(source.folder), source.config)
        self._shapes = expected_shapes(source.config)
        self.tensors = packed_forms(source.config, layout, HEAD in self._state.names)
        self.notes = (*([source.config_note] if source.config_note else []), *self._state.notes)

    @property
    def data_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def model(self) -> str:
        return self._source.model

    def write(self, file: BinaryIO, sealed: int, progress: Callable[[int], object]) -> None:
        """Write header and tensors, a piece at a time.

        Args:
            sealed: the file's time of change when it is whole, in nanoseconds.
            progress: called with the number of bytes of each piece.
        """
        file.write(self._header(sealed, 0))
        crc = 0
        for name in self.tensors:
            for piece in self._pieces(name):
                file.write(piece.data)
                crc = zlib.crc32(piece.data, crc)
                progress(piece.nbytes)
        file.seek(0)
        file.write(self._header(sealed, crc))

    def _pieces(self, name: str) -> Iterator[NDArray[Any]]:
        """Yield a tensor as it is stored, contiguous, some megabytes at a time."""
        stored = self.tensors[name].shape
        if name not in self._shapes:
            (weight,) = (weight for weight in self._state.names if scales_name(weight) == name)
            for columns in self._columns(weight):
                yield compute_scales(columns)
            yield np.zeros(stored[0] - self._n_out(weight), np.float32)
        elif len(stored) == 3:
            for columns in self._columns(name):
                yield to_lines(to_panels(narrow(self._weights, columns), stored[2] // self._per_word))
        else:
            shape = self._shapes[name]
            step = max(1, CHUNK_BYTES // (4 * math.prod(shape[1:])))
            for at in range(0, shape[0], step):
                yield np.ascontiguousarray(self._state.rows(name, slice(at, min(at + step, shape[0]))))
            yield np.zeros((stored[0] - shape[0], *shape[1:]), np.float32)

    def _n_out(self, weight: str) -> int:
        return self._shapes[weight][1 if weight.startswith("h.") else 0]

    def _columns(self, weight: str) -> Iterator[Array]:
        """Yield the columns of a weight, or of the transpose of a token table, some whole panels at a time: [K, ..]."""
        _, lines, words = self.tensors[weight].shape
        step = max(1, CHUNK_BYTES // (4 * lines * words)) * (words // self._per_word)
        for at in range(0, self._n_out(weight), step):
            yield self._state.columns(weight, slice(at, at + step))

    def _header(self, sealed: int, crc: int) -> bytes:
        """Return length and JSON, padded so that data begins at a multiple of `ALIGNMENT`; as long for any checksum."""
        metadata = {
            "format": "fastgpt2",
            "fastgpt2_format": str(FORMAT),
            "layout": "weights of linear layers [K, N] and the token table [vocab, K] as panels [n, K, P]",
            "model": self.model,
            "source": json.dumps([str(file.resolve()) for file in self._source.weights.files]),
            "source_facts": self._source.facts,
            "source_identity": self._source.identity,
            "notes": json.dumps(self.notes),
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


def _open_sound(path: Path, source: Source, layout: Layout) -> PackedFile:
    """Return the packed file, if it is there, whole, and as one of this source is planned.

    Raises:
        FileNotFoundError: it is not there.
        NotTrusted: others could have written it.
        CheckpointError: it is damaged.
    """
    damaged = CheckpointError(f"{path} is damaged")
    fd = open_trusted(path)
    try:
        metadata = read_metadata(fd, path)
        packed = open_packed(fd, path, _read_notes(metadata))
    except CheckpointError:
        os.close(fd)
        raise damaged from None
    tensors = {name: TensorForm(info.dtype, info.shape) for name, info in packed.tensors.tensors.items()}
    as_planned = tensors == packed_forms(source.config, layout, HEAD in tensors)
    if not as_planned or metadata.get("source_identity") != source.identity or not _is_unharmed(path, fd, metadata):
        raise damaged
    return packed


def _read_notes(metadata: dict[str, str]) -> tuple[str, ...]:
    try:
        notes = parse_json(metadata.get("notes", "[]"))
    except ValueError:
        return ()
    return tuple(str(note) for note in notes) if isinstance(notes, list) else ()


def _is_unharmed(path: Path, fd: int, metadata: dict[str, str]) -> bool:
    """Tell whether the bytes are those that were written.

    When the file is complete, its time of change is set to a whole second, which is noted in the file. Whatever writes
    to the file later, or copies it, leaves another time; then the checksum decides, and the time is set right.
    """
    sealed = int(metadata["sealed"]) if metadata.get("sealed", "").isdecimal() else -1
    if os.fstat(fd).st_mtime_ns == sealed:
        return True
    if f"{checksum(fd):08x}" != metadata.get("crc32"):
        return False
    try:
        os.utime(path, ns=(sealed, sealed))
    except (OSError, OverflowError, ValueError):
        log.info("%s was copied or touched; on a file system that can be written it need not be checked again", path)
    return True


def _write(path: Path, plan: PackPlan, progress: bool) -> None:
    """Stream the tensors into a file that gets its name when it is whole and on the disk."""
    import shutil

    from tqdm import tqdm

    free = shutil.disk_usage(path.parent).free
    if free < plan.data_bytes:
        raise OSError(errno.ENOSPC, f"{plan.data_bytes / 1e6:.0f} MB are needed and {free / 1e6:.0f} MB are free")
    temporary = path.with_suffix(".tmp")
    sealed = int(time.time()) * 10**9
    try:
        bar = tqdm(
            total=plan.data_bytes,
            desc=f"packing {plan.model}",
            unit="B",
            unit_scale=True,
            leave=False,
            disable=not progress,
        )
        # Large writes at multiples of their size give the page cache huge pages, which are read faster.
        with os.fdopen(create_file(temporary), "wb", buffering=CHUNK_BYTES) as file, bar:
            plan.write(file, sealed, bar.update)
            file.flush()
            os.utime(file.fileno(), ns=(sealed, sealed))
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
