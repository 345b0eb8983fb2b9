"""The jobs in a state by pages, one job in full, and running jobs again: over HTTP, by the shell, and by stock RQ."""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any
from urllib.parse import quote

import pytest
from redis import Redis
from rq import Callback, Queue, RateLimit, Retry
from rq.job import Job as RQJob
from rq.job import JobStatus
from rq.results import Result
from rq.serializers import JSONSerializer
from starlette.testclient import TestClient
from support.running import in_thread
from support.turns import Turns

from fastgpt2 import Client
from fastgpt2.api.client.admission import Admission
from fastgpt2.api.client.enqueue import plan_job
from fastgpt2.api.client.flow import Driver
from fastgpt2.api.http.app import create_app
from fastgpt2.api.http.service import Bounds
from fastgpt2.api.http.tokens import Token, Tokens
from fastgpt2.cli import main
from fastgpt2.errors import JobTimedOut, PromptTooLong, TokenLimitReached
from fastgpt2.protocol.keys import account_jobs_key, account_key
from fastgpt2.protocol.stored_jobs import HIDDEN
from fastgpt2.system.redis_server import RedisServer

TASK = "fastgpt2.worker.tasks.generate"
HOSTILE = "<img src=x onerror=alert(1)> \x1b[31mred\x1b[0m \u202eback\u202c \x00"
SECRET = "My secret prompt is long enough"


@pytest.fixture
def web(redis_server: RedisServer, client: Client) -> Iterator[TestClient]:
    with open_web(redis_server, client) as web:
        yield web


def open_web(redis_server: RedisServer, client: Client, **bounds: Any) -> TestClient:
    app = create_app(redis_server.url, client.queue_name, Bounds(timeout=1, **bounds), lambda: False)
    return TestClient(app, base_url="http://localhost")


@pytest.fixture
def shell(redis_server: RedisServer, client: Client, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Any:
    """Runs a command in this process; returns its status, and what it printed on both streams."""
    monkeypatch.setenv("FASTGPT2_REDIS_URL", redis_server.url)
    monkeypatch.setenv("FASTGPT2_QUEUE", client.queue_name)

    def run(*words: str) -> tuple[int, str, str]:
        status = main(words)
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


def fail(queue: Queue, error: str = "KeyError: 'x'", job_id: str | None = None, ttl: int = 600, **kwargs: Any) -> RQJob:
    """Enqueue a job as a stock client does, and write its failure as a stock worker does."""
    job = queue.enqueue(TASK, kwargs={"prompt": SECRET, **kwargs}, job_id=job_id, failure_ttl=ttl)
    return fail_now(queue, job, error, ttl)


def fail_now(queue: Queue, job: RQJob, error: str, ttl: int = 600, status: JobStatus = JobStatus.FAILED) -> RQJob:
    queue.connection.lrem(queue.key, 0, job.id)
    with queue.connection.pipeline() as pipeline:
        job.set_status(status, pipeline=pipeline)
        job.failed_job_registry.add(job, ttl, error, pipeline)
        Result.create_failure(job, ttl, error, pipeline=pipeline)
        pipeline.execute()
    return job


def read_pages(web: TestClient, limit: int, state: str = "failed") -> list[list[str]]:
    pages: list[list[str]] = []
    after: dict[str, str] = {}
    while True:
        page = web.get("/v1/jobs", params={"state": state, "limit": limit, **after}).json()
        pages.append([job["id"] for job in page["data"]])
        assert page["has_more"] == (page["next"] is not None)
        if not page["has_more"]:
            return pages
        after = {"after": page["next"]}


class TestList:
    def test_the_failed_ones_with_their_sentences(self, web: TestClient, queue: Queue, client: Client) -> None:
        ours = "fastgpt2.errors.PromptTooLong: prompt tokens 301 make too many"
        defect = "Traceback:\n  File x\nValueError: no such thing\n"
        jobs = {
            fail(queue, defect, ttl=500).id: ("error", "ValueError: no such thing"),
            fail(queue, ours, ttl=510).id: ("prompt_too_long", "prompt tokens 301 make too many"),
            fail(queue, "", ttl=520).id: (None, None),
            fail(queue, f"fastgpt2.errors.BadRequest: {HOSTILE}", ttl=530).id: ("bad_request", HOSTILE),
            fail(queue, "fastgpt2.errors.PoisonJob: 4 workers died", ttl=540).id: ("poison", "4 workers died"),
        }  # fmt: skip
        stopped = fail_now(
            queue, queue.enqueue(TASK, "a"), "fastgpt2.errors.JobStopped: on request", 550, JobStatus.STOPPED
        )
        client.enqueue("waits")
        page = web.get("/v1/jobs", params={"state": "failed"}).json()
        assert (page["object"], page["total"], page["has_more"], page["next"]) == ("list", 6, False, None)
        found = {job["id"]: (job["error"], job["message"]) for job in page["data"]}
        assert found == {**jobs, stopped.id: ("on_request", "on request")}
        assert list(found) == [stopped.id, *reversed(jobs)], "the latest first"
        assert {job["status"] for job in page["data"]} == {"failed", "stopped"}
        assert not any("prompt" in job for job in page["data"])

    def test_thousands_by_pages_though_many_failed_in_one_second(
        self, web: TestClient, redis: Redis, queue: Queue
    ) -> None:
        expected = [f"job-{number:04}" for number in range(900)]
        with redis.pipeline() as pipeline:
            for nth, job_id in enumerate(expected):
                name = queue.name if nth % 2 else f"{queue.name}-low"
                pipeline.hset(f"rq:job:{job_id}", mapping={"status": "failed", "origin": name})
                pipeline.expire(f"rq:job:{job_id}", 300)
                pipeline.zadd(f"rq:failed:{name}", {job_id: 1e10 + nth // 350})
            pipeline.execute()
        pages = read_pages(web, 100)
        found = [job_id for page in pages for job_id in page]
        assert (len(pages), sorted(found)) == (9, expected), "each once"
        # A page goes on behind the last job of the one before, also when that has left the list.
        first = web.get("/v1/jobs", params={"state": "failed", "limit": 50}).json()
        name = first["data"][-1]["queue"]
        redis.zrem(f"rq:failed:{name}", first["data"][-1]["id"])
        second = web.get("/v1/jobs", params={"state": "failed", "limit": 50, "after": first["next"]}).json()
        assert [job["id"] for job in second["data"]] == found[50:100]
        assert second["total"] == 899

    def test_each_state(self, web: TestClient, queue: Queue, redis: Redis, client: Client) -> None:
        first = queue.enqueue(TASK, "a")
        deferred = queue.enqueue(TASK, "a", depends_on=first)
        high = client.enqueue("a", priority="high")
        cancelled = client.enqueue("a")
        cancelled.cancel()
        redis.zadd(f"rq:scheduled:{queue.name}", {first.id: time.time() + 60})
        redis.zadd(f"rq:wip:{queue.name}", {f"{first.id}:an-execution": time.time() + 60})
        expected = {
            "queued": [high.id, first.id], "deferred": [deferred.id], "canceled": [cancelled.id], "finished": [],
            "scheduled": [first.id], "started": [first.id], "failed": [],
        }  # fmt: skip
        assert {state: [*chain(*read_pages(web, 1, state))] for state in expected} == expected

    def test_a_models_own_queue_counts(self, web: TestClient, redis: Redis, queue: Queue) -> None:
        redis.zadd(f"fastgpt2:models:{queue.name}", {"a/model": 0})
        own = Queue(f"{queue.name}-low@a/model", connection=redis, serializer=JSONSerializer)
        job = fail(own)
        assert read_pages(web, 10) == [[job.id]]
        details = web.get(f"/v1/jobs/{job.id}", params={"details": "true"}).json()["details"]
        assert (details["priority"], details["model"]) == ("low", "a/model")

    def test_what_is_no_job_is_passed_over(self, web: TestClient, redis: Redis, queue: Queue) -> None:
        job = fail(queue)
        redis.zadd(f"rq:failed:{queue.name}", {b"gone": 2e10, b"\xff\xfe": 2e10, b"x" * 5000: 2e10, b"odd": 2e10})
        redis.set("rq:job:odd", "no hash", ex=60)
        redis.set(f"rq:failed:{queue.name}-low", "no set", ex=60)
        redis.delete(f"rq:results:{job.id}")
        redis.set(f"rq:results:{job.id}", "no stream", ex=60)
        page = web.get("/v1/jobs", params={"state": "failed"}).json()
        assert [(one["id"], one["error"]) for one in page["data"]] == [(job.id, None)]
        redis.delete(f"rq:failed:{queue.name}-low", f"rq:failed:{queue.name}")

    @pytest.mark.parametrize(
        ("query", "sentence"),
        [
            ({"state": "nosuch"}, "state must be one of queued, started, finished, failed"),
            ({"state": ""}, "state must be one of"),
            ({"state": "failed", "after": "x"}, "after must be the `next` of an earlier page"),
            ({"state": "failed", "after": "é"}, "after must be the `next` of an earlier page"),
            ({"after": "x"}, "after is given without a state"),
            ({"state": "failed", "limit": "0"}, "limit must be a whole number from 1 to 100"),
        ],
    )
    def test_bad_queries(self, web: TestClient, query: dict[str, str], sentence: str) -> None:
        answer = web.get("/v1/jobs", params=query)
        assert answer.status_code == 400
        assert sentence in answer.json()["error"]["message"]


class TestDetails:
    def test_all_of_a_failed_job(self, web: TestClient, queue: Queue) -> None:
        text = f"Traceback (most recent call last):\n  File x\nKeyError: {SECRET!r}\n"
        job = fail(queue, text, temperature=0.5, stop=["x"] * 3, promt="a slip", retry=None)
        plain = web.get(f"/v1/jobs/{job.id}").json()
        assert "details" not in plain
        body = web.get(f"/v1/jobs/{job.id}", params={"details": "true"}).json()
        details = body["details"]
        assert details["request"] == {"temperature": 0.5, "stop": ["x"] * 3}, "no prompt, and nothing that may be one"
        assert details["failure"] == text.replace(SECRET, HIDDEN)
        assert SECRET not in json.dumps(body)
        assert HIDDEN in body["error"]["message"]
        assert (details["queue"], details["priority"], details["shows_prompts"]) == (queue.name, "normal", False)

    def test_prompts_are_shown_where_the_operator_wants(
        self, redis_server: RedisServer, client: Client, queue: Queue
    ) -> None:
        job = fail(queue, f"KeyError: {SECRET!r}")
        positional = queue.enqueue(TASK, [1, 2, 3], max_new_tokens=2)
        with open_web(redis_server, client, show_prompts=True) as web:
            details = web.get(f"/v1/jobs/{job.id}", params={"details": "1"}).json()["details"]
            assert (details["request"], details["shows_prompts"]) == ({"prompt": SECRET}, True)
            assert SECRET in details["failure"]
            (listed,) = web.get("/v1/jobs", params={"state": "failed"}).json()["data"]
            assert (listed["prompt"], listed["message"]) == (SECRET, f"KeyError: {SECRET!r}")
            details = web.get(f"/v1/jobs/{positional.id}", params={"details": "1"}).json()["details"]
            assert details["request"] == {"prompt": [1, 2, 3], "max_new_tokens": 2}

    def test_a_prompt_that_cannot_be_read_is_in_no_sentence(self, web: TestClient, redis: Redis, queue: Queue) -> None:
        job = fail(queue, f"Traceback\nKeyError: {SECRET!r}")
        ours = fail(queue, "fastgpt2.errors.BadRequest: max_new_tokens must be a whole number")
        for one in (job, ours):
            redis.hset(one.key, "data", b"\xff\x00 damaged")
        listed = web.get("/v1/jobs", params={"state": "failed"}).json()["data"]
        details = web.get(f"/v1/jobs/{job.id}", params={"details": "true"}).json()["details"]
        assert SECRET not in json.dumps([listed, details])
        assert details["request"] is None
        assert "max_new_tokens must be a whole number" in [one["message"] for one in listed]

    def test_a_prompt_of_several_lines_is_hidden_as_a_whole(self, web: TestClient, queue: Queue) -> None:
        lines = f"first line\n{SECRET}\nlast line of it"
        job = fail(queue, f"Traceback\nValueError: no: {lines}\n", prompt=lines)
        (listed,) = web.get("/v1/jobs", params={"state": "failed"}).json()["data"]
        body = web.get(f"/v1/jobs/{job.id}", params={"details": "true"}).json()
        assert listed["message"] == body["error"]["message"] == f"ValueError: no: {HIDDEN}"
        assert body["details"]["failure"] == f"Traceback\nValueError: no: {HIDDEN}\n"

    def test_echo_is_not_shown_either(self, web: TestClient, client: Client, turns: Turns) -> None:
        texts = [
            client.enqueue(SECRET, echo=True, max_new_tokens=3),
            client.enqueue([464, 2], echo=True, n=2, temperature=1.0, max_new_tokens=3),
        ]
        turns.until(lambda: all(job.status() == "finished" for job in texts), "their ends")
        body = web.get(f"/v1/jobs/{texts[0].id}", params={"details": "true"}).json()
        assert body["result"]["text"].startswith(HIDDEN)
        assert SECRET not in json.dumps(body)
        assert SECRET in web.get(f"/v1/jobs/{texts[0].id}").json()["result"]["text"], "its client has all of it"
        body = web.get(f"/v1/jobs/{texts[1].id}", params={"details": "true"}).json()
        assert [body["result"]["text"], body["result"]["alternatives"][0]["text"]] == [HIDDEN, HIDDEN]

    def test_log_probabilities_are_left_out(self, web: TestClient, client: Client, turns: Turns) -> None:
        job = client.enqueue("a", n=2, temperature=1.0, logprobs=3, max_new_tokens=2)
        turns.until(lambda: job.status() == "finished", "its end")
        result = web.get(f"/v1/jobs/{job.id}", params={"details": "true"}).json()["result"]
        for text in (result, *result["alternatives"]):
            assert not {"logprobs", "prompt_logprobs"} & text.keys()
        assert "logprobs" in web.get(f"/v1/jobs/{job.id}").json()["result"]

    def test_strange_entries(self, web: TestClient, redis: Redis, queue: Queue) -> None:
        values: Any = {
            "stop": ["é" * 9000],
            "logit_bias": {"1": float("nan")},
            "temperature": "\ud800",
            "max_new_tokens": None,
        }
        job = fail(queue, "x\n" * 200_000 + "the end", **values)
        redis.hset(
            job.key,
            mapping={"retries_left": "many", "timeout": "x" * 100_000, "dependency_ids": "{", "created_at": "?"},
        )
        body = web.get(f"/v1/jobs/{job.id}", params={"details": "true"}).json()["details"]
        assert (body["retries_left"], body["job_timeout"], body["depends_on"], body["created_at"]) == (
            None,
            None,
            [],
            None,
        )
        assert len(body["request"]["stop"]) < 3000
        assert "NaN" in body["request"]["logit_bias"] or "nan" in body["request"]["logit_bias"]
        assert body["failure"].endswith("the end")
        assert len(body["failure"]) < 70_000

    def test_bad_queries(self, web: TestClient, queue: Queue) -> None:
        answer = web.get(f"/v1/jobs/{fail(queue).id}", params={"details": "perhaps"})
        assert (answer.status_code, answer.json()["error"]["message"]) == (
            400,
            "details must be true or false, not 'perhaps'",
        )


class TestRequeue:
    def test_a_failed_job_runs_again_under_its_id(
        self, web: TestClient, client: Client, redis: Redis, turns: Turns
    ) -> None:
        job = client.enqueue("the " * 300, max_new_tokens=400)
        turns.until(lambda: job.status() == "failed", "its end")
        waiting = client.enqueue("first")
        answer = web.post(f"/v1/jobs/{job.id}/requeue")
        body = answer.json()
        assert (answer.status_code, answer.headers["location"]) == (202, f"/v1/jobs/{job.id}")
        assert (body["id"], body["status"], body["error"], body["ended_at"]) == (job.id, "queued", None, None)
        ids = redis.lrange(f"rq:queue:{client.queue_name}", 0, -1)
        assert ids == [waiting.id.encode(), job.id.encode()], "at the end of its queue"
        assert redis.ttl(f"rq:job:{job.id}") == -1, "it waits for as long as it takes"
        assert read_pages(web, 10) == [[]]
        # Who waits for it has its new end, not the old one.
        future = in_thread(lambda: client.job(job.id).result(timeout=60))
        again = web.post(f"/v1/jobs/{job.id}/requeue")
        assert (again.status_code, again.json()["error"]["code"]) == (409, "job_not_ended")
        assert "wait for its end, or cancel it first" in again.json()["error"]["message"]
        turns.until(lambda: job.status() == "failed", "its end")
        assert isinstance(future.exception(60), PromptTooLong)
        assert web.get(f"/v1/jobs/{job.id}").json()["attempts"] == 2

    def test_a_finished_job_runs_again_as_a_new_one(self, web: TestClient, client: Client, turns: Turns) -> None:
        options: Any = {"temperature": 1.2, "max_new_tokens": 12, "n": 2, "priority": "high", "result_ttl": 77}
        job = client.enqueue("Once", **options)
        turns.until(lambda: job.status() == "finished", "its end")
        answer = web.post(f"/v1/jobs/{job.id}/requeue")
        new = client.job(answer.json()["id"])
        assert new.id != job.id
        assert answer.headers["location"] == f"/v1/jobs/{new.id}"
        turns.until(lambda: new.status() == "finished", "the new one's end")
        first, second = job.result(5), new.result(5)
        assert (first.text, first.seed, first.alternatives[0].text) == (
            second.text,
            second.seed,
            second.alternatives[0].text,
        )
        details = web.get(f"/v1/jobs/{new.id}", params={"details": "true"}).json()["details"]
        assert (details["priority"], details["result_ttl"]) == ("high", 77)

    def test_a_stock_clients_draw_is_had_again(
        self, web: TestClient, queue: Queue, client: Client, turns: Turns
    ) -> None:
        job = queue.enqueue(TASK, "Once", temperature=1.5, max_new_tokens=12, result_ttl=-1, job_timeout=-1)
        turns.until(lambda: client.status(job.id) == "finished", "its end")
        new = client.job(web.post(f"/v1/jobs/{job.id}/requeue").json()["id"])
        turns.until(lambda: new.status() == "finished", "the new one's end")
        assert new.result(5).text == client.result(job.id, 5).text

    def test_a_cancelled_job(self, web: TestClient, client: Client) -> None:
        job = client.enqueue("a", max_new_tokens=3)
        job.cancel()
        new = web.post(f"/v1/jobs/{job.id}/requeue").json()
        assert (new["id"] != job.id, new["status"]) == (True, "queued")
        assert job.status() == "canceled"

    def test_once_however_often_it_is_asked(self, web: TestClient, client: Client) -> None:
        job = client.enqueue("a")
        job.cancel()
        headers = {"idempotency-key": str(uuid.uuid4())}
        ids = {web.post(f"/v1/jobs/{job.id}/requeue", headers=headers).json()["id"] for _ in range(3)}
        assert len(ids) == 1

    def test_jobs_of_stock_clients_keep_what_they_have(self, web: TestClient, queue: Queue, redis: Redis) -> None:
        job = fail(queue)
        job.meta["mine"] = 1
        job.save_meta()  # type: ignore[no-untyped-call]
        waiting = queue.enqueue(
            TASK, "b", ttl=300, meta={"k": "v"}, retry=Retry(max=2, interval=5), depends_on=None,
            on_failure=Callback("os.system"), on_success=Callback("os.system"),
        )  # fmt: skip
        fail_now(queue, waiting, "KeyError: 1")
        for one in (job, waiting):
            assert web.post(f"/v1/jobs/{one.id}/requeue").json()["status"] == "queued"
        found = RQJob.fetch(waiting.id, connection=redis, serializer=JSONSerializer)
        assert (found.meta, found.retries_left, found.ttl, found.started_at) == ({"k": "v"}, 2, 300, None)
        assert 290 < redis.ttl(waiting.key) <= 300
        assert RQJob.fetch(job.id, connection=redis, serializer=JSONSerializer).meta == {"mine": 1}
        # As rq itself would leave it, so that rq finds nothing to do.
        assert job.failed_job_registry.get_job_ids() == []
        assert queue.get_job_ids() == [job.id, waiting.id]

    def test_what_waits_for_a_job_runs_after_it(
        self, web: TestClient, queue: Queue, client: Client, redis: Redis, turns: Turns
    ) -> None:
        first = queue.enqueue(TASK, "a", max_new_tokens=1)
        second = queue.enqueue(TASK, "b", max_new_tokens=1, depends_on=first)
        fail_now(queue, first, "KeyError: 1")
        assert web.post(f"/v1/jobs/{first.id}/requeue").status_code == 202
        assert redis.ttl(first.dependents_key) == redis.ttl(second.dependencies_key) == -1
        turns.until(lambda: client.status(second.id) == "finished", "the second one's end")

    def test_rq_requeue_works_as_ever(self, web: TestClient, queue: Queue, client: Client, turns: Turns) -> None:
        job = queue.enqueue(TASK, "a", max_new_tokens=2, timeout=0.000001)
        turns.until(lambda: client.status(job.id) == "failed", "its end")
        RQJob.fetch(job.id, connection=queue.connection, serializer=JSONSerializer).requeue()
        assert web.get(f"/v1/jobs/{job.id}").json()["error"] is None
        future = in_thread(lambda: client.result(job.id, 60))
        turns.until(lambda: client.status(job.id) == "failed", "its end")
        assert isinstance(future.exception(60), JobTimedOut)
        assert web.get(f"/v1/jobs/{job.id}").json()["attempts"] == 2

    def test_a_job_under_a_rate_limit_takes_a_slot(self, web: TestClient, queue: Queue, redis: Redis) -> None:
        limit = RateLimit(f"limit-{queue.name}", 1)
        jobs = [queue.enqueue(TASK, "a", rate_limit=limit) for _ in range(2)]
        fail_now(queue, jobs[0], "KeyError: 1")
        redis.zrem(f"rq:rl:{limit.key}:allowed", jobs[0].id)  # as a worker does that has failed it
        redis.zadd(f"rq:rl:{limit.key}:rate_limited", {jobs[1].id: 1})  # for long, not for less than a second
        assert web.post(f"/v1/jobs/{jobs[0].id}/requeue").json()["status"] == "rate_limited"
        assert queue.get_job_ids() == [jobs[1].id], "the one that waited for longer has the slot"
        assert redis.zrange(f"rq:rl:{limit.key}:rate_limited", 0, -1) == [jobs[0].id.encode()]
        assert web.get(f"/v1/jobs/{jobs[0].id}", params={"details": "true"}).json()["status"] == "rate_limited"

    @pytest.mark.parametrize("job_id", ["user:42", "a.b c", "two\nlines", "Schlüssel", "<b>", "a/b"])
    def test_ids_that_an_older_rq_allowed(self, web: TestClient, redis: Redis, queue: Queue, job_id: str) -> None:
        made = fail(queue)
        redis.rename(made.key, f"rq:job:{job_id}")
        redis.zrem(f"rq:failed:{queue.name}", made.id)
        redis.zadd(f"rq:failed:{queue.name}", {job_id: 2e10})
        assert read_pages(web, 5) == [[job_id]]
        answer = web.post(f"/v1/jobs/{quote(job_id, safe='')}/requeue")
        assert (answer.status_code, answer.json()["id"]) == (202, job_id)
        assert answer.headers["location"] == f"/v1/jobs/{quote(job_id, safe='')}"
        redis.delete(f"rq:job:{job_id}")

    def test_what_is_refused(self, web: TestClient, client: Client, queue: Queue, redis: Redis) -> None:
        def refused(job_id: str) -> tuple[int, str, str]:
            answer = web.post(f"/v1/jobs/{job_id}/requeue")
            return answer.status_code, answer.json()["error"]["code"], answer.json()["error"]["message"]

        assert refused("nosuch")[:2] == (404, "job_not_found")
        failed = fail(queue)
        answer = web.post(f"/v1/jobs/{failed.id}/requeue", headers={"origin": "http://elsewhere.example"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden_origin")
        assert failed.failed_job_registry.get_job_ids() == [failed.id]
        other = Queue(f"{queue.name}-other", connection=redis, serializer=JSONSerializer)
        foreign = fail(other)
        assert refused(foreign.id)[:2] == (404, "job_not_found")
        assert other.failed_job_registry.get_job_ids() == [foreign.id]
        unserved = fail(Queue(f"{queue.name}@nobody", connection=redis, serializer=JSONSerializer))
        status, code, message = refused(unserved.id)
        assert (status, code) == (404, "model_not_found")
        assert "no worker serves the model 'nobody'; served are: none" in message
        damaged = client.enqueue("a")
        damaged.cancel()
        redis.hset(f"rq:job:{damaged.id}", "data", b"\xff\x00")
        status, _, message = refused(damaged.id)
        assert (status, "cannot run again: its data cannot be read" in message) == (400, True)
        other_task = queue.enqueue("os.system", "x")
        client.cancel(other_task.id)
        status, _, message = refused(other_task.id)
        assert (status, "it names the function 'os.system'" in message) == (400, True)

    def test_the_limits_of_a_token(self, redis_server: RedisServer, client: Client, queue: Queue) -> None:
        secret = "a-token-of-many-letters"
        token = Token(hashlib.sha256(secret.encode()).digest(), "alice", waiting=1)
        app = create_app(redis_server.url, client.queue_name, Bounds(timeout=1), lambda: False, Tokens([token]))
        jobs, cancelled = [fail(queue), fail(queue)], client.enqueue("a")
        cancelled.cancel()
        headers = {"authorization": f"Bearer {secret}"}
        with TestClient(app, base_url="http://localhost", headers=headers) as web:

            def run_again(job_id: str) -> tuple[int, str | None]:
                answer = web.post(f"/v1/jobs/{job_id}/requeue")
                return answer.status_code, answer.headers.get("x-ratelimit-remaining-requests")

            assert run_again("nosuch")[0] == 404
            assert run_again(jobs[0].id) == (202, "0")
            assert run_again(jobs[0].id)[0] == 409
            assert run_again(jobs[1].id) == run_again(cancelled.id) == (429, "0")
            client.cancel(jobs[0].id)
            assert run_again(cancelled.id) == (202, "0")
        assert jobs[1].failed_job_registry.get_job_ids() == [jobs[1].id], "it stays as it is"

    def test_two_who_ask_at_once_have_no_more_room_than_their_token(
        self, redis_server: RedisServer, redis: Redis, client: Client, queue: Queue
    ) -> None:
        secrets = {"alice": "a-token-of-many-letters", "bob": "another-of-many-letters"}
        tokens = [Token(hashlib.sha256(secret.encode()).digest(), name, waiting=2) for name, secret in secrets.items()]
        app = create_app(redis_server.url, client.queue_name, Bounds(timeout=1), lambda: False, Tokens(tokens))
        jobs = [fail(queue) for _ in range(6)]
        with TestClient(app, base_url="http://localhost") as web, ThreadPoolExecutor(12) as threads:

            def run_again(job: RQJob, name: str = "alice") -> int:
                headers = {"authorization": f"Bearer {secrets[name]}"}
                return web.post(f"/v1/jobs/{job.id}/requeue", headers=headers).status_code

            answers = list(threads.map(run_again, jobs * 2))
            assert answers.count(202) == 2
            assert set(answers) <= {202, 409, 429}
            room = account_jobs_key(client.queue_name, "alice")
            again = queue.get_job_ids()
            assert sorted(redis.zrange(room, 0, -1)) == sorted(map(str.encode, again))
            (left, *_) = [job for job in jobs if job.id not in again]
            # It is bob's from now on, and no room of alice's is taken by it.
            assert [run_again(left, name) for name in ("bob", "alice")] == [202, 409]
            assert redis.hget(left.key, "fastgpt2_token") == b"bob"
            assert redis.zcard(room) == 2

    def test_room_for_a_job_that_is_about_to_be_requeued_stays(
        self, redis: Redis, client: Client, queue: Queue
    ) -> None:
        job, plan = fail(queue), plan_job("a", {"max_new_tokens": 9})
        driver = Driver(client.redis_url)

        def ask(job_id: str) -> None:
            driver.run(Admission(client.queue_name, "alice", 1, 1000).ask([job_id], [plan], None))

        ask(job.id)
        with pytest.raises(TokenLimitReached):
            ask("another")
        # Half a minute later it counts as ended, and what it had reserved is reserved once.
        redis.zadd(account_jobs_key(client.queue_name, "alice"), {job.id: 1})
        ask(job.id)
        assert redis.hget(account_key(client.queue_name, "alice"), "reserved") == b"10"
        driver.close()

    def test_a_full_queue(self, redis_server: RedisServer, client: Client, queue: Queue) -> None:
        job = fail(queue)
        client.enqueue("a")
        with open_web(redis_server, client, max_queue=1) as web:
            answer = web.post(f"/v1/jobs/{job.id}/requeue")
            assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
            assert web.get(f"/v1/jobs/{job.id}").json()["status"] == "failed", "it stays as it is"
            assert job.failed_job_registry.get_job_ids() == [job.id]


class TestShell:
    def test_lists(self, shell: Any, queue: Queue, client: Client, turns: Turns) -> None:
        assert shell("jobs") == (0, "no jobs yet\n", "")
        assert shell("jobs", "--failed") == (0, "no failed jobs\n", "")
        finished = client.enqueue("a", max_new_tokens=2)
        turns.until(lambda: finished.status() == "finished", "its end")
        record = {"id": finished.id, "status": "finished", "finish_reason": "length"}
        client.connection.lpush(f"fastgpt2:latest:{queue.name}", json.dumps(record))
        # What came of it before it was run again is in the list no more.
        client.connection.rpush(f"fastgpt2:latest:{queue.name}", json.dumps({**record, "status": "failed"}))
        status, out, _ = shell("jobs")
        assert (status, out.count(finished.id), "finished" in out, "failed" in out) == (0, 1, True, False)
        jobs = [fail(queue, f"BadRequest: {HOSTILE} {SECRET}", ttl=600 + nth) for nth in range(3)]
        status, out, _ = shell("jobs", "--failed", "--limit", "2")
        heading, *lines, rest = out.splitlines()
        assert heading.split() == ["JOB", "STATE", "ATTEMPTS", "ENQUEUED", "ENDED", "WORKER", "WHY"]
        assert [line.split()[0] for line in lines] == [jobs[2].id, jobs[1].id]
        assert "\\x1b[31mred\\x1b[0m \\u202eback\\u202c \\x00" in lines[0], "a terminal obeys none of it"
        assert HIDDEN in lines[0]
        assert rest == "2 of 3 failed jobs; --limit lists more"
        assert SECRET in shell("jobs", "--failed", "--show-prompts")[1]
        found = json.loads(shell("jobs", "--state", "failed", "--json")[1])
        assert ([job["id"] for job in found["data"]], found["total"]) == ([job.id for job in reversed(jobs)], 3)
        assert shell("jobs", "--failed", "--state", "queued")[0] == 2

    def test_requeues_by_name(self, shell: Any, queue: Queue, client: Client) -> None:
        failed, cancelled = fail(queue), client.enqueue("a")
        cancelled.cancel()
        status, out, err = shell("requeue", failed.id, "--max-queue", "9", cancelled.id, "no\u202esuch")
        assert status == 1
        assert out.splitlines()[0] == f"job {failed.id} is requeued"
        assert out.splitlines()[1].startswith(f"job {cancelled.id} runs again, as the new job ")
        assert "fastgpt2 requeue: no job 'no\\u202esuch'" in err
        status, out, err = shell("requeue", failed.id)
        assert (status, out) == (1, "")
        assert f"job {failed.id} is queued, so it runs anyway" in err

    def test_requeues_all_that_failed(self, shell: Any, redis: Redis, queue: Queue) -> None:
        assert shell("requeue", "--failed") == (0, "no failed jobs\n", "")
        jobs = [fail(queue) for _ in range(5)]
        jobs.append(fail(Queue(f"{queue.name}-high", connection=redis, serializer=JSONSerializer)))
        redis.zadd(f"rq:failed:{queue.name}", {b"gone": 2e10, b"\xff": 2e10})
        status, out, err = shell("requeue", "--failed")
        assert (status, out) == (1, "6 of 8 failed jobs are requeued\n")
        assert "no job 'gone'" in err
        assert sorted(queue.get_job_ids()) == sorted(job.id for job in jobs[:5])
        assert all(job.get_status() == "queued" for job in jobs)
        for job in jobs:
            fail_now(queue, job, "again")
        status, out, err = shell("requeue", "--failed", "--max-queue", "3")
        assert (status, out.splitlines()[-1].split()[0]) == (1, "2"), "one of the -high queue waits"
        assert "is full: 3 jobs wait" in err

    @pytest.mark.parametrize(
        ("words", "sentence"),
        [
            ([], "name the jobs, as in fastgpt2 requeue JOB..., or give --failed"),
            (["x", "--failed"], "jobs are named beside --failed"),
            (["--all"], "unknown option --all; did you mean --failed?"),
            ([""], "JOB is empty: fastgpt2 requeue [OPTIONS] [JOB...]"),
            (["a", ""], "JOB is empty"),
            (["a", "--nosuch"], "unknown option --nosuch"),
        ],
    )
    def test_wrong_words(self, shell: Any, words: list[str], sentence: str) -> None:
        status, out, err = shell("requeue", *words)
        assert (status, out) == (2, "")
        assert sentence in err

    def test_ids_behind_dashes(self, shell: Any) -> None:
        status, _, err = shell("requeue", "--", "-x", "--failed")
        assert (status, err.count("no job")) == (1, 2)
