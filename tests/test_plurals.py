"""Numbers of things in messages: of one thing they speak in the singular."""

from __future__ import annotations

import pytest

from fastgpt2.commands.batch.report import Report
from fastgpt2.engine.decoding.records import GenerationRequest
from fastgpt2.errors import PromptTooLong, QueueFull
from fastgpt2.plurals import counted
from fastgpt2.worker.recycling import Recycling


def test_one_thing_and_others() -> None:
    assert [counted(number, "job") for number in (0, 1, 2)] == ["0 jobs", "1 job", "2 jobs"]
    assert counted(1, "guess", "guesses") == "1 guess"
    assert counted(3, "job waits", "jobs wait") == "3 jobs wait"


@pytest.mark.parametrize(("number", "said"), [(1, "1 job waits, the limit is 1"), (2, "2 jobs wait, the limit is 2")])
def test_a_full_queue(number: int, said: str) -> None:
    assert str(QueueFull("q", number, number)) == f"the queue 'q' is full: {said}; try again later"


@pytest.mark.parametrize(("prompt_tokens", "said"), [(10, "by at least 1 token"), (11, "by at least 2 tokens")])
def test_a_prompt_without_room(prompt_tokens: int, said: str) -> None:
    with pytest.raises(PromptTooLong, match=f"shorten the prompt {said}$"):
        GenerationRequest("", max_new_tokens=1).room(prompt_tokens, 10)


def test_room_for_one_token() -> None:
    with pytest.raises(PromptTooLong, match=r"ask for at most 1 new one, or shorten the prompt by 1 token$"):
        GenerationRequest("", max_new_tokens=2).room(9, 10)


@pytest.mark.parametrize(("jobs", "said"), [(1, "1 job"), (3, "3 jobs")])
def test_a_worker_that_makes_way(jobs: int, said: str) -> None:
    assert Recycling(1, 0).due(jobs, 0, 0.0) == f"it has taken {said}, and --max-jobs is 1"


def test_a_batch_of_one_line() -> None:
    report = Report(1, shows_bar=False)
    report.add(1, ("failed", "it failed"), 1)
    first, errors = report.summary("out.jsonl", is_continued=False)
    report.close()
    assert first.startswith("1 line in out.jsonl: 0 results, 1 token in ")
    assert errors == "1 of 1 line is an error: 1 failed"
