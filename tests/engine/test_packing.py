"""Packed files are made once, mapped by all, made anew if they do not fit, and done without if they cannot be kept."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file
from support.running import GOLDEN

from fastgpt2.cli import main
from fastgpt2.commands.pack import _tell_figures
from fastgpt2.engine import figure, machine
from fastgpt2.engine.engine import Engine
from fastgpt2.engine.figure import Figure
from fastgpt2.engine.kernels import choice
from fastgpt2.engine.kernels.panels import Layout
from fastgpt2.engine.loading import load_network
from fastgpt2.engine.model import packing
from fastgpt2.engine.model.checkpoint import Checkpoint, weight_files
from fastgpt2.engine.model.config import read_config
from fastgpt2.engine.model.hub import DEMO_FOLDER
from fastgpt2.engine.model.packing import PackedFile, Source, checksum, pack_in_cache, pack_in_memory, pack_path
from fastgpt2.engine.model.weights import expected_shapes
from fastgpt2.engine.network import step_times
from fastgpt2.engine.network.gpt2 import GPT2
from fastgpt2.engine.network.step import Segment
from fastgpt2.engine.network.step_times import ROWS, rows_name
from fastgpt2.errors import CheckpointError

CASES = ["masks_misaligned", "float16", "bfloat16", "tied_with_head", "untied", "sharded", "masks_uint8", "odd_heads"]
CASES += ["own_head", "head_only", "equal_head", "float64", "without_biases", "pickle", "pickle_shards"]
OWN_HEADS = {"untied", "own_head"}
NARROW = Layout("16", lambda _n_in, _n_out: 16)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the test a cache of its own, for which tiny checkpoints are large enough."""
    monkeypatch.setenv("FASTGPT2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(machine, "MIN_BYTES", 0)
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(GOLDEN / "checkpoints" / "masks_misaligned", tmp_path / "model")


def pack(folder: Path, cache: Path) -> PackedFile:
    source = find(folder)
    return pack_in_cache(pack_path(cache, source, NARROW), source, NARROW)


def find(folder: Path) -> Source:
    return Source.find(folder, read_config(folder), "some/model")


def load(folder: Path) -> GPT2:
    return load_network(folder, read_config(folder), "some/model", n_slots=1, size=1, blas="openblas")


def packed_files(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.safetensors"))


def assert_right(folder: Path, network: GPT2) -> None:
    golden = np.load(folder / "golden.npz")
    ids = golden["input_ids"].tolist()
    logits = network.forward([Segment(0, ids, len(ids))])
    assert np.abs(logits - golden["logits"]).max() / np.abs(golden["logits"]).max() < 1e-4


def unpacked(stored: NDArray[Any], shape: tuple[int, ...], transposed: bool) -> NDArray[Any]:
    """Unpack a tensor of the packed file the slow way, and check that nothing else is in it."""
    if stored.ndim < 3:
        assert not stored[shape[0] :].any()
        return stored[: shape[0]]
    n_in, n_out = shape[::-1] if transposed else shape
    whole = np.concatenate(list(stored), axis=1)
    assert whole.shape[0] == n_in
    assert not whole[:, n_out:].any()
    return whole[:, :n_out].T if transposed else whole[:, :n_out]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("in_cache", [True, False])
def test_a_packed_file_holds_the_checkpoint(case: str, in_cache: bool, cache: Path) -> None:
    folder = GOLDEN / "checkpoints" / case
    original, config = Checkpoint.open(folder), read_config(folder)
    packed = pack(folder, cache) if in_cache else pack_in_memory(find(folder), NARROW)
    # A standard file, by the library's judgement.
    stored = load_file(packed_files(cache)[0] if in_cache else f"/proc/self/fd/{packed.fd}")
    head = "lm_head.weight" if case in OWN_HEADS else "wte.weight"
    shapes = {
        name: shape for name, shape in expected_shapes(config).items() if name != "lm_head.weight" or name == head
    }
    assert stored.keys() == shapes.keys()
    for name, shape in shapes.items():
        assert stored[name].dtype == np.float32
        assert stored[name].ndim == (3 if len(shape) == 2 and (name.startswith("h.") or name == head) else len(shape))
        sources = [source for source in (name, f"transformer.{name}") if source in original.tensors]
        if case == "head_only" and name == "wte.weight":
            sources = ["lm_head.weight"]
        expected = original.float32(sources[0]) if sources else np.zeros(shape)
        assert sources or case == "without_biases"
        np.testing.assert_array_equal(unpacked(stored[name], shape, name == head), expected)
    for info in packed.tensors.tensors.values():
        assert info.start % 64 == 0


def test_packed_weights_are_views_on_the_file(folder: Path, cache: Path) -> None:
    packed = pack(folder, cache)
    (path,) = packed_files(cache)
    whole = np.frombuffer(packed.tensors._maps[path], np.uint8)
    for name in packed.tensors.tensors:
        tensor = packed.tensors.float32(name)
        assert np.shares_memory(tensor, whole)
        assert tensor.flags.aligned
        assert not tensor.flags.writeable


def test_a_large_model_is_packed_on_its_first_load_and_measured_once(
    folder: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    assert_right(folder, load(folder))
    (path,) = packed_files(cache)
    before = path.stat()
    assert caplog.text.count("packed ") == 1
    assert caplog.text.count("panels of 20 rows") == 1
    measured = json.loads((cache / "calibration.json").read_text())
    ((machine, known),) = measured.items()
    assert "numpy" in machine
    assert known["width 20"]["value"] in (0, 16, 32, 64)
    assert_right(folder, load(folder))
    assert path.stat() == before
    assert caplog.text.count("packed ") == 1
    assert caplog.text.count("panels of 20 rows") == 1
    assert not list(cache.glob("*.tmp"))


def test_what_a_worker_would_measure_is_measured_with_it(
    cache: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """A worker whose cache is a read-only volume needs these measurements there."""
    caplog.set_level(logging.INFO)
    assert main(["pack", "demo", "--measure-missing", "--threads", "1"]) == 0
    (path,) = packed_files(cache)
    assert capsys.readouterr().out == f"{path}\t{path.stat().st_size}\n"
    assert caplog.text.count("sequences at once pay on this machine") == 1
    before = (cache / "calibration.json").read_text()
    Engine.load("demo", threads=1)
    assert caplog.text.count("sequences at once pay on this machine") == 1
    assert (cache / "calibration.json").read_text() == before
    assert main(["pack", "demo", "--measure-missing", "--threads", "1"]) == 0
    assert (cache / "calibration.json").read_text() == before


def test_all_of_it_is_measured_again_by_the_command(
    cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it was, and although it is not old. Of a busy machine, that is said."""

    def measure_again(spread: float) -> str:
        monkeypatch.setattr(choice, "measure_fastest_width", lambda _kernel, _n_in: Figure(64, spread, 5))
        assert main(["pack", "demo", "--measure", "--threads", "1", "--blas", "openblas"]) == 0
        return capsys.readouterr().err

    def rows(network: GPT2) -> dict[str, Figure]:
        return {rows_name(network, n): Figure(1000 + n, 0.05, 5) for n in ROWS}

    def values(figures: dict[str, Any]) -> dict[str, int]:
        # But for the rows with the same bits, which are asked for of the widths that are taken.
        return {name: fields["value"] for name, fields in figures.items() if " exact " not in name}

    monkeypatch.setattr(step_times, "measure_slots", lambda _network, _most: Figure(32, 0.05, 5))
    monkeypatch.setattr(step_times, "measure_rows", rows)
    assert "too busy" not in measure_again(0.05)
    path = cache / "calibration.json"
    ((cpu, known),) = json.loads(path.read_text()).items()
    wrong = {name: {**fields, "value": fields["value"] // 4} for name, fields in known.items()}
    path.write_text(json.dumps({cpu: wrong}))
    told = measure_again(0.05)
    assert "  width 224: 64 (spread 5%, 5 looks)\n" in told
    ((_, again),) = json.loads(path.read_text()).items()
    assert values(again) == values(known)
    # A busy machine replaces what an old version has left, but not what a calm one has told.
    path.write_text(json.dumps({cpu: {**wrong, "width 224": 16}}))
    told = measure_again(3.0)
    assert f"the machine was too busy for 2 of {len(known)} figures to be trusted (spread over 25%)" in told
    assert ", 1 of which are those that a calm machine told before" in told
    assert "  width 224: 64 (spread 300%, 5 looks)\n" in told
    assert re.search(r"  width 896: 16 \(spread 5%, 5 looks, of \d{4}-\d\d-\d\d\)\n", told)
    ((_, again),) = json.loads(path.read_text()).items()
    assert values(again) == {**values(known), "width 896": 16}


def test_a_figure_that_stays_and_is_doubtful_is_counted_once(capsys: pytest.CaptureFixture[str]) -> None:
    """It stays with one that it belongs together with, which a calm machine told."""
    engine: Any = SimpleNamespace(model="demo", config=read_config(DEMO_FOLDER))
    known = {"x": Figure(1, 0.05, 5, date=1e9), "y": Figure(2, 3.0, 5, date=1e9)}
    assert choice.open_measurements(engine.config).keep(known)
    with figure.measuring_again() as began:
        found = {name: Figure(9, 3.0, 5) for name in known}
        assert choice.open_measurements(engine.config).find_or_measure_all(known, lambda: found) == known
        _tell_figures(engine, began)
    assert "the machine was too busy for 2 of 2 figures to be trusted" in capsys.readouterr().err


def test_of_a_small_model_nothing_is_measured(
    cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "MIN_BYTES", 64 << 20)
    assert main(["pack", "demo", "--measure", "--threads", "1"]) == 0
    assert "demo: a small model, of which nothing is measured" in capsys.readouterr().err
    assert not (cache / "calibration.json").exists()


@pytest.mark.thorough
@pytest.mark.parametrize("spoiled", ["", "{", "[]", '{"x": []}', "[" * 100_000])
@pytest.mark.usefixtures("_measured_once")
def test_a_spoiled_record_of_measurements_is_measured_anew(folder: Path, cache: Path, spoiled: str) -> None:
    load(folder)
    (cache / "calibration.json").write_text(spoiled)
    assert_right(folder, load(folder))
    assert "width 20" in (cache / "calibration.json").read_text()


def test_a_small_model_leaves_nothing_in_the_cache(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "MIN_BYTES", 64 << 20)
    assert_right(folder, load(folder))
    assert not cache.exists()


@pytest.mark.parametrize("keep", [0, 7, 200, -1])
def test_a_truncated_file_is_made_anew(folder: Path, cache: Path, keep: int, caplog: pytest.LogCaptureFixture) -> None:
    pack(folder, cache)
    (path,) = packed_files(cache)
    whole = load_file(path)
    path.write_bytes(path.read_bytes()[:keep])
    pack(folder, cache)
    assert f"{path} is damaged; packing anew" in caplog.text
    for name, tensor in load_file(path).items():
        np.testing.assert_array_equal(tensor, whole[name])


def test_a_changed_byte_is_noticed(folder: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The file is as long as before and as valid, and one weight is another."""
    pack(folder, cache)
    (path,) = packed_files(cache)
    before = load_file(path)
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(struct.pack("<f", 42.0))
    packed = pack(folder, cache)
    assert f"{path} is damaged; packing anew" in caplog.text
    for name, tensor in before.items():
        np.testing.assert_array_equal(packed.tensors.view(name), tensor)


def test_a_copied_file_is_checked_and_taken(folder: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A volume or the layer of an image has the same bytes under another time."""
    pack(folder, cache)
    (path,) = packed_files(cache)
    inode, sealed = path.stat().st_ino, path.stat().st_mtime_ns
    os.utime(path, ns=(1, 1))
    pack(folder, cache)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (inode, sealed)
    assert not caplog.records


def test_the_checksum_is_that_of_the_data(folder: Path, cache: Path) -> None:
    import zlib

    packed = pack(folder, cache)
    raw = packed_files(cache)[0].read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    metadata = json.loads(raw[8 : 8 + length])["__metadata__"]
    assert f"{checksum(packed.fd):08x}" == metadata["crc32"] == f"{zlib.crc32(raw[8 + length :]):08x}"


def test_a_file_of_another_shape_is_made_anew(folder: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    pack(folder, cache)
    (path,) = packed_files(cache)
    pack_in_cache(path, find(folder), Layout("16", lambda _n_in, _n_out: 32))
    assert f"{path} is damaged; packing anew" in caplog.text


def test_a_changed_source_is_noticed(folder: Path, cache: Path) -> None:
    pack(folder, cache)
    source = folder / "model.safetensors"
    raw = bytearray(source.read_bytes())
    raw[-4:] = struct.pack("<f", 42.0)  # the last weight of wte
    source.write_bytes(raw)
    os.utime(source, ns=(1, 1))
    packed = pack(folder, cache)
    assert len(packed_files(cache)) == 2
    rows, _ = Checkpoint.open(folder).view("wte.weight").shape
    panel, column = divmod(rows - 1, 16)
    assert packed.tensors.view("wte.weight")[panel, -1, column] == 42.0


def change_secretly(folder: Path) -> None:
    """Change the weights of all files, and leave their names, sizes and times as they are."""
    tensors = Checkpoint.open(folder).tensors.items()
    for path in weight_files(folder).files:
        before, raw = path.stat(), bytearray(path.read_bytes())
        for name, info in tensors:
            if info.file == path and "attn.bias" not in name:
                numbers = np.frombuffer(raw[info.start : info.stop], {"F32": np.float32, "F16": np.float16}[info.dtype])
                raw[info.start : info.stop] = (numbers * numbers.dtype.type(-1.5)).tobytes()
        path.write_bytes(raw)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


@pytest.mark.parametrize("case", ["prefixed", "sharded", "pickle", "pickle_shards", "nanogpt"])
@pytest.mark.usefixtures("_measured_once")
def test_other_weights_of_the_same_size_and_time_are_noticed(case: str, tmp_path: Path, cache: Path) -> None:
    """`rsync -a` and the layers of an image leave such files."""
    folder = shutil.copytree(GOLDEN / "checkpoints" / case, tmp_path / case)
    assert_right(folder, load(folder))
    change_secretly(folder)
    ids = np.load(folder / "golden.npz")["input_ids"].tolist()
    found = load(folder).forward([Segment(0, ids, len(ids))]).copy()
    fresh = shutil.copytree(folder, tmp_path / "elsewhere")
    np.testing.assert_array_equal(found, load(fresh).forward([Segment(0, ids, len(ids))]))
    assert found.argmax(-1).tolist() != np.load(folder / "golden.npz")["logits"].argmax(-1).tolist()
    assert len(packed_files(cache)) == 3


def test_a_source_that_is_packed_is_not_opened_again(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a pickle holds is read once, and a second table is compared with the first one once."""
    folder = shutil.copytree(GOLDEN / "checkpoints" / "left_out", tmp_path / "left_out")
    notes = pack(folder, cache).notes
    assert len(notes) == 2
    monkeypatch.setattr(Checkpoint, "open", None)
    again = pack(folder, cache)
    assert again.notes == notes
    assert "lm_head.weight" in again.tensors.tensors


@pytest.mark.parametrize("case", ["pickle", "pickle_shards", "nanogpt"])
@pytest.mark.usefixtures("_measured_once")
def test_weights_in_a_pickle_are_kept_even_if_they_are_small(
    case: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "MIN_BYTES", 64 << 20)
    folder = GOLDEN / "checkpoints" / case
    assert_right(folder, load(folder))
    assert len(packed_files(cache)) == 1
    monkeypatch.setattr(Checkpoint, "open", None)
    assert_right(folder, load(folder))


def test_the_packed_file_depends_on_numbers_of_the_configuration(folder: Path, cache: Path) -> None:
    """Without the tie, the output's table would be missing."""
    pack(folder, cache)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "tie_word_embeddings": False}))
    with pytest.raises(CheckpointError, match=r"tensor 'lm_head\.weight' is missing"):
        pack(folder, cache)


def test_code_of_a_models_own_is_told(folder: Path, cache: Path) -> None:
    pack(folder, cache)
    fields = json.loads((folder / "config.json").read_text())
    fields["auto_map"] = {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}
    (folder / "config.json").write_text(json.dumps(fields))
    for _ in range(2):
        (note,) = pack(folder, cache).notes
        assert note.startswith(f'{folder / "config.json"}: auto_map names code of its own for the model, "modeling_x.X')


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_a_weights_file_that_cannot_be_read(folder: Path, kind: str) -> None:
    path = folder / "model.safetensors"
    path.unlink()
    os.mkfifo(path) if kind == "pipe" else path.mkdir()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read \("):
        packing.pack(folder, read_config(folder), "m", NARROW)


def test_what_a_killed_process_left_does_no_harm(folder: Path, cache: Path) -> None:
    pack(folder, cache)
    (path,) = packed_files(cache)
    path.unlink()
    path.with_suffix(".tmp").write_bytes(b"half a file")
    assert path.with_suffix(".lock").exists()
    pack(folder, cache)
    assert packed_files(cache) == [path]
    assert not path.with_suffix(".tmp").exists()


@pytest.mark.usefixtures("_measured_once")
def test_a_cache_that_cannot_be_written_costs_memory_only(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTGPT2_CACHE", str(tmp_path / "file" / "cache"))
    assert_right(folder, load(folder))
    assert "makes panels of them in memory of its own" in caplog.text
    assert "Set FASTGPT2_CACHE to a folder that can be written" in caplog.text


RUN = """
import logging, resource, sys
from pathlib import Path
from fastgpt2.engine import loading, machine
from fastgpt2.engine.model.config import read_config
logging.basicConfig(level="INFO", format="%(message)s")
machine.MIN_BYTES = 0
limit = int(sys.argv[2])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
print("ready", flush=True)
sys.stdin.readline()
folder = Path(sys.argv[1])
config = read_config(folder)
network = loading.load_network(folder, config, "m", n_slots=1, size=1, blas="openblas")
print([line.split()[-1] for line in open("/proc/self/maps") if ".v3.safetensors" in line], flush=True)
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


@pytest.mark.processes
@pytest.mark.usefixtures("_measured_once")
def test_of_many_processes_one_packs_and_all_map_the_same_file(folder: Path, cache: Path) -> None:
    load(folder)  # which layout is best, measured while nobody disturbs: one file in the end
    (path,) = packed_files(cache)
    path.unlink()
    processes = [start(folder) for _ in range(4)]
    outputs = []
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        outputs.append(process.communicate(timeout=60))
        assert process.returncode == 0
    (made,) = packed_files(cache)
    assert sum("packed " in errors for _, errors in outputs) == 1
    for maps, _ in outputs:
        assert maps.strip() == str([str(made)])


@pytest.mark.processes
def test_a_full_disk_is_no_loss(folder: Path, cache: Path) -> None:
    """Files may grow to 40,000 bytes only: the write fails as on a full disk, in the cache and in memory alike."""
    process = start(folder, limit=40_000)
    _, errors = process.communicate("go\n", timeout=60)
    assert "Set FASTGPT2_CACHE to a folder that can be written" in errors
    assert "no memory to hold the weights of m" in errors
    assert not packed_files(cache)
    assert not list(cache.glob("*.tmp"))


@pytest.mark.usefixtures("_measured_once")
def test_a_disk_with_too_little_room_is_known_before_it_is_filled(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The free space is what `statvfs` would say of a small volume; the rest is real."""
    little = shutil.disk_usage(folder)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: little)
    assert_right(folder, load(folder))
    assert "MB are needed and 0 MB are free" in caplog.text
    assert not packed_files(cache)
