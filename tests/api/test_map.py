"""Many prompts at once: results in order or as they come, no more jobs in the queue than allowed, each job once."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
from redis import Redis
from support.running import GOLDEN, StartWorker, jobs_held, run_out_of_time, wait_until

from fastgpt2 import Client, GenerationRequest, GenerationResult
from fastgpt2.errors import BadRequest, JobCancelled, JobTimedOut, PromptTooLong, QueueUnavailable
from fastgpt2.system.redis_server import RedisServer

pytestmark = pytest.mark.processes

ENTRIES: list[dict[str, Any]] = json.loads((GOLDEN / "demo_continuations.json").read_text("utf-8"))["continuations"]
PROMPTS = [entry["prompt"] for entry in ENTRIES]


def ids(entry: dict[str, Any], tokens: int) -> tuple[int, ...]:
    return tuple(entry["ids"][:tokens])


def waiting(redis: Redis, client: Client) -> list[bytes]:
    found: Any = redis.lrange(f"rq:queue:{client.queue_name}", 0, -1)
    return list(found)


@pytest.mark.usefixtures("served")
def test_results_come_in_the_order_of_the_prompts(client: Client) -> None:
    results = list(client.map(PROMPTS, max_new_tokens=10, ignore_eos=True, in_flight=7))
    assert [result.token_ids for result in results] == [ids(entry, 10) for entry in ENTRIES]
    assert list(client.map([])) == []


@pytest.mark.usefixtures("served")
def test_as_completed_tells_the_number(client: Client) -> None:
    """A long job at the front does not keep the others waiting."""
    requests = [
        GenerationRequest(entry["prompt"], 100 if n == 0 else 5, ignore_eos=True)
        for n, entry in enumerate(ENTRIES[:12])
    ]
    with jobs_held():
        results = client.as_completed(requests, in_flight=4)
        found = [next(results)]
    found += results
    assert sorted(number for number, _ in found) == list(range(12))
    assert found[0][0] != 0
    for number, result in found:
        assert result.token_ids == ids(ENTRIES[number], 100 if number == 0 else 5)


def test_prompts_are_read_as_there_is_room(client: Client, redis: Redis, start_worker: StartWorker) -> None:
    """The prompts are endless, the results in order: a slow job holds others back, as their results would pile up."""
    read: list[int] = []

    def endless() -> Iterator[GenerationRequest]:
        for n in count():
            read.append(n)
            yield GenerationRequest(ENTRIES[0]["prompt"], 100 if n == 0 else 1, ignore_eos=True)

    results = client.map(endless(), in_flight=5)
    first: list[GenerationResult] = []
    reader = threading.Thread(target=lambda: first.append(next(results)))
    reader.start()
    wait_until(lambda: len(waiting(redis, client)) == 5, "five jobs to be in the queue")
    assert read == list(range(5))
    start_worker()
    reader.join(30)
    assert len(first[0].token_ids) == 100
    assert len(read) == 5, "no result was given before that of the first"
    assert len(next(results).token_ids) == 1
    assert len(read) <= 7
    results.close()


def test_closed_early_it_cancels_what_is_in_flight(client: Client, redis: Redis, start_worker: StartWorker) -> None:
    start_worker()
    requests = (GenerationRequest("a", 1 if n == 0 else 480, ignore_eos=True) for n in count())
    with jobs_held():
        for number, _ in client.as_completed(requests, in_flight=40):
            assert number == 0
            break
    cancelled = redis.zcard(f"rq:canceled:{client.queue_name}")
    assert 39 <= cancelled <= 40
    assert waiting(redis, client) == []
    wait_until(lambda: not redis.zcard(f"rq:wip:{client.queue_name}"), "the worker to have let go")


class TestErrors:
    def test_the_first_one_is_raised_in_its_place(
        self, client: Client, redis: Redis, start_worker: StartWorker
    ) -> None:
        start_worker()
        short, long = GenerationRequest("a", 2), GenerationRequest("b", 480, ignore_eos=True)
        with jobs_held():
            results = client.map([short, "the " * 600, *[long] * 20], in_flight=22)
            assert next(results).text
            with pytest.raises(PromptTooLong, match="over the model's 512 positions"):
                next(results)
        assert next(results, None) is None
        assert waiting(redis, client) == []
        assert redis.zcard(f"rq:canceled:{client.queue_name}") == 20

    @pytest.mark.usefixtures("served")
    def test_or_all_are_given_in_their_places(self, client: Client) -> None:
        strange: Any = 3.5
        short, long = GenerationRequest((1, 2), 1), GenerationRequest("b", 480, ignore_eos=True)
        prompts = [short, strange, "the " * 600, "x" * 500_000, short, long]
        results: list[Any] = []

        def attempt(seconds: float) -> JobTimedOut:
            results[:] = client.map(prompts, return_exceptions=True, timeout=seconds)
            assert isinstance(results[5], JobTimedOut)
            return results[5]

        run_out_of_time(attempt)
        assert [type(result) for result in results] == [
            GenerationResult, BadRequest, PromptTooLong, PromptTooLong, GenerationResult, JobTimedOut,
        ]  # fmt: skip

    def test_wrong_options(self, client: Client, redis: Redis) -> None:
        many: Any
        for many in (0, -1, 2.5, True, 10**9):
            with pytest.raises(BadRequest, match="in_flight must be a whole number from 1"):
                list(client.map(["a"], in_flight=many))
        unknown: Any = {"num_beams": 4}
        with pytest.raises(BadRequest, match="num_beams is refused"):
            list(client.map(["a", "b"], **unknown))
        with pytest.raises(BadRequest, match="stop is given beside a request that has been made"):
            list(client.map([GenerationRequest("a")], stop="x"))
        assert waiting(redis, client) == []

    def test_cancelled_by_somebody_else(self, client: Client, redis: Redis, start_worker: StartWorker) -> None:
        """A cancellation writes no result that the client could wait for."""
        found: list[Any] = []
        reader = threading.Thread(
            target=lambda: found.extend(client.map(["a", [1, 2]], return_exceptions=True, max_new_tokens=2))
        )
        reader.start()
        wait_until(lambda: len(waiting(redis, client)) == 2, "the jobs to be in the queue")
        client.cancel(waiting(redis, client)[0].decode())
        start_worker()
        reader.join(30)
        assert [type(outcome) for outcome in found] == [JobCancelled, GenerationResult]


@pytest.mark.usefixtures("served")
def test_a_stop_that_is_an_iterator_holds_for_all(client: Client) -> None:
    stop = ENTRIES[0]["text"][10:14]
    results = list(client.map([PROMPTS[0]] * 3, stop=(text for text in [stop]), max_new_tokens=50))
    assert {result.text for result in results} == {ENTRIES[0]["text"][: ENTRIES[0]["text"].index(stop)]}


class TestFullQueue:
    @pytest.mark.usefixtures("served")
    def test_it_waits_for_its_own_jobs(self, redis_server: RedisServer, client: Client) -> None:
        with Client(redis_server.url, client.queue_name, max_queue=2) as limited:
            results = list(limited.map(PROMPTS, max_new_tokens=3, ignore_eos=True, in_flight=20))
        assert [result.token_ids for result in results] == [ids(entry, 3) for entry in ENTRIES]

    def test_and_for_those_of_others(
        self, redis_server: RedisServer, redis: Redis, client: Client, start_worker: StartWorker
    ) -> None:
        others = [client.enqueue("a", max_new_tokens=1) for _ in range(3)]
        with Client(redis_server.url, client.queue_name, max_queue=3) as limited:
            found: list[Any] = []
            reader = threading.Thread(target=lambda: found.extend(limited.map(["b"], max_new_tokens=1)))
            reader.start()
            wait_until(lambda: limited._session.retries.answered, "the first refusal")
            assert len(waiting(redis, client)) == 3
            start_worker()
            reader.join(30)
            assert len(found) == 1
        assert all(other.result(timeout=30) for other in others)


def test_redis_is_restarted(
    tmp_path_factory: pytest.TempPathFactory, queue_name: str, start_worker: StartWorker
) -> None:
    """Redis restarts while jobs are enqueued and waited for: all of them are done, none twice."""
    folder = tmp_path_factory.mktemp("redis")
    server = RedisServer(folder=folder).start()
    try:
        start_worker(wait=False, FASTGPT2_REDIS_URL=server.url)
        with Client(server.url, queue_name) as client:
            results = client.map(PROMPTS * 3, max_new_tokens=8, ignore_eos=True, in_flight=30)
            found = [next(results) for _ in range(20)]
            server.stop()
            server = RedisServer(server.port, folder).start()
            found += results
            assert [result.token_ids for result in found] == [ids(entry, 8) for entry in ENTRIES * 3]
    finally:
        server.stop()


def test_redis_stays_away(queue_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgpt2.api.client.flow.RECONNECT_SECONDS", 0.2)
    with RedisServer() as server, Client(server.url, queue_name) as client:
        results = client.map(count_to_strings(server), in_flight=3)
        with pytest.raises(QueueUnavailable):
            next(results)


def count_to_strings(server: RedisServer) -> Iterator[str]:
    yield "a"
    yield "b"
    server.stop()
    yield "c"


def test_prompts_that_cannot_be_read(client: Client, redis: Redis) -> None:
    """Whatever error the prompts raise comes out, and the jobs in flight are cancelled."""

    def prompts() -> Iterator[str]:
        yield "a"
        raise OSError("the disk is broken")

    with pytest.raises(OSError, match="the disk is broken"):
        list(client.map(prompts()))
    assert waiting(redis, client) == []


@pytest.mark.usefixtures("served")
def test_progress(client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(list(client.map(PROMPTS[:5], max_new_tokens=4, ignore_eos=True, progress=True))) == 5
    shown = capsys.readouterr().err
    assert "5/5" in shown
    assert "tokens/s" in shown
    list(client.map(PROMPTS[:2], max_new_tokens=4))
    assert capsys.readouterr().err == ""


# A program that believes that it runs in a notebook, in an environment without ipywidgets.
NOTEBOOK = """
import sys, types
class ZMQInteractiveShell: pass
sys.modules["ipykernel.zmqshell"] = types.ModuleType("ipykernel.zmqshell")
sys.modules["IPython"] = shell = types.ModuleType("IPython")
shell.get_ipython = ZMQInteractiveShell
sys.modules["ipywidgets"] = None
from fastgpt2.api.client.bulk import ProgressBar
from fastgpt2.errors import FastGPT2Error
bar = ProgressBar(1, shown=True).start()
bar.add(FastGPT2Error())
bar.close()
"""


def test_a_notebook_without_widgets_shows_the_bar_and_no_warning() -> None:
    done = subprocess.run([sys.executable, "-c", NOTEBOOK], capture_output=True, text=True, timeout=60, check=True)
    assert "1/1" in done.stderr
    assert "ipywidgets" not in done.stderr


def test_nothing_is_shown_or_sent_before_the_first_result_is_asked_for(
    client: Client, redis: Redis, capsys: pytest.CaptureFixture[str]
) -> None:
    results = client.map(["a", "b"], progress=True)
    assert capsys.readouterr().err == ""
    assert waiting(redis, client) == []
    results.close()
