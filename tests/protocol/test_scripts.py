"""Lua scripts on a real Redis: by their digests where it knows them, by their texts where it does not, or must not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import NoScriptError, ResponseError

import fastgpt2
from fastgpt2 import Client
from fastgpt2.protocol.connection import connect
from fastgpt2.protocol.keys import TOTALS_TTL_SECONDS, totals_key
from fastgpt2.protocol.scripts import Script, execute
from fastgpt2.system.redis_server import RedisServer
from fastgpt2.worker import ledger

PACKAGE = Path(fastgpt2.__file__).parent
FILES = sorted(PACKAGE.rglob("*.lua"))
COUNT_ONE = Script(ledger.__file__, "count_one")


@pytest.fixture
def echo(tmp_path: Path) -> Script:
    """A script that Redis has never seen: each test has it at a path of its own, which is part of its text."""
    (tmp_path / "twice.lua").write_text("local function twice(text) return text .. text end\n")
    (tmp_path / "echo.lua").write_text(f"-- {tmp_path}\n-- include twice\nreturn {{twice(ARGV[1]), '$JOB_PREFIX'}}\n")
    return Script(str(tmp_path / "module.py"), "echo")


@pytest.fixture
def url_without_evalsha(redis: Redis, redis_server: RedisServer, queue_name: str) -> Iterator[str]:
    """A user of Redis as earlier releases of deploy/redis.acl had them: they may send texts only."""
    redis.acl_setuser(
        queue_name, True, passwords=["+secret"], commands=["+@all", "-evalsha"], keys=["*"], channels=["*"]
    )
    yield redis_server.url.replace("redis://", f"redis://{queue_name}:secret@")
    redis.acl_deluser(queue_name)


def known(redis: Redis, script: Script) -> bool:
    (exists,) = redis.script_exists(script.digest)
    return bool(exists)


def test_the_text_is_sent_once(redis: Redis, echo: Script) -> None:
    assert not known(redis, echo)
    assert echo.run(redis, [], ["a"]) == [b"aa", b"rq:job:"]
    assert known(redis, echo)
    assert echo.run(redis, [], ["b"]) == [b"bb", b"rq:job:"]


def test_a_redis_that_forgot_its_scripts_learns_them_again(redis: Redis, echo: Script) -> None:
    echo.run(redis, [], ["a"])
    redis.script_flush()
    with pytest.raises(NoScriptError):
        redis.evalsha(echo.digest, 0, "a")
    assert echo.run(redis, [], ["a"]) == [b"aa", b"rq:job:"]


def test_a_pipeline_keeps_the_order_of_its_replies(redis: Redis, echo: Script, queue_name: str) -> None:
    """Two scripts, one of them unknown to Redis, run between other commands."""
    totals = totals_key(queue_name)
    COUNT_ONE.run(redis, [totals], ["a"])
    for _ in range(2):
        with redis.pipeline(transaction=False) as pipeline:
            echo.add(pipeline, [], ["a"])
            pipeline.hget(totals, "a")
            echo.add(pipeline, [], ["b"])
            pipeline.lpush(totals, "x")
            COUNT_ONE.add(pipeline, [totals], ["b"])
            first, count, second, error, nothing = execute(pipeline)
        assert (first[0], count, second[0], nothing) == (b"aa", b"1", b"bb", None)
        assert isinstance(error, ResponseError)
    assert redis.hget(totals, "b") == b"2"
    assert TOTALS_TTL_SECONDS - 60 < redis.ttl(totals) <= TOTALS_TTL_SECONDS


def test_a_transaction_needs_no_second_try(redis: Redis, echo: Script, queue_name: str) -> None:
    with redis.pipeline() as pipeline:
        pipeline.set(queue_name, "x", ex=60)
        echo.add_to_transaction(pipeline, [], ["a"])
        assert pipeline.execute() == [True, [b"aa", b"rq:job:"]]


def test_an_error_of_the_script_is_raised(redis: Redis, queue_name: str, tmp_path: Path) -> None:
    redis.set(queue_name, "x", ex=60)
    (tmp_path / "length.lua").write_text("return redis.call('LLEN', KEYS[1])\n")
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        Script(str(tmp_path / "module.py"), "length").run(redis, [queue_name], [])


def test_a_user_who_may_send_texts_only(redis: Redis, echo: Script, url_without_evalsha: str) -> None:
    with connect(url_without_evalsha) as connection:
        for known_before in (False, True):
            assert known(redis, echo) == known_before
            assert echo.run(connection, [], ["a"]) == [b"aa", b"rq:job:"]
            with connection.pipeline(transaction=False) as pipeline:
                echo.add(pipeline, [], ["a"])
                echo.add(pipeline, [], ["b"])
                replies: Any = execute(pipeline)
            assert [reply[0] for reply in replies] == [b"aa", b"bb"]


def test_a_worker_and_a_client_who_may_send_texts_only(url_without_evalsha: str, queue_name: str) -> None:
    environment = {**os.environ, "FASTGPT2_REDIS_URL": url_without_evalsha, "FASTGPT2_QUEUE": queue_name}
    command = [sys.executable, "-m", "fastgpt2", "worker", "--burst", "--model", "demo"]
    with Client(url_without_evalsha, queue_name) as client:
        jobs = [client.enqueue("a", max_new_tokens=3) for _ in range(3)]
        subprocess.run(command, env=environment, check=True, timeout=60, capture_output=True)
        assert [job.result(timeout=5).usage.completion_tokens for job in jobs] == [3, 3, 3]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_file_says_what_it_takes_and_is_used(path: Path) -> None:
    head = []
    for line in path.read_text("utf-8").splitlines():
        if not line.startswith("--"):
            break
        head.append(line)
    assert head
    sources = [source.read_text("utf-8") for source in path.parent.glob("*.py")]
    if any(f'Script(__file__, "{path.stem}")' in source for source in sources):
        assert re.search(r"^-- KEYS", "\n".join(head), re.MULTILINE)
        assert re.search(r"^-- ARGV", "\n".join(head), re.MULTILINE)
        Script(str(path), path.stem)  # all names that it mentions are there
    else:
        assert any(f"-- include {path.stem}\n" in other.read_text("utf-8") for other in FILES)
