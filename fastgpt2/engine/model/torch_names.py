"""The names that stand in the pickles of torch.save, and the records that they become.

A record is all that a name becomes: nothing is imported. The names are those of torch's `weights_only` list that a
state dict can have, and some that stand beside the weights in checkpoints of training.
"""

from __future__ import annotations

from dataclasses import dataclass


class UnknownName(ValueError):
    """Raised if a pickle names something that the machine does not know.

    Attributes:
        name: module and name, with a dot between them.
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"its pickle names {name}")
        self.name = name


@dataclass(frozen=True, slots=True)
class DType:
    """The type of a tensor's numbers: its name, as safetensors has it, and the bytes of one number."""

    name: str
    itemsize: int


@dataclass(frozen=True, slots=True)
class Inert:
    """The place of a value of which nothing is kept but the name of what it is."""

    name: str


@dataclass(frozen=True, slots=True)
class Function:
    """A function that the machine itself has."""

    name: str


@dataclass(frozen=True, slots=True)
class StorageType:
    """The type of a storage's numbers; None if they are bytes, of whatever type the tensors on them have."""

    dtype: DType | None


Name = DType | StorageType | Function | Inert


_DTYPES = {
    "float64": DType("F64", 8), "float32": DType("F32", 4), "float16": DType("F16", 2), "bfloat16": DType("BF16", 2),
    "float8_e4m3fn": DType("F8_E4M3", 1), "float8_e5m2": DType("F8_E5M2", 1),
    "complex64": DType("C64", 8), "complex128": DType("C128", 16), "bool": DType("BOOL", 1),
    "uint8": DType("U8", 1), "uint16": DType("U16", 2), "uint32": DType("U32", 4), "uint64": DType("U64", 8),
    "int8": DType("I8", 1), "int16": DType("I16", 2), "int32": DType("I32", 4), "int64": DType("I64", 8),
}  # fmt: skip

_STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "ComplexFloatStorage": "complex64", "ComplexDoubleStorage": "complex128", "BoolStorage": "bool",
    "ByteStorage": "uint8", "CharStorage": "int8", "ShortStorage": "int16", "IntStorage": "int32",
    "LongStorage": "int64",
}  # fmt: skip

# The modules that have had storages, in one version of torch or another.
_STORAGE_MODULES = frozenset({"torch", "torch.cuda", "torch.storage"})

_OLD_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # Python 2's names

# Functions that make tensors of kinds which have no plain numbers in one storage.
TENSORS_OF_OTHER_KINDS = frozenset(
    f"torch._utils.{name}"
    for name in (
        "_rebuild_qtensor", "_rebuild_sparse_tensor", "_rebuild_meta_tensor_no_storage", "_rebuild_nested_tensor",
        "_rebuild_wrapper_subclass", "_rebuild_device_tensor_from_numpy", "_rebuild_device_tensor_from_cpu_tensor",
        "_rebuild_xla_tensor",
    )
)  # fmt: skip

# What may stand beside the weights: of these only the name is kept, whatever is done with them.
_INERT = TENSORS_OF_OTHER_KINDS | {
    "torch.device", "torch.Tensor", "torch.nn.parameter.Parameter", "torch.serialization._get_layout", "torch.strided",
    "torch.per_tensor_affine", "torch.per_tensor_symmetric", "torch.per_channel_affine",
    "torch.per_channel_symmetric", "torch.per_channel_affine_float_qparams",
    "builtins.set", "builtins.frozenset", "builtins.complex", "builtins.bytearray", "builtins.bytes", "builtins.dict",
    "builtins.list", "builtins.tuple", "builtins.int", "builtins.float", "builtins.str", "builtins.bool",
    "builtins.object", "builtins.slice", "builtins.range", "_codecs.encode", "copyreg._reconstructor",
    "collections.Counter", "collections.defaultdict", "collections.deque", "argparse.Namespace",
    "types.SimpleNamespace", "datetime.datetime", "datetime.date", "datetime.timedelta", "datetime.timezone",
    *(
        f"{module}.{name}"
        for module in ("pathlib", "pathlib._local")
        for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    ),
    "numpy.dtype", "numpy.ndarray",
    *(
        f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")
    ),
    "pytorch_lightning.utilities.parsing.AttributeDict", "lightning_fabric.utilities.data.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict", "lightning.pytorch.utilities.parsing.AttributeDict",
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
}  # fmt: skip

# What a pickle may call. `TorchPickle` has these itself.
_FUNCTIONS = frozenset(
    {
        "collections.OrderedDict", "torch.Size", "torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3", "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_parameter_with_state", "torch._tensor._rebuild_from_type_v2",
    }
)  # fmt: skip


def look_up(module: str, name: str) -> Name:
    """Return the record that stands for a name; raise UnknownName if it is none of those that the machine knows."""
    module = _OLD_MODULES.get(module, module)
    full = f"{module}.{name}"
    if module in _STORAGE_MODULES and name in _STORAGES:
        return StorageType(_DTYPES[_STORAGES[name]])
    if module in _STORAGE_MODULES and name == "UntypedStorage":
        return StorageType(None)
    if module == "torch" and name in _DTYPES:
        return _DTYPES[name]
    if full in _FUNCTIONS:
        return Function(full)
    if full in _INERT:
        return Inert(full)
    raise UnknownName(full)
