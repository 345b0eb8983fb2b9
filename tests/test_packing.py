"""Packed weights: made once, mapped by all, made anew when they do not fit, done without when they cannot be kept."""

from __future__ import annotations

import logging
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN
from safetensors.numpy import load_file

from fastgpt2.engine import packing
from fastgpt2.engine.checkpoint import Checkpoint
from fastgpt2.engine.config import read_config
from fastgpt2.engine.kv_cache import KVCache
from fastgpt2.engine.packing import shareable
from fastgpt2.engine.transformer import GPT2, Segment
from fastgpt2.engine.weights import expected_shapes, read_weights

CASES = ["masks_misaligned", "float16", "bfloat16", "tied_with_head", "untied", "sharded", "masks_uint8"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, and tiny checkpoints large enough for it."""
    monkeypatch.setenv("FASTGPT2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packing, "MIN_BYTES", 0)
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(GOLDEN / "checkpoints" / "masks_misaligned", tmp_path / "model")


def share(folder: Path) -> Checkpoint:
    return shareable(Checkpoint.open(folder), read_config(folder / "config.json"), "some/model")


def packed_files(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.safetensors"))


def right_logits(folder: Path, checkpoint: Checkpoint) -> bool:
    config = read_config(folder / "config.json")
    golden = np.load(folder / "golden.npz")
    ids = golden["input_ids"].tolist()
    logits = GPT2(config, read_weights(checkpoint, config)).forward([Segment(0, ids, len(ids))], KVCache(config, 1))
    return bool(np.abs(logits - golden["logits"]).max() / np.abs(golden["logits"]).max() < 1e-4)


@pytest.mark.parametrize("case", CASES)
def test_a_packed_model_computes_the_same(case: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = GOLDEN / "checkpoints" / case
    # Also those that would be mapped as they lie.
    original = Checkpoint.open(folder)
    monkeypatch.setattr(packing, "all", lambda _flags: False, raising=False)
    packed = share(folder)
    assert right_logits(folder, packed)
    (path,) = packed_files(cache)
    config = read_config(folder / "config.json")
    stored = load_file(path)  # a standard file, by the library's judgement
    head = set() if not config.tie_word_embeddings else {"lm_head.weight"}
    assert set(stored) == set(expected_shapes(config)) - head
    for name, tensor in stored.items():
        source = name if name in original.tensors else f"transformer.{name}"
        assert tensor.dtype == np.float32
        np.testing.assert_array_equal(tensor, original.float32(source))
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert (8 + length) % 64 == 0


def test_packed_weights_are_views_on_the_file(folder: Path, cache: Path) -> None:
    packed = share(folder)
    (path,) = packed_files(cache)
    whole = np.frombuffer(packed._maps[path], np.uint8)
    weights = read_weights(packed, read_config(folder / "config.json"))
    for tensor in (weights.wte, weights.blocks[1].c_fc.weight, weights.ln_f.bias):
        assert np.shares_memory(tensor, whole)
        assert tensor.flags.aligned
        assert not tensor.flags.writeable


def test_an_aligned_float32_file_and_a_small_one_are_used_as_they_lie(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    share(GOLDEN / "checkpoints" / "prefixed")
    monkeypatch.setattr(packing, "MIN_BYTES", 64 << 20)
    share(folder)
    assert not cache.exists()


def test_it_is_made_once(folder: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    share(folder)
    (path,) = packed_files(cache)
    before = path.stat()
    share(folder)
    assert path.stat() == before
    assert caplog.text.count("packed ") == 1
    assert not list(cache.glob("*.tmp"))


@pytest.mark.parametrize("keep", [0, 7, 200, -1])
def test_a_damaged_file_is_made_anew(folder: Path, cache: Path, keep: int, caplog: pytest.LogCaptureFixture) -> None:
    share(folder)
    (path,) = packed_files(cache)
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    assert right_logits(folder, share(folder))
    assert path.read_bytes() == whole
    assert f"{path} is damaged; packing anew" in caplog.text


def test_a_changed_source_is_noticed(folder: Path, cache: Path) -> None:
    share(folder)
    source = folder / "model.safetensors"
    raw = bytearray(source.read_bytes())
    raw[-4:] = struct.pack("<f", 42.0)  # the last weight of wte
    source.write_bytes(raw)
    os.utime(source, ns=(1, 1))
    checkpoint = share(folder)
    assert len(packed_files(cache)) == 2
    assert checkpoint.view("wte.weight")[-1, -1] == 42.0


def test_what_a_killed_process_left_does_no_harm(folder: Path, cache: Path) -> None:
    share(folder)
    (path,) = packed_files(cache)
    path.unlink()
    path.with_suffix(".tmp").write_bytes(b"half a file")
    assert path.with_suffix(".lock").exists()
    assert right_logits(folder, share(folder))
    assert not path.with_suffix(".tmp").exists()


def test_a_cache_that_cannot_be_written_costs_memory_only(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTGPT2_CACHE", str(tmp_path / "file" / "cache"))
    assert right_logits(folder, share(folder))
    assert "MB of memory of its own, as every other will. Set FASTGPT2_CACHE" in caplog.text


RUN = """
import logging, resource, sys
from pathlib import Path
from fastgpt2.engine import packing
from fastgpt2.engine.checkpoint import Checkpoint
from fastgpt2.engine.config import read_config
logging.basicConfig(level="INFO", format="%(message)s")
packing.MIN_BYTES = 0
limit = int(sys.argv[2])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
print("ready", flush=True)
sys.stdin.readline()
folder = Path(sys.argv[1])
checkpoint = packing.shareable(Checkpoint.open(folder), read_config(folder / "config.json"), "m")
print([line.split()[-1] for line in open("/proc/self/maps") if ".safetensors" in line], flush=True)
"""


def start(folder: Path, limit: int = 0) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(folder), str(limit)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_of_many_processes_one_packs_and_all_map_the_same_file(folder: Path, cache: Path) -> None:
    processes = [start(folder) for _ in range(4)]
    outputs = []
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        outputs.append(process.communicate(timeout=60))
        assert process.returncode == 0
    (path,) = packed_files(cache)
    assert sum("packed " in errors for _, errors in outputs) == 1
    for maps, _ in outputs:
        assert maps.strip() == str([str(path)])


def test_a_full_disk_costs_memory_only(folder: Path, cache: Path) -> None:
    """The file may grow to 1,000 bytes only: the write fails as on a full disk."""
    out, errors = start(folder, limit=1000).communicate("go\n", timeout=60)
    assert "Set FASTGPT2_CACHE to a folder that can be written" in errors
    assert "Traceback" not in errors
    assert str(folder / "model.safetensors") in out
    assert not packed_files(cache)
    assert not list(cache.glob("*.tmp"))
