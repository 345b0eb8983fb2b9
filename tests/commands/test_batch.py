"""`fastgpt2 batch` writes one line of output for each line of input, once, in order, whatever happens meanwhile."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import re
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from rq.job import Job as RQJob
from rq.serializers import JSONSerializer
from support.finishing import abandon, finish, queued
from support.forgetful import ForgetfulRedis, finish_all, wait_for_queue
from support.running import GOLDEN, StartWorker, jobs_held, wait_until

from fastgpt2 import Client
from fastgpt2.commands.batch.lines import MAX_LINE_BYTES, LineReader
from fastgpt2.errors import BadRequest
from fastgpt2.system.redis_server import RedisServer

ENTRIES: list[dict[str, Any]] = json.loads((GOLDEN / "demo_continuations.json").read_text("utf-8"))["continuations"]
# One prompt on each line.
LINES = [entry for entry in ENTRIES if "\n" not in entry["prompt"] and "\r" not in entry["prompt"]]
FEW = ["--max-new-tokens", "4", "--ignore-eos"]

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(redis_server: RedisServer, client: Client, tmp_path: Path) -> Start:
    """Return a function that starts `fastgpt2 batch` in the test's folder."""

    def run(*arguments: str, **options: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "fastgpt2", "batch", *arguments],
            env={**os.environ, "FASTGPT2_REDIS_URL": redis_server.url, "FASTGPT2_QUEUE": client.queue_name},
            cwd=tmp_path,
            text=True,
            **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
        )

    return run


@pytest.fixture
def batch(start: Start) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs it to its end and returns (status, standard output, standard error)."""

    def run(*arguments: str, stdin: str | None = None) -> tuple[int, str, str]:
        process = start(*arguments, **({} if stdin is None else {"stdin": subprocess.PIPE}))
        out, err = process.communicate(stdin, timeout=60)
        return process.returncode, out, err

    return run


@pytest.fixture(scope="module")
def server() -> Iterator[ForgetfulRedis]:
    with ForgetfulRedis() as made:
        yield made


def results_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def has_lines(path: Path, count: int) -> bool:
    return path.exists() and path.read_bytes().count(b"\n") >= count


def write_prompts(path: Path, entries: list[dict[str, Any]] = LINES) -> None:
    path.write_text("".join(entry["prompt"] + "\n" for entry in entries), "utf-8")


def write_requests(path: Path, entries: list[dict[str, Any]], short: int) -> None:
    """Write an object a line; those after so many short ones are long enough to be held."""
    asked = [{"prompt": entry["prompt"], "max_new_tokens": 4 if n < short else 100} for n, entry in enumerate(entries)]
    path.write_text("".join(json.dumps(one) + "\n" for one in asked), "utf-8")


@pytest.mark.usefixtures("served")
def test_a_prompt_a_line(tmp_path: Path, batch: Any) -> None:
    write_prompts(tmp_path / "in.txt")
    status, out, err = batch("in.txt", "-o", "out.jsonl", "--max-new-tokens", "100", "--ignore-eos")
    assert (status, out) == (0, "")
    assert re.fullmatch(
        rf"{len(LINES)} lines in out.jsonl: {len(LINES)} results, {100 * len(LINES)} tokens in .+\n", err
    )
    results = results_in(tmp_path / "out.jsonl")
    assert [result["text"] for result in results] == [entry["text"] for entry in LINES]
    assert [result["index"] for result in results] == list(range(len(LINES)))
    assert results[0]["usage"] == {
        "prompt_tokens": len(LINES[0]["prompt_ids"]), "completion_tokens": 100, "cached_tokens": 0
    }  # fmt: skip
    assert set(results[0]) == {
        "index", "version", "text", "finish_reason", "usage", "timings", "model", "drafting", "input",
    }  # fmt: skip
    assert len({result["input"] for result in results}) == len({entry["prompt"] for entry in LINES})


@pytest.mark.usefixtures("served")
def test_an_object_a_line(tmp_path: Path, batch: Any) -> None:
    first, second = ENTRIES[0], ENTRIES[1]
    lines = [
        first["prompt"],
        {"prompt": second["prompt"], "max_new_tokens": 7, "id": "seven"},
        {"prompt": second["prompt_ids"], "id": 3, "logprobs": 1, "prompt_logprobs": 0},
        {"prompt": second["prompt"], "stop": second["text"][8:12], "max_new_tokens": 50, "echo": True},
        {"prompt": second["prompt"], "max_new_tokens": 480, "timeout": 1e-6, "id": "late"},
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))  # and no end to the last line
    status, _, err = batch("in.jsonl", "-o", "out.jsonl", *FEW)
    assert status == 1
    assert "line 5: job " in err.splitlines()[0]
    assert "1 of 5 lines is an error: 1 JobTimedOut; --retry-errors tries them again" in err
    results = results_in(tmp_path / "out.jsonl")
    assert [result.get("id") for result in results] == [None, "seven", 3, None, "late"]
    assert "id" not in results[0]
    assert first["text"].startswith(results[0]["text"])
    assert [result["usage"]["completion_tokens"] for result in results[:3]] == [4, 7, 4]
    assert [entry["token_id"] for entry in results[2]["logprobs"]] == second["ids"][:4]
    assert [entry["token_id"] for entry in results[2]["prompt_logprobs"]] == second["prompt_ids"]
    assert [entry["logprob"] is None for entry in results[2]["prompt_logprobs"]][:2] == [True, False]
    stop = second["text"].index(second["text"][8:12])
    assert results[3]["text"] == second["prompt"] + second["text"][:stop]
    assert results[4]["error_type"] == "JobTimedOut"
    assert results[4]["partial"]["finish_reason"] == "timeout"


@pytest.mark.usefixtures("served")
def test_bad_lines_are_errors_in_their_places(tmp_path: Path, batch: Any) -> None:
    (tmp_path / "in.jsonl").write_bytes(
        b"\n".join(
            [
                b'"a"',
                b"",
                b"{",
                b"[" * 100_000,
                b"3",
                b'{"prompt": "a", "num_beams": 4}',
                b'{"prompt": "a", "max_tokens": 1, "id": "x"}',
                b'{"prompt": "a", "id": [1]}',
                b'{"id": "no prompt"}',
                b'"\xff"',
                b'{"prompt": "a", "max_new_tokens": 5000, "id": "y"}',
                b'{"prompt": 5}',
                b'{"prompt": "a", "priority": "high"}',
                b'"' + b"x" * MAX_LINE_BYTES + b'"',
                b'"b"',
            ]
        )
        + b"\n"
    )
    status, _, err = batch("in.jsonl", "-o", "out.jsonl", *FEW)
    assert status == 1
    assert err.startswith("the first error, line 2: the line is not JSON")
    assert "13 of 15 lines are errors: 12 BadRequest, 1 PromptTooLong" in err
    assert err.count("\n") == 3
    results = results_in(tmp_path / "out.jsonl")
    assert [result["index"] for result in results] == list(range(15))
    assert [n for n, result in enumerate(results) if "text" in result] == [0, 14]
    errors = [result.get("error", "") for result in results]
    for number, message in {
        1: "the line is not JSON",
        2: "the line is not JSON",
        3: "the line is not JSON",
        4: "the line is neither a string nor an object",
        5: "num_beams is refused: no beams are searched here; ask for several texts by n",
        6: "unknown field 'max_tokens'",
        7: "id must be a string",
        8: "prompt is missing",
        9: "the line is not UTF-8 (byte 1)",
        10: "ask for at most 511",
        11: "prompt must be a string or a list of token ids",
        12: 'priority must be 0 or "normal", or left out',
        13: f"the line has {MAX_LINE_BYTES + 2} bytes; the limit is {MAX_LINE_BYTES}",
    }.items():
        assert message in errors[number]
    assert {result["error_type"] for result in results if "error" in result} <= {"BadRequest", "PromptTooLong"}
    assert results[10]["id"] == "y"
    assert len({result["input"] for result in results}) == 15


@pytest.mark.usefixtures("served")
def test_lines_of_text_are_taken_as_they_are(tmp_path: Path, batch: Any) -> None:
    """A line may be empty, end as on another system, follow the mark of UTF-8, or not be UTF-8."""
    (tmp_path / "in.txt").write_bytes(b"\xef\xbb\xbfMy name is\r\n\n\xff\xfe\n  \nMy name is")
    status, _, _ = batch("in.txt", "-o", "out.jsonl", *FEW)
    assert status == 1
    results = results_in(tmp_path / "out.jsonl")
    assert len(results) == 5
    assert results[0]["text"] == results[4]["text"] == text_of("My name is")
    assert results[0]["input"] == results[4]["input"]
    assert results[1]["text"] == text_of("")
    assert "the line is not UTF-8" in results[2]["error"]
    assert results[3]["usage"]["prompt_tokens"] > 0


def text_of(prompt: str) -> str:
    """Return the golden text of four tokens."""
    from fastgpt2.engine.model.hub import DEMO_FOLDER
    from fastgpt2.engine.text.tokenizer import Tokenizer

    (ids,) = [entry["ids"] for entry in ENTRIES if entry["prompt"] == prompt]
    return Tokenizer.from_folder(DEMO_FOLDER).decode(ids[:4])


class TestPipes:
    @pytest.mark.usefixtures("served")
    def test_standard_input_and_output(self, batch: Any) -> None:
        status, out, err = batch("-", *FEW, stdin="My name is\n\n")
        assert (status, err.count("\n")) == (0, 1)
        assert [json.loads(line)["text"] for line in out.splitlines()] == [text_of("My name is"), text_of("")]
        status, out, _ = batch("-", "--format", "jsonl", *FEW, stdin='{"prompt": "My name is"}\n')
        assert json.loads(out)["text"] == text_of("My name is")

    @pytest.mark.usefixtures("served")
    def test_results_come_before_the_input_has_ended(self, start: Start) -> None:
        process = start("-", *FEW, stdin=subprocess.PIPE)
        assert process.stdin is not None
        assert process.stdout is not None
        for n in range(2):
            process.stdin.write("My name is\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["index"] == n
        process.stdin.close()
        assert process.wait(30) == 0

    @pytest.mark.usefixtures("served")
    def test_a_reader_that_goes_away(self, tmp_path: Path, redis: Redis, client: Client, start: Start) -> None:
        write_prompts(tmp_path / "in.txt", LINES * 20)
        process = start("in.txt", "--in-flight", "4", *FEW)
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(60) == 141
        assert redis.llen(f"rq:queue:{client.queue_name}-low") == 0


class TestBrokenOff:
    @pytest.mark.usefixtures("served")
    def test_killed_and_taken_up(self, tmp_path: Path, start: Start, batch: Any) -> None:
        """The process is killed with -9, again and again: every line is there once."""
        prompts = LINES * 3
        write_requests(tmp_path / "in.jsonl", prompts, 110 + 16)
        out = tmp_path / "out.jsonl"
        with jobs_held():
            for enough in (20, 60, 110):
                process = start("in.jsonl", "-o", "out.jsonl", "--in-flight", "16", *FEW)
                wait_until(partial(has_lines, out, enough), "some results")
                process.kill()
                process.communicate()
        before = out.read_bytes()
        assert before.count(b"\n") < len(prompts)
        assert batch("in.jsonl", "-o", "out.jsonl", *FEW)[0] == 0
        assert out.read_bytes().startswith(before[: before.rindex(b"\n") + 1])
        results = results_in(out)
        assert [result["index"] for result in results] == list(range(len(prompts)))
        assert [entry["text"].startswith(r["text"]) for entry, r in zip(prompts, results, strict=True)] == (
            [True] * len(prompts)
        )
        assert batch("in.jsonl", "-o", "out.jsonl", *FEW)[0] == 0, "nothing is left to do"
        assert results_in(out) == results

    def test_a_table_whose_run_is_killed(
        self, tmp_path: Path, start: Start, batch: Any, start_worker: StartWorker
    ) -> None:
        """Its results stand beside the output until all are there: the first worker ends after some."""
        worker = start_worker(FASTGPT2_MAX_JOBS="10", FASTGPT2_MAX_BATCH="2")
        rows = [["id", "prompt"], *([str(n), entry["prompt"]] for n, entry in enumerate(LINES))]
        with (tmp_path / "in.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
        process = start("in.csv", "-o", "out.csv", "--in-flight", "8", *FEW)
        wait_until(partial(has_lines, tmp_path / "out.csv.partial.jsonl", 10), "some results")
        assert worker.wait(60) == 0
        process.kill()
        process.communicate()
        assert not (tmp_path / "out.csv").exists()
        start_worker(wait=False)
        status, _, err = batch("in.csv", "-o", "out.csv", *FEW)
        kept = re.search(r"\((\d+) of them from before\)", err)
        assert kept is not None
        assert (status, int(kept[1]) >= 10) == (0, True)
        with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
            written = list(csv.DictReader(file))
        assert [[row["id"], row["prompt"]] for row in written] == rows[1:]
        assert all(entry["text"].startswith(row["text"]) for entry, row in zip(LINES, written, strict=True))
        assert not (tmp_path / "out.csv.partial.jsonl").exists()

    @pytest.mark.usefixtures("served")
    def test_an_incomplete_line_is_cut(self, tmp_path: Path, batch: Any) -> None:
        write_prompts(tmp_path / "in.txt", LINES[:6])
        batch("in.txt", "-o", "out.jsonl", *FEW)
        whole = (tmp_path / "out.jsonl").read_text()
        lines = whole.splitlines(keepends=True)
        for broken in (whole[:-1], lines[0] + lines[1][:10], lines[0][:1], "", lines[0], lines[0] + "x" * 100_000):
            (tmp_path / "out.jsonl").write_text(broken)
            assert batch("in.txt", "-o", "out.jsonl", *FEW)[0] == 0
            assert [(r["index"], r["text"]) for r in results_in(tmp_path / "out.jsonl")] == [
                (r["index"], r["text"]) for r in map(json.loads, lines)
            ]

    @pytest.mark.usefixtures("served")
    def test_results_of_something_else_are_left_alone(self, tmp_path: Path, batch: Any) -> None:
        write_prompts(tmp_path / "in.txt", LINES[:3])
        assert batch("in.txt", "-o", "out.jsonl", *FEW)[0] == 0
        before = (tmp_path / "out.jsonl").read_text()
        write_prompts(tmp_path / "shorter.txt", LINES[:2])
        write_prompts(tmp_path / "other.txt", LINES[5:8])
        (tmp_path / "notes.txt").write_text("my notes\n")
        (tmp_path / "unended.txt").write_text("my notes")
        for message, arguments in (
            ("results of other options", ["in.txt", "-o", "out.jsonl", "--max-new-tokens", "5", "--ignore-eos"]),
            ("results of another input or of other options", ["other.txt", "-o", "out.jsonl", *FEW]),
            ("something else than results, in line 1", ["in.txt", "-o", "notes.txt", *FEW]),
            ("something else than results, in line 1", ["in.txt", "-o", "unended.txt", *FEW]),
        ):
            status, _, err = batch(*arguments)
            assert status == 2
            assert f"{arguments[2]} holds {message}" in err
            assert "--restart, or name another file with -o" in err
        assert (tmp_path / "out.jsonl").read_text() == before
        assert (tmp_path / "notes.txt").read_text() == "my notes\n"
        assert (tmp_path / "unended.txt").read_text() == "my notes"
        # Options that do not change the results may differ.
        assert batch("in.txt", "-o", "out.jsonl", *FEW, "--priority", "low", "--deadline", "50")[0] == 0
        assert (tmp_path / "out.jsonl").read_text() == before
        assert batch("shorter.txt", "-o", "out.jsonl", *FEW, "--restart")[0] == 0
        assert len(results_in(tmp_path / "out.jsonl")) == 2

    @pytest.mark.usefixtures("served")
    def test_what_was_drawn_stays(self, tmp_path: Path, batch: Any) -> None:
        """Each line has a seed of its own, which its result tells: a run that goes on keeps what is written."""
        drawn = ["--temperature", "0.9", "-n", "2", *FEW]
        write_prompts(tmp_path / "in.txt", LINES[:4] * 2)
        assert batch("in.txt", "-o", "out.jsonl", *drawn)[:2] == (0, "")
        first = results_in(tmp_path / "out.jsonl")
        assert len({result["seed"] for result in first}) == 8
        assert {result["alternatives"][0]["choice_index"] for result in first} == {1}
        assert not any("token_ids" in text for result in first for text in (result, *result["alternatives"]))
        whole = (tmp_path / "out.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "out.jsonl").write_text("".join(whole[:5]) + whole[5][:20])
        assert batch("in.txt", "-o", "out.jsonl", *drawn)[:2] == (0, "")
        assert (tmp_path / "out.jsonl").read_text().startswith("".join(whole[:5]))
        assert len(results_in(tmp_path / "out.jsonl")) == 8
        # With its seed, a line's text comes again.
        lines = [{"prompt": LINES[n % 4]["prompt"], "seed": result["seed"]} for n, result in enumerate(first)]
        (tmp_path / "again.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert batch("again.jsonl", "-o", "again-out.jsonl", *drawn)[:2] == (0, "")
        texts = [(one["text"], one["alternatives"][0]["text"]) for one in results_in(tmp_path / "again-out.jsonl")]
        assert texts == [(one["text"], one["alternatives"][0]["text"]) for one in first]

    @pytest.mark.usefixtures("served")
    def test_earlier_errors_count(self, tmp_path: Path, batch: Any) -> None:
        (tmp_path / "in.jsonl").write_text('"a"\n{\n"b"\n')
        for _ in range(2):
            status, _, err = batch("in.jsonl", "-o", "out.jsonl", *FEW)
            assert status == 1
            assert "1 of 3 lines is an error: 1 BadRequest" in err

    @pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
    @pytest.mark.usefixtures("served")
    def test_told_to_end(
        self,
        tmp_path: Path,
        redis: Redis,
        client: Client,
        start: Start,
        batch: Any,
        signum: int,
    ) -> None:
        write_requests(tmp_path / "in.jsonl", LINES * 2, 5 + 30)
        out = tmp_path / "out.jsonl"
        with jobs_held():
            process = start("in.jsonl", "-o", "out.jsonl", "--in-flight", "30", *FEW)
            wait_until(partial(has_lines, out, 5), "some results")
            process.send_signal(signum)
            _, err = process.communicate(timeout=30)
        assert process.returncode == 130
        done = len(results_in(out))
        assert f"interrupted: out.jsonl holds {done} results; the same command goes on from there" in err
        assert "Traceback" not in err
        assert redis.llen(f"rq:queue:{client.queue_name}-low") == 0, "what was in flight has been cancelled"
        wait_until(lambda: not redis.zcard(f"rq:wip:{client.queue_name}"), "the worker to have let go")
        write_requests(tmp_path / "in.jsonl", (LINES * 2)[: done + 3], 5 + 30)
        assert batch("in.jsonl", "-o", "out.jsonl", *FEW)[0] == 0
        assert len(results_in(out)) == done + 3


class TestLostJobs:
    """Redis is started again without what it had, or somebody deletes a job: no line is written that is not final."""

    @pytest.fixture
    def begin(self, server: ForgetfulRedis, start: Start) -> Start:
        return partial(start, "in.txt", "-o", "out.jsonl", "--redis-url", server.url, "--priority", "normal", *FEW)

    def test_they_are_enqueued_again(
        self, tmp_path: Path, client: Client, server: ForgetfulRedis, begin: Start
    ) -> None:
        write_prompts(tmp_path / "in.txt", LINES[:20])
        process = begin()
        ids = wait_for_queue(server, client.queue_name, 20)
        with server.administered() as connection:
            finish(connection, ids[0], "first")
        wait_until(partial(has_lines, tmp_path / "out.jsonl", 1), "the first result")
        server.restart()
        assert set(wait_for_queue(server, client.queue_name, 19)) == set(ids[1:])
        finish_all(server, client.queue_name)
        assert process.communicate(timeout=60)[1].count("\n") == 2, "that no worker listens, and the summary"
        assert process.returncode == 0
        texts = [result["text"] for result in results_in(tmp_path / "out.jsonl")]
        assert texts == ["first", *(f"text of {job_id}" for job_id in ids[1:])]

    def test_one_that_was_deleted_ends_the_run_which_goes_on_from_there(
        self, tmp_path: Path, client: Client, server: ForgetfulRedis, begin: Start
    ) -> None:
        write_prompts(tmp_path / "in.txt", LINES[:3])
        process = begin()
        ids = wait_for_queue(server, client.queue_name, 3)
        with server.administered() as connection:
            RQJob.fetch(ids[1], connection=connection, serializer=JSONSerializer).delete()
            finish(connection, ids[0], "first")
        err = process.communicate(timeout=60)[1]
        assert process.returncode == 1
        assert f"job {ids[1]} is gone from Redis without an end: somebody deleted it" in err
        assert "out.jsonl holds 1 result; the same command goes on from there" in err
        process = begin()
        wait_for_queue(server, client.queue_name, 2)
        finish_all(server, client.queue_name)
        process.communicate(timeout=60)
        assert (process.returncode, len(results_in(tmp_path / "out.jsonl"))) == (0, 3)


class TestPassingEnds:
    """Ends that say nothing of the line are not written."""

    def test_a_job_that_was_abandoned_is_run_again_and_one_that_was_cancelled_by_the_next_run(
        self, tmp_path: Path, client: Client, redis: Redis, start: Start
    ) -> None:
        write_prompts(tmp_path / "in.txt", LINES[:3])
        arguments = ["in.txt", "-o", "out.jsonl", *FEW]
        process = start(*arguments)
        wait_until(lambda: len(queued(redis, f"{client.queue_name}-low")) == 3, "the jobs")
        first, second, third = queued(redis, f"{client.queue_name}-low")
        abandon(redis, first)
        client.cancel(second)
        finish(redis, third, "third")
        queue = f"{client.queue_name}-low"
        wait_until(lambda: set(queued(redis, queue)) - {first, second, third}, "the first line to be run again")
        (first,) = set(queued(redis, queue)) - {first, second, third}
        finish(redis, first, "first")
        err = process.communicate(timeout=60)[1]
        assert process.returncode == 1
        assert "1 line has no result" in err
        assert [(r["index"], r["text"]) for r in results_in(tmp_path / "out.jsonl")] == [(0, "first"), (2, "third")]
        process = start(*arguments)
        before = set(queued(redis, queue))
        wait_until(lambda: set(queued(redis, queue)) - before, "the job of the second line")
        (again,) = set(queued(redis, queue)) - before
        finish(redis, again, "second")
        process.communicate(timeout=60)
        assert process.returncode == 0
        assert [r["text"] for r in results_in(tmp_path / "out.jsonl")] == ["first", "second", "third"]


class TestFiles:
    @pytest.mark.usefixtures("served")
    def test_one_run_at_a_time(self, tmp_path: Path, batch: Any) -> None:
        write_prompts(tmp_path / "in.txt", LINES[:2])
        with (tmp_path / "out.jsonl").open("w") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            status, _, err = batch("in.txt", "-o", "out.jsonl", "--restart", *FEW)
        assert status == 1
        assert "out.jsonl is being written by another run; wait for it, or name another file" in err
        assert batch("in.txt", "-o", "out.jsonl", *FEW)[0] == 0

    @pytest.mark.usefixtures("served")
    def test_a_full_disk(self, tmp_path: Path, batch: Any) -> None:
        write_prompts(tmp_path / "in.txt", LINES[:2])
        status, _, err = batch("in.txt", "-o", "/dev/full", *FEW)
        assert status == 1
        assert "No space left on device after 0 results: make room, and the same command goes on from there" in err
        assert "Traceback" not in err

    def test_what_cannot_be_opened(self, tmp_path: Path, batch: Any) -> None:
        write_prompts(tmp_path / "in.txt", LINES[:1])
        (tmp_path / "folder").mkdir()
        for arguments, status, message in (
            (["nothing.txt", "-o", "out.jsonl"], 1, "nothing.txt: cannot be read (No such file or directory)"),
            (["folder", "-o", "out.jsonl"], 1, "folder: cannot be read (Is a directory)"),
            (["in.txt", "-o", "folder"], 1, "folder: cannot be written (Is a directory)"),
            (["in.txt", "-o", "nowhere/out.jsonl"], 1, "nowhere/out.jsonl: cannot be written (No such file or"),
            (["in.txt", "-o", "in.txt"], 2, "in.txt is both input and output; name another file with -o"),
            (["in.txt", "-o", "o", "--min-new-tokens", "9", "--max-new-tokens", "3"], 2, "min_new_tokens must be"),
            (["in.txt", "--in-flight", "0"], 2, "--in-flight: '0' is not between 1 and"),
            (["in.txt", "--format", "xml"], 2, "--format: 'xml' is not one of auto, txt, jsonl"),
        ):
            got, _, err = batch(*arguments)
            assert (got, message in err) == (status, True), err
            assert "Traceback" not in err
        assert (tmp_path / "in.txt").read_text() == LINES[0]["prompt"] + "\n"


def test_without_a_worker_it_says_so_and_waits(tmp_path: Path, start_worker: StartWorker, start: Start) -> None:
    write_prompts(tmp_path / "in.txt", LINES[:3])
    process = start("in.txt", "-o", "out.jsonl", *FEW)
    assert process.stderr is not None
    assert "no worker listens on the queue" in process.stderr.readline()
    start_worker()
    assert process.communicate(timeout=60)[1].startswith("3 lines in out.jsonl: 3 results, 12 tokens in ")
    assert process.returncode == 0
    assert len(results_in(tmp_path / "out.jsonl")) == 3


@pytest.mark.usefixtures("served")
def test_a_full_queue_is_waited_for(tmp_path: Path, batch: Any) -> None:
    write_prompts(tmp_path / "in.txt", LINES[:20])
    assert batch("in.txt", "-o", "out.jsonl", "--max-queue", "1", "--in-flight", "9", *FEW)[0] == 0
    assert len(results_in(tmp_path / "out.jsonl")) == 20


def test_no_redis(tmp_path: Path, batch: Any) -> None:
    write_prompts(tmp_path / "in.txt", LINES[:1])
    status, _, err = batch("in.txt", "-o", "out.jsonl", "--redis-url", "redis://127.0.0.1:1/0")
    assert (status, "cannot be used" in err, "Traceback" in err) == (4, True, False)


def test_a_line_without_end_takes_no_memory() -> None:
    reader = LineReader(False, {})
    file = io.BytesIO(b"a\n" + b"x" * (16 * MAX_LINE_BYTES) + b"\nb")
    tracemalloc.start()
    lines = list(reader.read(file))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * MAX_LINE_BYTES
    assert [isinstance(line.item, BadRequest) for line in lines] == [False, True, False]
    whole = list(LineReader(False, {}).read(io.BytesIO(b"x" * (16 * MAX_LINE_BYTES))))
    assert whole[0].digest == lines[1].digest
    other = list(LineReader(False, {}).read(io.BytesIO(b"x" * (16 * MAX_LINE_BYTES) + b"y")))
    assert other[0].digest != lines[1].digest
