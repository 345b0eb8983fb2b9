"""Greedy decoding gives token for token what transformers generates, whatever else runs beside it."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.machines import TWO_PROCESSES
from support.models import with_end_of_text
from support.running import GOLDEN

from fastgpt2 import Engine
from fastgpt2.engine.decoding.records import GenerationRequest, GenerationResult
from fastgpt2.engine.kernels import mkl
from fastgpt2.engine.model.hub import DEMO_FOLDER
from fastgpt2.errors import BadRequest, CheckpointError, PromptTooLong

golden: dict[str, Any] = json.loads((GOLDEN / "demo_continuations.json").read_text("utf-8"))


@pytest.fixture(scope="module", params=["openblas", "mkl", TWO_PROCESSES])
def any_engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """Load the shipped model with each product that there is. It has four slots, so that batches are mixed.

    It is for tests of what steps compute. What is checked before or after them is the same whatever multiplies.
    """
    if request.param == "mkl" and not mkl.is_installed():
        pytest.skip("MKL is not installed")
    two = request.param == "two processes"
    blas = "openblas" if two else request.param
    # Without prefixes: with them, the tests before would change in how many steps a prompt is read.
    made = Engine.load("demo", max_batch=4, blas=blas, threads=2 if two else 1, prefix_memory=0, drafts="off")
    made.warm_up()
    yield made
    made.decoder.model.close()


def test_the_golden_file_belongs_to_the_shipped_model() -> None:
    weights = (DEMO_FOLDER / "model.safetensors").read_bytes()
    assert golden["model_sha256"] == hashlib.sha256(weights).hexdigest()
    assert len(golden["continuations"]) >= 64
    assert all(len(entry["ids"]) == 100 for entry in golden["continuations"])


def test_the_same_tokens_as_transformers(any_engine: Engine) -> None:
    """64 prompts of 100 tokens each run four side by side, and enter as slots become free."""
    prompts = [entry["prompt"] for entry in golden["continuations"]]
    results = any_engine.generate(prompts, max_new_tokens=100, ignore_eos=True)
    for entry, result in zip(golden["continuations"], results, strict=True):
        assert list(result.token_ids) == entry["ids"], entry["prompt"]
        assert result.text == entry["text"]
        assert result.finish_reason == "length"
        assert result.usage.prompt_tokens == len(entry["prompt_ids"])
        assert (result.usage.completion_tokens, result.model) == (100, "demo")


def test_one_string_gives_one_result_and_a_list_a_list(engine: Engine) -> None:
    entry = golden["continuations"][0]
    alone = engine.generate(entry["prompt"], max_new_tokens=7, ignore_eos=True)
    assert list(alone.token_ids) == entry["ids"][:7]
    (listed,) = engine.generate([entry["prompt"]], max_new_tokens=7, ignore_eos=True)
    assert (listed.text, listed.token_ids) == (alone.text, alone.token_ids)
    assert engine.generate([]) == []


def test_different_limits_side_by_side(any_engine: Engine) -> None:
    entries = golden["continuations"][:8]
    requests = [GenerationRequest(e["prompt"], 1 + 9 * i, ignore_eos=True) for i, e in enumerate(entries)]
    for i, result in enumerate(any_engine.run(requests)):
        assert list(result.token_ids) == entries[i]["ids"][: 1 + 9 * i]


def test_an_empty_prompt_starts_a_text(any_engine: Engine) -> None:
    (entry,) = [entry for entry in golden["continuations"] if entry["prompt"] == ""]
    result = any_engine.generate("", max_new_tokens=30, ignore_eos=True)
    assert list(result.token_ids) == entry["ids"][:30]
    assert result.usage.prompt_tokens == 1


def test_end_of_text_stops(tmp_path: Path) -> None:
    entry = golden["continuations"][0]
    stopper = entry["ids"][10]
    first = entry["ids"].index(stopper)
    engine = with_end_of_text(tmp_path, [2047, stopper])
    result = engine.generate(entry["prompt"], max_new_tokens=100)
    assert result.finish_reason == "stop"
    # transformers' output ends with the end-of-text token too, and so does its text if that is no special token.
    assert list(result.token_ids) == entry["ids"][: first + 1]
    assert result.text == engine.tokenizer.decode(entry["ids"][: first + 1])
    assert result.stop_reason is None
    onward = engine.generate(entry["prompt"], max_new_tokens=100, ignore_eos=True)
    assert (onward.finish_reason, list(onward.token_ids)) == ("length", entry["ids"])


def test_stop_strings_cut_the_text_wherever_they_begin(engine: Engine) -> None:
    """A substring of a continuation stops it at its first occurrence, across tokens or within one."""
    entry = golden["continuations"][1]
    text = entry["text"][:60]
    stops = [text[begin : begin + length] for begin in range(0, 40, 3) for length in (1, 2, 5, 12)]
    results = engine.run([GenerationRequest(entry["prompt"], 100, (stop,), ignore_eos=True) for stop in stops])
    for stop, result in zip(stops, results, strict=True):
        assert result.finish_reason == "stop"
        assert result.text == entry["text"][: entry["text"].index(stop)]
        assert list(result.token_ids) == entry["ids"][: len(result.token_ids)]


def test_the_earliest_of_several_stop_strings_counts(engine: Engine) -> None:
    entry = golden["continuations"][2]
    early, late = entry["text"][8:12], entry["text"][20:30]
    at = entry["text"].index(early)
    for stops in ([early, late], [late, early], [early, late, "no such text"]):
        result = engine.generate(entry["prompt"], max_new_tokens=100, stop=stops, ignore_eos=True)
        assert (result.text, result.finish_reason) == (entry["text"][:at], "stop")


def test_a_stop_string_in_the_prompt_is_not_looked_for(engine: Engine) -> None:
    result = engine.generate("xyzzy", stop="xyzzy", max_new_tokens=3, ignore_eos=True)
    assert result.finish_reason == "length"


def test_the_limit_of_positions_is_told_in_numbers(engine: Engine) -> None:
    n_positions = engine.config.n_positions
    ids = engine.tokenizer.encode("the " * 3000)
    text = engine.tokenizer.decode(ids[: n_positions - 10])
    tokens = len(engine.tokenizer.encode(text))
    with pytest.raises(
        PromptTooLong, match=rf"{tokens} and max_new_tokens 500 make {tokens + 500}, over .*{n_positions} pos"
    ):
        engine.generate(text, max_new_tokens=500)
    with pytest.raises(PromptTooLong, match=rf"at most {n_positions - tokens} new ones"):
        engine.generate(text, max_new_tokens=500)
    # Where no length is asked for, it is 20, or less if there is no room for 20.
    assert engine.generate(text, ignore_eos=True).usage.completion_tokens == min(20, n_positions - tokens)
    full = engine.generate(text, max_new_tokens=n_positions - tokens, ignore_eos=True)
    assert full.usage.total_tokens == n_positions
    with pytest.raises(
        PromptTooLong, match=rf"over the model's {n_positions} positions.*shorten the prompt by at least"
    ):
        engine.generate("the " * 3000)


def test_a_long_prompt_is_read_in_chunks_and_leaves_others_alone(any_engine: Engine) -> None:
    entry = golden["continuations"][3]
    decoder = any_engine.decoder
    short = decoder.admit(decoder.prepare(GenerationRequest(entry["prompt"], 40, ignore_eos=True)))
    decoder.step()
    long = decoder.admit(decoder.prepare(GenerationRequest("the " * 420, 5, ignore_eos=True)))
    assert long.prompt_tokens > 256
    decoder.step()
    assert not long.token_ids, "a prompt of more rows than a step takes needs several"
    assert len(short.token_ids) == 2, "and the other goes on meanwhile"
    while decoder.running:
        decoder.step()
    assert short.token_ids == entry["ids"][:40]
    alone = any_engine.generate("the " * 420, max_new_tokens=5, ignore_eos=True)
    assert tuple(long.token_ids) == alone.token_ids


def test_one_bad_prompt_fails_the_call_before_anything_runs(engine: Engine) -> None:
    with pytest.raises(PromptTooLong):
        engine.generate(["fine", "the " * 3000])
    assert engine.decoder.model.cache.free_slots == 4


def test_a_run_that_is_broken_off_gives_its_slots_back(any_engine: Engine) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        any_engine.run([GenerationRequest("a"), GenerationRequest("b")], stop)
    assert any_engine.decoder.model.cache.free_slots == 4
    assert not any_engine.decoder.running
    entry = golden["continuations"][0]
    again = any_engine.generate(entry["prompt"], max_new_tokens=20, ignore_eos=True)
    assert list(again.token_ids) == entry["ids"][:20]


def test_a_dropped_sequence_keeps_its_tokens_and_has_no_result(engine: Engine) -> None:
    decoder = engine.decoder
    sequence = decoder.admit(decoder.prepare(GenerationRequest(golden["continuations"][0]["prompt"], 50)))
    decoder.step()
    decoder.step()
    decoder.finish(sequence)
    decoder.finish(sequence)
    assert sequence.finished
    assert sequence.token_ids == golden["continuations"][0]["ids"][:2]
    with pytest.raises(ValueError, match="not ended by itself"):
        sequence.result("demo")
    assert decoder.step() == []


def test_timings_are_of_this_run(engine: Engine) -> None:
    t = engine.generate("My name is", max_new_tokens=5, ignore_eos=True).timings
    assert t.queue_seconds == 0
    assert 0 < t.prefill_seconds < 10
    assert 0 < t.decode_seconds < 10


def test_a_tokenizer_that_is_larger_than_the_model_is_noted(tmp_path: Path) -> None:
    folder = shutil.copytree(GOLDEN / "checkpoints" / "prefixed", tmp_path / "model")
    shutil.copy(DEMO_FOLDER / "tokenizer.json", folder)
    engine = Engine.load(str(folder), max_batch=1)
    size = engine.config.vocab_size
    expected = f"the tokenizer has {2048 - size} tokens beyond the model's table of {size}; the first is {size}, "
    assert any(note.startswith(expected) for note in engine.notes)
    with pytest.raises(BadRequest, match=r"in the prompt as token \d+, and the model's vocabulary has"):
        engine.generate("It was a dark and stormy night")


def test_a_token_that_the_model_does_not_have(tmp_path: Path) -> None:
    folder = shutil.copytree(DEMO_FOLDER, tmp_path / "model")
    stored = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    text = Engine.load("demo").tokenizer.decode([2047])
    stored["model"]["vocab"] = {token: 70_000 if i == 2047 else i for token, i in stored["model"]["vocab"].items()}
    (folder / "tokenizer.json").write_text(json.dumps(stored), "utf-8")
    engine = Engine.load(folder, max_batch=1)
    assert engine.model == str(folder)
    message = re.escape(f"reads {text!r} in the prompt as token 70000, and the model's vocabulary has 2048: leave that")
    with pytest.raises(BadRequest, match=message):
        engine.generate(f"the{text}")
    # Without it, as the message says.
    assert engine.generate("the", max_new_tokens=1).token_ids


def test_weights_that_are_not_numbers(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = shutil.copytree(DEMO_FOLDER, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["ln_f.weight"] = weights["ln_f.weight"] * np.float16("nan")
    save_file(weights, folder / "model.safetensors")
    engine = Engine.load(folder, max_batch=1)
    with pytest.raises(CheckpointError, match="not finite"):
        engine.warm_up()
    assert engine.decoder.model.cache.free_slots == 1


def test_a_batch_of_none_is_refused() -> None:
    with pytest.raises(BadRequest, match="max_batch must be 1 or more, not 0"):
        Engine.load("demo", max_batch=0)


def test_a_decoder_that_is_full_is_said_not_waited_for(engine: Engine) -> None:
    decoder = engine.decoder
    held = [decoder.admit(decoder.prepare(GenerationRequest("a"))) for _ in range(4)]
    with pytest.raises(RuntimeError, match="no slot"):
        engine.generate("b")
    for sequence in held:
        decoder.finish(sequence)


@pytest.mark.parametrize("prompts", [None, 3, {"a"}])
def test_prompts_of_the_wrong_type(engine: Engine, prompts: Any) -> None:
    with pytest.raises(BadRequest, match="prompts must be a string, a list of token ids or a list of such"):
        engine.generate(prompts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens must be between 0 and"),
        ({"max_new_tokens": "3"}, 'max_new_tokens must be a whole number, not the string "3"'),
        ({"max_new_tokens": True}, "max_new_tokens must be a whole number, not true"),
        ({"stop": [""]}, "a stop string must have 1 to 256 characters, not 0"),
        ({"stop": ["x"] * 17}, "stop holds 17 strings; the limit is 16"),
        ({"stop": [1]}, "stop must hold strings, not 1"),
        ({"stop": 5}, "stop must be a string or a list of strings, not 5"),
        ({"stop": [None]}, "stop must hold strings, not null"),
        ({"ignore_eos": 1}, "ignore_eos must be true or false, not 1"),
    ],
)
def test_bad_options_are_named(engine: Engine, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        engine.generate("My name is", **options)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "prompt must be a string or a list of token ids, not null"),
        (b"bytes", "prompt must be a string or a list of token ids, not bytes"),
        ("a\ud800", "lone surrogate U\\+D800 at character 1"),
        ("x" * (1 << 20) + "x", "prompt has 1048577 bytes; the limit is 1048576"),
    ],
    ids=["none", "bytes", "surrogate", "long"],
)
def test_bad_prompts_are_refused(prompt: Any, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        GenerationRequest(prompt)


def test_prompts_of_every_kind(engine: Engine) -> None:
    """One prompt alone gives one result, all that holds several a list; a mapping's fields count before the call's."""
    one: list[Any] = ["a", [66], (66,), np.array([66]), {"prompt": "a"}, {"prompt": [66], "max_new_tokens": 2}]
    several: list[Any] = [one, tuple(one), iter(one), np.array(["a", "b"]), np.array([[1, 2], [3, 4]]), []]
    for prompt in one:
        result = engine.generate(prompt, max_new_tokens=2, ignore_eos=True)
        assert isinstance(result, GenerationResult)
        assert len(result.token_ids) == 2
    for prompts in several:
        results = engine.generate(prompts, max_new_tokens=2, ignore_eos=True)
        assert isinstance(results, list)
        assert [len(result.token_ids) for result in results] == [2] * len(results)
    rows: list[dict[str, Any]] = [
        {"prompt": "a", "max_new_tokens": 1},
        {"prompt": "a", "max_new_tokens": None},
        {"prompt": "a", "stop": "?"},
    ]
    assert [len(each.token_ids) for each in engine.generate(rows, max_new_tokens=3, ignore_eos=True)] == [1, 3, 3]
    assert len(engine.generate(GenerationRequest("a", 2, ignore_eos=True)).token_ids) == 2


@pytest.mark.parametrize(
    ("prompts", "index", "words", "shown"),
    [
        (["a", 2.5], 1, "prompt must be a string or a list of token ids", "2.5"),
        (["a", "the " * 600], 1, "over the model's 512 positions", repr(f"{('the ' * 600)[:60]}...")),
        ([{"prompt": "a", "foo": 1}], 0, "unknown field 'foo'", "'a'"),
        (["a", {"foo": 1}], 1, "prompt is missing in a mapping", "a mapping of 'foo'"),
        ([GenerationRequest("a")], 0, "max_new_tokens is given beside a request that has been made", "'a'"),
    ],
)
def test_an_error_says_which_of_several_prompts_it_is_about(
    engine: Engine, prompts: Any, index: int, words: str, shown: str
) -> None:
    with pytest.raises(BadRequest, match=words) as caught:
        engine.generate(prompts, max_new_tokens=2)
    assert caught.value.index == index
    assert caught.value.__notes__ == [f"prompt number {index} (counted from 0) of generate: {shown}"]
    with pytest.raises(BadRequest) as caught:
        engine.generate("the " * 600)
    assert caught.value.index is None
