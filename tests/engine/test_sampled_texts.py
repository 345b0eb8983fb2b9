"""A text that is drawn, or chosen under penalties, depends on nothing but its request and its seed.

Not on the batch, on drafts, on kept prefixes, on how its prompt is read, or on its siblings: bit for bit where the
kernel promises that (`GPT2.exact`), and the tokens elsewhere.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from support.machines import needs_helpers

from fastgpt2 import Engine
from fastgpt2.engine.decoding import decoder as decoder_module
from fastgpt2.engine.decoding import drafter as drafter_module
from fastgpt2.engine.decoding.records import GenerationRequest, GenerationResult, combine
from fastgpt2.engine.decoding.sequence import Sequence
from fastgpt2.engine.model.generation_config import GenerationConfig
from fastgpt2.engine.network.step import Segment

PROMPTS = (
    "",
    "My name is",
    "Sherlock Holmes",
    "KING RICHARD III:\nMy gracious lord, I pray thee, my lord, my gracious lord, I pray",
    "to be or not to be or not to be or not",
    "It was a cold morning in the spring of the year, and the man who was the first man to see the man who was dead",
)
LONG_PROMPT = " ".join(["It is a truth that the king of this fair land said to his daughter:"] * 14)
STOPS = (" the", "e", ".", "\n", " of", " king", ", and")


def load(**options: Any) -> Engine:
    """Load the shipped model, as all engines here, by one kernel."""
    plain: dict[str, Any] = {"max_batch": 8, "threads": 1, "prefix_memory": 0, "drafts": "off", "blas": "openblas"}
    return Engine.load("demo", **{**plain, **options})


@pytest.fixture(scope="module")
def plain() -> Engine:
    return load(max_batch=1)


def random_request(dice: random.Random) -> GenerationRequest:
    """Ask at random for ways to choose tokens, and for ends of texts; one in four is greedy."""
    new = dice.randint(1, 32)
    options: dict[str, Any] = {
        "max_new_tokens": new,
        "min_new_tokens": dice.choice((0, 0, dice.randint(0, new))),
        "stop": tuple(dice.sample(STOPS, dice.choice((0, 0, 0, 1, 2)))),
        "ignore_eos": dice.random() < 0.3,
        "logprobs": dice.choice((None, 0, 2)),
        "prompt_logprobs": dice.choice((None, None, None, 0)),
        "echo": dice.random() < 0.2,
        "choice_index": dice.choice((0, 0, 3)),
    }
    if dice.random() < 0.75:
        options |= {
            "seed": dice.randrange(-(1 << 63), 1 << 64),
            "temperature": dice.choice((0.3, 0.8, 1.0, 1.5)),
            "top_k": dice.choice((None, None, 5, 40)),
            "top_p": dice.choice((None, None, 0.6, 0.95)),
            "min_p": dice.choice((None, None, None, 0.1)),
            "typical_p": dice.choice((None, None, None, 0.8)),
            "n": dice.choice((1, 1, 1, 2, 3)),
        }
        options["best_of"] = dice.choice((None, None, options["n"] + dice.choice((0, 2))))
    if dice.random() < 0.5:
        options |= {
            "repetition_penalty": dice.choice((None, 0.9, 1.2)),
            "no_repeat_ngram_size": dice.choice((None, None, 1, 3)),
            "presence_penalty": dice.choice((None, None, 0.6)),
            "frequency_penalty": dice.choice((None, None, 0.4, -0.5)),
            "logit_bias": dice.choice((None, None, {262: -3.0, 11: 2.0})),
            "bad_words": dice.choice((None, None, ("the", " my lord", (300, 301)))),
            "suppress_tokens": dice.choice((None, None, (0, 13, 198))),
        }
    return GenerationRequest(dice.choice(PROMPTS), **options)


def requests(count: int, seed: int) -> list[GenerationRequest]:
    dice = random.Random(seed)
    return [random_request(dice) for _ in range(count)]


def told(engine: Engine, result: GenerationResult) -> tuple[Any, ...]:
    """Return what a result says, apart from how it came about; log probabilities only where their bits are promised."""
    exactly: tuple[Any, ...] = ()
    if engine.decoder.model.exact:
        exactly = result.logprobs, result.prompt_logprobs, result.cumulative_logprob
    others = tuple(told(engine, other) for other in result.alternatives)
    ended = result.finish_reason, result.stop_reason
    return result.text, result.token_ids, *ended, result.seed, result.choice_index, *exactly, others


def run_apart(engine: Engine, request: GenerationRequest) -> GenerationResult:
    """Run each text of a request as a request of its own, with its own index, one after the other."""
    results = []
    for index in range(request.texts):
        # What the texts of a best_of above n are ranked by.
        logprobs = 0 if request.logprobs is None and request.ranked else request.logprobs
        alone = replace(request, n=1, best_of=None, choice_index=request.choice_index + index, logprobs=logprobs)
        (result,) = engine.run([alone])
        results.append(result if request.logprobs is not None else replace(result, logprobs=None))
    if not request.ranked and request.logprobs is None:
        results = [replace(result, cumulative_logprob=None) for result in results]
    # One text is told of the prompt.
    results[1:] = [replace(result, prompt_logprobs=None) for result in results[1:]]
    return combine(request, results)


def run_mixed(engine: Engine, asked: list[GenerationRequest], dice: random.Random) -> list[GenerationResult]:
    """Run requests together in an order drawn at random: they come in mid-flight, whenever the dice says so."""
    decoder = engine.decoder
    prepared = [decoder.prepare(request) for request in asked]
    waiting = [(number, text) for number, prompt in enumerate(prepared) for text in range(prompt.request.texts)]
    if dice.random() < 0.5:
        # Texts of one prompt may come at any time, in any order.
        dice.shuffle(waiting)
    running: dict[tuple[int, int], Sequence] = {}
    results: dict[tuple[int, int], GenerationResult] = {}
    while waiting or running:
        while waiting and decoder.has_room(prepared[waiting[0][0]]) and (not running or dice.random() < 0.6):
            number, text = waiting.pop(0)
            running[number, text] = decoder.admit(prepared[number], text)
        decoder.step()
        for key in [key for key, sequence in running.items() if sequence.finished]:
            results[key] = running.pop(key).result(engine.model)
    return [
        combine(prompt.request, [results[number, text] for text in range(prompt.request.texts)])
        for number, prompt in enumerate(prepared)
    ]


@pytest.fixture(scope="module")
def asked() -> list[GenerationRequest]:
    return requests(24, 18)


@pytest.fixture(scope="module")
def expected(plain: Engine, asked: list[GenerationRequest]) -> list[GenerationResult]:
    return [run_apart(plain, request) for request in asked]


# ------------------------------------------------------------------------------------------- whatever the load


@pytest.fixture(
    scope="module",
    params=[
        {"drafts": "off"},
        {"max_batch": 1},
        {"max_batch": 3, "prefix_memory": 1 << 24},
        {"drafts": "auto"},
        {"drafts": 1},
        {"drafts": 4, "prefix_memory": 1 << 24},
        {"drafts": "int8"},
        {"drafts": "int8", "always": True},
    ],
    ids=str,
)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """Load an engine that runs texts in another way; "always" guesses by the draft model whether that pays or not."""
    options = {**request.param}
    with pytest.MonkeyPatch.context() as patch:
        if options.pop("always", False):
            patch.setattr(drafter_module, "plan_model_drafts", lambda *_: (4, 100.0))
        made = load(**options)
        yield made
        made.decoder.model.close()


def check(engine: Engine, expected: list[GenerationResult], found: list[GenerationResult]) -> None:
    for theirs, ours in zip(expected, found, strict=True):
        assert told(engine, ours) == told(engine, theirs)


@pytest.mark.thorough
def test_a_text_is_the_same_in_any_company(
    engine: Engine, asked: list[GenerationRequest], expected: list[GenerationResult]
) -> None:
    """Where prefixes are kept, and how much is guessed is learnt, twice: these are others the second time."""
    twice = engine.decoder.prefixes is not None or engine.drafts in ("auto", "int8")
    for seed in (1, 2) if twice else (1,):
        check(engine, expected, run_mixed(engine, asked, random.Random(seed)))
    assert engine.decoder.model.cache.free_slots == engine.max_batch


@pytest.mark.thorough
@pytest.mark.parametrize("drafts", ["off", 4])
def test_a_text_is_the_same_however_its_prompt_is_cut(
    plain: Engine,
    asked: list[GenerationRequest],
    expected: list[GenerationResult],
    monkeypatch: pytest.MonkeyPatch,
    drafts: str | int,
) -> None:
    """A few rows of prompts are read at a time, beside a long prompt that takes its part of them."""
    longer = GenerationRequest(LONG_PROMPT, temperature=1.2, seed=5, n=3, max_new_tokens=20)
    alone = run_apart(plain, longer)
    monkeypatch.setattr(decoder_module, "PREFILL_ROWS", 11)
    monkeypatch.setattr(decoder_module, "PREFILL_ROWS_BESIDE", 5)
    monkeypatch.setattr(decoder_module, "SCORED_ROWS", 3)
    engine = load(drafts=drafts)
    found = run_mixed(engine, [longer, *asked, longer], random.Random(3))
    check(engine, [alone, *expected, alone], found)


@needs_helpers
@pytest.mark.processes
def test_a_text_is_the_same_in_two_processes(asked: list[GenerationRequest], expected: list[GenerationResult]) -> None:
    engine = load(threads=2, drafts="int8")
    engine.warm_up()
    try:
        check(engine, expected, run_mixed(engine, asked, random.Random(4)))
    finally:
        engine.decoder.model.close()


@pytest.mark.parametrize("drafts", [4, "int8"])
def test_drafts_of_drawn_texts_come_true(drafts: str | int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft model draws by the same numbers; and what turns in circles is looked up, though it is drawn."""
    monkeypatch.setattr(drafter_module, "plan_model_drafts", lambda *_: (4, 100.0))
    engine = load(drafts=drafts)
    options: dict[str, Any] = {"temperature": 0.3, "seed": 1, "max_new_tokens": 60, "ignore_eos": True}
    results = engine.generate(list(PROMPTS[2:]), repetition_penalty=1.05, **options)
    drafting = [result.drafting for result in results]
    assert all(one.steps + one.accepted == 59 for one in drafting)
    accepted, drafted = sum(one.accepted for one in drafting), sum(one.drafted for one in drafting)
    # Weights of 8 bits guess most tokens right, which are drawn by the same numbers.
    assert accepted > (0.7 if drafts == "int8" else 0) * drafted
    assert accepted < drafted


# ------------------------------------------------------------------------------------------- several texts


EIGHT_TIMES = ("Sherlock Holmes", LONG_PROMPT, "")


@pytest.fixture(scope="module")
def eight(plain: Engine) -> dict[str, tuple[GenerationRequest, GenerationResult]]:
    """Ask for eight texts of each prompt, and run each of them as a request of its own."""
    options: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9, "seed": 77, "max_new_tokens": 12, "logprobs": 1}
    asked = [GenerationRequest(prompt, n=8, **options) for prompt in EIGHT_TIMES]
    return {prompt: (request, run_apart(plain, request)) for prompt, request in zip(EIGHT_TIMES, asked, strict=True)}


@pytest.mark.parametrize("max_batch", [1, 3, 8])
@pytest.mark.parametrize("prefix_memory", [0, 1 << 24])
@pytest.mark.parametrize("prompt", EIGHT_TIMES)
def test_eight_texts_are_those_of_eight_requests(
    eight: dict[str, tuple[GenerationRequest, GenerationResult]], max_batch: int, prefix_memory: int, prompt: str
) -> None:
    engine = load(max_batch=max_batch, prefix_memory=prefix_memory)
    request, apart = eight[prompt]
    (result,) = engine.run([request])
    assert told(engine, result) == told(engine, apart)
    texts = [result, *result.alternatives]
    assert [one.choice_index for one in texts] == list(range(8))
    assert len({one.token_ids for one in texts}) > 4
    assert {one.seed for one in texts} == {77}
    # Each stands for itself: the prompt is counted in full.
    assert len({one.usage.prompt_tokens for one in texts}) == 1


@pytest.mark.parametrize("max_new_tokens", [1, 2])
def test_a_prompt_is_read_once(max_new_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if each text ends with its first token, and so leaves before the next has read anything."""
    engine = load(max_batch=8, prefix_memory=0)
    rows, forward = list[int](), engine.decoder.model.forward

    def count(segments: list[Segment], *rest: Any) -> Any:
        rows.append(sum(len(segment.ids) for segment in segments))
        return forward(segments, *rest)

    monkeypatch.setattr(engine.decoder.model, "forward", count)
    result = engine.generate(LONG_PROMPT, n=8, temperature=1.0, seed=1, max_new_tokens=max_new_tokens)
    # The prompt, its last token for each of the others, and the new tokens of each but the last.
    assert sum(rows) == result.usage.prompt_tokens + 7 + 8 * (max_new_tokens - 1)
    cached = [one.usage.cached_tokens for one in (result, *result.alternatives)]
    assert cached == [0] + 7 * [result.usage.prompt_tokens - 1]


def test_a_text_that_ends_at_once_leaves_the_prompt_to_the_others(plain: Engine) -> None:
    engine = load(max_batch=8)
    request = GenerationRequest(LONG_PROMPT, n=6, temperature=1.0, seed=4, max_new_tokens=10)
    first = run_apart(plain, request).token_ids[0]
    for index in range(3):
        ended = replace(request, stop_token_ids=(first,), choice_index=index)
        (result,) = engine.run([ended])
        assert told(engine, result) == told(engine, run_apart(plain, ended))
    assert engine.decoder.model.cache.free_slots == 8


def test_a_text_that_is_dropped_leaves_the_prompt_to_the_others(plain: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the midst of the prompt."""
    monkeypatch.setattr(decoder_module, "PREFILL_ROWS", 50)
    engine = load(max_batch=4)
    request = GenerationRequest(LONG_PROMPT, n=3, temperature=1.0, seed=4, max_new_tokens=10)
    prepared, alone = engine.decoder.prepare(request), run_apart(plain, request)
    for steps in (1, 2, 20):
        texts = [engine.decoder.admit(prepared, index) for index in range(3)]
        for _ in range(steps):
            engine.decoder.step()
        engine.decoder.finish(texts[0])
        while engine.decoder.running:
            engine.decoder.step()
        for sequence, theirs in zip(texts[1:], alone.alternatives, strict=True):
            assert told(engine, sequence.result("demo")) == told(engine, theirs)


def mean(result: GenerationResult) -> float:
    assert result.logprobs is not None
    values = [one.logprob for one in result.logprobs]
    return sum(value for value in values if value is not None) / len(values)


def test_the_best_are_those_with_the_highest_mean_log_probability() -> None:
    engine = load()
    for seed in range(6):
        options: dict[str, Any] = {"temperature": 1.3, "seed": seed, "max_new_tokens": 15, "logprobs": 0}
        result = engine.generate("Sherlock Holmes", n=3, best_of=8, **options)
        everything = engine.generate("Sherlock Holmes", n=8, **options)
        ranked = sorted([everything, *everything.alternatives], key=mean, reverse=True)[:3]
        best = [result, *result.alternatives]
        assert [one.choice_index for one in best] == [one.choice_index for one in ranked]
        assert [one.token_ids for one in best] == [one.token_ids for one in ranked]
        for one in best:
            assert one.cumulative_logprob == pytest.approx(mean(one) * len(one.token_ids))
    # Without log probabilities being told, the same are the best.
    again = engine.generate("Sherlock Holmes", n=3, best_of=8, **{**options, "logprobs": None})
    assert again.logprobs is None
    assert [one.token_ids for one in (again, *again.alternatives)] == [one.token_ids for one in best]
    assert again.cumulative_logprob == pytest.approx(best[0].cumulative_logprob)


def test_the_best_of_greedy_texts_is_the_first() -> None:
    engine = load()
    result = engine.generate("Sherlock Holmes", best_of=3, max_new_tokens=5)
    assert (result.choice_index, result.alternatives) == (0, ())
    assert result.token_ids == engine.generate("Sherlock Holmes", max_new_tokens=5).token_ids


def test_what_is_told_of_the_prompt_is_told_once_whichever_text_is_first() -> None:
    engine = load()
    alone = engine.generate("Sherlock Holmes", prompt_logprobs=1, max_new_tokens=1)
    first = set()
    for seed in range(5):
        options: dict[str, Any] = {"prompt_logprobs": 1, "temperature": 1.5, "seed": seed, "max_new_tokens": 6}
        result = engine.generate("Sherlock Holmes", n=2, best_of=4, **options)
        first.add(result.choice_index)
        assert result.prompt_logprobs is not None
        assert [one.token_id for one in result.prompt_logprobs] == [one.token_id for one in alone.prompt_logprobs or ()]
        assert [one.prompt_logprobs for one in result.alternatives] == [None]
    assert len(first) > 1


def test_several_texts_with_all_that_a_request_may_ask(plain: Engine) -> None:
    """An echo, stop strings, least lengths, going on past the end, log probabilities; alone and as texts of one."""
    engine = load()
    for options in (
        {"echo": True},
        {"stop": ("e", " the"), "min_new_tokens": 3},
        {"stop": ("\n",), "echo": True, "logprobs": 2},
        {"ignore_eos": True, "logit_bias": {0: 100.0}},
        {"logit_bias": {0: 100.0}, "min_new_tokens": 4},
        {"stop_token_ids": (262, 11, 13), "min_new_tokens": 2},
        {"logprobs": 3, "prompt_logprobs": 2},
    ):
        fields: dict[str, Any] = options
        request = GenerationRequest("Sherlock Holmes", n=4, temperature=1.1, seed=6, max_new_tokens=16, **fields)
        (result,) = engine.run([request])
        assert told(engine, result) == told(engine, run_apart(plain, request))
        for one in (result, *result.alternatives):
            assert one.text.startswith("Sherlock Holmes") == request.echo
            assert len(one.token_ids) > request.min_new_tokens or one.finish_reason == "length"


def test_without_new_tokens_there_are_as_many_empty_texts() -> None:
    engine = load()
    result = engine.generate("My name is", n=3, temperature=1.0, seed=9, max_new_tokens=0, prompt_logprobs=0, echo=True)
    texts = [result, *result.alternatives]
    assert [(one.text, one.token_ids, one.finish_reason) for one in texts] == 3 * [("My name is", (), "length")]
    assert [one.choice_index for one in texts] == [0, 1, 2]
    assert [one.seed for one in texts] == [9, 9, 9]
    assert result.prompt_logprobs is not None
    assert len(result.prompt_logprobs) == 3
    best = engine.generate("My name is", n=1, best_of=2, temperature=1.0, max_new_tokens=0)
    assert (best.text, best.alternatives) == ("", ())


# ----------------------------------------------------------------------------------------------- seeds


def test_other_seeds_and_other_indices_give_other_texts(plain: Engine) -> None:
    options: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 12}
    of_seeds = {plain.generate("Sherlock Holmes", seed=seed, **options).token_ids for seed in range(40)}
    assert len(of_seeds) > 35
    of_indices = {plain.generate("Sherlock Holmes", seed=0, choice_index=n, **options).token_ids for n in range(40)}
    assert len(of_indices) > 35
    # 64 bits count, and a negative seed is the one that they spell.
    near = [plain.generate("Sherlock Holmes", seed=seed, **options).token_ids for seed in (2**64 - 1, -1, 2**63 - 1, 0)]
    assert near[0] == near[1]
    assert len(set(near)) == 3


def test_a_seed_that_the_result_tells_gives_the_text_again(plain: Engine) -> None:
    texts = set()
    for _ in range(8):
        options: dict[str, Any] = {"temperature": 1.2, "top_k": 300, "max_new_tokens": 12}
        drawn = plain.generate("Sherlock Holmes", **options)
        assert drawn.seed is not None
        assert 0 <= drawn.seed < 2**53
        assert plain.generate("Sherlock Holmes", seed=drawn.seed, **options).token_ids == drawn.token_ids
        texts.add(drawn.token_ids)
    assert len(texts) > 5


def test_a_longer_text_begins_as_the_shorter_one(plain: Engine) -> None:
    options: dict[str, Any] = {"temperature": 1.0, "seed": 3, "repetition_penalty": 1.1, "ignore_eos": True}
    longest = plain.generate("My name is", max_new_tokens=150, **options).token_ids
    for length in (1, 2, 63, 64, 65, 149):
        assert plain.generate("My name is", max_new_tokens=length, **options).token_ids == longest[:length]


# ------------------------------------------------------------------------------- what is drawn, and what is not


def test_what_is_greedy_and_what_is_drawn(plain: Engine) -> None:
    def tokens(**options: Any) -> tuple[int, ...]:
        result = plain.generate("Sherlock Holmes", max_new_tokens=16, **options)
        assert (result.seed is None) == (result.token_ids == greedy or not options)
        return result.token_ids

    greedy: tuple[int, ...] = plain.generate("Sherlock Holmes", max_new_tokens=16).token_ids
    for options in (
        {"temperature": 0},
        {"temperature": 0.0, "seed": 5},
        {"do_sample": False, "temperature": 0.9, "seed": 5},
        {"do_sample": True, "temperature": 0},
        {"top_k": 5, "top_p": 0.5, "min_p": 0.1, "typical_p": 0.4, "seed": 5},
        {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "presence_penalty": 0, "logit_bias": {}},
    ):
        fields: dict[str, Any] = options
        assert tokens(**fields) == greedy
    drawn = tokens(temperature=1.0, seed=5)
    assert drawn != greedy
    assert tokens(do_sample=True, seed=5) == drawn
    assert tokens(do_sample=True, temperature=1, seed=5) == drawn


def test_a_draw_without_a_temperature_takes_the_model_s_own() -> None:
    engine = load()
    options: dict[str, Any] = {"seed": 5, "max_new_tokens": 16}
    asked = engine.generate("Sherlock Holmes", temperature=0.6, top_k=30, **options).token_ids
    engine.decoder.generation = GenerationConfig(0, (0,), options={"temperature": 0.6, "top_k": 30})
    greedy = engine.generate("Sherlock Holmes", **options)
    assert greedy.seed is None, "a model's own temperature has nothing drawn"
    assert engine.generate("Sherlock Holmes", do_sample=True, **options).token_ids == asked
    # Another temperature keeps the model's own top_k; a neutral one sets it aside.
    hotter = engine.generate("Sherlock Holmes", temperature=1.4, **options).token_ids
    engine.decoder.generation = GenerationConfig(0, (0,))
    assert engine.generate("Sherlock Holmes", temperature=1.4, top_k=30, **options).token_ids == hotter
    engine.decoder.generation = GenerationConfig(0, (0,), options={"temperature": 0.6, "top_k": 30})
    free = engine.generate("Sherlock Holmes", temperature=1.4, top_k=0, **options).token_ids
    engine.decoder.generation = GenerationConfig(0, (0,))
    assert engine.generate("Sherlock Holmes", temperature=1.4, **options).token_ids == free


# ---------------------------------------------------------------------------------------- log probabilities


def test_log_probabilities_are_the_model_s_own(plain: Engine) -> None:
    """They are those of the same tokens where they stand in a prompt: before penalties, temperature and all else."""
    options: dict[str, Any] = {
        "temperature": 0.7, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.3, "frequency_penalty": 0.5,
        "logit_bias": {262: 3.0}, "suppress_tokens": (13,), "bad_words": ("my",),
    }  # fmt: skip
    drafting = load(drafts=4)
    for seed in range(5):
        for engine in (plain, drafting):
            result = engine.generate("Sherlock Holmes", seed=seed, max_new_tokens=30, logprobs=2, **options)
            ids = [*engine.tokenizer.encode("Sherlock Holmes"), *result.token_ids]
            scored = engine.generate(ids, max_new_tokens=0, prompt_logprobs=2).prompt_logprobs
            assert scored is not None
            assert result.logprobs is not None
            for ours, theirs in zip(result.logprobs, scored[-len(result.token_ids) :], strict=True):
                assert ours.token_id == theirs.token_id
                if engine.decoder.model.exact:
                    assert (ours.logprob, ours.top) == (theirs.logprob, theirs.top)
                else:
                    assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            total = sum(one.logprob for one in result.logprobs if one.logprob is not None)
            assert result.cumulative_logprob == pytest.approx(total)
