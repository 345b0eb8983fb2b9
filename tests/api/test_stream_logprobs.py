"""Log probabilities in a job's stream: each comes once, with the text in which its token begins, whatever gets lost."""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from rq import Queue, Retry
from rq.serializers import JSONSerializer
from support.running import GOLDEN, StartWorker, jobs_held
from support.stock_worker import run_by_stock

from fastgpt2 import Client, GenerationResult, Piece, TokenLogprob
from fastgpt2.api.client.reader import Assembly
from fastgpt2.engine.model.hub import DEMO_FOLDER
from fastgpt2.engine.text.tokenizer import Tokenizer
from fastgpt2.protocol.keys import stream_key
from fastgpt2.protocol.messages import MAX_LOGPROBS_BYTES, entry_to_piece, piece_to_entry
from fastgpt2.system.redis_server import RedisServer

ENTRIES: list[dict[str, Any]] = json.loads((GOLDEN / "demo_continuations.json").read_text("utf-8"))["continuations"]
ENTRY = ENTRIES[0]


def told(*tokens: tuple[str, int], first_id: int = 0, logprob: float = -1.0) -> tuple[TokenLogprob, ...]:
    return tuple(TokenLogprob(first_id + ord(t[0]), t, logprob, text_offset=at) for t, at in tokens)


def held(pieces: list[Piece]) -> tuple[str, list[TokenLogprob]]:
    """Return what a reader holds who does as `Piece` says."""
    text, tokens = "", list[TokenLogprob]()
    for piece in pieces:
        assert piece.at <= len(text)
        assert piece.token_at <= len(tokens)
        text = text[: piece.at] + piece.text
        tokens[piece.token_at :] = piece.logprobs
    return text, tokens


def in_text(result: GenerationResult) -> list[TokenLogprob]:
    assert result.logprobs is not None
    return [one for one in result.logprobs if one.text_offset < len(result.text)]


def assert_as_the_result(pieces: list[Piece], result: GenerationResult | None) -> None:
    """Check that nothing was taken back or came twice, and each token came with the piece that reaches its begin."""
    assert result is not None
    assert "".join(piece.text for piece in pieces) == result.text
    assert [one for piece in pieces for one in piece.logprobs] == in_text(result)
    for piece in pieces:
        end = piece.at + len(piece.text)
        assert all(one.text_offset < end for one in piece.logprobs)
        assert piece.token_at + len(piece.logprobs) == sum(one.text_offset < end for one in in_text(result))


class TestAssembly:
    A, B, C = told(("ab", 0), ("cd", 2), ("ef", 4))

    def test_what_was_sent_twice_is_given_once(self) -> None:
        assembly = Assembly()
        assert repr(assembly.add(Piece("ab", 0, 1, (self.A,)))) == repr(Piece("ab", 0, 1, (self.A,), 0))
        assert repr(assembly.add(Piece("cd", 2, 1, (self.B,), 1))) == repr(Piece("cd", 2, 1, (self.B,), 1))
        assert assembly.add(Piece("abc", 0, 2, (self.A, self.B))) is None
        assert repr(assembly.add(Piece("def", 3, 2, (self.C,), 2))) == repr(Piece("ef", 4, 2, (self.C,), 2))
        assert assembly.complete("abcdef", (self.A, self.B, self.C)) is None

    def test_the_same_tokens_from_another_machine(self) -> None:
        """The log probabilities of another machine differ in the last digits."""
        assembly = Assembly()
        assembly.add(Piece("abcd", 0, 1, (self.A, self.B)))
        others = told(("ab", 0), ("cd", 2), ("ef", 4), logprob=-1.0000001)
        assert repr(assembly.add(Piece("abcdef", 0, 2, others))) == repr(Piece("ef", 4, 2, others[2:], 2))
        assert assembly.complete("abcdef", (self.A, self.B, self.C)) is None

    def test_other_tokens_are_given_where_they_begin_to_differ(self) -> None:
        assembly = Assembly()
        assembly.add(Piece("abcdef", 0, 1, (self.A, self.B, self.C)))
        (other,) = told(("cX", 2), first_id=1000)
        assert repr(assembly.add(Piece("abcX", 0, 2, (self.A, other)))) == repr(Piece("X", 3, 2, (other,), 1))
        assert assembly.complete("abcX", (self.A, other)) is None

    def test_other_tokens_within_the_same_text(self) -> None:
        """A stop string held back the rest of a token: first the token differs, then its text."""
        assembly = Assembly()
        assembly.add(Piece("abcdef", 0, 1, (self.A, self.B, self.C)))
        (other,) = told(("cX", 2), first_id=1000)
        assert repr(assembly.add(Piece("abc", 0, 2, (self.A, other)))) == repr(Piece("", 6, 2, (other,), 1))
        assert repr(assembly.add(Piece("X", 3, 2, (), 2))) == repr(Piece("X", 3, 2, (), 2))
        assert assembly.complete("abcX", (self.A, other)) is None

    def test_a_gap_is_left_to_the_result(self) -> None:
        assembly = Assembly()
        assembly.add(Piece("ab", 0, 1, (self.A,)))
        assert assembly.add(Piece("ef", 4, 1, (self.C,), 2)) is None
        whole = (self.A, self.B, self.C, *told(("!", 6)))
        assert repr(assembly.complete("abcdef", whole)) == repr(Piece("cdef", 2, 1, (self.B, self.C), 1)), (
            "the last was cut off"
        )
        assert assembly.complete("abcdef", whole) is None

    def test_a_gap_among_the_tokens_alone(self) -> None:
        assembly = Assembly()
        assert repr(assembly.add(Piece("ab", 0, 1))) == repr(Piece("ab", 0, 1))
        assert repr(assembly.add(Piece("cd", 2, 1, (self.B,), 1))) == repr(Piece("cd", 2, 1))
        assert repr(assembly.complete("abcd", (self.A, self.B))) == repr(Piece("", 4, 1, (self.A, self.B), 0))

    def test_the_result_has_the_last_word(self) -> None:
        assembly = Assembly()
        assembly.add(Piece("abcd", 0, 1, (self.A, self.B)))
        assert repr(assembly.complete("ab", (self.A, self.B))) == repr(Piece("", 2, 1, (), 1))

    @pytest.mark.parametrize("seed", range(50))
    def test_any_losses_and_repetitions(self, seed: int) -> None:
        """Attempts break off, pieces are cut anyhow and get lost: text and tokens are the result's, and given once."""
        dice = random.Random(seed)
        text = ENTRIES[seed % len(ENTRIES)]["text"]
        begins, at = [], 0
        while at < len(text):
            # Some with no characters of their own, as parts of one.
            begins += [at] * dice.choice([1, 1, 1, 3])
            at += dice.randint(1, 6)
        whole = tuple(TokenLogprob(n, "?", -1.0, text_offset=at) for n, at in enumerate(begins))
        assembly, given = Assembly(), []
        for attempt in range(1, 4):
            at, token_at, until = 0, 0, dice.randrange(len(text) + 1)
            while at < until:
                end = min(at + dice.randint(1, 9), len(text))
                logprobs = tuple(one for one in whole[token_at:] if one.text_offset < end)
                if dice.random() > 0.1:
                    given.append(assembly.add(Piece(text[at:end], at, attempt, logprobs, token_at)))
                at, token_at = end, token_at + len(logprobs)
        given.append(assembly.complete(text, whole))
        pieces = [piece for piece in given if piece is not None]
        assert held(pieces) == (text, list(whole))
        assert [one for piece in pieces for one in piece.logprobs] == list(whole)
        assert "".join(map(str, pieces)) == text


@pytest.mark.usefixtures("served")
def test_they_come_with_the_text(client: Client) -> None:
    stream = client.stream(ENTRY["prompt"], max_new_tokens=100, ignore_eos=True, logprobs=2, prompt_logprobs=1)
    pieces = list(stream)
    assert_as_the_result(pieces, stream.result)
    assert [one.token_id for one in held(pieces)[1]] == ENTRY["ids"]
    assert all(len(one.top) == 2 for one in held(pieces)[1])
    assert len([piece for piece in pieces if piece.logprobs]) > 20
    assert stream.result is not None
    assert stream.result.prompt_logprobs is not None
    (late,) = stream.job.stream()
    assert (late.text, list(late.logprobs)) == (ENTRY["text"], in_text(stream.result)), "from the result"


@pytest.mark.usefixtures("served")
def test_who_does_not_ask_pays_nothing(client: Client, redis: Redis) -> None:
    stream = client.stream(ENTRY["prompt"], max_new_tokens=20, ignore_eos=True, prompt_logprobs=2)
    assert all(piece.logprobs == () and piece.token_at == 0 for piece in stream)
    entries: Any = redis.xrange(stream_key(stream.job.id))
    assert {frozenset(fields) for _, fields in entries} == {
        frozenset({b"attempt", b"at", b"text"}),
        frozenset({b"attempt", b"end"}),
    }


@pytest.mark.usefixtures("served")
def test_beside_an_echo(client: Client) -> None:
    prompt = ENTRIES[3]["prompt"]
    assert not prompt.isascii()
    stream = client.stream(prompt, max_new_tokens=60, echo=True, ignore_eos=True, logprobs=0)
    pieces = list(stream)
    assert_as_the_result(pieces, stream.result)
    assert [one.token_id for one in held(pieces)[1]] == ENTRIES[3]["ids"][:60]
    assert held(pieces)[1][0].text_offset == len(prompt)


@pytest.mark.usefixtures("served")
def test_nothing_of_what_a_stop_string_cuts_off(client: Client) -> None:
    for begin in range(24, 33):
        stop = ENTRY["text"][begin : begin + 9]
        # What was held back for a stop string that does not come is given after all.
        spoilt = ENTRY["text"][8:16] + "\u2603"
        stream = client.stream(ENTRY["prompt"], max_new_tokens=60, stop=[stop, spoilt], logprobs=1)
        pieces = list(stream)
        assert_as_the_result(pieces, stream.result)
        assert stream.result is not None
        assert stream.result.text == ENTRY["text"][:begin]
        assert len(in_text(stream.result)) < len(stream.result.token_ids)


def of_bytes(folder: Path) -> Path:
    """Make the demo model with a vocabulary in which the tokens of a known continuation are bytes of characters."""
    shutil.copytree(DEMO_FOLDER, folder)
    stored = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    tokenizer = Tokenizer.from_folder(DEMO_FOLDER)
    vocabulary: dict[str, int] = stored["model"]["vocab"]
    names = {token_id: name for name, token_id in vocabulary.items()}
    of_byte = {tokenizer.token_bytes(i): i for i in range(1, len(vocabulary))}
    wanted = [of_byte[bytes([byte])] for byte in dict.fromkeys("🦜“é中文".encode())]
    for here, there in zip(dict.fromkeys(ENTRY["ids"]), wanted, strict=False):
        names[here], names[there] = names[there], names[here]
    stored["model"]["vocab"] = {name: token_id for token_id, name in names.items()}
    (folder / "tokenizer.json").write_text(json.dumps(stored), "utf-8")
    return folder


def test_characters_of_many_tokens(client: Client, start_worker: StartWorker, tmp_path: Path) -> None:
    """Decode up to the first byte of each token: the last character of that is the one that the token begins in."""
    folder = of_bytes(tmp_path / "model")
    tokenizer = Tokenizer.from_folder(folder)
    start_worker(FASTGPT2_MODEL=str(folder))
    for options in ({}, {"echo": True}, {"stop": "🦜\u2603"}):
        stream = client.stream(ENTRY["prompt_ids"], max_new_tokens=100, ignore_eos=True, logprobs=1, **options)
        pieces = list(stream)
        assert_as_the_result(pieces, stream.result)
        given = held(pieces)[1]
        assert [one.token_id for one in given] == ENTRY["ids"]
        parts = [tokenizer.token_bytes(token_id) for token_id in ENTRY["ids"]]
        assert sum(not part.decode(errors="ignore") for part in parts) > 20
        for n, one in enumerate(given):
            assert one.text_offset == len((b"".join(parts[:n]) + parts[n][:1]).decode(errors="replace")) - 1


def test_a_killed_worker(client: Client, redis: Redis, start_worker: StartWorker) -> None:
    """The job is put back; another attempt's tokens go on where the first one's stopped."""
    queue = Queue(client.queue_name, connection=redis, serializer=JSONSerializer)
    first = start_worker()
    fields = {"prompt": ENTRY["prompt"], "max_new_tokens": 480, "ignore_eos": True, "stream": True, "logprobs": 1}
    with jobs_held():
        job = queue.enqueue("fastgpt2.worker.tasks.generate", kwargs=fields, retry=Retry(max=3), description="generate")
        stream = client.job(job.id).stream(timeout=60)
        pieces = [next(stream)]
        first.kill()
        first.wait()
    queue.started_job_registry.cleanup(timestamp=time.time() + 10**6)
    assert job.get_status() == "queued"
    redis.xadd(stream_key(job.id), piece_to_entry(pieces[0]))
    start_worker(wait=False)
    pieces += stream
    assert {piece.attempt for piece in pieces} == {1, 2}
    result = client.result(job.id, timeout=30)
    text, tokens = held(pieces)
    assert text == result.text == "".join(map(str, pieces))
    assert [one.token_id for one in tokens[:100]] == ENTRY["ids"]
    key = [(one.token_id, one.text_offset) for one in in_text(result)]
    assert [(one.token_id, one.text_offset) for one in tokens] == key
    assert sum(len(piece.logprobs) for piece in pieces) == len(key), "each once"


def test_a_stock_worker_sends_them_too(client: Client, redis_server: RedisServer, redis: Redis) -> None:
    job = client.enqueue(ENTRY["prompt"], max_new_tokens=12, ignore_eos=True, logprobs=1, stream=True)
    run_by_stock(Queue(client.queue_name, connection=redis, serializer=JSONSerializer), redis_server)
    entries: Any = redis.xrange(stream_key(job.id))
    pieces = [entry_to_piece(fields) for _, fields in entries]
    assert len(pieces) > 5
    assert_as_the_result([piece for piece in pieces if piece is not None], job.result(timeout=30))


HOSTILE = [
    b"",
    b"3",
    b"{}",
    b"[3]",
    b"[[]]",
    b"[{}]",
    b"\xff",
    b"[" * 100_000,
    b'[{"token_id": 1, "token": "a", "logprob": -1, "text_offset": "0"}]',
    b'[{"token_id": 1, "token": "a", "logprob": -1, "top": [{}]}]',
    b'[{"token_id": 1, "token": "a", "logprob": -1, "top": 7}]',
    b"[" + b'{"token_id": 1, "token": "a", "logprob": -1},' * 25_000 + b"]",
]


@pytest.mark.parametrize("logprobs", HOSTILE, ids=range(len(HOSTILE)))
def test_what_are_no_log_probabilities(logprobs: bytes) -> None:
    fields = {b"attempt": b"1", b"at": b"0", b"text": b"a", b"token_at": b"0", b"logprobs": logprobs}
    with pytest.raises((KeyError, TypeError, ValueError)):
        entry_to_piece(fields)


@pytest.mark.parametrize(("field", "value"), [(b"token_at", b"-1"), (b"token_at", b"x"), (b"at", b"-1")])
def test_numbers_of_what_comes_before(field: bytes, value: bytes) -> None:
    fields = {b"attempt": b"1", b"at": b"0", b"text": b"a", b"token_at": b"0", b"logprobs": b"[]"}
    assert repr(entry_to_piece(fields)) == repr(Piece("a", 0, 1))
    with pytest.raises(ValueError, match=r"is no number of what comes before|invalid literal"):
        entry_to_piece({**fields, field: value})


def test_the_largest_entry_that_a_job_can_make_in_one_piece_fits() -> None:
    """A stop string holds back 255 characters; their tokens come with the 20 likeliest of each."""
    one = TokenLogprob(50_000, "\u2603" * 20, -12.345678901234567)
    tokens = tuple(TokenLogprob(50_000, "\u2603", -1.234567890123456, (one,) * 20, 100_000) for _ in range(255))
    entry = piece_to_entry(Piece("a" * 255, 0, 1, tokens))
    assert len(entry["logprobs"]) < MAX_LOGPROBS_BYTES
    read = entry_to_piece({name.encode(): str(value).encode() for name, value in entry.items()})
    assert repr(read) == repr(Piece("a" * 255, 0, 1, tokens))


def test_strange_entries_are_passed_over(client: Client, redis: Redis, start_worker: StartWorker) -> None:
    """Whatever they stood for comes with the result."""
    job = client.enqueue(ENTRY["prompt"], max_new_tokens=10, ignore_eos=True, logprobs=1, stream=True)
    for logprobs in HOSTILE:
        redis.xadd(stream_key(job.id), {"attempt": 1, "at": 0, "text": "x", "token_at": 0, "logprobs": logprobs})
    start_worker()
    pieces = list(job.stream(timeout=30))
    assert_as_the_result(pieces, job.result(timeout=30))
