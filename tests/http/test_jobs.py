"""`/v1/jobs` over real HTTP: work that is left behind."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx2 as httpx
import pytest
from support.running import jobs_held, wait_until

from fastgpt2 import Client, Engine
from fastgpt2.system.up import System

PROMPT = "It was a dark night"
LONG = {"prompt": "a", "max_new_tokens": 500, "ignore_eos": True}


@pytest.fixture
def web(system: System) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=system.http_url, trust_env=False, timeout=60) as client:
        yield client


@pytest.fixture
def queue(system: System) -> Iterator[Client]:
    with Client(system.redis_url) as client:
        yield client


def created(web: httpx.Client, **fields: Any) -> str:
    answer = web.post("/v1/jobs", json={"prompt": PROMPT, **fields})
    assert answer.status_code == 202
    job = answer.json()
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    assert job["object"] == "job"
    return str(job["id"])


def read_events(text: str) -> list[tuple[str, str, Any]]:
    """Each event's name, id and data."""
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if "data" in fields:
            found.append((fields.get("event", ""), fields.get("id", ""), json.loads(fields["data"])))
    return found


def test_a_job_is_left_behind_and_asked_for_later(web: httpx.Client, engine: Engine) -> None:
    job_id = created(web, max_new_tokens=8)
    job = web.get(f"/v1/jobs/{job_id}", params={"wait": 30}).json()
    assert (job["id"], job["status"], job["error"]) == (job_id, "finished", None)
    expected = engine.generate(PROMPT, max_new_tokens=8)
    assert job["result"]["text"] == expected.text
    assert job["result"]["token_ids"] == list(expected.token_ids)
    assert job["result"]["usage"]["completion_tokens"] == 8
    assert job["enqueued_at"] <= job["started_at"] <= job["ended_at"]
    assert job["attempts"] == 1
    assert job["worker"]
    # Waiting does not outlast the time that was named; a job that has ended is answered at once.
    assert web.get(f"/v1/jobs/{job_id}", params={"wait": 60}).elapsed.total_seconds() < 30


def test_waiting_is_over_in_time(web: httpx.Client) -> None:
    with jobs_held():
        job_id = created(web, **LONG)
        job = web.get(f"/v1/jobs/{job_id}", params={"wait": 0.05}).json()
        assert job["status"] in ("queued", "started")
        assert (job["result"], job["error"]) == (None, None)
        web.delete(f"/v1/jobs/{job_id}")


def test_its_text_as_it_comes_and_from_where_it_was_left(web: httpx.Client, engine: Engine) -> None:
    job_id = created(web, max_new_tokens=40, ignore_eos=True, stream=True)
    expected = engine.generate(PROMPT, max_new_tokens=40, ignore_eos=True).text
    got = read_events(web.get(f"/v1/jobs/{job_id}/stream").text)
    assert "".join(data["text"] for name, _, data in got if not name) == expected
    assert (got[-1][0], got[-1][2]["result"]["text"]) == ("end", expected)
    ids = [int(event_id) for name, event_id, _ in got if not name]
    assert ids == sorted(ids)
    assert ids[-1] == len(expected)
    for known in (0, ids[0], ids[len(ids) // 2], ids[0] + 1, ids[-1], ids[-1] + 100):
        again = read_events(web.get(f"/v1/jobs/{job_id}/stream", headers={"last-event-id": str(known)}).text)
        assert "".join(data["text"] for name, _, data in again if not name) == expected[known:]
        assert again[-1][0] == "end"


def test_without_stream_its_text_comes_at_the_end(web: httpx.Client, engine: Engine) -> None:
    job_id = created(web, max_new_tokens=10)
    got = read_events(web.get(f"/v1/jobs/{job_id}/stream").text)
    assert [name for name, _, _ in got] == ["", "end"]
    assert got[0][2] == {"text": engine.generate(PROMPT, max_new_tokens=10).text, "at": 0}


def test_several_texts_as_they_come_and_from_where_they_were_left(web: httpx.Client, engine: Engine) -> None:
    options: Any = {"temperature": 1.1, "seed": 11, "n": 3, "choice_index": 1, "max_new_tokens": 25}
    job_id = created(web, stream=True, **options)
    result = engine.generate(PROMPT, **options)
    expected = {text.choice_index: text.text for text in (result, *result.alternatives)}
    assert expected.keys() == {1, 2, 3}
    got = read_events(web.get(f"/v1/jobs/{job_id}/stream").text)

    def texts(events: list[tuple[str, str, Any]]) -> dict[int, str]:
        found: dict[int, str] = {}
        for name, _, data in events:
            if not name:
                found[data.get("choice_index", 0)] = found.get(data.get("choice_index", 0), "") + data["text"]
        return found

    assert texts(got) == expected
    assert (got[-1][0], got[-1][2]["result"]["text"]) == ("end", expected[1])
    assert [other["text"] for other in got[-1][2]["result"]["alternatives"]] == [expected[2], expected[3]]
    for at in (0, len(got) // 2, len(got) - 2):
        # The pieces may come parted otherwise.
        event_id = got[at][1]
        known = {int(pair.split(":")[0]): int(pair.split(":")[1]) for pair in event_id.split(",")}
        again = read_events(web.get(f"/v1/jobs/{job_id}/stream", headers={"last-event-id": event_id}).text)
        left = {index: text[known.get(index, 0) :] for index, text in expected.items()}
        assert texts(again) == {index: text for index, text in left.items() if text}
        assert again[-1][0] == "end"
    assert got[-2][1] == ",".join(f"{index}:{len(text)}" for index, text in expected.items())


def test_hanging_up_on_it_does_not_end_it(web: httpx.Client) -> None:
    with jobs_held():
        job_id = created(web, **LONG, stream=True)
        with web.stream("GET", f"/v1/jobs/{job_id}/stream") as answer:
            assert answer.headers["x-job-id"] == job_id
            next(answer.iter_lines())
    assert web.get(f"/v1/jobs/{job_id}", params={"wait": 30}).json()["status"] == "finished"


def test_it_is_cancelled(web: httpx.Client) -> None:
    with jobs_held():
        job_id = created(web, **LONG)
        answer = web.delete(f"/v1/jobs/{job_id}").json()
    assert (answer["cancelled"], answer["status"]) == (True, "canceled")
    job = web.get(f"/v1/jobs/{job_id}", params={"wait": 30}).json()
    assert (job["status"], job["error"]["code"]) == ("canceled", "job_cancelled")
    assert web.delete(f"/v1/jobs/{job_id}").json()["cancelled"] is False
    got = web.get(f"/v1/jobs/{job_id}/stream")
    assert (got.status_code, got.json()["error"]["code"]) == (409, "job_cancelled")


def test_cancelled_while_it_is_followed(web: httpx.Client) -> None:
    lines: list[str] = []
    with jobs_held():
        job_id = created(web, **LONG, stream=True)
        with web.stream("GET", f"/v1/jobs/{job_id}/stream") as answer:
            canceller = threading.Thread(target=lambda: web.delete(f"/v1/jobs/{job_id}"))
            for line in answer.iter_lines():
                if not lines:
                    canceller.start()
                lines.append(line)
        canceller.join(30)
    name, _, data = read_events("\n".join(lines))[-1]
    assert (name, data["error"]["code"]) == ("error", "job_cancelled")
    assert data["result"]["finish_reason"] == "cancelled"


def test_a_job_that_fails_says_why(web: httpx.Client) -> None:
    job_id = created(web, prompt="the " * 300, max_new_tokens=400)
    job = web.get(f"/v1/jobs/{job_id}", params={"wait": 30}).json()
    assert (job["status"], job["error"]["code"]) == ("failed", "context_length_exceeded")
    assert (job["result"], job["error"]["type"]) == (None, "invalid_request_error")
    assert web.get(f"/v1/jobs/{job_id}/stream").status_code == 400
    late = created(web, **LONG, timeout=1e-6)
    job = web.get(f"/v1/jobs/{late}", params={"wait": 30}).json()
    assert (job["status"], job["error"]["code"]) == ("failed", "job_timed_out")


@pytest.mark.parametrize("job_id", ["nothing", "a" * 128, "%2e%2e", "a%00b", "x" * 500, str(uuid.UUID(int=1))])
def test_no_such_job(web: httpx.Client, job_id: str) -> None:
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/stream")):
        answer = web.request(method, f"/v1/jobs/{job_id}{path}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "job_not_found")


@pytest.mark.parametrize("job_id", ["user:42", "a.b c", "two\nlines", "Schlüssel", "x" * 500, "a/b%2F"])
def test_ids_that_an_older_rq_allowed(web: httpx.Client, system: System, job_id: str) -> None:
    in_a_path = quote(job_id, safe="")
    with Client(system.redis_url) as client:
        made = client.connection.hgetall(f"rq:job:{created(web, prompt='a', max_new_tokens=2)}")
        fields: dict[Any, Any] = {
            name: made[name] for name in (b"data", b"origin", b"created_at", b"enqueued_at", b"timeout")
        }
        client.connection.hset(f"rq:job:{job_id}", mapping={**fields, "status": "queued", "result_ttl": 60})
        client.connection.rpush("rq:queue:fastgpt2", job_id)
    shown = web.get(f"/v1/jobs/{in_a_path}", params={"wait": 30})
    assert (shown.json()["id"], shown.json()["status"]) == (job_id, "finished")
    assert shown.headers["x-job-id"] == in_a_path
    assert web.get(f"/v1/jobs/{in_a_path}/stream").status_code == 200
    assert web.delete(f"/v1/jobs/{in_a_path}").json()["cancelled"] is False


def test_what_is_no_job_is_none(web: httpx.Client, system: System) -> None:
    with Client(system.redis_url) as client:
        client.connection.set("rq:job:odd", "x", ex=60)
    assert web.get("/v1/jobs/odd").status_code == 404


def test_jobs_of_other_queues_are_none_of_its_business(web: httpx.Client, system: System) -> None:
    with Client(system.redis_url, "another") as other:
        job = other.enqueue("secret")
        for method in ("GET", "DELETE"):
            assert web.request(method, f"/v1/jobs/{job.id}").status_code == 404
        assert job.status() == "queued"
        job.cancel()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "prompt is missing"),
        ({"prompt": 3}, "prompt must be a string"),
        ({"prompt": "a", "max_tokens": 3}, "unknown field 'max_tokens'; max_new_tokens may be meant; known are"),
        ({"prompt": "a", "temperature": -1}, "temperature must be between 0 and 100"),
        ({"prompt": "a", "num_beams": 2}, "num_beams is refused: no beams are searched here"),
        ({"prompt": "a", "best_of": 2, "stream": True}, "stream is refused beside a best_of of 2 and an n of 1"),
        ({"prompt": "a", "result_ttl": 0}, "result_ttl must be a whole number of seconds from 1"),
        ({"prompt": "the " * 7000}, "the model's 512 positions"),
    ],
)
def test_bad_jobs(web: httpx.Client, body: Any, message: str) -> None:
    answer = web.post("/v1/jobs", json=body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


@pytest.mark.parametrize("query", [("wait", "x"), ("wait", "-1"), ("wait", "61"), ("wait", "nan"), ("wait", "1" * 400)])
def test_bad_queries(web: httpx.Client, query: tuple[str, str]) -> None:
    job_id = created(web, max_new_tokens=1)
    assert web.get(f"/v1/jobs/{job_id}", params=dict([query])).status_code == 400
    for limit in ("0", "101", "x", "1.5", "9" * 400, "²"):
        assert web.get("/v1/jobs", params={"limit": limit}).status_code == 400
    for known in ("x", "", "-1", "1:", "0:1,", "1" * 10, ",".join(["0:1"] * 129)):
        assert web.get(f"/v1/jobs/{job_id}/stream", headers={"last-event-id": known}).status_code == 400


def test_the_latest_jobs(web: httpx.Client) -> None:
    ended = created(web, max_new_tokens=3)
    web.get(f"/v1/jobs/{ended}", params={"wait": 30})

    def listed(limit: int = 20) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = web.get("/v1/jobs", params={"limit": limit}).json()["data"]
        return found

    wait_until(lambda: ended in [job["id"] for job in listed()], "the job to be listed")
    (job,) = [job for job in listed() if job["id"] == ended]
    assert (job["status"], job["finish_reason"], job["completion_tokens"]) == ("finished", "length", 3)
    assert job["prompt_tokens"] > 0
    assert "prompt" not in job, "nobody has said that prompts may be shown"
    with jobs_held():
        running = created(web, **LONG)
        wait_until(lambda: listed()[0]["id"] == running, "the running one to be listed first", 60)
        (first,) = listed(1)
        assert first.keys() == job.keys()
        web.delete(f"/v1/jobs/{running}")


def test_once_however_often_it_is_asked(web: httpx.Client, queue: Client) -> None:
    key, body = str(uuid.uuid4()), {"prompt": PROMPT, "max_new_tokens": 4}
    answers = [web.post("/v1/jobs", json=body, headers={"idempotency-key": key}) for _ in range(3)]
    assert len({answer.json()["id"] for answer in answers}) == 1
    other = web.post("/v1/jobs", json={**body, "max_new_tokens": 5}, headers={"idempotency-key": key})
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_mismatch")
    for bad in ("", "x" * 256):
        assert web.post("/v1/jobs", json=body, headers={"idempotency-key": bad}).status_code == 400
    assert not [name for name in queue.connection.keys("fastgpt2:once:*") if queue.connection.ttl(name) < 1]
