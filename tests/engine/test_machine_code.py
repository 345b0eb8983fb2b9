"""Machine code is kept for its user alone, and used without LLVM, if nobody else can have written it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.running import GOLDEN

from fastgpt2 import Engine
from fastgpt2.engine.kernels import machine_code, object_file
from fastgpt2.engine.kernels.ir import Module
from fastgpt2.engine.kernels.machine_code import Compiler, load_code
from fastgpt2.engine.kernels.object_file import NotLinkable, link
from fastgpt2.engine.kernels.program import NativeCall, arguments_of
from fastgpt2.engine.loading import load_network
from fastgpt2.engine.model.config import read_config
from fastgpt2.errors import BadRequest

FOLDER = GOLDEN / "checkpoints" / "odd_heads"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of the user's own cache that code is kept in, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    monkeypatch.setenv("FASTGPT2_CACHE", str(tmp_path / "explicit"))
    monkeypatch.setattr(machine_code, "_loaded", {})
    return tmp_path / "own" / "fastgpt2" / "code"


def write_double(module: Module, *_: object) -> None:
    """Write an operation that doubles a float32."""
    code = module.operation("double")
    (place,) = code.arguments("p")
    code.store(code.load(place) * 2.0, place)
    code.end()


def double(number: float) -> float:
    """Double a number by code that is loaded as if for the first time in this process."""
    machine_code._loaded.clear()
    code = load_code("double", write_double)
    place = np.array([number], np.float32)
    NativeCall([(code.address("double"), arguments_of(place))], None)()
    return float(place[0])


def compiled_how_often(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets an entry whenever something is compiled."""
    times: list[int] = []
    original = Compiler.compile

    def counting(self: Compiler, write: machine_code.Writer) -> bytes:
        times.append(1)
        return original(self, write)

    monkeypatch.setattr(Compiler, "compile", counting)
    return times


def test_code_is_compiled_once_and_kept_for_the_user_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = compiled_how_often(monkeypatch)
    assert [double(1.5), double(2.0), double(-3.0)] == [3.0, 4.0, -6.0]
    assert len(times) == 1
    (file,) = folder.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o022 == 0


def harm_bytes(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def harm_length(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def harm_size(file: Path) -> None:
    file.write_bytes(b"")


def harm_mode(file: Path) -> None:
    file.chmod(0o640)


def harm_folder(file: Path) -> None:
    file.parent.chmod(0o777)


def harm_kind(file: Path) -> None:
    other = file.with_name("elsewhere")
    file.rename(other)
    file.symlink_to(other)


@pytest.mark.parametrize(
    "harm", [harm_bytes, harm_length, harm_size, harm_mode, harm_folder, harm_kind], ids=lambda harm: harm.__name__
)
def test_what_others_could_have_written_is_not_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch, harm: object
) -> None:
    assert double(1.0) == 2.0
    (file,) = folder.iterdir()
    harm(file)  # type: ignore[operator]
    times = compiled_how_often(monkeypatch)
    assert double(4.0) == 8.0
    assert len(times) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_code_of_another_user_is_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert double(1.0) == 2.0
    (file,) = folder.iterdir()
    os.chown(file, 65534, 65534)
    times = compiled_how_often(monkeypatch)
    assert double(4.0) == 8.0
    assert len(times) == 1


def test_code_is_kept_beside_the_weights_if_there_is_no_cache_of_the_users_own(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own").write_text("no folder")
    times = compiled_how_often(monkeypatch)
    assert [double(1.0), double(2.0)] == [2.0, 4.0]
    assert len(times) == 1
    assert len(list((tmp_path / "explicit" / "code").iterdir())) == 1
    assert not folder.exists()


def test_a_cache_from_which_nothing_may_be_run_is_passed_over(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As in a container whose only place to write is a tmpfs without the right to run what is there (noexec).
    original = machine_code._map

    def map_unless_in_folder(fd: int) -> machine_code.MachineCode:
        if any(os.path.samestat(os.fstat(fd), file.stat()) for file in folder.iterdir()):
            os.close(fd)
            raise PermissionError("noexec")
        return original(fd)

    monkeypatch.setattr(machine_code, "_map", map_unless_in_folder)
    times = compiled_how_often(monkeypatch)
    assert [double(1.5), double(2.0)] == [3.0, 4.0]
    assert len(times) == 1
    assert len(list((folder.parents[2] / "explicit" / "code").iterdir())) == 1


def test_without_any_cache_it_is_compiled_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = tmp_path / "nowhere"
    nowhere.write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(nowhere))
    monkeypatch.setenv("FASTGPT2_CACHE", str(nowhere))
    monkeypatch.setattr(machine_code, "_loaded", {})
    assert double(1.0) == 2.0
    (code,) = machine_code._loaded.values()
    assert code.fd is not None  # helpers can map it


def test_what_cannot_be_linked_stays_with_llvm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_data: bytes) -> object:
        raise NotLinkable("a relocation of tomorrow")

    monkeypatch.setattr(object_file, "link", refuse)
    assert [double(1.0), double(2.5)] == [2.0, 5.0]
    assert not folder.exists()


@pytest.mark.parametrize("data", [b"", b"\x7fELF\x01\x01" + bytes(60), b"\x7fELF\x02\x01" + bytes(60)])
def test_what_is_no_object_of_a_known_machine_is_not_linked(data: bytes) -> None:
    with pytest.raises(NotLinkable):
        link(data)


def test_another_cpu_llvm_or_source_has_other_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert double(1.0) == 2.0
    machine_code._surroundings.cache_clear()
    monkeypatch.setattr(machine_code, "_cpu", lambda: "another CPU")
    assert double(1.0) == 2.0
    machine_code._surroundings.cache_clear()
    assert len(list(folder.iterdir())) == 2


def test_nothing_is_kept_where_the_cpu_is_not_known(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_code, "_CPU_FILE", tmp_path / "none")
    times = compiled_how_often(monkeypatch)
    assert [double(1.0), double(2.0)] == [2.0, 4.0]
    assert len(times) == 2
    assert not folder.exists()


def test_old_code_goes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_code, "_MOST_FILES", 2)
    folder.mkdir(parents=True)
    for age in range(5):
        old = folder / f"{age}{machine_code.SUFFIX}"
        old.write_bytes(b"")
        os.utime(old, (1000 - age, 1000 - age))
    assert double(1.0) == 2.0
    assert len(list(folder.iterdir())) == 2
    assert (folder / f"0{machine_code.SUFFIX}").exists()


# Prints whether LLVM was imported, and what a model says.
LOADS = """
import json, sys
from fastgpt2 import Engine
engine = Engine.load("demo", threads=1)
[result] = engine.generate(["I"], max_new_tokens=5)
print(json.dumps([sorted(name for name in sys.modules if name.startswith("llvmlite")), result.token_ids]))
"""


@pytest.mark.processes
def test_a_process_that_finds_the_code_does_not_import_llvm(folder: Path) -> None:
    first, second = (
        json.loads(subprocess.run([sys.executable, "-c", LOADS], capture_output=True, check=True).stdout)
        for _ in range(2)
    )
    assert first[1] == second[1]
    assert first[0]
    assert second[0] == []
    assert folder.exists()


@pytest.mark.processes
@pytest.mark.parametrize("size", [1, 2])
def test_float32_compiled_gives_the_same_tokens(engine: Engine, size: int) -> None:
    prompts = ["Once upon a time", "The king said", "I", "to be or not to be, that is", "O Romeo, Romeo!"]
    compiled = Engine.load("demo", blas="compiled", threads=size, max_batch=4)
    compiled.warm_up()
    assert compiled.describe() == f"compiled-float32 in panels of 16, {size} process{'es' if size > 1 else ''}"
    ours = compiled.generate(prompts, max_new_tokens=60)
    assert [r.token_ids for r in ours] == [r.token_ids for r in engine.generate(prompts, max_new_tokens=60)]


def test_auto_compiles_what_can_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    config = read_config(FOLDER)
    network = load_network(FOLDER, config, "m", n_slots=1, size=1, blas="auto")
    assert network.describe().startswith("compiled-float32 in panels of 16")
    assert network.exact
    monkeypatch.setattr(machine_code, "is_installed", lambda: False)
    without = load_network(FOLDER, config, "m", n_slots=1, size=1, blas="auto")
    assert not without.describe().startswith("compiled")


def test_an_llvmlite_that_cannot_be_used_is_told_and_done_without(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_args: object) -> None:
        raise BadRequest("this llvmlite cannot be used (too old): pip install -U 'fastgpt2[compact]'")

    monkeypatch.setattr(Compiler, "__init__", fail)
    network = load_network(FOLDER, read_config(FOLDER), "m", n_slots=1, size=1, blas="auto")
    assert not network.describe().startswith("compiled")
    assert "pip install -U 'fastgpt2[compact]'" in caplog.text
    with pytest.raises(BadRequest, match="pip install -U"):
        load_network(FOLDER, read_config(FOLDER), "m", n_slots=1, size=1, blas="compiled")
    assert not folder.exists()


@pytest.mark.processes
def test_what_was_packed_is_all_that_a_worker_without_a_cache_of_its_own_needs(tmp_path: Path) -> None:
    """In a container the weights were packed by another one, and nothing can be written."""
    (tmp_path / "no folder").write_text("")
    packing = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "own"), "FASTGPT2_CACHE": str(tmp_path / "volume")}
    command = [sys.executable, "-m", "fastgpt2", "pack", "demo"]
    subprocess.run(command, env=packing, capture_output=True, check=True)
    (tmp_path / "volume" / "code").chmod(0o555)
    working = {**packing, "XDG_CACHE_HOME": str(tmp_path / "no folder")}
    done = subprocess.run([sys.executable, "-c", LOADS], env=working, capture_output=True, check=True)
    imported, token_ids = json.loads(done.stdout)
    assert imported == []
    assert len(token_ids) == 5


# An environment without the extra.
WITHOUT = "import sys; sys.modules['llvmlite'] = None; sys.modules['llvmlite.binding'] = None; "


@pytest.mark.processes
@pytest.mark.parametrize("option", ["--weights=int8", "--weights=bfloat16", "--blas=compiled"])
def test_without_the_extra_it_is_said_what_to_install(folder: Path, option: str) -> None:
    command = [sys.executable, "-c", WITHOUT + "from fastgpt2.cli import run; run()"]
    command += ["generate", "--model", "demo", option, "I"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "pip install 'fastgpt2[compact]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not folder.exists()


def test_unknown_weights() -> None:
    with pytest.raises(BadRequest, match="weights must be one of float32, bfloat16, int8, not 'int4'"):
        Engine.load("demo", weights="int4")
