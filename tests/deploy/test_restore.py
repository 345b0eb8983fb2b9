"""A backup of Redis, as docs/operations.md makes it, becomes a Redis again whose jobs run."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.compose import ROOT
from support.programs import find_program
from support.redis_process import OpenRedis
from support.turns import take_turns

from fastgpt2 import Client, Engine
from fastgpt2.protocol.connection import connect
from fastgpt2.system.redis_server import RedisServer, find_server

pytestmark = pytest.mark.processes

SCRIPT = ROOT / "deploy" / "restore-redis.sh"
PROMPT = "My name is"


def restore(dump: Path, folder: Path, programs: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", SCRIPT, dump, folder],
        env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PATH with the server that the tests use."""
    server, folder = find_server(), tmp_path_factory.mktemp("programs")
    (folder / server.name).symlink_to(server)
    return folder


@dataclass(frozen=True)
class Backup:
    """A dump of a Redis in which two jobs wait; what each key held; the jobs."""

    dump: Path
    saved: dict[bytes, Any]
    jobs: list[str]


@pytest.fixture(scope="module")
def backup(tmp_path_factory: pytest.TempPathFactory) -> Backup:
    dump = tmp_path_factory.mktemp("backup") / "dump.rdb"
    # Redis waits five seconds otherwise: another replica may come.
    with OpenRedis("--repl-diskless-sync-delay", "0") as server, Client(server.url) as client:
        jobs = [client.enqueue(PROMPT, priority=name, max_new_tokens=3).id for name in ("normal", "high")]
        command = [find_program("redis-cli"), "-u", server.url, "--rdb", str(dump)]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        return Backup(dump, contents(server), jobs)


def contents(server: RedisServer) -> dict[bytes, Any]:
    """Return what each key holds."""
    redis: Any = connect(server.url)
    read = {
        b"hash": redis.hgetall,
        b"list": lambda key: redis.lrange(key, 0, -1),
        b"set": redis.smembers,
        b"string": redis.get,
    }
    found = {key: read[redis.type(key)](key) for key in redis.scan_iter()}
    redis.close()
    return found


def test_what_was_saved_is_there_again_and_its_jobs_run(
    backup: Backup, programs: Path, tmp_path: Path, engine: Engine
) -> None:
    done = restore(backup.dump, tmp_path, programs)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{tmp_path}: {len(backup.saved)} keys restored\n"
    assert [path.name for path in tmp_path.iterdir()] == ["appendonlydir"]
    with RedisServer(folder=tmp_path) as server, Client(server.url) as client:
        assert contents(server) == backup.saved
        with take_turns(engine, server, client.queue_name) as turns:
            turns.until(lambda: {client.status(job) for job in backup.jobs} == {"finished"}, "the jobs to finish")
        assert [client.result(job, timeout=10).usage.completion_tokens for job in backup.jobs] == [3, 3]
    again = restore(backup.dump, tmp_path, programs)
    assert again.returncode == 1
    assert f"{tmp_path}/appendonlydir is there already: move it away first" in again.stderr


def test_what_is_no_backup_is_refused_and_leaves_nothing(backup: Backup, programs: Path, tmp_path: Path) -> None:
    whole = backup.dump.read_bytes()
    for content, sentence in (
        (b"*2\r\n$6\r\nSELECT", "is no dump of a Redis (redis-cli --rdb)"),
        (whole[: len(whole) // 2], "the dump cannot be loaded"),
    ):
        (tmp_path / "dump").write_bytes(content)
        done = restore(tmp_path / "dump", tmp_path / "folder", programs)
        assert done.returncode == 1
        assert sentence in done.stderr
        assert not (tmp_path / "folder").exists() or not list((tmp_path / "folder").iterdir())
    assert restore(tmp_path / "missing", tmp_path / "folder", programs).returncode == 1
