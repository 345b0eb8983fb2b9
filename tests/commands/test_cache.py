"""`fastgpt2 pack` makes a file when asked; `fastgpt2 cache` lists what is there, and removes only what may go."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from support.running import GOLDEN

from fastgpt2.cli import main
from fastgpt2.commands import pack as pack_command
from fastgpt2.engine.machine import is_locked, locked
from fastgpt2.engine.model import packing

Start = Callable[..., subprocess.Popen[str]]

OLD = "old-model-0123456789abcdef.v1"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTGPT2_CACHE", str(tmp_path / "cache"))
    # The tiny checkpoints have none of their own, and pack opens what a worker will open.
    monkeypatch.setenv("FASTGPT2_TOKENIZER", "demo")
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(GOLDEN / "checkpoints" / "float16", tmp_path / "model")


@pytest.fixture
def start() -> Iterator[Start]:
    """Return a function that starts Python code as a process, killed at the end, and waits for its first line."""
    started: list[subprocess.Popen[str]] = []

    def run(code: str, *arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, *map(str, arguments)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "ready"
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def pack(capsys: pytest.CaptureFixture[str], *arguments: object) -> Path:
    """Run `fastgpt2 pack`, and return the path that it prints."""
    capsys.readouterr()
    assert main(["pack", *map(str, arguments)]) == 0
    path, size = capsys.readouterr().out.removesuffix("\n").split("\t")
    assert Path(path).stat().st_size == int(size)
    return Path(path)


def listed(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    """Return what `fastgpt2 cache --json` says, by file name."""
    capsys.readouterr()
    assert main(["cache", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["bytes"] == sum(file["bytes"] for file in value["files"])
    return {Path(file["path"]).name: file for file in value["files"]}


def states(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    return {name: file["state"] for name, file in listed(capsys).items()}


def prune(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["cache", "prune", "--json", *options]) == 0
    value: dict[str, Any] = json.loads(capsys.readouterr().out)
    return value


def names(files: list[dict[str, Any]]) -> list[str]:
    return [Path(file["path"]).name for file in files]


def in_cache(cache: Path) -> set[str]:
    """Return the names of the files; compiled code lies in a folder of its own."""
    return {path.name for path in cache.iterdir() if path.is_file()}


def flip_last_byte(path: Path, keep_time: bool) -> None:
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte ^ 0x40]))
    if keep_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


class TestPack:
    def test_it_is_made_once_and_by_either_name(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = pack(capsys, folder)
        before = path.stat()
        assert pack(capsys, "--model", folder) == path
        assert pack(capsys, folder, "--verify") == path
        after = path.stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)

    def test_the_variable_names_the_model_too(
        self, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("FASTGPT2_MODEL", "no such model")
        assert main(["pack"]) == 3
        path = pack(capsys, folder)  # the argument wins
        monkeypatch.setenv("FASTGPT2_MODEL", str(folder))
        assert pack(capsys) == path

    def test_verify_finds_what_the_time_of_change_does_not_tell(
        self, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = pack(capsys, folder)
        whole = path.read_bytes()
        flip_last_byte(path, keep_time=True)
        assert states(capsys) == {path.name: "ok"}  # a listing does not read every file to its end
        assert pack(capsys, folder).read_bytes() != whole
        assert main(["pack", str(folder), "--verify"]) == 0
        assert f"{path} is damaged; packing anew" in capsys.readouterr().err
        assert data(path) == data(whole)

    def test_a_disk_that_keeps_nothing_is_named(
        self, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pack_command, "_is_intact", lambda _packed: False)
        assert main(["pack", str(folder), "--verify"]) == 3
        assert "reads otherwise than it was written a moment ago" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            ([str(GOLDEN)], 3, "holds no config.json and no weights"),
            (["no such model"], 3, "no such folder, nor a hub id"),
            ([""], 2, "--model is empty"),
            (["demo", "--model", "demo"], 2, "model is given twice"),
        ],
    )
    def test_mistakes_get_a_sentence(
        self, arguments: list[str], code: int, message: str, cache: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["pack", *arguments]) == code
        done = capsys.readouterr()
        assert (done.out, message in done.err) == ("", True)
        assert not cache.exists()

    def test_a_cache_that_cannot_be_written(
        self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("FASTGPT2_CACHE", str(tmp_path / "file" / "cache"))
        assert main(["pack", str(folder)]) == 3
        assert "cannot be kept" in capsys.readouterr().err


def data(file: Path | bytes) -> bytes:
    """Return a packed file without its header, which holds the time of packing."""
    raw = file.read_bytes() if isinstance(file, Path) else file
    return raw[8 + struct.unpack("<Q", raw[:8])[0] :]


class TestList:
    def test_what_is_said_of_a_file(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = pack(capsys, folder)
        file = listed(capsys)[path.name]
        changed, used = (datetime.fromisoformat(file.pop(name)) for name in ("changed", "used"))
        assert abs(changed.timestamp() - time.time()) < 60
        assert abs(used.timestamp() - time.time()) < 60
        layout = path.name.split(".")[0].rpartition("-")[2]
        assert file == {
            "path": str(path),
            "state": "ok",
            "model": str(folder),
            "layout": layout,
            "format": packing.FORMAT,
            "bytes": path.stat().st_size,
        }
        assert main(["cache"]) == 0
        head, row, total = capsys.readouterr().out.splitlines()
        assert head.split() == ["MODEL", "LAYOUT", "SIZE", "CHANGED", "USED", "STATE", "FILE"]
        assert row.startswith(f"{folder}  {layout} ")
        assert row.endswith(f"ok     {path}")
        assert total == f"1 file, {path.stat().st_size / 1e6:.1f} MB"

    def test_looking_is_no_use(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = pack(capsys, folder)
        os.utime(path, ns=(10**18, path.stat().st_mtime_ns))
        for _ in range(2):
            assert listed(capsys)[path.name]["used"].startswith("2001-09-09")

    @pytest.mark.parametrize("made", [False, True])
    def test_an_empty_cache(self, made: bool, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
        if made:
            cache.mkdir()
        assert listed(capsys) == {}
        assert main(["cache"]) == 0
        assert capsys.readouterr().out == f"nothing in {cache}\n"
        assert main(["cache", "prune"]) == 0
        assert capsys.readouterr().out == f"nothing to remove in {cache}\n"
        assert cache.exists() == made

    @pytest.mark.parametrize("below", ["", "cache"])
    @pytest.mark.parametrize("action", ["list", "prune"])
    def test_a_folder_that_cannot_be_read(
        self,
        below: str,
        action: str,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("FASTGPT2_CACHE", str(tmp_path / "file" / below))
        assert main(["cache", action]) == 1
        assert f"the cache {tmp_path / 'file' / below} cannot be read (Not a directory)" in capsys.readouterr().err

    def test_options_of_prune_are_not_ignored(self, capsys: pytest.CaptureFixture[str]) -> None:
        for option in ("--all", "--dry-run"):
            assert main(["cache", option]) == 2
            assert "are for `fastgpt2 cache prune`" in capsys.readouterr().err

    def test_a_name_that_a_terminal_would_obey(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        pack(capsys, folder.rename(folder.with_name("\x1b[2Jmodel")))
        assert main(["cache"]) == 0
        text = capsys.readouterr().out
        assert "?[2Jmodel" in text
        assert "\x1b" not in text


class TestStates:
    @pytest.mark.parametrize("keep", [0, 7, 8, 200, -1])
    def test_truncated(self, keep: int, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = pack(capsys, folder)
        before = path.stat()
        path.write_bytes(path.read_bytes()[:keep])
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert states(capsys) == {path.name: "damaged"}
        assert names(prune(capsys)["removed"]) == [path.name]
        assert not path.exists()

    def test_damaged(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = pack(capsys, folder)
        flip_last_byte(path, keep_time=False)
        assert states(capsys) == {path.name: "damaged"}
        assert names(prune(capsys)["removed"]) == [path.name]

    def test_a_copy_is_not_damaged(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = pack(capsys, folder)
        os.utime(path)
        assert states(capsys) == {path.name: "ok"}

    @pytest.mark.parametrize(
        "header", [b"{}", b"[]", b"7", b'{"__metadata__": {}}', b'{"__metadata__": [], "a": 1}', b"[" * 9999]
    )
    def test_a_header_of_nonsense(self, header: bytes, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
        cache.mkdir()
        name = f"m-0123456789abcdef-64.v{packing.FORMAT}.safetensors"
        (cache / name).write_bytes(struct.pack("<Q", len(header)) + header)
        assert states(capsys) == {name: "damaged"}

    @pytest.mark.parametrize("source", ["7", "[7]", "[" * 9999, "1" * 9999])
    def test_a_source_of_nonsense(self, source: str, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
        cache.mkdir()
        metadata = {"source": source, "source_identity": "0123456789abcdef", "crc32": "00000000"}
        header = json.dumps({"__metadata__": metadata, "a": {"data_offsets": [0, 0]}}).encode()
        name = f"m-0123456789abcdef-64.v{packing.FORMAT}.safetensors"
        (cache / name).write_bytes(struct.pack("<Q", len(header)) + header)
        assert states(capsys) == {name: "damaged"}

    def test_under_another_files_name(self, folder: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = pack(capsys, folder)
        name = f"m-0123456789abcdef-64.v{packing.FORMAT}.safetensors"
        path.rename(cache / name)
        assert states(capsys)[name] == "damaged"

    def test_source_changed(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = pack(capsys, folder)
        os.utime(folder / "model.safetensors", ns=(1, 1))
        assert states(capsys) == {path.name: "source changed"}
        again = pack(capsys, folder)
        assert states(capsys) == {path.name: "source changed", again.name: "ok"}
        assert names(prune(capsys)["removed"]) == [path.name]
        assert pack(capsys, folder) == again

    def test_source_changed_under_the_same_time(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = pack(capsys, folder)
        flip_last_byte(folder / "model.safetensors", keep_time=True)
        assert states(capsys) == {path.name: "source changed"}

    def test_source_gone(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = pack(capsys, folder)
        shutil.rmtree(folder)
        assert states(capsys) == {path.name: "source gone"}
        assert names(prune(capsys)["removed"]) == [path.name]

    def test_a_source_that_gives_no_answer_is_kept(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = pack(capsys, folder)
        source = folder / "model.safetensors"
        source.unlink()
        source.symlink_to(source)
        assert states(capsys) == {path.name: "unreadable"}
        assert prune(capsys)["removed"] == []

    @pytest.mark.parametrize("case", ["sharded", "float16"])
    def test_a_snapshot_of_the_hub(self, case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """A snapshot's files are links to blobs, whose order is not that of the shards."""
        blobs = tmp_path / "models--a--b" / "blobs"
        snapshot = tmp_path / "models--a--b" / "snapshots" / ("5" * 40)
        blobs.mkdir(parents=True)
        snapshot.mkdir(parents=True)
        files = sorted((GOLDEN / "checkpoints" / case).glob("*"), reverse=True)
        for number, file in enumerate(files):
            shutil.copy(file, blobs / f"{number:064x}")
            (snapshot / file.name).symlink_to(f"../../blobs/{number:064x}")
        path = pack(capsys, snapshot)
        assert states(capsys) == {path.name: "ok"}
        weights = next(snapshot.glob("*.safetensors")).resolve()
        os.utime(weights, ns=(1, 1))
        assert states(capsys) == {path.name: "source changed"}
        weights.unlink()
        assert states(capsys) == {path.name: "source gone"}

    def test_other_formats(self, folder: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = pack(capsys, folder)
        newer = path.name.replace(f".v{packing.FORMAT}.", f".v{packing.FORMAT + 1}.")
        shutil.copy(path, cache / newer)
        (cache / f"{OLD}.safetensors").write_bytes(b"x" * 1000)
        (cache / f"{OLD}.lock").touch()
        assert states(capsys) == {
            path.name: "ok",
            newer: "newer format",
            f"{OLD}.safetensors": "outdated format",
        }
        assert listed(capsys)[f"{OLD}.safetensors"]["model"] == "old-model"
        value = prune(capsys)
        assert (names(value["removed"]), value["freed_bytes"]) == ([f"{OLD}.safetensors"], 1000)
        assert in_cache(cache) == {path.name, path.with_suffix(".lock").name, newer}

    def test_leftovers(self, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
        cache.mkdir()
        leftovers = ["a-0123456789abcdef-64.v2.lock", "calibration.7.tmp", "calibration.lock", f"{OLD}.tmp"]
        for name in (*leftovers, f"{OLD}.lock"):
            (cache / name).touch()
        (cache / "calibration.8.tmp").touch()  # may be written right now
        os.utime(cache / "calibration.7.tmp", (1, 1))
        assert states(capsys) == dict.fromkeys(leftovers, "leftover")
        assert names(prune(capsys)["removed"]) == leftovers
        assert in_cache(cache) == {"calibration.8.tmp"}


class TestPrune:
    def test_dry_run_removes_nothing(self, folder: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = pack(capsys, folder)
        shutil.rmtree(folder)
        path.with_suffix(".lock").unlink()
        assert main(["cache", "prune", "--dry-run"]) == 0
        size = f"{path.stat().st_size / 1e6:.1f} MB"
        assert capsys.readouterr().out == f"would remove {path} (source gone, {size})\nwould free {size}\n"
        assert in_cache(cache) == {path.name}
        assert main(["cache", "prune"]) == 0
        assert capsys.readouterr().out == f"removed {path} (source gone, {size})\nfreed {size}\n"
        assert in_cache(cache) == set()

    def test_what_is_of_use_stays_unless_all_is_to_go(
        self, folder: Path, cache: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = pack(capsys, folder)
        (cache / "calibration.json").write_text("{}")
        (cache / "calibration.lock").touch()
        before = in_cache(cache)
        assert prune(capsys)["removed"] == []
        assert prune(capsys, "--dry-run", "--all")["freed_bytes"] == path.stat().st_size + 2
        assert in_cache(cache) == before
        assert set(names(prune(capsys, "--all")["removed"])) == {path.name, "calibration.json"}
        assert in_cache(cache) == set()

    def test_other_files_folders_and_links_are_none_of_its_business(
        self, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        outside = tmp_path / "outside"
        outside.write_text("precious")
        cache.mkdir()
        (cache / f"{OLD}.safetensors").symlink_to(outside)
        (cache / "calibration.json").symlink_to(outside)
        (cache / "b-0123456789abcdef.v1.safetensors").mkdir()
        for name in ("model.safetensors", "mine.v1.safetensors", "notes.tmp", "calibration.json.bak"):
            (cache / name).write_text("mine")
        before = in_cache(cache)
        assert listed(capsys) == {}
        assert prune(capsys, "--all")["removed"] == []
        assert in_cache(cache) == before
        assert outside.read_text() == "precious"

    @pytest.mark.parametrize("hindrance", ["folder", "link"])
    def test_a_lock_that_cannot_be_taken(
        self, hindrance: str, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        outside = tmp_path / "outside"
        outside.write_text("precious")
        cache.mkdir()
        (cache / f"{OLD}.safetensors").touch()
        lock = cache / f"{OLD}.lock"
        lock.mkdir() if hindrance == "folder" else lock.symlink_to(outside)
        assert main(["cache", "prune"]) == 1
        assert f"{cache / OLD}.safetensors cannot be removed (" in capsys.readouterr().err
        assert (cache / f"{OLD}.safetensors").exists()
        assert outside.read_text() == "precious"

    @pytest.mark.processes
    def test_a_file_in_use_stays_usable(self, start: Start, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = pack(capsys, "demo")
        entry = json.loads((GOLDEN / "demo_continuations.json").read_text("utf-8"))["continuations"][0]
        process = start(USE, entry["prompt"])
        assert str(path) in Path(f"/proc/{process.pid}/maps").read_text()
        assert names(prune(capsys, "--all")["removed"]) == [path.name]
        assert in_cache(cache) == set()
        out, _ = process.communicate("\n", timeout=60)
        assert json.loads(out) == entry["ids"][:20]


USE = """
import json, sys
from fastgpt2 import Engine
engine = Engine.load("demo", threads=1)
print("ready", flush=True)
sys.stdin.readline()
print(json.dumps(engine.generate(sys.argv[1], max_new_tokens=20, ignore_eos=True).token_ids))
"""

# Stands still with the whole file written, and not yet renamed.
SLOW_PACK = """
import os, sys
from fastgpt2.cli import main
def fsync(fd):
    print("ready", flush=True)
    sys.stdin.readline()
os.fsync = fsync
sys.exit(main(["pack", sys.argv[1]]))
"""


class TestLocks:
    @pytest.mark.processes
    def test_a_file_that_is_being_packed(
        self, start: Start, folder: Path, cache: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        process = start(SLOW_PACK, folder)
        (temporary,) = cache.glob("*.tmp")
        before = in_cache(cache)
        for options in ([], ["--all"], ["--dry-run"]):
            assert states(capsys) == {temporary.name: "being packed"}
            value = prune(capsys, *options)
            assert (value["removed"], names(value["kept"])) == ([], [temporary.name])
            assert in_cache(cache) == before
        assert main(["cache", "prune"]) == 0
        done = capsys.readouterr()
        assert done.out == f"nothing to remove in {cache}\n"
        assert done.err == f"kept {temporary}: it is being packed\n"
        out, _ = process.communicate("\n", timeout=60)
        assert process.returncode == 0
        assert states(capsys) == {Path(out.split("\t")[0]).name: "ok"}

    @pytest.mark.processes
    def test_what_a_killed_process_left(
        self, start: Start, folder: Path, cache: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        process = start(SLOW_PACK, folder)
        process.kill()
        process.wait()
        (temporary,) = cache.glob("*.tmp")
        assert states(capsys) == {temporary.name: "leftover"}
        value = prune(capsys)
        assert names(value["removed"]) == [temporary.name]
        assert value["freed_bytes"] > 100_000
        assert in_cache(cache) == set()

    @pytest.mark.processes
    def test_a_damaged_file_that_is_being_made_anew(
        self, start: Start, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = pack(capsys, folder)
        flip_last_byte(path, keep_time=False)
        process = start(SLOW_PACK, folder)
        assert set(states(capsys).values()) == {"being packed"}
        assert prune(capsys)["removed"] == []
        process.communicate("\n", timeout=60)
        assert states(capsys) == {path.name: "ok"}
        assert prune(capsys)["removed"] == []

    @pytest.mark.processes
    def test_whoever_waits_for_a_lock_that_is_removed_gets_the_next(self, start: Start, tmp_path: Path) -> None:
        path = tmp_path / "lock"
        with locked(path):
            process = start(HOLD, path)
            time.sleep(0.2)  # it waits by now
            path.unlink()
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "held"
        assert path.exists()
        assert is_locked(path)
        with pytest.raises(BlockingIOError), locked(path, wait=False):
            pass
        process.communicate("\n", timeout=60)
        assert not is_locked(path)
        with locked(path, wait=False):
            pass


HOLD = """
import sys
from pathlib import Path
from fastgpt2.engine.machine import locked
print("ready", flush=True)
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""
