"""How many rows of prompts a step reads, and whose turn it is: by a stub of the network, without a clock."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastgpt2 import Engine
from fastgpt2.engine.decoding.decoder import MOST_ROWS_AHEAD, PREFILL_ROWS, SCORED_ROWS, Decoder
from fastgpt2.engine.decoding.prompt_rows import MOST_SECONDS, ROWS_AT_ONCE, PromptRows
from fastgpt2.engine.decoding.records import GenerationRequest
from fastgpt2.engine.decoding.sequence import Sequence
from fastgpt2.engine.network.step import Segment

SLOTS, ROWS = 6, 64


# ------------------------------------------------------------------------------------------- how many rows


def run_steps(rows: PromptRows, step_seconds: Callable[[int, int], float], decoding: int, steps: int = 60) -> int:
    """Take steps that last as long as `step_seconds` says of sequences and rows; return the next step's rows."""
    for _ in range(steps):
        count = rows.beside(decoding)
        rows.note(decoding, count, step_seconds(decoding, count))
    return rows.beside(decoding)


def test_nothing_is_known_at_first() -> None:
    assert PromptRows(64, 256).beside(1) == 64
    assert PromptRows(64, 256).seconds_a_row is None


@pytest.mark.parametrize("decoding", [1, 8, 15])
def test_rows_come_to_what_there_is_time_for(decoding: int) -> None:
    """By hand: 16 ms for the weights, 1 ms a sequence and 0.5 ms a row leave time for 108 to 136 rows."""

    def step_seconds(sequences: int, rows: int) -> float:
        return 0.016 + 0.001 * sequences + 0.0005 * rows

    found = run_steps(PromptRows(64, 256), step_seconds, decoding)
    assert step_seconds(decoding, found) <= MOST_SECONDS < step_seconds(decoding, found + 2 * ROWS_AT_ONCE)


@pytest.mark.parametrize(
    ("step_seconds", "expected"),
    [
        (lambda _, rows: 0.020 + 0.002 * rows, 64),  # the least, however long it takes: a step of 148 ms
        (lambda *_: 0.012, 256),  # rows that cost nothing
    ],
)
def test_rows_have_bounds(step_seconds: Callable[[int, int], float], expected: int) -> None:
    assert run_steps(PromptRows(64, 256), step_seconds, 8) == expected


def test_rows_follow_what_else_runs() -> None:
    """By hand: 85 ms are 170 rows of 0.5 ms, so 168; of rows of 2 ms, the least are too many."""

    def quick(_: int, count: int) -> float:
        return 0.0005 * count

    def slow(_: int, count: int) -> float:
        return 0.002 * count

    rows = PromptRows(64, 256)
    assert [run_steps(rows, step_seconds, 2) for step_seconds in (quick, slow, quick)] == [168, 64, 168]


def test_one_step_that_was_disturbed_counts_little() -> None:
    rows = PromptRows(64, 256, seconds_a_row=0.0005)
    rows.note(0, 160, 60.0)
    assert rows.seconds_a_row == pytest.approx(0.0007)
    rows.note(0, 8, 0.012)
    assert rows.seconds_a_row == pytest.approx(0.0007), "a few rows take as long as the weights"


# ------------------------------------------------------------------------------------------- whose turn it is


@dataclass
class StubNetwork:
    """What a decoder's steps were given, with logits that make every token the same.

    Attributes:
        steps: of each step, the segments by what their sequences do: "read" or "decode".
    """

    decoder: Decoder
    steps: list[dict[str, list[Segment]]] = field(default_factory=list)

    def forward(self, segments: list[Segment]) -> Any:
        reading = {s.slot for s in self.decoder.running if s.status == "prefill"}
        step = defaultdict(list)
        for segment in segments:
            step["read" if segment.slot in reading else "decode"].append(segment)
            self.decoder.model.cache.lengths[segment.slot] += len(segment.ids)
        self.steps.append(step)
        logits = np.zeros((sum(segment.n_logits for segment in segments), 512), np.float32)
        logits[:, 300] = 1.0
        return logits


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load("demo", max_batch=SLOTS, prefix_memory=0, drafts="off", threads=1)


@pytest.fixture
def decoder(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Decoder]:
    """Give a decoder of a stubbed network, which reads `ROWS` rows beside sequences that decode."""
    monkeypatch.setattr(engine.decoder, "prompt_rows", PromptRows(ROWS, ROWS))
    monkeypatch.setattr(engine.decoder.model, "forward", StubNetwork(engine.decoder).forward)
    yield engine.decoder
    for sequence in list(engine.decoder.running):
        engine.decoder.finish(sequence)


def admit(decoder: Decoder, tokens: int, new: int = 2, urgency: int = 0, **options: Any) -> Sequence:
    request = GenerationRequest((7,) * tokens, new, ignore_eos=True, **options)
    return decoder.admit(decoder.prepare(request), urgency=urgency)


def start_one(decoder: Decoder) -> None:
    """Have a sequence decode, so that a step reads `ROWS` rows beside it."""
    admit(decoder, 1, 400)
    decoder.step()


def left(*sequences: Sequence) -> list[int]:
    """Return what is left to read of prompts; 0 once there is a token."""
    return [0 if sequence.token_ids else len(sequence.pending) for sequence in sequences]


def test_the_shortest_prompt_is_read_first(decoder: Decoder) -> None:
    start_one(decoder)
    prompts = [admit(decoder, tokens) for tokens in (90, 40, 20)]
    decoder.step()
    assert left(*prompts) == [86, 0, 0], "60 rows for the two short ones, the other 4 for the long one"
    decoder.step()
    assert left(*prompts) == [22, 0, 0]


def test_what_is_left_counts_and_then_who_came_first(decoder: Decoder) -> None:
    start_one(decoder)
    first = admit(decoder, 150)
    decoder.step()
    second, third = admit(decoder, 100), admit(decoder, 100)
    decoder.step()
    assert left(first, second, third) == [22, 100, 100]
    decoder.step()
    assert left(first, second, third) == [0, 58, 100]


def test_a_short_prompt_does_not_wait_for_a_long_one_that_is_read(decoder: Decoder) -> None:
    start_one(decoder)
    long = admit(decoder, 400)
    decoder.step()
    short = admit(decoder, 30)
    decoder.step()
    assert left(long, short) == [400 - ROWS - (ROWS - 30), 0]


def test_urgent_prompts_go_first(decoder: Decoder) -> None:
    start_one(decoder)
    prompts = [admit(decoder, 10, urgency=-1), admit(decoder, 60, urgency=0), admit(decoder, 50, urgency=0)]
    decoder.step()
    assert left(*prompts) == [10, 46, 0]


def test_a_long_prompt_is_not_passed_for_ever(decoder: Decoder) -> None:
    """By hand: of each step's 64 rows, 60 are a later prompt's, until 180 have gone before the long one in 3 steps."""
    start_one(decoder)
    long, steps = admit(decoder, 396), 0
    while long.rows_ahead < MOST_ROWS_AHEAD:
        admit(decoder, 60, 1, urgency=1)
        decoder.step()
        steps += 1
    assert (steps, long.rows_ahead, left(long)) == (3, 180, [396 - 3 * 4])
    other = admit(decoder, 60, 1, urgency=1)
    while not long.token_ids:
        decoder.step()
        steps += 1
    assert steps == 3 + 6, "384 rows, 64 a step"
    assert left(other) == [60]


@dataclass(eq=False)
class Job:
    """A prompt that comes before the step of a number, and what is asked of it."""

    step: int
    tokens: int
    new: int
    urgency: int
    texts: int
    scored: bool


JOBS = st.builds(
    Job,
    step=st.integers(0, 30),
    tokens=st.one_of(st.integers(1, 40), st.integers(1, 450)),
    new=st.integers(1, 6),
    urgency=st.integers(-2, 0),
    texts=st.sampled_from([1, 1, 1, 2, 3]),
    scored=st.sampled_from([False, False, False, True]),
)


def is_plain(sequence: Sequence) -> bool:
    """Tell whether a prompt can be read whenever there are rows left: it is not scored, and its only text's."""
    return sequence.request.texts == 1 and sequence.request.prompt_logprobs is None


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(jobs=st.lists(JOBS, min_size=1, max_size=12))
def test_every_prompt_is_read_once_within_the_bounds(decoder: Decoder, jobs: list[Job]) -> None:
    network: StubNetwork = decoder.model.forward.__self__  # type: ignore[attr-defined]
    waiting = [(job, index) for job in sorted(jobs, key=lambda job: job.step) for index in range(job.texts)]
    prepared = {
        job: decoder.prepare(
            GenerationRequest(
                tuple(range(10, 10 + job.tokens)) if job.tokens < 300 else (9,) * job.tokens,
                job.new,
                n=job.texts,
                ignore_eos=True,
                prompt_logprobs=0 if job.scored else None,
            )
        )
        for job in jobs
    }
    admitted: list[Sequence] = []
    read: defaultdict[Sequence, list[int]] = defaultdict(list)
    ahead: defaultdict[Sequence, int] = defaultdict(int)
    number = 0
    while waiting or decoder.running:
        while waiting and waiting[0][0].step <= number and decoder.has_room(prepared[waiting[0][0]]):
            job, index = waiting.pop(0)
            admitted.append(decoder.admit(prepared[job], index, job.urgency))
        number += 1
        if not decoder.running:
            continue
        by_slot = {sequence.slot: sequence for sequence in decoder.running}
        reading = [s for s in decoder.running if s.status == "prefill"]
        scored = {sequence.slot for sequence in reading if sequence.unscored}
        decoder.step()
        pieces, decoding = network.steps[-1]["read"], network.steps[-1]["decode"]
        rows = sum(len(piece.ids) for piece in pieces)
        assert rows <= (ROWS if decoding else PREFILL_ROWS)
        assert rows + len(decoding) <= decoder.model.max_rows
        assert sum(len(piece.ids) for piece in pieces if piece.slot in scored) <= SCORED_ROWS
        for piece in pieces:
            read[by_slot[piece.slot]] += piece.ids
        unread = [sequence for sequence in reading if not sequence.token_ids and not sequence.finished]
        if rows < (ROWS if decoding else PREFILL_ROWS):
            # Rows are left only where nothing can be read: of scored prompts, or of texts that wait for another one.
            assert not any(is_plain(sequence) for sequence in unread)
        for sequence in unread:
            since = admitted.index(sequence) + 1
            ahead[sequence] += sum(len(p.ids) for p in pieces if by_slot[p.slot] in admitted[since:])
    assert decoder.model.cache.free_slots == SLOTS
    for sequence in admitted:
        assert sequence.finish_reason == "length"
        # All of it, or what was not copied from another text of the same prompt.
        assert read[sequence] == list(sequence.prompt_ids[sequence.cached_tokens :])
        if is_plain(sequence):
            assert ahead[sequence] < MOST_ROWS_AHEAD + PREFILL_ROWS
