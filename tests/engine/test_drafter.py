"""Drafts: guesses are looked up right and planned as they pay, and do not change what is generated."""

from __future__ import annotations

import itertools
import os
import random
import signal
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.machines import needs_helpers

from fastgpt2 import Engine
from fastgpt2.engine.decoding.drafter import Drafter, plan_drafts, plan_model_drafts
from fastgpt2.engine.decoding.lookup import LONGEST_MATCH, Acceptance, Lookup
from fastgpt2.engine.decoding.records import GenerationRequest
from fastgpt2.engine.decoding.sequence import Sequence
from fastgpt2.engine.network.step_costs import StepCosts
from fastgpt2.errors import BadRequest

# Where the kernel is not batch-invariant, the order of two logits that are nearer to each other than this may change.
TIE = 1e-3


def test_a_guess_is_what_followed_the_longest_match() -> None:
    lookup = Lookup([1, 2, 3, 4, 9])

    def after(token_id: int) -> tuple[int | None, int]:
        lookup.push(token_id)
        return lookup.guess, lookup.match

    assert lookup.draft(3) == []
    assert after(2) == (None, 0)  # the last two tokens have not occurred before
    assert after(3) == (4, 2)
    assert lookup.draft(4) == [4, 9, 2, 3]
    assert after(4) == (9, 3)
    assert after(7) == (None, 0)  # and not 9


def test_a_text_that_turns_in_circles_is_guessed_beyond_its_end() -> None:
    assert Lookup([5, 5, 5]).draft(4) == [5, 5, 5, 5]
    assert Lookup([8, 1, 2, 3, 1, 2, 3]).draft(7) == [1, 2, 3, 1, 2, 3, 1]


@given(st.lists(st.integers(0, 3), max_size=120))
def test_a_match_is_one(ids: list[int]) -> None:
    lookup = Lookup([])
    for end in range(1, len(ids) + 1):
        lookup.push(ids[end - 1])
        seen = ids[:end]
        pairs = set(itertools.pairwise(seen[:-1]))
        assert (lookup.match > 0) == (end > 1 and (seen[-2], seen[-1]) in pairs)
        if lookup.match:
            # Somewhere before stand `match` of the last tokens, and then the guess.
            wanted = [*seen[-lookup.match :], lookup.guess]
            places = [at for at in range(end) if seen[at : at + len(wanted)] == wanted]
            assert places
            assert 2 <= lookup.match <= LONGEST_MATCH


def test_acceptance_is_learnt_by_the_length_of_the_match() -> None:
    acceptance = Acceptance()
    for _ in range(2000):
        acceptance.note(2, False)
        acceptance.note(9, True)
    assert acceptance.rate(2) < 0.02
    assert acceptance.rate(9) > 0.98
    assert acceptance.rate(3) == acceptance.rate(2)  # one rate for a power of two and the lengths up to the next
    chances = acceptance.chances(9, 3)
    assert chances == [pytest.approx(acceptance.rate(9) ** n) for n in (1, 2, 3)]
    assert acceptance.chances(0, 3) == []
    # What was long ago is forgotten.
    for _ in range(4000):
        acceptance.note(2, True)
    assert acceptance.rate(2) > 0.9


def test_free_rows_are_filled_and_dear_ones_are_not() -> None:
    chances = [[0.9, 0.8, 0.7], []]
    counts, gain = plan_drafts(chances, lambda _rows: 1.0)
    assert counts == [3, 0]
    assert gain == pytest.approx((1 + 2.4 + 1) / 2)
    # If each row costs as much as the first, drafting is at best as fast as before.
    assert plan_drafts(chances, float) == ([0, 0], 1.0)
    # By hand: steps of 2, 3, 4 rows take 1.2, 1.4, 2.0 for 1.9, 2.7, 3.4 tokens: 1.58, 1.93, 1.7 a unit of time.
    costs = {1: 1.0, 2: 1.2, 3: 1.4, 4: 2.0}
    counts, gain = plan_drafts([[0.9, 0.8, 0.7]], costs.__getitem__)
    assert counts == [2]
    assert gain == pytest.approx(2.7 / 1.4)


def test_nobody_is_slowed_for_the_sake_of_another() -> None:
    """The first sequence would gain much by rows that cost 5% each; the second has no guesses and would pay for it."""
    chances = [[0.95] * 4, []]
    assert plan_drafts(chances, lambda rows: 1 + 0.05 * (rows - 2)) == ([0, 0], 1.0)
    # At 1% each, up to three rows are within what is tolerated.
    assert plan_drafts(chances, lambda rows: 1 + 0.01 * (rows - 2))[0] == [3, 0]
    # Alone, the first sequence gains.
    assert plan_drafts(chances[:1], lambda rows: 1 + 0.05 * (rows - 1))[0] == [4]


def test_a_smaller_model_guesses_as_far_as_it_pays() -> None:
    # Its step costs a quarter, and further rows are free: 1 + p + ... + p^k tokens for 1 + k / 4.
    gains = {k: sum(0.9**i for i in range(k + 1)) / (1 + k / 4) for k in range(9)}
    best = max(gains, key=gains.__getitem__)
    k, gain = plan_model_drafts(1, 0.9, lambda _rows: 0.25, lambda _rows: 1.0)
    assert k == best
    assert gain == pytest.approx(gains[best])
    assert plan_model_drafts(1, 0.2, lambda _rows: 0.25, lambda _rows: 1.0) == (0, 1.0)
    # A step verifies at most 32 guesses: three of each of 16 sequences would be 48.
    assert plan_model_drafts(16, 0.9, lambda _rows: 0.01, lambda _rows: 1.0)[0] == 2


def drafted_counts(steps: int, step_seconds: Callable[[int], float], guessable: range | None = None) -> list[int]:
    """Return how many guesses are verified in each step of a lone sequence that turns in circles.

    By what was measured, rows are dear: two take twice as long as one, and so on. What they take is `step_seconds`.

    Args:
        guessable: the steps in which there is anything to guess; None for all.
    """
    engine = Engine.load("demo", max_batch=1, drafts="off")
    drafter = Drafter(engine.decoder.model, None, StepCosts({rows: float(rows) for rows in (1, 2, 4, 8, 16)}))
    (sequence,) = generate(engine, [GenerationRequest("I", max_new_tokens=1)])
    sequence.max_new_tokens, lookup = 2 * steps, Lookup([5] * 12)
    counts = []
    for step in range(steps):
        sequence.lookup = lookup if guessable is None or step in guessable else None
        (guesses,) = drafter.draft([sequence], 32)
        counts.append(len(guesses))
        drafter.note_step(1 + len(guesses), step_seconds(1 + len(guesses)))
    return counts


def test_rows_that_were_measured_as_dear_are_tried_now_and_then() -> None:
    counts = drafted_counts(1000, lambda _rows: 0.010)
    assert not any(counts[:50]), "by what was measured, no guess pays"
    assert any(counts[50:60]), "but that is looked at"
    assert sum(map(bool, counts[60:])) > 0.97 * len(counts[60:]), "and corrected"


@pytest.mark.parametrize("first", [0, 5])
def test_rows_are_tried_also_where_there_is_seldom_anything_to_guess(first: int) -> None:
    counts = drafted_counts(1000, lambda _rows: 0.010, guessable := range(first, 1000, 10))
    tried = [bool(counts[step]) for step in guessable]
    assert not any(tried[:5])
    assert sum(tried[5:11]) >= 3, "three of six that had guesses, though many others lie between"
    assert all(tried[12:])


def test_where_rows_are_dear_indeed_trials_become_rare() -> None:
    counts = drafted_counts(1500, lambda rows: 0.010 * rows)
    assert 3 <= sum(map(bool, counts)) <= 24
    assert max(counts) <= 3


WORDS = """
it is a truth that the king of this fair land said to his daughter come hither and sit by me for I have a thing to tell
thee my dear Watson said he you have not observed the mud upon his boots nor the ring of a lady what is in a name a rose
by any other word would smell as sweet so Romeo would were he not called I pray you leave me to-night the moon was down
I have not heard the clock and she goes down at twelve there is husbandry in heaven
""".split()  # noqa: SIM905  (a list of this many words is easier to read as text)


def prompts(count: int, seed: int) -> list[str]:
    """Make prompts, some of which repeat themselves, so that there is something to look up."""
    dice = random.Random(seed)
    made = []
    for _ in range(count):
        at, length = dice.randrange(len(WORDS)), dice.randint(1, 12)
        phrase = " ".join((WORDS * 2)[at : at + length])
        made.append(" ".join([phrase] * dice.choice((1, 1, 2, 3))))
    return made


def generate(engine: Engine, requests: list[GenerationRequest]) -> list[Sequence]:
    """Run all requests, as many at a time as there are slots. Return the sequences, which tell more than results."""
    decoder, waiting, done = engine.decoder, [engine.decoder.prepare(request) for request in requests], []
    while waiting or decoder.running:
        while waiting and decoder.has_room(waiting[0]):
            done.append(decoder.admit(waiting.pop(0)))
        decoder.step()
    return done


def assert_same(engine: Engine, plain: list[Sequence], drafted: list[Sequence]) -> None:
    """Compare bit for bit where the kernel allows it; elsewhere ties may differ."""
    exact = engine.decoder.model.exact
    for one, other in zip(plain, drafted, strict=True):
        if one.token_ids != other.token_ids and not exact:
            at = next(i for i, (a, b) in enumerate(zip(one.token_ids, other.token_ids, strict=False)) if a != b)
            prompt = [*engine.decoder.prepare(one.request).ids, *one.token_ids[:at]]
            (result,) = generate(engine, [GenerationRequest(tuple(prompt), max_new_tokens=1, logprobs=2)])
            best, second = result.logprobs[0].top
            assert best.logprob is not None
            assert second.logprob is not None
            assert best.logprob - second.logprob < TIE
            continue
        assert (one.token_ids, one.text, one.finish_reason) == (other.token_ids, other.text, other.finish_reason)
        for token, again in zip(one.logprobs, other.logprobs, strict=True):
            assert token.token_id == again.token_id
            assert token.logprob == (again.logprob if exact else pytest.approx(again.logprob, abs=1e-3))


@pytest.fixture(scope="module", params=["auto", 1, 15, "int8"], ids=str)
def drafting(request: pytest.FixtureRequest) -> Engine:
    return Engine.load("demo", max_batch=8, drafts=request.param)


@pytest.fixture(scope="module")
def plain() -> Engine:
    return Engine.load("demo", max_batch=8, drafts="off")


@pytest.fixture(scope="module")
def expected(plain: Engine) -> list[Sequence]:
    return generate(plain, REQUESTS)


REQUESTS = [GenerationRequest(prompt, max_new_tokens=16) for prompt in prompts(150, 1)]


@pytest.mark.thorough
def test_hundreds_of_prompts_give_the_same_tokens(plain: Engine, drafting: Engine, expected: list[Sequence]) -> None:
    """150 prompts run in each of four modes, in batches of eight."""
    found = generate(drafting, REQUESTS)
    assert_same(plain, expected, found)
    # Guesses were verified, and some came true: each saved a step.
    if drafting.decoder.drafter._most is not None:
        assert 0 < sum(s.accepted for s in found) < sum(s.drafted for s in found)
    assert all(s.steps == len(s.token_ids) - 1 - s.accepted for s in found)


def random_request(dice: random.Random, prompt: str) -> GenerationRequest:
    """Ask at random for what may end a text, or read each of its tokens, in the midst of what was guessed."""
    new = dice.randint(1, 40)
    return GenerationRequest(
        prompt,
        max_new_tokens=new,
        min_new_tokens=dice.choice((0, 0, dice.randint(0, new))),
        stop=tuple(dice.sample((" the", "e", ".", "\n", " of", " king", ", and"), dice.choice((0, 0, 1, 2)))),
        ignore_eos=dice.random() < 0.3,
        logprobs=dice.choice((None, 0, 2)),
        prompt_logprobs=dice.choice((None, None, 0)),
        echo=dice.random() < 0.2,
    )


@pytest.fixture(scope="module")
def ending(plain: Engine) -> tuple[list[GenerationRequest], list[Sequence]]:
    """Make requests with ends of all kinds, and what follows without drafts."""
    dice = random.Random(7)
    requests = [random_request(dice, prompt) for prompt in prompts(100, 2)]
    return requests, generate(plain, requests)


@pytest.mark.thorough
def test_whatever_ends_a_text_ends_it_where_it_would(
    plain: Engine, drafting: Engine, ending: tuple[list[GenerationRequest], list[Sequence]]
) -> None:
    requests, expected = ending
    assert_same(plain, expected, generate(drafting, requests))


@pytest.mark.parametrize("drafts", [15, "int8"])
def test_up_to_the_last_position_and_not_beyond(plain: Engine, drafts: str | int) -> None:
    engine = Engine.load("demo", max_batch=2, drafts=drafts)
    n_positions = engine.config.n_positions
    ids = (engine.tokenizer.encode(" ".join(WORDS)) * 10)[: n_positions - 30]
    requests = [GenerationRequest(tuple(ids), max_new_tokens=30, ignore_eos=True)] * 2
    found = generate(engine, requests)
    assert_same(plain, generate(plain, requests), found)
    assert sum(sequence.accepted for sequence in found) > 0
    assert engine.decoder.model.cache.free_slots == 2


def test_the_cache_holds_what_came_true_and_no_more() -> None:
    engine = Engine.load("demo", max_batch=1, drafts=15)
    decoder = engine.decoder
    sequence = decoder.admit(decoder.prepare(GenerationRequest("to be or not to be or not", max_new_tokens=60)))
    slot, rejected = sequence.slot, 0
    assert slot is not None
    while not sequence.finished:
        decoder.step()
        if sequence.token_ids and not sequence.finished:
            assert decoder.model.cache.lengths[slot] == sequence.prompt_tokens + len(sequence.token_ids) - 1
        rejected = sequence.drafted - sequence.accepted
    assert rejected > 0


def test_nothing_is_guessed_where_it_is_off(plain: Engine) -> None:
    assert all(s.drafted == 0 and s.lookup is None for s in generate(plain, REQUESTS[:20]))


@pytest.fixture
def team() -> Iterator[Engine]:
    engine = Engine.load("demo", max_batch=4, drafts="int8", threads=2)
    engine.warm_up()
    yield engine
    engine.decoder.model.close()


@needs_helpers
@pytest.mark.processes
def test_a_team_drafts_together_and_goes_on_alone(plain: Engine, team: Engine, expected: list[Sequence]) -> None:
    assert team.describe().endswith("2 processes, drafts by compiled-int8")
    requests, before = REQUESTS[:40], expected[:40]
    assert_same(plain, before, generate(team, requests))
    (pid,) = team.decoder.model.helper_pids()
    os.kill(pid, signal.SIGKILL)
    assert_same(plain, before, generate(team, requests))


@pytest.mark.parametrize("drafts", ["sometimes", 0, 16, -1, 2.5, True])
def test_what_drafts_cannot_be(drafts: str | int) -> None:
    with pytest.raises(BadRequest, match="drafts must be off, auto, int8 or 1 to 15"):
        Engine.load("demo", drafts=drafts)


def test_int8_does_not_draft_for_itself() -> None:
    with pytest.raises(BadRequest, match="of no use to int8 weights"):
        Engine.load("demo", drafts="int8", weights="int8")
