"""Those who use a pool whose masters fail: they wait, stream, map, enqueue, ask the endpoint, and keep a book."""

from __future__ import annotations

import random
import threading
import time
import traceback
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx2 as httpx

from chaos.cluster import QUEUE
from chaos.submission import ENTRIES, Submitted
from fastgpt2 import Client, GenerationRequest, GenerationResult, Job
from fastgpt2.errors import FastGPT2Error, JobNotFound, NotDurable, QueueUnavailable, ResultTimeout

# Nobody waits for longer than this, whatever happens.
PATIENCE_SECONDS = 120.0
_MOST_TOKENS = 40
_PAUSE_SECONDS = 0.1

# How a job's result is read, within a number of seconds.
Read = Callable[[Job, float], GenerationResult]


@dataclass
class Acknowledged:
    """A job whose enqueueing was answered.

    Attributes:
        handle: what its enqueueing returned. Who waits by it enqueues again what Redis lost; by the id, one is told.
        asked, at: when it was sent, and when the answer came, on the monotonic clock.
        waited: somebody waits for its end.
        seen: its right result was read.
        told: its reader, who knew it by its id only, was told that it is lost or not there.
    """

    job: Submitted
    handle: Job
    asked: float
    at: float
    waited: bool
    seen: bool = False
    told: bool = False


@dataclass
class Book:
    """What the callers have seen. Safe for several threads.

    Attributes:
        counts: of what happened, by its name.
        wrong: a sentence for everything that must not happen.
    """

    acknowledged: list[Acknowledged] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def acknowledge(self, entry: Acknowledged) -> None:
        with self._lock:
            self.acknowledged.append(entry)

    def count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1

    def complain(self, sentence: str) -> None:
        with self._lock:
            self.wrong.append(sentence)


class Caller(threading.Thread):
    """Takes its turns until all is over."""

    def __init__(self, seed: int, book: Book, over: threading.Event) -> None:
        super().__init__(daemon=True, name=f"{type(self).__name__.lower()} {seed}")
        self.random, self.book, self.over = random.Random(seed), book, over

    def run(self) -> None:
        try:
            self.work()
        except Exception:
            self.book.complain(f"{self.name} ended: {traceback.format_exc()}")

    @abstractmethod
    def work(self) -> None:
        """Ask again and again, while there is a next turn."""

    def has_turn(self) -> bool:
        return not self.over.wait(self.random.uniform(0.5, 1.5) * _PAUSE_SECONDS)

    def prompt(self) -> tuple[dict[str, Any], int]:
        return self.random.choice(ENTRIES), self.random.randint(1, _MOST_TOKENS)


class QueueCaller(Caller):
    """Uses the queue itself.

    Args:
        durability: what its enqueued jobs must have reached to count as acknowledged.
    """

    def __init__(self, url: str, durability: str, seed: int, book: Book, over: threading.Event) -> None:
        super().__init__(seed, book, over)
        self._url, self._durability = url, durability

    def work(self) -> None:
        with Client(self._url, QUEUE, durability=self._durability) as client:
            while self.has_turn():
                self.turn(client)

    @abstractmethod
    def turn(self, client: Client) -> None:
        """Ask once, and see to the answer."""

    def enqueue(self, client: Client, waited: bool, **fields: Any) -> Acknowledged | None:
        """Enqueue one; None if that was refused, after which it may run or not."""
        entry, tokens = self.prompt()
        asked = time.monotonic()
        try:
            job = client.enqueue(entry["prompt"], max_new_tokens=tokens, ignore_eos=True, result_ttl=86400, **fields)
        except NotDurable as reason:
            if len(reason.job_ids) != 1:
                self.book.complain(f"NotDurable names {reason.job_ids}")
            self.book.count("not durable")
            return None
        except QueueUnavailable:
            self.book.count("refused")
            return None
        submitted = Submitted(job.id, self.name, [entry["ids"][:tokens]])
        acknowledged = Acknowledged(submitted, job, asked, time.monotonic(), waited)
        self.book.acknowledge(acknowledged)
        return acknowledged

    def reader_of(self, client: Client, entry: Acknowledged) -> Job:
        return entry.handle if self.random.random() < 0.5 else client.job(entry.job.id)

    def wait_for(self, client: Client, entry: Acknowledged, read: Read = Job.result) -> None:
        """Read the result, and again, then in the plain way, if Redis was away for longer than a reader waits."""
        job = self.reader_of(client, entry)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                result = read(job, max(1.0, deadline - time.monotonic()))
            except JobNotFound as reason:
                entry.told = True
                if job is entry.handle:
                    self.book.complain(f"job {job.id} ({self.name}) was lost, and not enqueued again: {reason!r}")
                return
            except ResultTimeout as reason:
                self.book.complain(f"job {entry.job.id} ({self.name}) was waited for in vain: {reason}")
                return
            except QueueUnavailable as reason:
                read = Job.result
                self.book.count("readers given up")
                if time.monotonic() > deadline:
                    self.book.complain(f"job {entry.job.id} ({self.name}) was waited for in vain: {reason}")
                    return
            except FastGPT2Error as reason:
                self.book.complain(f"job {entry.job.id} ({self.name}) ended otherwise: {reason!r}")
                return
            else:
                entry.seen = True
                if entry.job.expected != [list(result.token_ids)]:
                    self.book.complain(f"job {entry.job.id} ({self.name}) was read with wrong tokens")
                return


class Waiter(QueueCaller):
    """Enqueues a job and waits for its result."""

    def turn(self, client: Client) -> None:
        entry = self.enqueue(client, waited=True)
        if entry is not None:
            self.wait_for(client, entry)


class Enqueuer(QueueCaller):
    """Enqueues and goes."""

    def turn(self, client: Client) -> None:
        self.enqueue(client, waited=False)


class Streamer(QueueCaller):
    """Reads texts as they come. Every character has to come once."""

    def turn(self, client: Client) -> None:
        entry = self.enqueue(client, waited=True, stream=True)
        if entry is not None:
            self.wait_for(client, entry, self._read)

    def _read(self, job: Job, timeout: float) -> GenerationResult:
        stream = job.stream(timeout=timeout, replacements=True)
        text = ""
        for piece in stream:
            text = text[: piece.at] + piece.text
        assert stream.result is not None
        if text != stream.result.text:
            self.book.complain(f"job {job.id} was streamed as {text!r}, and it is {stream.result.text!r}")
        return stream.result


class Mapper(QueueCaller):
    """Maps over prompts without an end. What Redis loses is to be enqueued anew."""

    def turn(self, client: Client) -> None:
        asked: list[tuple[dict[str, Any], int]] = []
        outcomes = client.map(self._prompts(asked), in_flight=4, return_exceptions=True)
        try:
            for number, outcome in enumerate(outcomes):
                if isinstance(outcome, QueueUnavailable):
                    self.book.count("mapped prompts refused")
                elif isinstance(outcome, Exception):
                    self.book.complain(f"{self.name}: a mapped prompt ended so: {outcome!r}")
                else:
                    entry, tokens = asked[number]
                    self.book.count("mapped prompts")
                    if list(outcome.token_ids) != entry["ids"][:tokens]:
                        self.book.complain(f"{self.name}: a mapped prompt has wrong tokens")
        except QueueUnavailable:
            self.book.count("maps given up")

    def _prompts(self, asked: list[tuple[dict[str, Any], int]]) -> Iterator[GenerationRequest]:
        while self.has_turn():
            entry, tokens = self.prompt()
            asked.append((entry, tokens))
            yield GenerationRequest(entry["prompt"], max_new_tokens=tokens, ignore_eos=True)


class Asker(Caller):
    """Asks the endpoint, as a program that knows no queue does."""

    def __init__(self, url: str, seed: int, book: Book, over: threading.Event) -> None:
        super().__init__(seed, book, over)
        self._url = url

    def work(self) -> None:
        with httpx.Client(base_url=self._url, trust_env=False, timeout=PATIENCE_SECONDS) as http:
            while self.has_turn():
                self._ask(http)

    def _ask(self, http: httpx.Client) -> None:
        entry, tokens = self.prompt()
        body = {"prompt": entry["prompt"], "max_tokens": tokens, "temperature": 0}
        answer = http.post("/v1/completions", json=body)
        if answer.status_code == 503:
            self.book.count("requests refused")
        elif answer.status_code != 200:
            self.book.complain(f"the endpoint answered {answer.status_code}: {answer.text[:300]}")
        else:
            self.book.count("requests")
            if not entry["text"].startswith(answer.json()["choices"][0]["text"].rstrip("\ufffd")):
                self.book.complain(f"the endpoint gave a wrong text for {entry['prompt']!r}")
