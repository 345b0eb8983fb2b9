"""A checkpoint: the tensors of a model's files, validated, by name, as zero-copy arrays on read-only memory maps.

The files are safetensors' or torch's (`torch_file`). The safetensors library validates a file (bounds, overlaps,
dtypes, sizes) but hands out copies. So its verdict is taken, and the offsets are then read from the same header.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from fastgpt2.engine.kernels.panels import STORED_TYPES, widen
from fastgpt2.engine.model.config import WEIGHT_FILES, read_index
from fastgpt2.engine.model.files import open_file, parse_json, path_of, why_not_read
from fastgpt2.engine.model.lfs_pointer import explain_pointer, is_pointer
from fastgpt2.errors import CheckpointError

# gpt2-xl's header has 60 KB. The library would accept 100 MB, which Python's JSON turns into gigabytes.
MAX_HEADER_BYTES = 8 << 20

# Source: linux/mman.h. Python's mmap has no name for it.
_MADV_POPULATE_READ = 22

# The tensors that can be viewed, by safetensors' names of their dtypes.
NUMPY_TYPES: dict[str, np.dtype[Any]] = {stored.safetensors: stored.numpy for stored in STORED_TYPES.values()}
NUMPY_TYPES |= {"F16": np.dtype(np.float16), "F64": np.dtype(np.float64), "BOOL": np.dtype(np.bool_)}
NUMPY_TYPES |= {f"{kind}{8 * size}": np.dtype(f"{kind.lower()}{size}") for kind in "IU" for size in (1, 2, 4, 8)}
_FLOATING = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """The place of a tensor.

    Attributes:
        dtype: safetensors' name of its type.
        start, stop: its byte range in the file.
        strides: numbers from one index to the next, for each dimension; None if the tensor lies in C order.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    strides: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The files that hold a model's weights.

    Attributes:
        format: "safetensors", "torch" or "nanogpt".
        files: the files, in the order of their names.
        index: tensor name -> file name, as the index of several files has it; empty for one file.
    """

    format: str
    files: tuple[Path, ...]
    index: dict[str, str]


class Checkpoint:
    """The tensors of a model's folder, by name. Views stay valid as long as any of them, or this object, is alive.

    Attributes:
        format: the files' format, as `WeightFiles` has it.
    """

    def __init__(
        self, tensors: dict[str, TensorInfo], maps: dict[Path, mmap.mmap], file_format: str = "safetensors"
    ) -> None:
        self.tensors, self._maps, self.format = tensors, maps, file_format

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Map the files that `weight_files` finds.

        Every tensor that a file holds is taken, also one that the index does not list. If several files hold a tensor,
        that of the file which the index names is taken.

        Raises:
            CheckpointError: there are none, or a file is missing, damaged or of another kind than its name says.
        """
        weights = weight_files(folder)
        tensors: dict[str, TensorInfo] = {}
        maps: dict[Path, mmap.mmap] = {}
        for file in weights.files:
            if weights.format == "safetensors":
                present, maps[file] = map_file(file)
            else:
                present, maps[file] = _map_torch_file(file, weights.format)
            for name, info in present.items():
                if name not in tensors or weights.index.get(name, file.name) == file.name:
                    tensors[name] = info
        return cls(tensors, maps, weights.format)

    def view(self, name: str) -> NDArray[Any]:
        """Return the tensor as it lies in the file, read-only, without a copy; a BF16 tensor as its bits, in uint16.

        The view is unaligned where the file is (`view.flags.aligned`), as the public `gpt2` file is.
        """
        info = self.tensors[name]
        if info.dtype not in NUMPY_TYPES:
            raise self._unreadable(name)
        dtype = NUMPY_TYPES[info.dtype]
        strides = None if info.strides is None else tuple(dtype.itemsize * stride for stride in info.strides)
        return np.ndarray(info.shape, dtype, self._maps[info.file], info.start, strides)

    def populate(self) -> None:
        """Enter all pages into this process's page table at once, where the system can (Linux 5.14)."""
        for mapped in self._maps.values():
            with contextlib.suppress(OSError, ValueError):
                mapped.madvise(_MADV_POPULATE_READ)

    def float32(self, name: str, where: Any = ...) -> NDArray[np.float32]:
        """Return the tensor, or the part of it at the index `where`, as aligned float32: the view, or a converted copy.

        BLAS reads nothing else: numpy would copy the weights again on every product. Of a tensor that does not lie in C
        order, the result is a copy that does. Numbers of F64 that are too large for float32 become infinite.
        """
        info = self.tensors[name]
        if info.dtype not in _FLOATING:
            raise self._unreadable(name)
        view: NDArray[Any] = self.view(name)[where]
        if info.dtype == "BF16":
            return widen(view) if info.strides is None else widen(np.ascontiguousarray(view))
        if view.dtype == np.float32 and view.flags.aligned and info.strides is None:
            return view
        with np.errstate(over="ignore"):
            return np.require(view, np.float32, ["A", "C"])

    def _unreadable(self, name: str) -> CheckpointError:
        info = self.tensors[name]
        return CheckpointError(
            f"{info.file}: tensor {name!r} is {info.dtype}; GPT-2 weights are read as {', '.join(_FLOATING)}"
        )


def weight_files(folder: Path) -> WeightFiles:
    """Find the files that hold the weights of a model's folder, by their names. Nothing is read but an index.

    If there are several kinds, the first of these is taken, as transformers does: `model.safetensors`, the shards of
    `model.safetensors.index.json`, `pytorch_model.bin`, the shards of `pytorch_model.bin.index.json`, and then
    nanoGPT's `ckpt.pt`.

    Raises:
        CheckpointError: there are none, or the index is damaged.
    """
    for file_format, single, index_name in WEIGHT_FILES:
        if (folder / single).exists():
            return WeightFiles(file_format, (folder / single,), {})
        if index_name is not None and (folder / index_name).exists():
            index = read_index(folder / index_name)
            return WeightFiles(file_format, tuple(folder / name for name in sorted(set(index.values()))), index)
    from fastgpt2.engine.model.diagnosis import explain_folder

    raise CheckpointError(explain_folder(folder))


def map_file(path: Path) -> tuple[dict[str, TensorInfo], mmap.mmap]:
    """Validate a safetensors file, list its tensors and map it read-only.

    Raises:
        CheckpointError: the file is not a safetensors file, is damaged or truncated, or has a header beyond the limit.
    """
    if is_pointer(path):
        raise CheckpointError(explain_pointer(path))
    try:
        fd = open_file(path)
    except OSError as reason:
        raise CheckpointError(why_not_read(path, reason)) from None
    try:
        return map_open_file(fd, path)
    finally:
        os.close(fd)


def map_open_file(fd: int, path: Path) -> tuple[dict[str, TensorInfo], mmap.mmap]:
    """Do the same for an open file, which stays open; raise CheckpointError, which names its path, as `map_file`."""
    try:
        header, data_start = _read_header(fd, path)
        # By the descriptor: another file may have the name by now.
        with safe_open(path_of(fd), framework="numpy"):
            pass
        mapped = mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
    except SafetensorError as reason:
        raise CheckpointError(f"{path}: damaged or not a safetensors file ({reason}); fetch it again") from None
    except OSError as reason:
        raise CheckpointError(why_not_read(path, reason)) from None
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, stop = entry["data_offsets"]
        tensors[name] = TensorInfo(path, entry["dtype"], tuple(entry["shape"]), data_start + start, data_start + stop)
    return tensors, mapped


def read_metadata(fd: int, path: Path) -> dict[str, str]:
    """Return the free-form texts in an open safetensors file's header; raise CheckpointError if it cannot be read."""
    try:
        metadata = _read_header(fd, path)[0].get("__metadata__", {})
    except OSError as reason:
        raise CheckpointError(why_not_read(path, reason)) from None
    return {str(key): str(value) for key, value in metadata.items()} if isinstance(metadata, dict) else {}


def _read_header(fd: int, path: Path) -> tuple[dict[str, Any], int]:
    """Return the JSON header, which the library is to validate, and the byte at which tensor data begins."""
    size = os.fstat(fd).st_size
    start = os.pread(fd, 8, 0)
    if len(start) < 8:
        raise CheckpointError(f"{path}: not a safetensors file: only {size} bytes long; fetch it again")
    (length,) = struct.unpack("<Q", start)
    if length > min(size - 8, MAX_HEADER_BYTES):
        raise CheckpointError(
            f"{path}: damaged or not a safetensors file: its header claims {length} bytes "
            f"(the file has {size}, a header at most {MAX_HEADER_BYTES}); fetch it again"
        )
    try:
        header = parse_json(os.pread(fd, length, 8), _refuse_duplicates)
    except ValueError as reason:
        raise CheckpointError(f"{path}: damaged or not a safetensors file: its header is no JSON ({reason})") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: damaged or not a safetensors file: its header is no JSON object")
    return header, 8 + length


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raise ValueError if a name occurs twice: the library and this module would see different tensors then."""
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _map_torch_file(path: Path, file_format: str) -> tuple[dict[str, TensorInfo], mmap.mmap]:
    """List the tensors of a file of torch.save, of the model if there are others, and map the file read-only."""
    # Most models are loaded without: it takes milliseconds of every start.
    from fastgpt2.engine.model.torch_file import TorchFile

    file = TorchFile.open(path)
    stored = file.nanogpt()[0] if file_format == "nanogpt" else file.state_dict()
    tensors = {
        name: TensorInfo(path, tensor.dtype, tensor.shape, tensor.start, tensor.stop, tensor.strides)
        for name, tensor in stored.items()
    }
    return tensors, file.mapped
