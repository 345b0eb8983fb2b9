"""Jobs of all kinds, submitted while things go wrong, and what is to come of each."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redis import Redis
from redis.exceptions import RedisError
from rq import Queue
from rq.job import Job as RQJob
from rq.serializers import JSONSerializer

from chaos.cluster import QUEUE
from fastgpt2 import Client, Engine
from fastgpt2.api.client.enqueue import enqueue_command, plan_job
from fastgpt2.errors import FastGPT2Error, JobFailed
from fastgpt2.protocol.keys import PRIORITIES
from fastgpt2.protocol.scripts import with_text

ENTRIES: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent.parent / "golden" / "demo_continuations.json").read_text("utf-8")
)["continuations"]
STREAM_READERS = 8
MOST_TOKENS = 100
DRAWN_TEXTS = 3


@dataclass
class Submitted:
    """A job, and how it may end.

    Attributes:
        expected: the token ids of its texts, known from transformers or, if they are drawn, from an engine that is left
            alone; None if it must fail.
        may_fail: words of the reason with which it may.
        read: what a reader of its stream put together, of each text.
    """

    id: str
    kind: str
    expected: list[list[int]] | None
    may_fail: str = ""
    may_be_cancelled: bool = False
    read: list[str] | None = None


@dataclass
class DrawnPrompt:
    """A prompt, the options of a draw, and the token ids of its texts at their longest."""

    prompt: str
    fields: dict[str, Any]
    ids: list[list[int]]


def draw(count: int) -> list[DrawnPrompt]:
    """Draw several texts of each of a few prompts."""
    engine, made = Engine.load("demo", threads=1), []
    for seed, entry in enumerate(ENTRIES[:count]):
        fields: dict[str, Any] = {
            "temperature": 1.0,
            "top_p": 0.95,
            "repetition_penalty": 1.1,
            "seed": seed,
            "n": DRAWN_TEXTS,
        }
        result = engine.generate(entry["prompt"], max_new_tokens=MOST_TOKENS, ignore_eos=True, **fields)
        ids = [list(text.token_ids) for text in (result, *result.alternatives)]
        made.append(DrawnPrompt(entry["prompt"], fields, ids))
    return made


class Submission:
    """Submits jobs one by one.

    Attributes:
        repeated: how many answers were lost on the way, and the job was sent again: the same one.
    """

    def __init__(self, url: str, connection: Redis, seed: int) -> None:
        self._url, self._connection = url, connection
        self._random = random.Random(seed)
        self._client = Client(url, QUEUE)
        self._readers = threading.Semaphore(STREAM_READERS)
        self._threads: list[threading.Thread] = []
        self._cancellations: list[tuple[float, str]] = []
        self._drawn = draw(6)
        self.everything: list[Submitted] = []
        self.repeated = 0

    def submit(self, tend: Callable[[], None]) -> None:
        """Submit one more job, whatever it takes; `tend` is called meanwhile."""
        entry, tokens = self._random.choice(ENTRIES), self._random.randint(1, MOST_TOKENS)
        prompt, expected = entry["prompt"], [entry["ids"]]
        kind = self._random.choices(
            ["plain", "stream", "drawn", "cancelled", "refused", "deadline", "dependent"], [10, 3, 2, 1, 1, 1, 1]
        )[0]
        fields: dict[str, Any] = {"max_new_tokens": tokens, "ignore_eos": True, "stream": kind in ("stream", "drawn")}
        if kind == "deadline":
            fields["timeout"] = 60.0
        elif kind == "drawn":
            drawn = self._random.choice(self._drawn)
            prompt, expected = drawn.prompt, drawn.ids
            fields.update(drawn.fields)
        plan = plan_job(prompt, {**fields, "priority": self._random.choice(PRIORITIES)})
        job_id, call = enqueue_command(plan, QUEUE, None)
        if kind == "refused":  # as a plain RQ client could have it
            at = call.args.index("data") + 1
            data = b'["os.system", null, ["true"], {}]'
            call = type(call)(call.method, (*call.args[:at], data, *call.args[at + 1 :]))
        job = Submitted(job_id, kind, None if kind == "refused" else [ids[:tokens] for ids in expected])
        if kind == "refused":
            job.may_fail = "only fastgpt2.worker.tasks.generate is run here"
        elif kind == "deadline":
            job.may_fail = "took longer than the 60 s"
        job.may_be_cancelled = kind == "cancelled"
        self._say(lambda: self._connection.execute_command(*with_text(call.args)), tend)  # type: ignore[no-untyped-call]
        self.everything.append(job)
        if plan.options.stream:
            self._read(job)
        elif kind == "cancelled":
            self._cancellations.append((time.monotonic() + self._random.uniform(0, 2), job_id))
        elif kind == "dependent":
            self._say(lambda: self._depend(job), tend)

    def tend(self, now: float) -> None:
        """Cancel the jobs that are due to be cancelled."""
        for at, job_id in list(self._cancellations):
            if now >= at:
                with suppress(FastGPT2Error):  # away: tried again next time
                    self._client.cancel(job_id)
                    self._cancellations.remove((at, job_id))

    def finish(self) -> None:
        for thread in self._threads:
            thread.join(timeout=120)
        self._client.close()

    def _say(self, what: Callable[[], object], tend: Callable[[], None]) -> None:
        while True:
            try:
                what()
                return
            except RedisError:
                self.repeated += 1
                tend()
                time.sleep(0.05)

    def _depend(self, on: Submitted) -> None:
        """Enqueue another job, by plain RQ, that waits for this one; under the same id however often this is called."""
        entry = ENTRIES[0]
        parent = RQJob(on.id, connection=self._connection, serializer=JSONSerializer)
        child = f"after-{on.id}"
        if self._connection.hget(f"rq:job:{child}", "status") not in (None, b"created"):
            self._note_dependent(child, entry)
            return
        rq = Queue(QUEUE, connection=self._connection, serializer=JSONSerializer)
        rq.enqueue(
            "fastgpt2.worker.tasks.generate",
            entry["prompt"],
            job_id=child,
            depends_on=parent,
            max_new_tokens=5,
            ignore_eos=True,
            result_ttl=86400,
        )
        self._note_dependent(child, entry)

    def _note_dependent(self, child: str, entry: dict[str, Any]) -> None:
        self.everything.append(Submitted(child, "after", [entry["ids"][:5]]))

    def _read(self, job: Submitted) -> None:
        if not self._readers.acquire(blocking=False):
            return
        thread = threading.Thread(target=self._read_stream, args=(job,), daemon=True)
        self._threads.append(thread)
        thread.start()

    def _read_stream(self, job: Submitted) -> None:
        texts = [""] * len(job.expected or ())
        try:
            with Client(self._url, QUEUE) as client:
                client.status(job.id)  # so that it waits for a Redis that goes away later
                for piece in client.job(job.id).stream(timeout=300, replacements=True):
                    texts[piece.choice_index] = texts[piece.choice_index][: piece.at] + piece.text
            job.read = texts
        except JobFailed:
            pass
        except FastGPT2Error:
            job.read = None  # Redis was away for longer than a reader waits
        finally:
            self._readers.release()
