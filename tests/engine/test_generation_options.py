"""Options of a request beside its length: least lengths, stop strings, echoes, token ids; and partial results."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.models import with_end_of_text
from support.running import GOLDEN

from fastgpt2 import Engine
from fastgpt2.engine.decoding.prompt_rows import PromptRows
from fastgpt2.engine.decoding.records import GenerationRequest, GenerationResult
from fastgpt2.engine.decoding.sequence import Sequence
from fastgpt2.errors import BadRequest, PromptTooLong

continuations: list[dict[str, Any]] = json.loads((GOLDEN / "demo_continuations.json").read_text("utf-8"))[
    "continuations"
]
scores: list[dict[str, Any]] = json.loads((GOLDEN / "demo_scores.json").read_text("utf-8"))["scores"]


def admit(engine: Engine, request: GenerationRequest) -> Sequence:
    return engine.decoder.admit(engine.decoder.prepare(request))


def without_times(result: GenerationResult) -> tuple[Any, ...]:
    return result.text, result.token_ids, result.finish_reason, result.usage, result.logprobs


# ------------------------------------------------------------------------------------------- least lengths


@pytest.mark.parametrize("entry", scores, ids=lambda entry: repr(entry["prompt"]))
def test_a_least_length_as_transformers_has_it(tmp_path: Path, entry: dict[str, Any]) -> None:
    least = entry["least"]
    engine = with_end_of_text(tmp_path, least["eos_token_id"])
    limits = {"min_new_tokens": least["min_new_tokens"], "max_new_tokens": least["max_new_tokens"]}
    result = engine.generate(entry["prompt"], **limits, logprobs=1)
    assert list(result.token_ids) == least["ids"]
    assert result.finish_reason == "stop"
    # What ends it is no special token, and so its text stays.
    assert result.text == engine.tokenizer.decode(least["ids"])
    # They are of the distribution before end-of-text tokens were excluded, which were the likeliest in places.
    assert result.logprobs is not None
    assert [one.logprob for one in result.logprobs] == pytest.approx(least["logprobs"], rel=0, abs=1e-4)
    passed_over = [one.top[0].token_id for one in result.logprobs if one.top[0].token_id != one.token_id]
    assert passed_over
    assert set(passed_over) <= set(least["eos_token_id"])
    plain = engine.generate(entry["prompt"], max_new_tokens=20)
    assert list(plain.token_ids) == entry["ids"][: len(plain.token_ids)]
    assert len(plain.token_ids) <= 4, "without a least length it ends early"


def test_what_ends_nothing_is_not_passed_over(tmp_path: Path) -> None:
    entry = continuations[0]
    engine = with_end_of_text(tmp_path, [entry["ids"][3]])
    result = engine.generate(entry["prompt"], max_new_tokens=30, min_new_tokens=20, ignore_eos=True)
    assert list(result.token_ids) == entry["ids"][:30]


def test_a_stop_string_counts_from_the_least_length_on(engine: Engine) -> None:
    """The places are found by hand, in a continuation whose every token is known."""
    entry = continuations[1]
    texts = [engine.tokenizer.decode([token_id]) for token_id in entry["ids"]]
    assert "".join(texts) == entry["text"]
    for n in (0, 1, 5, 12):
        # It ends in the text of token n + 1, and begins in the text of token n if there is one.
        stop = texts[n] if n == 0 else texts[n - 1][-1] + texts[n]
        for least in (n, n + 1):
            result = engine.generate(entry["prompt"], max_new_tokens=60, min_new_tokens=least, stop=stop)
            # The first occurrence that ends in the text of a token beyond the least length.
            spent = len("".join(texts[:least]))
            at = next(
                (i for i in range(len(entry["text"])) if entry["text"].startswith(stop, i) and i + len(stop) > spent),
                None,
            )
            if least == n:
                assert at == len("".join(texts[:n])) - (1 if n else 0)
                assert (len(result.token_ids), result.finish_reason) == (n + 1, "stop")
            if at is not None and at + len(stop) <= len("".join(texts[:60])):
                assert (result.text, result.finish_reason) == (entry["text"][:at], "stop")
            else:
                assert (result.text, result.finish_reason) == ("".join(texts[:60]), "length")


def test_a_least_length_without_a_limit_is_the_limit(engine: Engine) -> None:
    result = engine.generate("My name is", min_new_tokens=33, ignore_eos=True)
    assert result.usage.completion_tokens == 33


def test_a_least_length_for_which_there_is_no_room(engine: Engine) -> None:
    prompt = [5] * 500
    with pytest.raises(PromptTooLong, match="500 and min_new_tokens 13 make 513, over the model's 512 positions: ask"):
        engine.generate(prompt, min_new_tokens=13)
    assert engine.generate(prompt, min_new_tokens=12).usage.completion_tokens == 12
    with pytest.raises(BadRequest, match="min_new_tokens must be between 0 and 5, not 6"):
        engine.generate(prompt, max_new_tokens=5, min_new_tokens=6)


# ------------------------------------------------------------------------------------------- no new tokens


def test_no_new_tokens(engine: Engine) -> None:
    for prompt in ("My name is", "", [5, 6, 7]):
        result = engine.generate(prompt, max_new_tokens=0, stop="name", logprobs=2)
        assert (result.text, result.token_ids, result.logprobs, result.finish_reason) == ("", (), (), "length")
        assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (1 if prompt == "" else 3, 0)
        assert result.timings.prefill_seconds > 0
        assert result.timings.decode_seconds == 0
    assert engine.generate("A parrot: 🦜", max_new_tokens=0, echo=True).text == "A parrot: 🦜"
    cut = engine.tokenizer.encode("A parrot: 🦜")[:-1]
    assert engine.generate(cut, max_new_tokens=0, echo=True).text == "A parrot: \ufffd"


def test_without_new_tokens_a_prompt_may_fill_all_positions(engine: Engine) -> None:
    n_positions = engine.config.n_positions
    full = [5] * n_positions
    assert engine.generate(full, max_new_tokens=0).usage.total_tokens == n_positions
    for asked in (None, 1):
        with pytest.raises(PromptTooLong, match=r"512 positions, one of which a new token needs: .* by at least 1 tok"):
            engine.generate(full, max_new_tokens=asked)
    with pytest.raises(
        PromptTooLong, match=r"tokens 514, over the model's 512 positions: shorten .* by at least 2 tok"
    ):
        engine.generate([*full, 5, 5], max_new_tokens=0)
    with pytest.raises(BadRequest, match="min_new_tokens must be between 0 and 0, not 1"):
        engine.generate(full, max_new_tokens=0, min_new_tokens=1)


def test_those_without_new_tokens_come_and_go_beside_others(engine: Engine) -> None:
    decoder = engine.decoder
    entry = continuations[1]
    steady = admit(engine, GenerationRequest(entry["prompt"], 12, ignore_eos=True))
    decoder.step()
    nothing = [admit(engine, GenerationRequest("a", 0)) for _ in range(3)]
    assert decoder.model.cache.free_slots == 0
    assert not nothing[0].finished
    assert decoder.step() == nothing
    assert decoder.model.cache.free_slots == 3
    assert len(steady.token_ids) == 2
    while decoder.running:
        decoder.step()
    assert steady.token_ids == entry["ids"][:12]


# --------------------------------------------------------------------------------------- stop strings, settled


def may_become(text: str, stop: str, begin: int) -> bool:
    """Tell whether text that follows may complete a stop string that begins at this place."""
    return len(text) - begin < len(stop) and stop.startswith(text[begin:])


def stop_strings(text: str, dice: random.Random) -> list[str]:
    """Cut stop strings out of a text, and spoil the end of some: text held back for these comes out after all."""
    stops = []
    for _ in range(dice.randint(1, 4)):
        begin = dice.randrange(len(text) - 12)
        stop = text[begin : begin + dice.randint(1, 12)]
        stops.append(stop + "\u2603" if dice.random() < 0.6 else stop)
    return stops


@pytest.mark.parametrize("seed", range(40))
def test_what_is_settled_stays(engine: Engine, seed: int) -> None:
    dice = random.Random(seed)
    entry = dice.choice(continuations)
    echo, least = dice.random() < 0.3, dice.choice([0, 0, 10])
    stops = stop_strings(entry["text"], dice)
    request = GenerationRequest(entry["prompt"], 60, tuple(stops), ignore_eos=True, echo=echo, min_new_tokens=least)
    sequence = admit(engine, request)
    start = len(entry["prompt"]) if echo else 0
    assert sequence.settled == start
    given = sequence.text
    while not sequence.finished:
        engine.decoder.step()
        assert sequence.settled >= len(given)
        assert sequence.text.startswith(given)
        given = sequence.text[: sequence.settled]
        if not sequence.finished:
            text = sequence.text
            open_at = [at for at in range(start, len(text)) if any(may_become(text, stop, at) for stop in stops)]
            assert sequence.settled == min(open_at, default=len(text))
    assert given == sequence.text == sequence.result("demo").text
    # At the limit an unfinished character ends the text.
    assert entry["text"].startswith(sequence.text[start:].rstrip("\ufffd"))


def test_text_is_held_back_before_the_least_length_too(engine: Engine) -> None:
    entry = continuations[1]
    texts = [engine.tokenizer.decode([token_id]) for token_id in entry["ids"]]
    stop = "".join(texts[3:8])
    sequence = admit(engine, GenerationRequest(entry["prompt"], 20, (stop,), min_new_tokens=6, ignore_eos=True))
    lengths = []
    while not sequence.finished:
        engine.decoder.step()
        lengths.append(sequence.settled)
    kept = len("".join(texts[:3]))
    assert lengths[2:] == [kept] * 6
    assert (sequence.text, len(sequence.token_ids)) == (entry["text"][:kept], 8)


# ----------------------------------------------------------------------------------------------- stop tokens


def accept(engine: Engine, request: GenerationRequest, ids: list[int]) -> Sequence:
    """Have the decoder take these tokens for the likeliest, one after the other, until the text ends."""
    sequence = admit(engine, request)
    for token_id in ids:
        logits = np.zeros(engine.config.vocab_size, np.float32)
        logits[token_id] = 9
        settled = sequence.text[: sequence.settled]
        engine.decoder._accept(sequence, logits, token_id, 0.0)
        assert sequence.text.startswith(settled)
        if sequence.finished:
            break
    engine.decoder.finish(sequence)
    return sequence


def test_a_stop_token_ends_the_text_and_is_left_out(engine: Engine) -> None:
    entry = continuations[1]
    at = 6
    stop = entry["ids"][at]
    assert stop not in entry["ids"][:at]
    result = engine.generate(entry["prompt"], max_new_tokens=60, stop_token_ids=[stop, 2047], logprobs=0)
    assert (result.finish_reason, result.stop_reason) == ("stop", stop)
    assert list(result.token_ids) == entry["ids"][: at + 1]
    assert result.text == engine.tokenizer.decode(entry["ids"][:at])
    assert result.logprobs is not None
    assert (result.logprobs[-1].text_offset, result.logprobs[-1].special) == (len(result.text), False)
    # It counts with `ignore_eos` too, and beside stop strings that come later.
    same = engine.generate(entry["prompt"], max_new_tokens=60, stop_token_ids=(stop,), ignore_eos=True, stop="zebra")
    assert without_times(same)[:3] == without_times(result)[:3]


def test_a_least_length_passes_over_stop_tokens(engine: Engine) -> None:
    entry = continuations[1]
    options: Any = {"max_new_tokens": 20, "stop_token_ids": entry["ids"][2:9]}
    result = engine.generate(entry["prompt"], min_new_tokens=8, logprobs=1, **options)
    assert list(result.token_ids[:2]) == entry["ids"][:2]
    assert not set(result.token_ids[:8]) & set(entry["ids"][2:9])
    assert result.logprobs is not None
    assert result.logprobs[2].top[0].token_id == entry["ids"][2], "the distribution is the model's"
    assert len(engine.generate(entry["prompt"], **options).token_ids) == 3


def test_the_model_s_own_end_of_text_is_no_stop_reason(tmp_path: Path) -> None:
    entry = continuations[1]
    end = entry["ids"][6]
    engine = with_end_of_text(tmp_path, [end])
    result = engine.generate(entry["prompt"], max_new_tokens=60, stop_token_ids=[end], logprobs=0)
    assert (result.finish_reason, result.stop_reason) == ("stop", None)
    # Being no special token, it is text, as in transformers; a stop string may cut it off all the same.
    assert result.text == engine.tokenizer.decode(entry["ids"][:7])
    assert result.logprobs is not None
    assert [one.special for one in result.logprobs] == [False] * 6 + [True]
    cut = engine.generate(entry["prompt"], max_new_tokens=60, stop=engine.tokenizer.decode([end]))
    assert cut.text == engine.tokenizer.decode(entry["ids"][:6])
    # Once it is ignored, it is a stop token like another.
    again = engine.generate(entry["prompt"], max_new_tokens=60, stop_token_ids=[end], ignore_eos=True)
    assert (again.text, again.stop_reason) == (engine.tokenizer.decode(entry["ids"][:6]), end)


def test_guesses_stop_at_a_stop_token() -> None:
    """A stop token within what a step verifies ends the text there."""
    drafting = Engine.load("demo", max_batch=2, drafts=8)
    plain = Engine.load("demo", max_batch=2, drafts="off")
    prompt = "the the the the the the the the"
    whole = plain.generate(prompt, max_new_tokens=40, ignore_eos=True)
    for stop in sorted(set(whole.token_ids)):
        options: Any = {"max_new_tokens": 40, "ignore_eos": True, "stop_token_ids": [stop]}
        assert without_times(drafting.generate(prompt, **options)) == without_times(plain.generate(prompt, **options))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (5, "stop_token_ids must be a list of token ids, not 5"),
        ("5", 'stop_token_ids must be a list of token ids, not the string "5"'),
        ([5, True], "stop_token_ids, a list, must hold token ids, not true"),
        ([-1], "stop_token_ids holds -1, which is no token id"),
        ([5] * 65, "stop_token_ids holds 65 token ids; the limit is 64"),
        ([7, 2048], "stop_token_ids holds token id 2048, and the model's vocabulary has 2048: give ids from 0 to 2047"),
    ],
)
def test_bad_stop_tokens_are_named(engine: Engine, ids: Any, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        engine.generate("a", stop_token_ids=ids)


def test_a_stop_string_that_names_a_special_token(engine: Engine) -> None:
    ids = [*engine.tokenizer.encode("He said"), 0, *engine.tokenizer.encode("\nand went")]
    for stop, text, count in (
        ("<|endoftext|>", "He said", 3),
        ("<|endoftext|>\n", "He said", 4),
        ("said<|endoftext|>", "He ", 3),
        ("id<|endoftext|>\nand", "He sa", 5),
    ):
        assert "".join(engine.tokenizer.token_text(one) for one in ids[:count]).endswith(stop)
        sequence = accept(engine, GenerationRequest("a", 20, stop=("zebra", stop), ignore_eos=True, logprobs=0), ids)
        assert (sequence.text, sequence.finish_reason, sequence.stop_reason) == (text, "stop", stop)
        assert sequence.token_ids == ids[:count]
    # Within the least length it is text like any other, and the token none of the text.
    request = GenerationRequest("a", 20, stop="<|endoftext|>", ignore_eos=True, min_new_tokens=3)  # type: ignore[arg-type]
    assert accept(engine, request, ids).text == "He said\nand went"
    # Without `ignore_eos` the token is the model's own end.
    sequence = accept(engine, GenerationRequest("a", 20, stop="<|endoftext|>"), ids)  # type: ignore[arg-type]
    assert (sequence.text, sequence.finish_reason, sequence.stop_reason) == ("He said", "stop", None)


# ------------------------------------------------------------------------------------------- echo and token ids


def test_an_echo_is_the_prompt_before_the_same_text(engine: Engine) -> None:
    entry = continuations[5]
    stop = entry["text"][20:24]
    plain = engine.generate(entry["prompt"], max_new_tokens=40, stop=stop, ignore_eos=True)
    echoed = engine.generate(entry["prompt"], max_new_tokens=40, stop=stop, ignore_eos=True, echo=True)
    assert plain.finish_reason == "stop"
    assert echoed.text == entry["prompt"] + plain.text
    assert (echoed.token_ids, echoed.usage) == (plain.token_ids, plain.usage)


def test_stop_strings_are_not_looked_for_in_an_echo(engine: Engine) -> None:
    entry = continuations[1]
    # It would begin in the prompt and end in what follows.
    stop = entry["prompt"][-1] + entry["text"][:2]
    result = engine.generate(entry["prompt"], max_new_tokens=5, stop=[stop, entry["prompt"]], echo=True)
    assert result.finish_reason == "length"
    assert result.text.startswith(entry["prompt"] + entry["text"][:2])


def test_prompts_by_ids_give_what_prompts_by_text_give(engine: Engine) -> None:
    entries = continuations[:6]
    options: Any = {"max_new_tokens": 25, "ignore_eos": True, "echo": True, "logprobs": 2}
    by_text = engine.generate([entry["prompt"] for entry in entries], **options)
    by_ids = engine.generate([entry["prompt_ids"] for entry in entries], **options)
    assert list(map(without_times, by_ids)) == list(map(without_times, by_text))
    alone = engine.generate(entries[1]["prompt_ids"], **options)
    assert (alone.text, alone.token_ids, alone.usage) == (by_text[1].text, by_text[1].token_ids, by_text[1].usage)
    empty: list[list[int]] = [[]]
    assert engine.generate(empty, max_new_tokens=5, ignore_eos=True)[0].token_ids == by_text[0].token_ids[:5]


def test_an_echo_of_ids_that_end_within_a_character(engine: Engine) -> None:
    whole = engine.tokenizer.encode("A parrot: 🦜")
    ids = whole[:-1]
    assert engine.tokenizer.decode(ids).endswith("\ufffd")
    result = engine.generate(ids, max_new_tokens=8, ignore_eos=True, echo=True)
    assert result.text == engine.tokenizer.decode([*ids, *result.token_ids])


def test_a_token_id_that_the_model_does_not_have(engine: Engine) -> None:
    with pytest.raises(BadRequest, match="token id 2048, and the model's vocabulary has 2048: give ids from 0 to 2047"):
        engine.generate([5, 2048])
    assert engine.generate([5, 2047], max_new_tokens=1).usage.prompt_tokens == 2


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([5, "a"], 'prompt, a list, must hold token ids, not the string "a"'),
        ([5, True], "prompt, a list, must hold token ids, not true"),
        ([[5, 1.5]], "prompt, a list, must hold token ids, not 1.5"),
        ([5, -1], "prompt holds -1, which is no token id"),
        ([1 << 31], "prompt holds 2147483648, which is no token id"),
        ([[5] * (1 << 17) + [5]], "prompt has 131073 tokens; the limit is 131072"),
        ([[5] * 600], "prompt tokens 600, over the model's 512 positions"),
    ],
    ids=range(7),
)
def test_bad_token_ids_are_named(engine: Engine, prompt: Any, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        engine.generate(prompt)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_new_tokens": -1}, "min_new_tokens must be between 0 and"),
        ({"min_new_tokens": 1.5}, "min_new_tokens must be a whole number, not 1.5"),
        ({"logprobs": 21}, "logprobs must be between 0 and 20, not 21"),
        ({"logprobs": True}, "logprobs must be a whole number, not true"),
        ({"echo": 1}, "echo must be true or false, not 1"),
    ],
)
def test_bad_options_are_named(engine: Engine, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        engine.generate("My name is", **options)


# ------------------------------------------------------------------------------------------------ side by side


def test_different_options_side_by_side_change_nothing_for_each_other(engine: Engine) -> None:
    dice = random.Random(4)
    requests = []
    for entry in continuations[:24]:
        text, ids = entry["prompt"], tuple(entry["prompt_ids"])
        requests.append(
            GenerationRequest(
                text if dice.random() < 0.5 else ids,
                max_new_tokens=dice.randint(12, 60),
                stop=tuple(stop_strings(entry["text"], dice)) if dice.random() < 0.5 else (),
                ignore_eos=dice.random() < 0.5,
                min_new_tokens=dice.choice([0, 5, 12]),
                logprobs=dice.choice([None, 0, 3]),
                echo=dice.random() < 0.5,
            )
        )
    together = engine.run(requests)
    for request, result in zip(requests, together, strict=True):
        (alone,) = engine.run([request])
        assert result.text == alone.text
        assert (result.token_ids, result.finish_reason) == (alone.token_ids, alone.finish_reason)
        assert (result.logprobs is None) == (request.logprobs is None)
        if result.logprobs is not None and alone.logprobs is not None:
            assert [one.logprob for one in result.logprobs] == pytest.approx(
                [one.logprob for one in alone.logprobs], rel=0, abs=1e-4
            )
    assert {result.finish_reason for result in together} == {"stop", "length"}


def test_a_long_prompt_keeps_nobody_waiting(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, rows = engine.decoder, 64
    monkeypatch.setattr(decoder, "prompt_rows", PromptRows(rows, rows))
    for prompt_tokens in (400, 65, 64, 63):
        short = [admit(engine, GenerationRequest(entry["prompt"], 40, ignore_eos=True)) for entry in continuations[1:4]]
        decoder.step()
        assert [len(sequence.token_ids) for sequence in short] == [1, 1, 1]
        long = admit(engine, GenerationRequest([7] * prompt_tokens, 3, ignore_eos=True))  # type: ignore[arg-type]
        steps = 0
        while not long.token_ids:
            left, slot = len(long.pending), long.slot
            assert slot is not None
            before = decoder.model.cache.lengths[slot]
            decoder.step()
            steps += 1
            assert [len(sequence.token_ids) for sequence in short] == [1 + steps] * 3
            read = decoder.model.cache.lengths[slot] - before
            assert read == min(left, rows)
        assert steps == -(-prompt_tokens // rows)
        while decoder.running:
            decoder.step()
        for sequence, entry in zip(short, continuations[1:4], strict=True):
            assert sequence.token_ids == entry["ids"][:40]


# --------------------------------------------------------------------------------------------- partial results


def test_the_partial_result_of_a_sequence_that_was_dropped(engine: Engine) -> None:
    entry = continuations[1]
    sequence = admit(engine, GenerationRequest(entry["prompt"], 50, ignore_eos=True, logprobs=0, echo=True))
    nothing = sequence.result("demo", "timeout")
    assert (nothing.text, nothing.token_ids, nothing.finish_reason) == (entry["prompt"], (), "timeout")
    assert nothing.timings.prefill_seconds > 0
    assert nothing.timings.decode_seconds == 0
    for _ in range(5):
        engine.decoder.step()
    running = sequence.result("demo", "timeout")
    engine.decoder.finish(sequence)
    partial = sequence.result("demo", "cancelled")
    for result, reason in ((running, "timeout"), (partial, "cancelled")):
        assert result.finish_reason == reason
        assert list(result.token_ids) == entry["ids"][:5]
        assert result.text == entry["prompt"] + engine.tokenizer.decode(entry["ids"][:5])
        assert result.usage.completion_tokens == 5
        assert result.logprobs is not None
        assert len(result.logprobs) == 5
        assert result.timings.prefill_seconds > 0
        assert result.timings.decode_seconds > 0
    assert sequence.settled == len(sequence.text)


def test_a_sequence_dropped_before_its_first_token(engine: Engine) -> None:
    sequence = admit(engine, GenerationRequest("a", 50))
    engine.decoder.finish(sequence)
    result = sequence.result("demo", "cancelled")
    assert (result.text, result.token_ids, result.logprobs) == ("", (), None)
    assert result.timings.decode_seconds == 0
    assert result.timings.prefill_seconds >= 0


def test_one_that_ended_by_itself_keeps_its_reason(engine: Engine) -> None:
    sequence = admit(engine, GenerationRequest("My name is", 2, ignore_eos=True))
    while not sequence.finished:
        engine.decoder.step()
    assert sequence.result("demo", "cancelled").finish_reason == "length"
