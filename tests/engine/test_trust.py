"""What somebody else could have written into the cache does not count; the sentence has the command that mends it."""

from __future__ import annotations

import os
import re
import shlex
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.running import GOLDEN

from fastgpt2.engine import machine, trust
from fastgpt2.engine.figure import Figure
from fastgpt2.engine.loading import load_network, pack_model
from fastgpt2.engine.machine import MEASUREMENTS_FILE, Measurements
from fastgpt2.engine.model.config import read_config
from fastgpt2.engine.network.step import Segment
from fastgpt2.engine.trust import NotTrusted, check_folder, make_folder, open_trusted

MODEL = GOLDEN / "checkpoints" / "masks_misaligned"
STRANGER = 54321
pytestmark = pytest.mark.usefixtures("_measured_once")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the test a cache of its own, for which tiny checkpoints are large enough."""
    monkeypatch.setenv("FASTGPT2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(machine, "MIN_BYTES", 0)
    return tmp_path / "cache"


def load() -> None:
    """Load the model as a worker does; its logits are right."""
    network = load_network(MODEL, read_config(MODEL), "some/model", n_slots=1, size=1, blas="openblas")
    golden = np.load(MODEL / "golden.npz")
    ids = golden["input_ids"].tolist()
    logits = network.forward([Segment(0, ids, len(ids))])
    assert np.abs(logits - golden["logits"]).max() / np.abs(golden["logits"]).max() < 1e-4


def packed_file(cache: Path) -> Path:
    (path,) = cache.glob("*.safetensors")
    return path


def spoil(path: Path, mode: int) -> None:
    """Change a weight as somebody would who may write the file, and leave checksum and time of change as they fit."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(b"\x7f" * 64)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    path.chmod(mode)


def command_of(error: object) -> list[str]:
    """Return the command that a sentence ends with, as a shell would split it."""
    found = re.search(r": (ch(?:mod|own) .*), or set FASTGPT2_CACHE", str(error))
    assert found is not None
    return shlex.split(found[1])


@pytest.mark.parametrize("mode", [0o666, 0o646])
def test_a_packed_file_that_others_may_write_is_made_anew(
    cache: Path, mode: int, caplog: pytest.LogCaptureFixture
) -> None:
    load()
    path = packed_file(cache)
    spoil(path, mode)
    load()
    assert f"{path}: not trusted, since everybody may write it (mode {mode:04o}): chmod go-w {path}" in caplog.text
    assert "; packing anew" in caplog.text
    assert path.stat().st_mode & 0o777 == 0o644 & ~_umask()
    caplog.clear()
    load()
    assert "not trusted" not in caplog.text


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@as_root
def test_a_packed_file_of_somebody_else_s_is_made_anew(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    load()
    path = packed_file(cache)
    spoil(path, 0o644)
    os.chown(path, STRANGER, STRANGER)
    load()
    assert f"{path}: not trusted, since it belongs to the user {STRANGER}" in caplog.text
    assert path.stat().st_uid == 0


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to(MODEL / "model.safetensors")])
def test_what_is_no_file_is_not_opened(
    cache: Path, make: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    load()
    path = packed_file(cache)
    path.unlink()
    make(path)
    load()
    assert f"{path}: not trusted, since it is no file" in caplog.text
    assert path.is_file()
    assert not path.is_symlink()


@pytest.mark.processes
@pytest.mark.parametrize("above", [False, True])
def test_a_folder_that_others_may_write_is_done_without(
    cache: Path, above: bool, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    load()
    spoil(packed_file(cache), 0o644)
    folder = tmp_path if above else cache
    folder.chmod(0o777)
    load()
    assert f"the packed weights are not kept: {folder}: not trusted, since everybody may write it" in caplog.text
    with pytest.raises(NotTrusted) as caught:
        pack_model(MODEL, read_config(MODEL), "some/model", "openblas", "float32", must_keep=True)
    assert caught.value.exit_code == 3
    # The command that it names mends it.
    subprocess.run(command_of(caught.value), check=True)
    check_folder(cache)


@as_root
def test_a_folder_of_somebody_else_s_is_done_without(cache: Path) -> None:
    cache.mkdir()
    os.chown(cache, STRANGER, 0)
    with pytest.raises(NotTrusted, match=f"it belongs to the user {STRANGER}, and this process is the user root"):
        check_folder(cache)
    os.chown(cache, 0, 0)
    check_folder(cache)


def test_others_may_write_into_a_sticky_folder_above(cache: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    check_folder(cache)
    make_folder(cache)
    check_folder(cache)


def test_the_root_of_a_volume_has_whatever_mode(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubernetes makes many that everybody may write."""
    make_folder(cache)
    tmp_path.chmod(0o777)
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path)
    check_folder(cache)


@pytest.mark.processes
@as_root
def test_a_group_counts_by_who_is_in_it(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The group that a volume in Kubernetes belongs to has no other member than the container's one user."""
    cache.mkdir()
    os.chown(cache, 0, STRANGER)
    cache.chmod(0o2775)
    check_folder(cache)
    monkeypatch.setattr(trust, "_other_member", lambda group: "carol" if group == STRANGER else "")
    with pytest.raises(
        NotTrusted, match=f"the group {STRANGER} may write it .*, and the user carol is in that"
    ) as caught:
        check_folder(cache)
    subprocess.run(command_of(caught.value), check=True)
    check_folder(cache)


def test_the_members_of_a_group() -> None:
    import pwd

    others = [user for user in pwd.getpwall() if user.pw_uid not in (0, os.geteuid())]
    assert trust._other_member(STRANGER) == ""
    assert trust._other_member(others[0].pw_gid) in {user.pw_name for user in others}


def test_a_member_of_a_group_is_known_by_name_where_no_list_of_users_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in most networks with a directory of users."""
    import grp
    import pwd

    users = {"carol": pwd.struct_passwd(("carol", "x", STRANGER, STRANGER, "", "/", "/bin/sh"))}
    group = grp.struct_group(("team", "x", 777, ["nobody-knows", "carol"]))
    monkeypatch.setattr(pwd, "getpwall", list)
    monkeypatch.setattr(pwd, "getpwnam", users.__getitem__)
    monkeypatch.setattr(grp, "getgrgid", lambda _group: group)
    assert trust._other_member(777) == "carol"
    monkeypatch.setattr(os, "geteuid", lambda: STRANGER)
    assert trust._other_member(777) == ""


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="access lists as Linux keeps them")
def test_an_access_list_may_let_others_write(cache: Path) -> None:
    """The mode shows its rights as those of the group, in which nobody else is."""
    cache.mkdir()
    anyone = 0xFFFFFFFF
    owner, user, group, mask, others = (
        (1, 7, anyone),
        (2, 7, STRANGER),
        (4, 5, anyone),
        (16, 7, anyone),
        (32, 5, anyone),
    )
    entries = b"".join(struct.pack("<HHI", *entry) for entry in (owner, user, group, mask, others))
    try:
        os.setxattr(cache, trust._ACCESS_LIST, struct.pack("<I", 2) + entries)
    except OSError:
        pytest.skip("the file system has no access lists")
    with pytest.raises(NotTrusted, match=r"its access list may let others write it \(mode 0775\)") as caught:
        check_folder(cache)
    subprocess.run(command_of(caught.value), check=True)
    check_folder(cache)


def test_a_pipe_that_takes_the_name_of_a_file_is_not_trusted(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look at a file and its opening another may have the name."""
    make_folder(cache)
    (cache / "file").touch()
    os.mkfifo(cache / "pipe")
    regular = os.lstat(cache / "file")
    monkeypatch.setattr(os, "lstat", lambda _path: regular)
    with pytest.raises(NotTrusted, match="since it is no file"):
        open_trusted(cache / "pipe")


def test_measurements_are_kept_where_a_process_of_the_same_number_died(cache: Path) -> None:
    """In a container most processes have the number of those before them."""
    make_folder(cache)
    (cache / MEASUREMENTS_FILE).with_suffix(f".{os.getpid()}.tmp").write_text("{")
    Measurements(cache, "here").find_or_measure("width", lambda: Figure(64))
    assert Measurements(cache, "here").find("width") == 64


def test_measurements_that_others_could_have_written_do_not_count(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Measurements(cache, "here").find_or_measure("width", lambda: Figure(64))
    assert Measurements(cache, "here").find("width") == 64
    path = cache / MEASUREMENTS_FILE
    path.chmod(0o666)
    assert Measurements(cache, "here").find("width") is None
    assert f"{path}: not trusted, since everybody may write it (mode 0666): chmod go-w {path}" in caplog.text
    assert Measurements(cache, "here").find_or_measure("width", lambda: Figure(32)) == 32
    assert path.stat().st_mode & 0o022 == 0
    cache.chmod(0o777)
    assert Measurements(cache, "here").find("width") is None


@pytest.mark.parametrize("content", ['{"here": {"width": 1' + "0" * 5000 + "}}", '{"here": {"width": -1}}', "[" * 9999])
def test_measurements_that_are_none_do_not_count(cache: Path, content: str) -> None:
    make_folder(cache)
    (cache / MEASUREMENTS_FILE).write_text(content)
    assert Measurements(cache, "here").find("width") is None


def test_whatever_the_umask_nobody_else_may_write_what_is_made(cache: Path) -> None:
    before = os.umask(0)
    try:
        load()
    finally:
        os.umask(before)
    os.close(open_trusted(packed_file(cache)))
    check_folder(cache)
