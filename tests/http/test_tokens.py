"""Tests of named tokens: their file, their limits over several endpoints, what is counted, and SIGHUP."""

from __future__ import annotations

import hashlib
import os
import pty
import signal
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from starlette.testclient import TestClient
from support.running import StartEndpoint, hang_up, jobs_held, wait_until

from fastgpt2 import Client
from fastgpt2.api.client.enqueue import idempotency_keys
from fastgpt2.api.http.app import create_app
from fastgpt2.api.http.service import Bounds
from fastgpt2.api.http.tokens import Token, Tokens, read_file
from fastgpt2.errors import BadRequest
from fastgpt2.protocol.keys import account_jobs_key, account_key, token_totals_key
from fastgpt2.system.redis_server import RedisServer
from fastgpt2.system.up import System

ALICE, BOB = "correct-horse-battery-staple", "0123456789abcdef#:="


def digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def hashed(token: str) -> str:
    return f"sha256:{digest(token).hex()}"


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


# --- The file ---


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (f"{ALICE}", [Token(digest(ALICE))]),
        (f"\ufeff{ALICE}\r\n\r\n", [Token(digest(ALICE))]),
        (f"# mine\n\n  {ALICE}   # its only one\n", [Token(digest(ALICE))]),
        (f"alice:{ALICE}", [Token(digest(ALICE), "alice")]),
        (
            f"# é is no fault here\r\nalice:{ALICE} waiting=3\r\n\tb@x.y:{hashed(BOB)}\ttokens_per_minute=500  #x\r\n",
            [Token(digest(ALICE), "alice", 3), Token(digest(BOB), "b@x.y", None, 500)],
        ),
        (
            f"a:{hashed(ALICE).upper()} tokens_per_minute=1000000000 waiting=1000000\rb:{BOB}\r",
            [Token(digest(ALICE), "a", 10**6, 10**9), Token(digest(BOB), "b")],
        ),
    ],
)
def test_what_a_file_may_hold(content: str, expected: list[Token], tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(content, "utf-8", newline="")
    assert read_file(str(file)) == expected
    tokens = Tokens(read_file(str(file)), str(file))
    assert [tokens.find(secret.encode()) for secret in (ALICE, BOB)][: len(expected)] == expected
    for wrong in (ALICE[:-1], f"{ALICE} ", f"alice:{ALICE}", hashed(ALICE), digest(ALICE).hex(), ""):
        assert tokens.find(wrong.encode()) is None


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "it holds no token; write one into it"),
        ("# nothing\n\n", "it holds no token"),
        (f"{ALICE}\n{BOB}", "line 1: the token has no name, and is not the only one"),
        (f"alice:{ALICE}\n\n0123456789abcdef", "line 3: the token has no name"),
        (f"{ALICE} waiting=3", "line 1: a token with limits needs a name"),
        ("alice:short", "line 1: the token must be 16 to 1024 visible ASCII characters"),
        (f"alice:{'x' * 1025}", "line 1: the token must be 16 to 1024"),
        (f"alice: {ALICE}", "line 1: no token follows the colon"),
        (f":{ALICE}", "line 1: the name before the colon must be 1 to 64 letters"),
        (f"al/ice:{ALICE}", "line 1: the name before the colon must be"),
        (f"é:{ALICE}", "line 1: the name before the colon must be"),
        (f"{'a' * 65}:{ALICE}", "line 1: the name before the colon must be"),
        (f"alice:{ALICE}\nalice:{BOB}", "line 2: line 1 has the same name"),
        (f"alice:{ALICE}\nbob:{ALICE}", "line 2: line 1 has the same token"),
        (f"alice:{ALICE}\nbob:{hashed(ALICE)}", "line 2: line 1 has the same token"),
        (hashed(ALICE), "line 1: a hash needs a name before it"),
        (f"alice:{hashed(ALICE)[:-1]}", "line 1: a SHA-256 has 64 hexadecimal digits, and sha256: is followed by 63"),
        (f"alice:{hashed(ALICE)}0", "is followed by 65 characters"),
        (f"alice:{hashed(ALICE)[:-1]}g", "line 1: a SHA-256 has 64 hexadecimal digits"),
        (f"alice:{hashed('')}", "line 1: the hash is that of an empty text"),
        (f"alice:sha512:{'0' * 128}", "line 1: only the hash SHA-256 is known"),
        ("alice:$2y$05$abcdefghijklmnopqrstuv", "line 1: only the hash SHA-256 is known"),
        ("alice:{SSHA}abcdefghijklmnopqrstuv", "line 1: only the hash SHA-256 is known"),
        (f"alice:{ALICE} rate=3", "line 1: only waiting=N and tokens_per_minute=N may stand behind the token"),
        (f"alice:{ALICE} waiting=3 waiting=3", "line 1: waiting is given twice"),
        (f"alice:{ALICE} waiting=0", "line 1: waiting must be a whole number from 1 to 1000000"),
        (f"alice:{ALICE} waiting=-1", "line 1: waiting must be a whole number"),
        (f"alice:{ALICE} waiting=٣", "line 1: waiting must be a whole number"),
        (f"alice:{ALICE} tokens_per_minute=1e6", "line 1: tokens_per_minute must be a whole number from 1 to 10000000"),
        (f"alice:{ALICE} tokens_per_minute={10**400}", "line 1: tokens_per_minute must be a whole number"),
        ("\n".join(f"n{i}:{i:016}" for i in range(1001)), "it holds 1001 tokens; the limit is 1000"),
        ("#" * ((1 << 20) + 1), "it has more than 1048576 bytes"),
        (f"alice:{ALICE}".encode("utf-16").decode("latin-1"), "it is no text in UTF-8"),
        (f"alice:{ALICE}\x00", "it is no text in UTF-8"),
    ],
)
def test_what_is_wrong_in_a_file_is_told_by_its_line_and_not_quoted(
    content: str, sentence: str, tmp_path: Path
) -> None:
    file = tmp_path / "tokens"
    file.write_bytes(content.encode("latin-1" if content.startswith("\xff") else "utf-8"))
    with pytest.raises(BadRequest) as caught:
        read_file(str(file))
    said = str(caught.value)
    assert sentence in said
    assert said.startswith(f"--token-file {file}")
    assert not any(secret in said for secret in (ALICE, BOB, digest(ALICE).hex()[:60], "short", "rate"))


def test_a_file_is_read_again_as_a_whole_or_not_at_all(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As Kubernetes replaces a secret: the name is a link to a folder that is another one at once."""
    for version, content in (("1", f"alice:{ALICE}"), ("2", f"bob:{BOB} waiting=1\ncarol:{hashed('c' * 16)}")):
        (tmp_path / version).mkdir()
        (tmp_path / version / "token").write_text(content)
        (tmp_path / version / "token").chmod(0o600)
    (tmp_path / "data").symlink_to("1")
    (tmp_path / "token").symlink_to("data/token")
    file = str(tmp_path / "token")
    caplog.set_level("INFO", "fastgpt2.http")
    tokens = Tokens(read_file(file), file)
    (tmp_path / "new").symlink_to("2")
    (tmp_path / "new").replace(tmp_path / "data")
    tokens.reload()
    assert (tokens.names, tokens.find(ALICE.encode())) == (["bob", "carol"], None)
    assert caplog.messages == [f"--token-file {file}: read again, 2 tokens, new: bob, new: carol, gone: alice"]
    caplog.clear()
    (tmp_path / "2" / "token").write_text(f"{ALICE}\n{BOB}")
    tokens.reload()
    (tmp_path / "2" / "token").unlink()
    tokens.reload()
    os.mkfifo(tmp_path / "2" / "token")
    tokens.reload()
    assert tokens.names == ["bob", "carol"]
    for message, why in zip(caplog.messages, ("has no name", "cannot be read", "no regular file"), strict=True):
        assert why in message
        assert "the tokens stay as they were" in message
        assert ALICE not in message


@pytest.mark.parametrize(
    ("mode", "content", "warned"),
    [
        (0o600, f"a:{ALICE}", ""),
        (0o640, f"a:{ALICE}", ""),
        (0o644, f"a:{ALICE}", "read"),
        (0o604, ALICE, "read"),
        (0o644, f"a:{hashed(ALICE)}", ""),
        (0o666, f"a:{hashed(ALICE)}", "changed"),
    ],
)
def test_a_file_that_others_can_use_is_warned_of(
    mode: int, content: str, warned: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "tokens"
    file.write_text(content)
    file.chmod(mode)
    read_file(str(file))
    assert [f"can be {warned} by every user" in message for message in caplog.messages] == [True] * bool(warned)
    file.chmod(mode & 0o770)  # the remedy
    caplog.clear()
    read_file(str(file))
    assert caplog.messages == []


# --- Limits, over two endpoints, without a worker: what is enqueued waits ---


@pytest.fixture
def limited(redis_server: RedisServer, client: Client) -> Iterator[list[TestClient]]:
    """Two endpoints of one queue, with the same tokens."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                TestClient(
                    create_app(
                        redis_server.url,
                        client.queue_name,
                        Bounds(timeout=0.05),
                        lambda: False,
                        Tokens(
                            [
                                Token(digest(ALICE), "alice", waiting=3),
                                Token(digest(BOB), "bob", tokens_per_minute=60),
                                Token(digest("c" * 16), "carol"),
                            ]
                        ),
                    ),
                    base_url="http://localhost",
                )
            )
            for _ in range(2)
        ]


def enqueue(web: TestClient, token: str, **fields: Any) -> Any:
    return web.post("/v1/jobs", json={"prompt": "Once", **fields}, headers=bearer(token))


def code_of(answer: Any) -> tuple[int, str | None]:
    return answer.status_code, answer.json()["error"]["code"]


def test_so_many_jobs_of_a_token_wait_over_all_endpoints(
    limited: list[TestClient], redis: Redis, client: Client
) -> None:
    queue = f"rq:queue:{client.queue_name}"
    answers = [enqueue(limited[number % 2], ALICE) for number in range(5)]
    assert [answer.status_code for answer in answers] == [202, 202, 202, 429, 429]
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["2", "1", "0", "0", "0"]
    refused = answers[-1]
    assert code_of(refused) == (429, "rate_limit_exceeded")
    assert refused.json()["error"]["message"] == (
        "3 jobs of the token alice wait or run, and the limit is 3: try again when one has ended"
    )
    assert (refused.headers["retry-after"], refused.headers["x-ratelimit-limit-requests"]) == ("1", "3")
    assert "x-ratelimit-limit-tokens" not in refused.headers
    for path, body in (
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/completions", {"prompt": "a", "stream": True}),
        ("/generate", {"inputs": "a"}),
        ("/generate_stream", {"inputs": "a"}),
        ("/", {"inputs": "a"}),
    ):
        answer = limited[0].post(path, json=body, headers=bearer(ALICE))
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1"), path
    assert redis.llen(queue) == 3
    # Others are not concerned, and what enqueues nothing is not either.
    assert enqueue(limited[0], "c" * 16).status_code == 202
    assert limited[0].get("/v1/jobs", headers=bearer(ALICE)).status_code == 200
    ids = [answer.json()["id"] for answer in answers[:3]]
    assert redis.hget(f"rq:job:{ids[0]}", "fastgpt2_token") == b"alice"
    # One that is cancelled leaves room, and so does one that is deleted, or has ended elsewhere.
    assert limited[1].delete(f"/v1/jobs/{ids[0]}", headers=bearer(ALICE)).status_code == 200
    assert enqueue(limited[0], ALICE).status_code == 202
    assert enqueue(limited[0], ALICE).status_code == 429
    redis.delete(f"rq:job:{ids[1]}")
    assert enqueue(limited[0], ALICE).status_code == 429, "it may be about to come"
    redis.zincrby(account_jobs_key(client.queue_name, "alice"), -40_000, ids[1])
    assert enqueue(limited[0], ALICE).status_code == 202
    redis.hset(f"rq:job:{ids[2]}", "status", "failed")
    assert enqueue(limited[1], ALICE).status_code == 202
    assert enqueue(limited[1], ALICE).status_code == 429
    assert limited[0].get("/metrics", headers=bearer(ALICE)).status_code == 200
    metrics = limited[1].get("/metrics", headers=bearer(ALICE)).text
    assert 'fastgpt2_token_requests_total{status="429",token="alice"} 2.0' in metrics
    assert 'fastgpt2_token_tokens_total{kind="prompt",token="carol"} 0.0' in metrics


def test_requests_that_come_at_once_share_the_room(limited: list[TestClient]) -> None:
    with ThreadPoolExecutor(10) as threads:
        asked = [threads.submit(enqueue, limited[number % 2], ALICE) for number in range(20)]
    assert Counter(each.result().status_code for each in asked) == {202: 3, 429: 17}


def test_a_request_of_several_prompts_is_let_in_as_a_whole(
    limited: list[TestClient], redis: Redis, client: Client
) -> None:
    too_many = limited[0].post("/v1/completions", json={"prompt": ["a"] * 4}, headers=bearer(ALICE))
    assert code_of(too_many) == (400, None)
    assert too_many.json()["error"]["message"] == (
        "the request has 4 prompts, and the token alice may have 3 waiting or running at once: send fewer in a request"
    )
    assert enqueue(limited[0], ALICE).status_code == 202
    refused = limited[1].post("/v1/completions", json={"prompt": ["a"] * 3}, headers=bearer(ALICE))
    assert (refused.status_code, redis.llen(f"rq:queue:{client.queue_name}")) == (429, 1)
    in_time = limited[1].post("/v1/completions", json={"prompt": ["a"] * 2}, headers=bearer(ALICE))
    assert in_time.status_code == 504, "both waited, if in vain"
    # bob's minute has 60 tokens. The request may use more, and is let in, as nothing else is.
    whole = limited[0].post("/v1/completions", json={"prompt": ["a"] * 8, "max_tokens": 40}, headers=bearer(BOB))
    assert whole.status_code == 504


def test_a_request_that_is_repeated_needs_no_room(limited: list[TestClient]) -> None:
    once = {**bearer(ALICE), "idempotency-key": uuid.uuid4().hex}
    first = [enqueue(limited[0], ALICE).status_code for _ in range(2)]
    job = limited[0].post("/v1/jobs", json={"prompt": "a"}, headers=once)
    assert (first, job.status_code) == ([202, 202], 202)
    assert enqueue(limited[0], ALICE).status_code == 429
    again = limited[1].post("/v1/jobs", json={"prompt": "a"}, headers=once)
    assert (again.status_code, again.json()["id"]) == (202, job.json()["id"])
    assert code_of(limited[1].post("/v1/jobs", json={"prompt": "b"}, headers=once)) == (422, "idempotency_mismatch")


def test_a_request_that_is_repeated_needs_room_for_what_was_cancelled(
    limited: list[TestClient], redis: Redis, client: Client
) -> None:
    key, body = uuid.uuid4().hex, {"prompt": ["a", "b", "c"]}
    once, queue = {**bearer(ALICE), "idempotency-key": key}, f"rq:queue:{client.queue_name}"
    # Nobody waits any more, and the jobs are cancelled; but let the first have ended before.
    assert limited[0].post("/v1/completions", json=body, headers=once).status_code == 504
    wait_until(lambda: not redis.llen(queue), "the jobs to be cancelled")
    first: Any = redis.hget(idempotency_keys(key, 3, body)[0].redis_key, "job")
    redis.hset(f"rq:job:{first.decode()}", "status", "finished")
    jobs = [enqueue(limited[1], ALICE).json()["id"] for _ in range(2)]
    refused = limited[1].post("/v1/completions", json=body, headers=once)
    assert (code_of(refused), redis.llen(queue)) == ((429, "rate_limit_exceeded"), 2), "there is room for one"
    limited[0].delete(f"/v1/jobs/{jobs[0]}", headers=bearer(ALICE))
    again = limited[1].post("/v1/completions", json=body, headers=once)
    assert again.status_code != 429
    assert again.headers["x-ratelimit-remaining-requests"] == "0"


def test_room_is_given_back_if_the_queue_is_full(redis_server: RedisServer, redis: Redis, client: Client) -> None:
    token = Token(digest(ALICE), "alice", 5, 1000)
    bounds = Bounds(timeout=0.05, max_queue=1)
    app = create_app(redis_server.url, client.queue_name, bounds, lambda: False, Tokens([token]))
    with TestClient(app, base_url="http://localhost") as web:
        assert enqueue(web, ALICE, max_new_tokens=9).status_code == 202
        for _ in range(6):
            assert code_of(enqueue(web, ALICE, max_new_tokens=99)) == (429, "queue_full")
    assert redis.zcard(account_jobs_key(client.queue_name, "alice")) == 1
    # "Once" is four bytes, so one token perhaps.
    assert redis.hget(account_key(client.queue_name, "alice"), "reserved") == b"10"


def test_what_running_jobs_may_use_counts_until_they_have_used_it(limited: list[TestClient]) -> None:
    first = enqueue(limited[0], BOB, prompt=[1] * 10, max_new_tokens=20, n=2, do_sample=True)
    assert first.status_code == 202
    assert first.headers["x-ratelimit-limit-tokens"] == "60"
    assert first.headers["x-ratelimit-remaining-tokens"] == "10", "10 read and 2 x 20 generated"
    assert first.headers["x-ratelimit-reset-tokens"] == "50s"
    second = enqueue(limited[1], BOB, max_new_tokens=400)
    assert second.headers["x-ratelimit-remaining-tokens"] == "0"
    refused = enqueue(limited[0], BOB, max_new_tokens=1)
    assert code_of(refused) == (429, "rate_limit_exceeded")
    assert "the jobs of the token bob that wait or run may use up its 60 tokens a minute" in refused.text
    assert refused.headers["x-ratelimit-reset-tokens"] == "7m31s", "451 tokens, at 1 a second"
    limited[0].delete(f"/v1/jobs/{second.json()['id']}", headers=bearer(BOB))
    assert enqueue(limited[0], BOB, max_new_tokens=1).status_code == 202


def test_the_name_is_in_the_log_and_the_token_is_not(
    limited: list[TestClient], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    caplog.set_level("DEBUG", "fastgpt2")  # another test of this process may have set its own
    assert enqueue(limited[0], ALICE).status_code == 202
    wrong = enqueue(limited[0], "x" * 20)
    assert code_of(wrong) == (401, "invalid_api_key")
    assert wrong.json()["error"]["message"].startswith("the token is none of this endpoint's")
    served, refused = (message for message in caplog.messages if message.startswith("POST /v1/jobs"))
    assert ", token alice, request" in served
    assert "token" not in refused
    assert ALICE not in caplog.text
    assert "x" * 20 not in caplog.text


def test_without_redis_nobody_is_let_in() -> None:
    tokens = Tokens([Token(digest(ALICE), "alice", 1)])
    app = create_app("redis://127.0.0.1:1/0", "q", Bounds(timeout=0.05), lambda: False, tokens)
    with TestClient(app, base_url="http://localhost") as web:
        answer = enqueue(web, ALICE)
        assert code_of(answer) == (503, "queue_unavailable")
        assert "x-ratelimit-limit-requests" not in answer.headers


# --- What is counted, with workers ---


@pytest.fixture
def counted(system: System) -> Iterator[tuple[TestClient, Token, Redis]]:
    """An endpoint in this process, on the session's pool, with a token of its own that has limits."""
    token = Token(digest(ALICE), f"t-{uuid.uuid4().hex[:8]}", 50, 10**6)
    app = create_app(system.redis_url, "fastgpt2", Bounds(), lambda: False, Tokens([token]))
    with (
        TestClient(app, base_url="http://localhost", headers=bearer(ALICE)) as web,
        Redis.from_url(system.redis_url) as connection,
    ):
        yield web, token, connection


def used(counted: tuple[TestClient, Token, Redis]) -> tuple[int, int]:
    web, token, _ = counted
    lines = [line for line in web.get("/metrics").text.splitlines() if f'token="{token.name}"' in line]
    by_kind = {kind: line for line in lines for kind in ("prompt", "generated") if f'kind="{kind}"' in line}
    return tuple(int(float(by_kind[kind].split()[-1])) for kind in ("prompt", "generated"))  # type: ignore[return-value]


def test_what_is_read_and_generated_is_counted(counted: tuple[TestClient, Token, Redis]) -> None:
    web, token, connection = counted
    body = {"prompt": [[1, 2, 3], [4, 5]], "max_tokens": 7, "n": 2, "temperature": 1}
    usage = web.post("/v1/completions", json=body).json()["usage"]
    total = (usage["prompt_tokens"], usage["completion_tokens"])
    assert used(counted) == total
    # A stream, the best of several texts, of which the others are generated too, and one that reads only.
    text = web.post(
        "/v1/completions", json={"prompt": [1] * 4, "max_tokens": 5, "stream": True, "ignore_eos": True}
    ).text
    assert text.endswith("data: [DONE]\n\n")
    assert used(counted) == (total[0] + 4, total[1] + 5)
    best = {"prompt": [1] * 4, "max_tokens": 6, "best_of": 3, "temperature": 1, "ignore_eos": True}
    assert web.post("/v1/completions", json=best).status_code == 200
    assert used(counted) == (total[0] + 8, total[1] + 5 + 18)
    # One that is left behind counts at its end, and one that is refused by the worker counts nothing.
    job = web.post("/v1/jobs", json={"prompt": [1] * 3, "max_new_tokens": 4, "ignore_eos": True}).json()["id"]
    assert web.get(f"/v1/jobs/{job}", params={"wait": "60"}).json()["status"] == "finished"
    assert used(counted) == (total[0] + 11, total[1] + 27)
    refused = web.post("/v1/completions", json={"prompt": [10**6], "max_tokens": 4})
    assert refused.status_code == 400
    assert used(counted) == (total[0] + 11, total[1] + 27)
    # The next request finds that all of them have ended, and how much they have used.
    last = web.post("/v1/jobs", json={"prompt": [1], "max_new_tokens": 1})
    assert last.headers["x-ratelimit-remaining-requests"] == "49"
    state = connection.hgetall(account_key("fastgpt2", str(token.name)))
    # A million a minute: what a moment takes off is not less than it was.
    assert 10**6 - sum(total) - 38 - 2 <= int(last.headers["x-ratelimit-remaining-tokens"]) <= 10**6 - 2
    assert state[b"reserved"] == b"2"


def test_a_client_that_hangs_up_pays_for_what_was_generated(
    system: System, start_endpoint: StartEndpoint, tmp_path: Path
) -> None:
    """And under nohup, the terminal's end is none of the endpoint's: SIGHUP only has the file read again."""
    name, file = f"t-{uuid.uuid4().hex[:8]}", tmp_path / "tokens"
    file.write_text(f"{name}:{ALICE}")
    own = {"FASTGPT2_REDIS_URL": system.redis_url, "FASTGPT2_QUEUE": "fastgpt2", "FASTGPT2_TOKEN_FILE": str(file)}
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        endpoint = start_endpoint(**own)
    finally:
        signal.signal(signal.SIGHUP, before)
    body = {"prompt": [1] * 3, "max_tokens": 480, "ignore_eos": True, "stream": True}
    key = token_totals_key("fastgpt2")
    with Redis.from_url(system.redis_url) as connection:
        streams = set(connection.keys("fastgpt2:stream:*"))
        with jobs_held():
            hang_up(
                endpoint.url,
                "/v1/completions",
                body,
                lambda: set(connection.keys("fastgpt2:stream:*")) - streams,
                **bearer(ALICE),
            )
            wait_until(lambda: connection.hget(key, f"{name}:generated_tokens"), "the tokens to be counted")
        prompt, generated = connection.hmget(key, f"{name}:prompt_tokens", f"{name}:generated_tokens")
    assert prompt == b"3"
    assert 1 <= int(generated or 0) < 480
    endpoint.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "read again" in endpoint.log.read_text(), "the reading")
    assert endpoint.process.poll() is None


def test_a_minute_that_is_used_up_and_the_next_one(system: System) -> None:
    name = f"t-{uuid.uuid4().hex[:8]}"
    tokens = Tokens([Token(digest(ALICE), name, tokens_per_minute=30)])
    app = create_app(system.redis_url, "fastgpt2", Bounds(), lambda: False, tokens)
    body = {"prompt": [1] * 10, "max_tokens": 15, "ignore_eos": True}
    web = TestClient(app, base_url="http://localhost", headers=bearer(ALICE))
    with web, Redis.from_url(system.redis_url) as connection:
        first, second, third = (web.post("/v1/completions", json=body) for _ in range(3))
        # 25 of 30 are used, then 50: 20 and a bit are above the limit, and half a token comes back a second.
        assert [first.status_code, second.status_code, third.status_code] == [200, 200, 429]
        assert 1 <= int(third.headers["retry-after"]) <= 42
        assert f"the token {name} has used its 30 tokens a minute: try again in" in third.text
        assert third.headers["x-ratelimit-remaining-tokens"] == "0"
        # As if a minute had gone by: 30 tokens are forgotten, and 20 are left of the 50.
        connection.hincrby(account_key("fastgpt2", name), "at", -60_000)
        fourth = web.post("/v1/completions", json=body)
        assert fourth.status_code == 200
        fifth = web.post("/v1/completions", json=body)
        assert fifth.status_code == 429


# --- SIGHUP ---


def start_in_terminal(command: str, log: Path, *options: str) -> tuple[subprocess.Popen[bytes], int]:
    """Start a command as the leader of a terminal's session; return it, and the terminal's other end."""
    master, slave = pty.openpty()
    with log.open("w") as out:
        process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                # Whoever runs these tests may ignore SIGHUP, as nohup does, and children inherit that.
                "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_DFL); "
                f"os.close(os.open({os.ttyname(slave)!r}, os.O_RDWR)); "
                "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])",
                "-m",
                "fastgpt2",
                command,
                *options,
            ],
            env={**os.environ, "FASTGPT2_MODEL": "demo"},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    os.close(slave)
    return process, master


@pytest.mark.parametrize("command", ["api", "up"])
def test_sighup_reads_the_tokens_again_and_the_end_of_the_terminal_still_ends(
    command: str, redis_server: RedisServer, queue_name: str, tmp_path: Path
) -> None:
    file, log = tmp_path / "tokens", tmp_path / "log"
    file.write_text(f"alice:{ALICE}")
    file.chmod(0o600)
    options = ["--redis-url", redis_server.url, "--queue", queue_name, "--port", "0", "--token-file", str(file)]
    process, terminal = start_in_terminal(command, log, *options, *(["--workers", "1"] if command == "up" else []))
    try:
        begun = "fastgpt2 is ready" if command == "up" else "endpoint on"
        wait_until(lambda: begun in log.read_text(), "the endpoint to listen")
        os.kill(process.pid, signal.SIGHUP)
        wait_until(lambda: "read again, 1 token" in log.read_text(), "the first reading")
        (tmp_path / "new").write_text(f"bob:{BOB}\ncarol:{hashed('c' * 16)} waiting=3")
        (tmp_path / "new").chmod(0o600)
        (tmp_path / "new").replace(file)
        os.kill(process.pid, signal.SIGHUP)
        wait_until(lambda: "read again, 2 tokens, new: bob, new: carol, gone: alice" in log.read_text(), "the second")
        file.write_text("bob:short")
        os.kill(process.pid, signal.SIGHUP)
        wait_until(lambda: "the tokens stay as they were" in log.read_text(), "the refusal of the third")
        assert process.poll() is None
        os.close(terminal)
        assert process.wait(60) == 0
        assert "endpoint has stopped" in log.read_text()
        assert not any(secret in log.read_text() for secret in (ALICE, BOB, "short", digest("c" * 16).hex()))
    finally:
        process.kill()
        process.wait()


@pytest.mark.processes
def test_the_line_of_the_documentation_makes_a_token(tmp_path: Path) -> None:
    """docs/tokens.md has it; a shell runs it as it stands there."""
    page = (Path(__file__).parents[2] / "docs" / "tokens.md").read_text("utf-8")
    lines = page.partition("## Make a token\n\n")[2].partition("\n\n")[0]
    done = subprocess.run(["sh", "-euc", lines], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    (token,) = read_file(str(tmp_path / "tokens"))
    assert (token.name, token.digest) == ("alice", digest(done.stdout.strip()))
    assert len(done.stdout.strip()) == 64
