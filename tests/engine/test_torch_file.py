"""Files of torch.save are read as torch reads them, and whatever else stands in them is one sentence, never run."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import shlex
import shutil
import struct
import tarfile
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.running import GOLDEN

from fastgpt2.engine.model import torch_pickle
from fastgpt2.engine.model.checkpoint import Checkpoint, weight_files
from fastgpt2.engine.model.config import read_config
from fastgpt2.engine.model.torch_file import MAX_SHARING, TorchFile
from fastgpt2.engine.model.torch_pickle import MAX_MARKS, MAX_OPCODES, MAX_PICKLE_BYTES
from fastgpt2.engine.model.zip_directory import MAX_DIRECTORY_BYTES
from fastgpt2.errors import CheckpointError, ConfigError

FILES = GOLDEN / "torch_files"
NUMBERS = np.arange(6, dtype=np.float32)
STORAGE = b"((X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0000X\3\0\0\0cpuK\6tQ"  # and the mark of a call's arguments


def tensor(
    shape: bytes = b"K\2K\3\x86", strides: bytes = b"K\3K\1\x86", offset: bytes = b"K\0", end: bytes = b""
) -> bytes:
    """Return the opcodes of a tensor on the six numbers of the storage '0'."""
    hooks = b"\x89ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + STORAGE + offset + shape + strides + hooks + end + b"tR"


def state_dict(*entries: bytes) -> bytes:
    """Return a pickle of a dict, of opcodes that come in pairs: key, value, ..."""
    return b"\x80\2}(" + b"".join(entries) + b"u."


def key(name: str) -> bytes:
    return b"X" + struct.pack("<I", len(name)) + name.encode()


def write_zip(
    folder: Path, raw: bytes, entries: dict[str, bytes] | None = None, name: str = "pytorch_model.bin", method: int = 0
) -> Path:
    """Write a file in torch's zip format around a pickle."""
    with zipfile.ZipFile(folder / name, "w", method) as archive:
        archive.writestr("archive/data.pkl", raw)
        for entry, data in ({"data/0": NUMBERS.tobytes()} if entries is None else entries).items():
            archive.writestr(f"archive/{entry}", data)
    return folder


def write_old(
    folder: Path, raw: bytes, keys: Any = ("0",), data: bytes = struct.pack("<q", 6) + NUMBERS.tobytes()
) -> Path:
    """Write a file in torch's old format around a pickle."""
    head = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True, "protocol_version": 1001}]
    parts = [pickle.dumps(part, 2) for part in head]
    (folder / "pytorch_model.bin").write_bytes(b"".join([*parts, raw, pickle.dumps(list(keys), 2), data]))
    return folder


WRITERS = pytest.mark.parametrize("write", [write_zip, write_old])


def refusal(folder: Path, most: int = 16 << 20) -> str:
    """Return the one sentence that a folder is refused with, for which few bytes are taken."""
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as refused:
            Checkpoint.open(folder)
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()
    message = str(refused.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("folder", sorted(FILES.iterdir()), ids=lambda folder: folder.name)
def test_tensors_are_those_that_were_saved(folder: Path) -> None:
    checkpoint, expected = Checkpoint.open(folder), np.load(folder / "expected.npz")
    assert sorted(checkpoint.tensors) == sorted(expected.files)
    for name, info in checkpoint.tensors.items():
        assert info.shape == expected[name].shape
        if info.dtype in ("C64", "F8_E4M3"):
            with pytest.raises(CheckpointError, match="GPT-2 weights are read as F32, F16, BF16, F64"):
                checkpoint.view(name)
            continue
        view = checkpoint.view(name)
        assert view.dtype == expected[name].dtype
        assert not view.flags.writeable
        np.testing.assert_array_equal(view, expected[name])


@pytest.mark.parametrize("folder", sorted(FILES.iterdir()), ids=lambda folder: folder.name)
def test_floating_tensors_become_float32_whole_or_in_part(folder: Path) -> None:
    checkpoint, expected = Checkpoint.open(folder), np.load(folder / "expected.npz")
    for name, info in checkpoint.tensors.items():
        if info.dtype not in ("F32", "F16", "BF16", "F64"):
            continue
        wanted = expected[name]
        with np.errstate(over="ignore"):
            wanted = (wanted.astype(np.uint32) << 16).view(np.float32) if info.dtype == "BF16" else wanted.astype("f4")
        for where in (..., slice(1, 3), (slice(None), slice(1, 3)))[: 1 + len(info.shape)]:
            part = checkpoint.float32(name, where)
            assert part.dtype == np.float32
            assert part.flags.aligned
            assert part.flags.c_contiguous or info.strides is None  # as the packed file is written
            np.testing.assert_array_equal(part, wanted[where])


def test_tensors_that_share_a_storage_are_views_of_the_same_bytes() -> None:
    tensors = Checkpoint.open(FILES / "shared_and_strided").tensors
    table, head, transposed = (tensors[n] for n in ("transformer.wte.weight", "lm_head.weight", "transposed.weight"))
    assert table == head
    assert (transposed.start, transposed.stop, transposed.strides) == (table.start, table.stop, (1, 4))


def test_the_index_decides_where_two_shards_hold_a_tensor_and_unlisted_ones_are_taken() -> None:
    checkpoint = Checkpoint.open(FILES / "shards")
    assert checkpoint.tensors["h.1.weight"].file.name == "pytorch_model-00001-of-00002.bin"
    assert checkpoint.tensors["h.1.attn.bias"].dtype == "BOOL"
    files = weight_files(FILES / "shards")
    assert files.format == "torch"
    assert [file.name[-9:-4] for file in files.files] == ["00002", "00002"]


def test_nanogpts_checkpoint_holds_its_configuration() -> None:
    checkpoint, config = Checkpoint.open(FILES / "nanogpt"), read_config(FILES / "nanogpt")
    assert checkpoint.format == "nanogpt"
    assert "_orig_mod.transformer.h.1.mlp.c_proj.weight" in checkpoint.tensors
    sizes = (config.n_layer, config.n_head, config.n_embd, config.n_positions, config.vocab_size, config.n_inner)
    assert sizes == (2, 2, 8, 16, 65, 32)
    assert (config.activation_function, config.layer_norm_epsilon) == ("gelu", 1e-5)


def test_a_config_json_wins_over_nanogpts_own(tmp_path: Path) -> None:
    shutil.copy(FILES / "nanogpt" / "ckpt.pt", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_embd": 8, "n_head": 2, "vocab_size": 65}')
    assert read_config(tmp_path).activation_function == "gelu_new"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_layer": 0}, r"ckpt\.pt: n_layer is 0; it must be a whole number"),
        ({"block_size": 1 << 40}, r"ckpt\.pt: block_size is 1099511627776; it must be"),
        ({"n_embd": 10, "n_head": 4}, "n_embd 10 is not divisible by n_head 4"),
        ({"vocab_size": "many"}, 'vocab_size is "many"'),
    ],
)
def test_nanogpts_numbers_are_checked(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    plain = pickle.dumps(arguments, 2)[2:-1]
    raw = state_dict(key("model"), b"}", key("wte.weight"), tensor(), b"s", key("model_args"), plain)
    write_zip(tmp_path, raw, name="ckpt.pt")
    with pytest.raises(ConfigError, match=message):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "raw",
    [
        state_dict(key("wte.weight"), tensor()),
        state_dict(key("model"), state_dict(key("wte.weight"), tensor())[2:-1]),
        state_dict(key("model_args"), b"}", key("model"), b"K\1"),
        b"\x80\2N.",
    ],
)
def test_a_ckpt_that_is_not_nanogpts(tmp_path: Path, raw: bytes) -> None:
    write_zip(tmp_path, raw, name="ckpt.pt")
    assert "ckpt.pt: no checkpoint of nanoGPT" in refusal(tmp_path)
    with pytest.raises(CheckpointError, match=r"name it pytorch_model\.bin"):
        read_config(tmp_path)


def test_model_args_that_refer_to_themselves_are_left_out(tmp_path: Path) -> None:
    loop = b"]q\1h\1a"
    raw = state_dict(
        key("model"), b"}", key("wte.weight"), tensor(), b"s", key("model_args"), b"}", key("n_layer"), loop, b"s"
    )
    write_zip(tmp_path, raw, name="ckpt.pt")
    assert read_config(tmp_path).n_layer == 12  # as if it were not there


@WRITERS
@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model", "module"])
def test_a_models_tensors_may_stand_under_a_name(tmp_path: Path, wrapper: str, write: Callable[..., Path]) -> None:
    inner = b"}" + key("wte.weight") + tensor() + b"s"
    checkpoint = Checkpoint.open(write(tmp_path, state_dict(key("epoch"), b"K\3", key(wrapper), inner)))
    np.testing.assert_array_equal(checkpoint.float32("wte.weight"), NUMBERS.reshape(2, 3))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"\x80\2" + tensor() + b".", r"holds no tensors by name, but one value \(Tensor\)"),
        (b"\x80\2](K\1e.", r"but one value \(list\)"),
        (b"\x80\2cargparse\nNamespace\n)\x81.", r"but one value \(argparse.Namespace\)"),
        (state_dict(), "no tensors by name; at its top there are no entries"),
        (state_dict(key("a" * 10_000), b"N"), "at its top there are 'a{79}; save"),
        (state_dict(key("a" * 501), tensor()), "a tensor's name has 501 characters"),
        (state_dict(key("epoch"), b"K\3", key("lr"), b"K\1"), "at its top there are 'epoch', 'lr'"),
        (
            state_dict(
                *(part for name in ("model", "module") for part in (key(name), b"}", key("a.b"), tensor(), b"s"))
            ),
            "holds tensors under each of model, module, so it is not clear which to take",
        ),
        (
            state_dict(key("a.weight"), b"ctorch._utils\n_rebuild_qtensor\n)R"),
            r"tensor 'a\.weight' is quantized, sparse or without numbers \(torch\._utils\._rebuild_qtensor\)",
        ),
    ],
)
def test_what_is_no_state_dict(tmp_path: Path, raw: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(write_zip(tmp_path, raw))


class Calls:
    """An object whose pickle calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.called = (function, arguments)

    def __reduce__(self) -> Any:
        return self.called


@WRITERS
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("function", [os.mkdir, os.system, eval, exec, open, __import__])
def test_nothing_that_a_pickle_names_is_run(
    tmp_path: Path, function: Callable[..., Any], protocol: int, write: Callable[..., Path]
) -> None:
    trap = tmp_path / "trap"
    raw = pickle.dumps({"wte.weight": Calls(function, str(trap))}, protocol)
    message = refusal(write(tmp_path, raw))
    assert "asks to run" in message
    assert "nothing of it was run" in message
    assert not trap.exists()


@WRITERS
def test_a_name_that_is_not_known_is_told_with_a_way_out(tmp_path: Path, write: Callable[..., Path]) -> None:
    message = refusal(write(tmp_path, state_dict(key("config"), b"c__main__\nGPTConfig\n)\x81")))
    assert "asks for __main__.GPTConfig, which is neither a tensor nor a plain value" in message
    assert "python -c 'import torch" in message


def test_the_way_out_is_a_program(tmp_path: Path) -> None:
    message = refusal(write_zip(tmp_path, state_dict(key("config"), b"c__main__\nGPTConfig\n)\x81")))
    compile(message.partition("python -c '")[2].rstrip("'`"), "message", "exec")


def test_the_way_out_runs_nothing_that_a_file_s_name_says(tmp_path: Path) -> None:
    """An index may name a shard so; somebody will paste the command into a shell."""
    path = tmp_path / """a'; touch x; '"; import os; os.abort(); ".bin"""
    write_zip(tmp_path, state_dict(key("config"), b"c__main__\nGPTConfig\n)\x81"), name=path.name)
    with pytest.raises(CheckpointError) as refused:
        TorchFile.open(path)
    command = shlex.split(str(refused.value).rpartition("`python")[2].rstrip("`"))
    assert command[0] == "-c"
    assert len(command) == 2
    (assigned,) = (node for node in ast.parse(command[1]).body[1:2] if isinstance(node, ast.Assign))
    assert ast.literal_eval(assigned.value) == str(path)


def test_what_stands_beside_the_weights_is_inert(tmp_path: Path) -> None:
    from argparse import Namespace
    from collections import Counter, defaultdict

    values = {
        "args": Namespace(lr=1.0, path=Path("x"), text="y"), "set": {1, 2}, "frozen": frozenset({3}), "raw": b"12",
        "array": bytearray(b"34"), "counts": Counter("aab"), "default": defaultdict(list, a=[1]), "complex": 1j,
        "numbers": [2**40, -(2**100), 1.5, True, None, ()], 7: "seven", (1, 2): "pair", 1.5: "real", None: "none",
        "ordered": OrderedDict(a=1), "array of numpy": np.float64(2.5),
    }  # fmt: skip
    for protocol in (2, 3, 4, 5):
        beside = pickle.dumps(values, protocol)
        beside = beside[2 if protocol < 4 else 11 : -1]  # without protocol, frame and stop
        raw = state_dict(key("beside"), beside, key("wte.weight"), tensor())
        assert Checkpoint.open(write_zip(tmp_path, raw)).tensors.keys() == {"wte.weight"}, protocol


def test_a_file_of_python_2_is_read(tmp_path: Path) -> None:
    # Its texts are bytes, and an OrderedDict is a list of pairs.
    raw = b"\x80\2ccollections\nOrderedDict\n](](U\nwte.weight" + tensor() + b"ee\x85R."
    assert Checkpoint.open(write_old(tmp_path, raw)).float32("wte.weight").shape == (2, 3)


def nested(opcode: bytes, count: int) -> bytes:
    return state_dict(key("x"), opcode * count)


@WRITERS
@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b".",
        b"\x80\2",
        b"\x80\x09}.",
        b"\x80\2}(.",
        b"\x80\2}u.",
        b"\x80\2h\0.",
        b"\x80\2r\0\0\0\x80}.",
        b"\x80\2}r\xff\xff\xff\xff.",
        b"\x80\2j\xff\xff\xff\x7f.",
        b"\x80\2R.",
        b"\x80\2K\1)R.",
        b"\x80\2)b.",
        b"\x80\2K\2K\1b.",
        b"\x80\2)K\1a.",
        b"\x80\2(K\1u.",
        b"\x80\2}(K\1u.",
        b"\x80\2}(K\1K\2K\3u.",
        b"\x80\2\x8b\xff\xff\xff\x7f" + b"\1" * 100 + b".",
        b"\x80\2\x8b\xff\xff\xff\xff.",
        b"\x80\2X\xff\xff\xff\xffabc.",
        b"\x80\2X\2\0\0\0\xff\xfe.",
        b"\x80\4\x8e" + struct.pack("<Q", 2**63) + b"abc.",
        b"\x80\4\x8d" + struct.pack("<Q", 2**64 - 1) + b"abc.",
        b"\x80\5\x96" + struct.pack("<Q", 2**62) + b".",
        b"\x80\5\x97.",
        b"\x80\2\x82\1.",
        b"(iposix\nsystem\n.",
        b"(ctorch\nSize\no.",
        b"Pstorage\n.",
        b"I01\n.",
        b"Vtext\n.",
        b"\x80\2c" + b"a" * 1000,
        b"\x80\4K\1K\2\x93.",
        b"\x80\2K\1Q.",
        b"\x80\2X\7\0\0\0storageQ.",
        b"\x80\2(X\6\0\0\0modulectorch\nFloatStorage\nNNtQ.",
        b"\x80\2(X\7\0\0\0storageK\1X\1\0\0\0000X\3\0\0\0cpuK\6tQ.",
        b"\x80\2(X\7\0\0\0storagectorch\nFloatStorage\nK\0X\3\0\0\0cpuK\6tQ.",
        b"\x80\2(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0000X\3\0\0\0cpuJ\xff\xff\xff\xfftQ.",
        b"\x80\2(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0000X\3\0\0\0cpu\x8a\x08\0\0\0\0\0\0\0\x7ftQ.",
        b"\x80\2(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0000X\3\0\0\0cpuK\6(K\0K\0K\0ttQ.",
        b"\x80\2ccollections\nOrderedDict\nK\1\x85R.",
        b"\x80\2ccollections\nOrderedDict\n](K\1e\x85R.",
        b"\x80\2ctorch._tensor\n_rebuild_from_type_v2\nq\0(h\0h\0(h\0h\0))t}tR.",
        b"\x80\2ctorch._utils\n_rebuild_parameter\n(K\1\x89NtR.",
        b"\x80\2ctorch\nFloatStorage\n)R.",
        b"\x80\4cargparse\nNamespace\n)}\x92K\1)}\x92.",
        nested(b"(", MAX_MARKS + 1),
        state_dict(key("a.b"), tensor(shape=b"K\2K\4\x86", strides=b"K\4K\1\x86")),
        state_dict(key("a.b"), tensor(offset=b"K\1")),
        state_dict(key("a.b"), tensor(offset=b"J\xff\xff\xff\xff")),
        state_dict(key("a.b"), tensor(strides=b"J\xff\xff\xff\xffK\1\x86")),
        state_dict(key("a.b"), tensor(strides=b"K\1\x85")),
        state_dict(key("a.b"), tensor(shape=b"(" + b"K\1" * 65 + b"t", strides=b"(" + b"K\1" * 65 + b"t")),
        state_dict(key("a.b"), tensor(shape=b"\x8a\x08\0\0\0\0\0\0\0\x40K\0\x86", strides=b"K\0K\0\x86")),
        state_dict(key("a.b"), tensor(shape=b"G\0\0\0\0\0\0\0\0K\1\x86")),
        state_dict(key("a.b"), tensor(shape=b"\x88\x88\x86")),
        state_dict(key("a.b"), tensor(end=b"}" + key("neg") + b"\x88s")),
        state_dict(key("a.b"), tensor() + b")b"),
    ],
)
def test_a_hostile_or_damaged_pickle_is_one_sentence(tmp_path: Path, raw: bytes, write: Callable[..., Path]) -> None:
    message = refusal(write(tmp_path, raw))
    assert "pytorch_model.bin: damaged, or not written by torch.save (" in message
    assert "fetch it again" in message


@WRITERS
@pytest.mark.parametrize("opcodes", [b"]", b"}", b"(", b"]\x85", b"}N}s", b"\x8f", b"ctorch\nSize\n)\x85R"])
def test_a_pickle_of_too_many_opcodes(
    tmp_path: Path, opcodes: bytes, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_pickle, "MAX_OPCODES", 1 << 13)
    monkeypatch.setattr(torch_pickle, "MAX_MARKS", 1 << 14)
    message = refusal(write(tmp_path, state_dict(key("x"), opcodes * (1 << 13))), most=2 << 20)
    assert "has more than 8192 opcodes" in message


@WRITERS
def test_small_tensors_that_claim_to_be_large_are_refused(tmp_path: Path, write: Callable[..., Path]) -> None:
    side = b"J" + struct.pack("<i", 1 << 20)
    expanded = tensor(shape=side + side + b"\x86", strides=b"K\0K\0\x86")
    assert "its tensors would take 4398046511104 bytes" in refusal(write(tmp_path, state_dict(key("a.b"), expanded)))
    many = b"".join(key(f"h.{i}.weight") + b"h\1" for i in range(MAX_SHARING + 2))
    shared = tensor(shape=b"J" + struct.pack("<i", 1 << 18) + b"\x85", strides=b"K\0\x85")
    raw = state_dict(key("a.b"), shared + b"q\1", many)
    assert "its tensors would take" in refusal(write(tmp_path, raw))


def test_a_pickle_beyond_the_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    text = b"X" + struct.pack("<I", MAX_PICKLE_BYTES) + b"x" * MAX_PICKLE_BYTES
    assert f"has more than {MAX_PICKLE_BYTES} bytes" in refusal(write_zip(tmp_path, b"\x80\2" + text + b"."))


def test_names_that_would_collide_cost_no_time(tmp_path: Path) -> None:
    # Multiples of 2^61 - 1 have the same hash: a dict of them takes time by the square of their number.
    keys = b"".join(
        b"\x8a\x0b" + ((2**61 - 1) * n).to_bytes(11, "little") + b"N" for n in range(1, MAX_OPCODES // 2 - 100)
    )
    raw = state_dict(key("x"), b"}(" + keys + b"u", key("a.b"), tensor())
    assert Checkpoint.open(write_zip(tmp_path, raw)).tensors.keys() == {"a.b"}


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["every_dtype", "every_dtype_old_format"])
def test_a_file_that_ends_too_early_is_refused(tmp_path: Path, name: str) -> None:
    path = Path(shutil.copy(FILES / name / "pytorch_model.bin", tmp_path))
    for stop in reversed(range(path.stat().st_size)):
        os.truncate(path, stop)
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: (empty|damaged|not written by|filled)"):
            Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty; fetch it again"),
        (b"<!DOCTYPE html><html>Not found</html>", "a web page, not weights"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "is a Git LFS pointer.*git lfs pull"),
        (bytes(4096), "filled with zeros, so the download was not finished"),
        (b"weights", "not written by torch.save: neither a zip file nor a pickle"),
        (struct.pack("<Q", 2) + b"{}", "looks like a safetensors file; name it model.safetensors"),
        (pickle.dumps({"a": 1}, 4), "it is a pickle, but does not begin as torch's do"),
        (b"PK\5\6" + bytes(18), "not written by torch.save"),
    ],
)
def test_what_torch_has_not_written_is_told(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"pytorch_model\.bin: .*{message}"):
        Checkpoint.open(tmp_path)


def test_the_oldest_format_is_told(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "pytorch_model.bin", "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    assert "in the format of torch before 0.2, a tar file" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "ckpt.pt"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, name: str, make: Callable[[Path], None]) -> None:
    make(tmp_path / name)
    assert f"{name}: a folder, pipe or device" in refusal(tmp_path)
    make(tmp_path / "config.json")
    with pytest.raises(ConfigError, match=r"config\.json: a folder, pipe or device"):
        read_config(tmp_path)


class TestZip:
    """The zip file around the pickle is trusted as little."""

    RAW = state_dict(key("wte.weight"), tensor())

    def change(self, folder: Path, change: Callable[[bytearray], object]) -> str:
        path = folder / "pytorch_model.bin"
        data = bytearray(path.read_bytes())
        change(data)
        path.write_bytes(data)
        return refusal(folder)

    def test_it_is_read(self, tmp_path: Path) -> None:
        np.testing.assert_array_equal(
            Checkpoint.open(write_zip(tmp_path, self.RAW)).view("wte.weight"), NUMBERS.reshape(2, 3)
        )

    def test_compressed_entries(self, tmp_path: Path) -> None:
        assert "'archive/data.pkl' is compressed" in refusal(write_zip(tmp_path, self.RAW, method=zipfile.ZIP_DEFLATED))

    def test_a_bomb_is_not_inflated(self, tmp_path: Path) -> None:
        entries = {"data/0": bytes(64 << 20)}
        assert "compressed" in refusal(write_zip(tmp_path, self.RAW, entries, method=zipfile.ZIP_DEFLATED))

    @pytest.mark.filterwarnings("ignore:Duplicate name")
    def test_a_name_that_occurs_twice(self, tmp_path: Path) -> None:
        write_zip(tmp_path, self.RAW)
        with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "a") as archive:
            archive.writestr("archive/data.pkl", self.RAW)
        assert "two of its entries are named 'archive/data.pkl'" in refusal(tmp_path)

    def test_a_storage_that_is_missing_or_short(self, tmp_path: Path) -> None:
        assert "lacks numbers of storage '0'" in refusal(write_zip(tmp_path, self.RAW, {}))
        assert "lacks numbers of storage '0'" in refusal(write_zip(tmp_path, self.RAW, {"data/0": bytes(23)}))

    def test_another_byte_order(self, tmp_path: Path) -> None:
        entries = {"data/0": NUMBERS.tobytes(), "byteorder": b"big"}
        assert "another byte order" in refusal(write_zip(tmp_path, self.RAW, entries))

    def test_a_program_of_torchscript(self, tmp_path: Path) -> None:
        entries = {"data/0": NUMBERS.tobytes(), "constants.pkl": b"\x80\2)."}
        assert "it is a TorchScript program" in refusal(write_zip(tmp_path, self.RAW, entries))

    def test_a_zip_file_of_something_else(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as archive:
            archive.writestr("readme.txt", "no weights")
        assert "has no data.pkl" in refusal(tmp_path)

    def test_a_changed_pickle(self, tmp_path: Path) -> None:
        write_zip(tmp_path, self.RAW)
        assert "checksum of its pickle is wrong" in self.change(
            tmp_path, lambda data: data.__setitem__(data.index(b"K\2K\3") + 1, 1)
        )

    @pytest.mark.parametrize(
        ("magic", "offset", "value", "message"),
        [
            (b"PK\1\2", 24, b"\xfe\xff\xff\x7f", "is compressed or encrypted"),  # two sizes that differ
            (b"PK\1\2", 20, b"\xf0\xff\xff\x7f" * 2, "not where its directory says"),
            (b"PK\1\2", 42, b"\xf0\xff\xff\x7f", "not where its directory says"),
            (b"PK\1\2", 42, b"\1", "not where its directory says"),
            (b"PK\1\2", 8, b"\1", "is compressed or encrypted"),
            (b"PK\1\2", 28, b"\xff\xff", "not where its directory says"),
            (b"PK\5\6", 12, b"\xff\xff\xff\xff", "its directory cannot be read"),
            (b"PK\5\6", 16, b"\xff\xff\xff\xff", "not where its directory says"),
            (b"PK\5\6", 16, b"\0\0\0\0", "not where its directory says"),
        ],
    )
    def test_numbers_that_lead_out_of_the_file(
        self, tmp_path: Path, magic: bytes, offset: int, value: bytes, message: str
    ) -> None:
        write_zip(tmp_path, self.RAW)

        def change(data: bytearray) -> None:
            at = data.index(magic) + offset
            data[at : at + len(value)] = value

        assert message in self.change(tmp_path, change)

    @pytest.mark.parametrize(
        ("offset", "value"),
        [
            (6, b"\xff"),  # a version of the format that is not known
            (8, b"\0\10"),  # a name in UTF-8, which it is not
            (30, b"\5"),  # a field beside the name, which is none
        ],
    )
    def test_whatever_the_standard_library_cannot_read(self, tmp_path: Path, offset: int, value: bytes) -> None:
        write_zip(tmp_path, self.RAW)

        def change(data: bytearray) -> None:
            at = data.index(b"PK\1\2")
            data[at + 46] = 0xFF
            data[at + offset : at + offset + len(value)] = value

        assert "its directory cannot be read" in self.change(tmp_path, change)

    def test_a_directory_beyond_the_limit_is_refused_before_it_is_read(self, tmp_path: Path) -> None:
        write_zip(tmp_path, self.RAW, {"data/0": bytes(MAX_DIRECTORY_BYTES)})
        size = MAX_DIRECTORY_BYTES + 1
        assert f"it has {size} bytes, and may have at most {MAX_DIRECTORY_BYTES}" in self.change(
            tmp_path, lambda data: struct.pack_into("<L", data, data.index(b"PK\5\6") + 12, size)
        )

    def test_an_entry_that_reaches_into_the_directory(self, tmp_path: Path) -> None:
        write_zip(tmp_path, self.RAW)

        def enlarge(data: bytearray) -> None:
            struct.pack_into("<LL", data, data.rindex(b"PK\1\2") + 20, NUMBERS.nbytes + 1, NUMBERS.nbytes + 1)

        assert "an entry is not where its directory says" in self.change(tmp_path, enlarge)

    def test_entries_that_overlap(self, tmp_path: Path) -> None:
        write_zip(tmp_path, self.RAW)

        def enlarge(data: bytearray) -> None:
            at = data.index(b"PK\1\2") + 20
            struct.pack_into("<LL", data, at, len(self.RAW) + 20, len(self.RAW) + 20)

        assert "two of its entries overlap" in self.change(tmp_path, enlarge)

    def test_the_wide_form_for_large_files(self, tmp_path: Path) -> None:
        write_zip(tmp_path, self.RAW)
        path = tmp_path / "pytorch_model.bin"
        data = path.read_bytes()
        at = data.index(b"PK\5\6")
        count, size, start = struct.unpack_from("<HLL", data, at + 10)
        end64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, start)
        locator = struct.pack("<4sLQL", b"PK\6\7", 0, at, 1)
        end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
        path.write_bytes(data[:at] + end64 + locator + end)
        assert Checkpoint.open(tmp_path).view("wte.weight").shape == (2, 3)
        for damaged in (
            end64.replace(b"PK\6\6", b"PK\6\0") + locator,
            end64[:40] + struct.pack("<Q", 1 << 62) + end64[48:] + locator,
            end64[:48] + struct.pack("<Q", 1 << 62) + locator,
            end64 + locator[:16] + b"\2\0\0\0",  # a file on two disks
        ):
            path.write_bytes(data[:at] + damaged + end)
            assert "damaged, or not written by torch.save (" in refusal(tmp_path)


class TestOldFormat:
    """The old format's storages follow each other, each behind the count of its numbers."""

    RAW = TestZip.RAW

    def test_it_is_read(self, tmp_path: Path) -> None:
        np.testing.assert_array_equal(
            Checkpoint.open(write_old(tmp_path, self.RAW)).view("wte.weight"), NUMBERS.reshape(2, 3)
        )

    def test_a_part_of_a_storage(self, tmp_path: Path) -> None:
        part = STORAGE[:-2] + b"(X\1\0\0\0001K\2K\4ttQ"
        raw = state_dict(
            key("a.b"), b"ctorch._utils\n_rebuild_tensor\n" + part + b"K\1K\3\x85K\1\x85tR", key("a.c"), tensor()
        )
        np.testing.assert_array_equal(Checkpoint.open(write_old(tmp_path, raw)).view("a.b"), NUMBERS[3:6])

    @pytest.mark.parametrize(
        ("keys", "data"),
        [
            ((), b""),
            (("0", "0"), struct.pack("<q", 6) + NUMBERS.tobytes()),
            (("1",), struct.pack("<q", 6) + NUMBERS.tobytes()),
            ((0,), struct.pack("<q", 6) + NUMBERS.tobytes()),
            (("0",), b"\6\0\0"),
            (("0",), struct.pack("<q", 7) + NUMBERS.tobytes() + bytes(4)),
            (("0",), struct.pack("<q", -1) + NUMBERS.tobytes()),
            (("0",), struct.pack("<q", 6) + NUMBERS.tobytes()[:-1]),
        ],
    )
    def test_storages_that_are_not_there(self, tmp_path: Path, keys: Any, data: bytes) -> None:
        assert "damaged, or not written by torch.save (it" in refusal(write_old(tmp_path, self.RAW, keys, data))


class TestShards:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return shutil.copytree(FILES / "shards", tmp_path / "model")

    def test_a_missing_shard(self, folder: Path) -> None:
        (folder / "pytorch_model-00002-of-00002.bin").unlink()
        assert "pytorch_model-00002-of-00002.bin: no such file" in refusal(folder)

    @pytest.mark.parametrize("name", ["../x.bin", "/x.bin", "x.safetensors", "x", 3, None, "a\\b.bin", ".."])
    def test_a_shard_that_is_no_plain_name(self, folder: Path, name: object) -> None:
        path = folder / "pytorch_model.bin.index.json"
        index = json.loads(path.read_text())
        index["weight_map"]["h.0.weight"] = name
        path.write_text(json.dumps(index))
        assert "which is no plain file name" in refusal(folder)


def test_safetensors_are_preferred_then_one_file_then_shards(tmp_path: Path) -> None:
    shutil.copy(FILES / "nanogpt" / "ckpt.pt", tmp_path)
    assert weight_files(tmp_path).format == "nanogpt"
    index = '{"weight_map": {"a": "b.bin"}}'
    (tmp_path / "pytorch_model.bin.index.json").write_text(index)
    assert weight_files(tmp_path).files == (tmp_path / "b.bin",)
    (tmp_path / "pytorch_model.bin").touch()
    assert weight_files(tmp_path).files == (tmp_path / "pytorch_model.bin",)
    (tmp_path / "model.safetensors.index.json").write_text(index.replace("bin", "safetensors"))
    assert weight_files(tmp_path).files == (tmp_path / "b.safetensors",)
    (tmp_path / "model.safetensors").touch()
    assert weight_files(tmp_path) == type(weight_files(tmp_path))("safetensors", (tmp_path / "model.safetensors",), {})
