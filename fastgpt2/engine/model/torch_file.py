"""The files that torch.save writes (`pytorch_model.bin`, nanoGPT's `ckpt.pt`), read without torch and on no trust.

Both of torch's formats hold a pickle and, beside it, the numbers of the tensors as they are: a zip file with one entry
a storage, or, before torch 1.6, one storage behind the other. `torch_pickle` reads the pickle. Here the storages are
found, so that each tensor becomes a byte range of a read-only map, checked to lie within the file.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgpt2.engine.model.files import map_file, why_not_read
from fastgpt2.engine.model.lfs_pointer import explain_pointer, is_pointer
from fastgpt2.engine.model.torch_names import TENSORS_OF_OTHER_KINDS, Inert, UnknownName
from fastgpt2.engine.model.torch_pickle import MAX_PICKLE_BYTES, BadPickle, Storage, Tensor, TorchPickle
from fastgpt2.engine.model.zip_directory import BadZip, ZipEntry, read_directory
from fastgpt2.errors import CheckpointError

# Beyond this, tensors that share their numbers would take memory that the size of the file does not explain. Tied
# tables take twice the file, and twelve layers that share all their weights less than twelve times.
MAX_SHARING = 16
_SMALL_BYTES = 1 << 20
_MAX_NAME = 500

# Source: torch/serialization.py.
_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_PROTOCOL_VERSION = 1001
_ZIP_MAGIC, _PICKLE_MAGIC = b"PK\3\4", b"\x80"

# Under these keys programs that train keep a model's tensors in a checkpoint: torch's own examples, Lightning,
# DeepSpeed, nanoGPT.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")

# Names of modules and functions that have no place beside weights, and that harmful pickles use.
_HARMFUL = frozenset(
    {"os", "posix", "nt", "subprocess", "sys", "io", "_io", "shutil", "socket", "pty", "runpy", "webbrowser", "pip"}
)
_HARMFUL_BUILTINS = frozenset({"eval", "exec", "compile", "open", "__import__"})

# Keeps dicts, tensors and plain values of what torch loads, whatever stands beside them.
_TO_PLAIN_VALUES = (
    "import torch; p = {path}; keep = lambda v: {{k: keep(w) for k, w in v.items() if isinstance(w, (dict, "
    'torch.Tensor, int, float, str))}} if isinstance(v, dict) else v; x = torch.load(p, map_location="cpu", '
    'weights_only=False); torch.save(keep(x.state_dict() if hasattr(x, "state_dict") else x), p)'
)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor's place in its file.

    Attributes:
        dtype: safetensors' name of its type.
        start, stop: its byte range. With strides, other tensors may have numbers there too.
        strides: numbers from one index to the next, for each dimension; None if the tensor lies in C order.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    strides: tuple[int, ...] | None


class TorchFile:
    """A file of torch.save, mapped.

    Attributes:
        mapped: the map of the whole file.
    """

    def __init__(self, path: Path, mapped: mmap.mmap, root: Any, places: dict[str, int]) -> None:
        self.mapped = mapped
        self._path, self._root, self._places = path, root, places

    @classmethod
    def open(cls, path: Path) -> TorchFile:
        """Map a file and read its pickle.

        Raises:
            CheckpointError: it is missing or damaged, or no file of torch.save, or its pickle holds something else than
                tensors and plain values.
        """
        mapped = _map(path)
        try:
            if mapped[:4] == _ZIP_MAGIC:
                return cls(path, mapped, *_read_zip(mapped))
            if mapped[:1] == _PICKLE_MAGIC:
                return cls(path, mapped, *_read_old_format(mapped))
        except UnknownName as unknown:
            raise CheckpointError(f"{path}: {_refusal(path, unknown.name)}") from None
        except (BadPickle, BadZip) as reason:
            raise CheckpointError(
                f"{path}: damaged, or not written by torch.save ({reason}); fetch it again, or save it again with torch"
            ) from None
        if is_pointer(path):
            raise CheckpointError(explain_pointer(path))
        raise CheckpointError(f"{path}: {_what_it_is(path, mapped)}")

    def state_dict(self) -> dict[str, StoredTensor]:
        """Return the tensors of a model, by name: those of the file, or of the one dict in it that holds a model's.

        Raises:
            CheckpointError: there are none, it is not clear which they are, or one cannot be viewed.
        """
        if type(self._root) is not dict:
            kind = self._root.name if type(self._root) is Inert else type(self._root).__name__
            raise self._error(f"holds no tensors by name, but one value ({kind})")
        wrapped = [name for name in _WRAPPERS if _has_tensors(self._root.get(name))]
        if any(type(value) is Tensor and "." in str(name) for name, value in self._root.items()):
            return self._tensors(self._root)
        if len(wrapped) > 1:
            raise self._error(f"holds tensors under each of {', '.join(wrapped)}, so it is not clear which to take")
        if wrapped:
            return self._tensors(self._root[wrapped[0]])
        if not _has_tensors(self._root):
            names = ", ".join(repr(name)[:80] for name in list(self._root)[:5])
            raise self._error(f"holds no tensors by name; at its top there are {names or 'no entries'}")
        return self._tensors(self._root)

    def nanogpt(self) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
        """Return the tensors of a checkpoint of nanoGPT, and its `model_args`, of which all values are plain.

        Raises:
            CheckpointError: it is none.
        """
        root = self._root if type(self._root) is dict else {}
        model, arguments = root.get("model"), root.get("model_args")
        if type(model) is not dict or not _has_tensors(model) or type(arguments) is not dict:
            raise CheckpointError(
                f"{self._path}: no checkpoint of nanoGPT: `model` (tensors by name) or `model_args` is missing. If it "
                "holds tensors under transformers' names, name it pytorch_model.bin, with its config.json beside it"
            )
        plain = {name: value for name, value in arguments.items() if type(value) in (int, float, bool, str)}
        return self._tensors(model), plain

    def _tensors(self, values: dict[Any, Any]) -> dict[str, StoredTensor]:
        tensors = {}
        total = 0
        for name, value in values.items():
            if type(name) is str and len(name) > _MAX_NAME:
                raise self._error(f"a tensor's name has {len(name)} characters")
            if type(value) is Inert and value.name in TENSORS_OF_OTHER_KINDS:
                raise self._error(f"tensor {name!r} is quantized, sparse or without numbers ({value.name})")
            if type(value) is not Tensor or type(name) is not str:
                continue  # plain values, such as the number of an epoch
            tensors[name] = self._place(value)
            total += math.prod(value.shape) * value.dtype.itemsize
        if total > max(MAX_SHARING * len(self.mapped), _SMALL_BYTES):
            raise self._error(f"its tensors would take {total} bytes, the file has {len(self.mapped)}")
        return tensors

    def _place(self, tensor: Tensor) -> StoredTensor:
        itemsize = tensor.dtype.itemsize
        strides: tuple[int, ...] | None = tensor.strides
        count = math.prod(tensor.shape)
        if count == 0 or _lies_in_order(tensor.shape, tensor.strides):
            strides = None
            span = count
        else:
            span = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))
        start = self._places[tensor.key] + tensor.start
        return StoredTensor(tensor.dtype.name, tensor.shape, start, start + span * itemsize, strides)

    def _error(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self._path}: {what}; save the model's own tensors with torch: torch.save(model.state_dict(), ...)"
        )


def _map(path: Path) -> mmap.mmap:
    """Map a file read-only; raise CheckpointError if that is not possible."""
    try:
        return map_file(path)
    except OSError as reason:
        raise CheckpointError(why_not_read(path, reason)) from None
    except ValueError:
        raise CheckpointError(f"{path}: empty; fetch it again") from None


def _read_zip(mapped: mmap.mmap) -> tuple[Any, dict[str, int]]:
    """Return the value of a file in torch's zip format, and the first byte of each storage."""
    entries = read_directory(mapped)
    pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise BadZip("it has no data.pkl in its one folder")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}constants.pkl" in entries:
        raise BadZip("it is a TorchScript program")
    order = entries.get(f"{folder}byteorder")
    if order is not None and mapped[order.start : min(order.stop, order.start + 8)] != b"little":
        raise BadPickle("it was written on a machine with another byte order")
    pickle = TorchPickle(mapped, *_checked(mapped, entries[pickles[0]]))
    root = pickle.read()
    places = {}
    for key, storage in pickle.storages.items():
        entry = entries.get(f"{folder}data/{key}")
        if entry is None or storage.numel * storage.itemsize > entry.stop - entry.start:
            raise BadZip(f"it lacks numbers of storage {key[:80]!r}")
        places[key] = entry.start
    return root, places


def _checked(mapped: mmap.mmap, entry: ZipEntry) -> tuple[int, int]:
    """Return the range of an entry whose checksum is right. An entry beyond the machine's limit is left to it."""
    start, stop, crc32 = entry
    if crc32 and stop - start <= MAX_PICKLE_BYTES and zlib.crc32(mapped[start:stop]) != crc32:
        raise BadZip("the checksum of its pickle is wrong")
    return start, stop


def _read_old_format(mapped: mmap.mmap) -> tuple[Any, dict[str, int]]:
    """Return the value of a file in the format before torch 1.6, and the first byte of each storage.

    Five pickles follow each other: a number, a version, what machine wrote it, the value, and the keys of the storages.
    Behind them is, for each key, the count of its numbers in 8 bytes, and the numbers.
    """
    at = 0
    values = []
    storages: dict[str, Storage] = {}
    for expected in (_MAGIC_NUMBER, _PROTOCOL_VERSION, None, None, None):
        pickle = TorchPickle(mapped, at, len(mapped))
        values.append(pickle.read())
        if expected is not None and values[-1] != expected:
            raise BadPickle("it is a pickle, but does not begin as torch's do")
        at = pickle.at
        storages.update(pickle.storages)
    _, _, machine, root, keys = values
    if type(machine) is not dict or machine.get("little_endian") is not True:
        raise BadPickle("it was written on a machine with another byte order")
    if type(keys) is not list or not all(type(key) is str for key in keys) or len(set(keys)) < len(keys):
        raise BadPickle("its list of storages is none")
    places = {}
    for key in keys:
        if key not in storages or at + 8 > len(mapped):
            raise BadPickle(f"it lacks numbers of storage {key[:80]!r}")
        (count,) = struct.unpack_from("<q", mapped, at)
        places[key] = at + 8
        at += 8 + storages[key].numel * storages[key].itemsize
        if count != storages[key].numel or at > len(mapped):
            raise BadPickle(f"it lacks numbers of storage {key[:80]!r}")
    if storages.keys() - places.keys():
        raise BadPickle("it lacks numbers of some storages")
    return root, places


def _has_tensors(value: Any) -> bool:
    return type(value) is dict and any(
        type(one) is Tensor or (type(one) is Inert and one.name in TENSORS_OF_OTHER_KINDS) for one in value.values()
    )


def _lies_in_order(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Tell whether a tensor lies in C order without gaps. The stride of a dimension of one has no meaning."""
    expected = 1
    for count, stride in zip(reversed(shape), reversed(strides), strict=True):
        if count != 1 and stride != expected:
            return False
        expected *= count
    return True


def _refusal(path: Path, name: str) -> str:
    """Return what to say of a pickle that names something unknown: nothing of it was run."""
    module, _, function = name.rpartition(".")
    if module.split(".")[0] in _HARMFUL or (module == "builtins" and function in _HARMFUL_BUILTINS):
        return (
            f"its pickle asks to run {name}, as harmful files do and weights never need; nothing of it was run. Do not "
            "open it with anything else: delete it, and take the model from somebody whom you trust"
        )
    return (
        f"its pickle asks for {name}, which is neither a tensor nor a plain value; nothing of it was run. If you trust "
        f"whoever made it, keep its tensors and plain values only, with torch and the package of {name}: "
        f"{_command_to_plain_values(path)}"
    )


def _command_to_plain_values(path: Path) -> str:
    from fastgpt2.engine.model.diagnosis import python_command

    return python_command(_TO_PLAIN_VALUES.format(path=json.dumps(str(path))))


def _what_it_is(path: Path, mapped: mmap.mmap) -> str:
    """Return what to say of a file that torch.save has not written, by how it begins."""
    begin = mapped[:1024]
    if begin.lstrip()[:1] == b"<":
        return "a web page, not weights; fetch the file again, and look at it if it comes again"
    if begin[257:262] == b"ustar":
        return (
            "in the format of torch before 0.2, a tar file. If you trust whoever made it, save it again with torch: "
            f"{_command_to_plain_values(path)}"
        )
    if not begin.strip(b"\0"):
        return "filled with zeros, so the download was not finished; fetch it again"
    if begin[8:9] == b"{":
        return "looks like a safetensors file; name it model.safetensors"
    return "not written by torch.save: neither a zip file nor a pickle; fetch it again"
