"""safetensors files are read without a copy where they allow it, and refused by name where they are wrong."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.running import GOLDEN

from fastgpt2.engine.model.checkpoint import MAX_HEADER_BYTES, Checkpoint
from fastgpt2.engine.model.config import read_config
from fastgpt2.engine.model.state_dict import match_names
from fastgpt2.engine.model.weights import expected_shapes
from fastgpt2.errors import CheckpointError

CHECKPOINTS = GOLDEN / "checkpoints"
DAMAGED = r"model\.safetensors: damaged or not a safetensors file"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a checkpoint of the test's own to spoil."""
    return shutil.copytree(CHECKPOINTS / "odd_heads", tmp_path / "model")


def open_weights(folder: Path) -> Any:
    checkpoint = Checkpoint.open(folder)
    names = match_names(checkpoint, read_config(folder)).names
    return [checkpoint.float32(name) for name in names.values() if name is not None]


def rewrite_header(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the JSON header of a file and leave its data as it is."""
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def rename(old: str, new: str) -> Callable[[dict[str, Any]], object]:
    return lambda header: header.__setitem__(new, header.pop(old))


@pytest.mark.parametrize("case", ["odd_heads", "sharded", "masks_misaligned", "float16", "masks_uint8"])
def test_views_hold_what_the_library_reads(case: str) -> None:
    checkpoint = Checkpoint.open(CHECKPOINTS / case)
    theirs: dict[str, Any] = {}
    for file in (CHECKPOINTS / case).glob("*.safetensors"):
        theirs |= load_file(file)
    assert checkpoint.tensors.keys() == theirs.keys()
    for name, info in checkpoint.tensors.items():
        if info.dtype in ("F32", "F16"):
            np.testing.assert_array_equal(checkpoint.view(name), theirs[name])


def test_aligned_float32_is_never_copied() -> None:
    folder = CHECKPOINTS / "odd_heads"
    checkpoint = Checkpoint.open(folder)
    whole = np.frombuffer(checkpoint._maps[folder / "model.safetensors"], np.uint8)
    for name in checkpoint.tensors:
        for tensor in (checkpoint.float32(name), checkpoint.float32(name, slice(1, 3))):
            assert np.shares_memory(tensor, whole)
            assert not tensor.flags.writeable


def test_a_misaligned_file_is_seen_as_such_and_copied_aligned() -> None:
    checkpoint = Checkpoint.open(CHECKPOINTS / "masks_misaligned")
    view = checkpoint.view("wte.weight")
    assert not view.flags.aligned
    for where in (..., slice(3, 9), (slice(None), slice(2, 5))):
        part = checkpoint.float32("wte.weight", where)
        assert part.flags.aligned
        np.testing.assert_array_equal(part, view[where])


def test_a_view_outlives_its_checkpoint() -> None:
    view = Checkpoint.open(CHECKPOINTS / "prefixed").view("transformer.wte.weight")
    assert np.isfinite(view).all()


def test_every_tensor_that_the_public_gpt2_has_is_expected() -> None:
    shapes = expected_shapes(read_config(CHECKPOINTS / "odd_heads"))
    header = Checkpoint.open(CHECKPOINTS / "odd_heads").tensors
    assert set(shapes) == set(header) | {"lm_head.weight"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.pop("h.1.mlp.c_fc.bias"), DAMAGED),
        (rename("h.1.mlp.c_fc.bias", "h.1.mlp.c_fc.bia"), "c_fc.bias' is missing, and there are 'h.1.mlp.c_fc.bia'"),
        (rename("wte.weight", "h.7.ln_1.weight"), r"tensor 'wte\.weight' is missing; fetch the file again"),
        (rename("h.0.ln_1.bias", "h.0.attn.bias"), r"model\.safetensors: tensor 'h\.0\.ln_1\.bias' is missing"),
        (lambda h: h["wpe.weight"]["shape"].reverse(), r"'wpe.weight' has the shape \[35, 32\]; config.json implies"),
        (lambda h: h["ln_f.bias"].update(dtype="I32"), "'ln_f.bias' is I32; GPT-2 weights are read as F32, F16, BF16"),
        (lambda h: h["ln_f.bias"].update(dtype="NONSENSE"), DAMAGED),
        (lambda h: h["ln_f.bias"].update(shape=[-1]), DAMAGED),
        (lambda h: h["ln_f.bias"].update(shape=[2**62, 2**62]), DAMAGED),
        (lambda h: h["ln_f.bias"].update(data_offsets=[0, 140]), DAMAGED),
        (lambda h: h["ln_f.bias"].update(data_offsets=[2**63, 2**64]), DAMAGED),
        (lambda h: h.update({"x": 1}), DAMAGED),
        (lambda h: h.update({"transformer.wte.weight": h["wte.weight"]}), DAMAGED),
    ],
)  # fmt: skip
def test_a_header_that_does_not_fit_is_refused(folder: Path, change: Callable[[Any], object], message: str) -> None:
    rewrite_header(folder, change)
    with pytest.raises(CheckpointError, match=message):
        open_weights(folder)


def test_a_tensor_that_is_left_out_is_named(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    tensors = load_file(CHECKPOINTS / "odd_heads" / "model.safetensors")
    del tensors["h.1.mlp.c_fc.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(CHECKPOINTS / "odd_heads" / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor 'h\.1\.mlp\.c_fc\.bias' is missing"):
        open_weights(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        b"PK\x03\x04" + bytes(100),
        struct.pack("<Q", 2**64 - 1) + b"{}",
        struct.pack("<Q", 100) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 2) + b"\xff\xff",
        struct.pack("<Q", 100_000) + b"[" * 100_000,
        struct.pack("<Q", 45) + b'{"__metadata__":{"a":"b"},"__metadata__":{}}  ',
    ],
    ids=["empty", "short", "zip", "huge", "truncated", "list", "not-utf8", "deep", "twice"],
)
def test_what_is_no_safetensors_file_is_refused(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: (damaged or )?not a safetensors file"):
        open_weights(folder)


def test_a_truncated_download_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged .* fetch it again"):
        open_weights(folder)


def test_a_header_beyond_the_limit_is_refused_before_it_is_read(folder: Path) -> None:
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER_BYTES + 1))
        file.truncate(2 * MAX_HEADER_BYTES)  # sparse: takes no disk
    with pytest.raises(CheckpointError, match=f"a header at most {MAX_HEADER_BYTES}"):
        open_weights(folder)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is empty; name a folder"):
        Checkpoint.open(tmp_path)


def test_float64_is_read_as_float32(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    numbers = np.array([[1 / 3, 1e300], [-1e300, 2.0]])
    save_file({"a": numbers, "b": numbers > 0}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.float32("a").tolist() == [[np.float32(1 / 3), np.inf], [-np.inf, 2.0]]
    assert checkpoint.view("b").tolist() == [[True, True], [False, True]]
    with pytest.raises(CheckpointError, match="tensor 'b' is BOOL; GPT-2 weights are read as F32, F16, BF16, F64"):
        checkpoint.float32("b")


class TestShards:
    @pytest.fixture
    def sharded(self, tmp_path: Path) -> Path:
        return shutil.copytree(CHECKPOINTS / "sharded", tmp_path / "model")

    def change_index(self, folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    def test_a_missing_shard(self, sharded: Path) -> None:
        shard = min(sharded.glob("model-*.safetensors"))
        shard.unlink()
        with pytest.raises(CheckpointError, match=f"{shard.name}: no such file"):
            open_weights(sharded)

    def test_a_tensor_in_another_shard_than_the_index_says(self, sharded: Path) -> None:
        before = open_weights(sharded)
        last = max(sharded.glob("model-*.safetensors")).name
        self.change_index(sharded, lambda m: m.update({min(m, key=lambda name: m[name]): last}))
        for tensor, same in zip(open_weights(sharded), before, strict=True):
            np.testing.assert_array_equal(tensor, same)

    def test_a_tensor_that_the_index_does_not_list(self, sharded: Path) -> None:
        before = open_weights(sharded)
        self.change_index(sharded, lambda m: m.pop(min(m)))
        for tensor, same in zip(open_weights(sharded), before, strict=True):
            np.testing.assert_array_equal(tensor, same)

    def test_a_tensor_that_two_shards_hold_is_that_of_the_index(self, sharded: Path) -> None:
        from safetensors.numpy import save_file

        index = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
        for shard in set(index.values()):
            tensors = load_file(sharded / shard)
            for name in index:
                tensors.setdefault(name, np.zeros(1, np.float32))
            save_file(tensors, sharded / shard)
        assert all(info.file.name == index[name] for name, info in Checkpoint.open(sharded).tensors.items())

    @pytest.mark.parametrize(
        "name", ["../../etc/passwd", "/etc/passwd", "a/b.safetensors", "..", "x.bin", 3, "a\\b.safetensors"]
    )
    def test_a_path_that_leads_out_of_the_folder(self, sharded: Path, name: object) -> None:
        self.change_index(sharded, lambda m: m.update({min(m): name}))
        with pytest.raises(CheckpointError, match="which is no plain file name"):
            open_weights(sharded)

    @pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', "[" * 100_000])
    def test_a_damaged_index(self, sharded: Path, content: str) -> None:
        (sharded / "model.safetensors.index.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json: "):
            open_weights(sharded)
