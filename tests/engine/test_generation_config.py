"""The generation settings that come with a model are read as transformers reads them, and what is left out is said."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from support.running import GOLDEN

from fastgpt2 import Engine
from fastgpt2.engine.model.config import MAX_CONFIG_BYTES, GPT2Config
from fastgpt2.engine.model.generation_config import GenerationConfig, read_generation_config
from fastgpt2.engine.model.hub import DEMO_FOLDER
from fastgpt2.errors import BadRequest, ConfigError

ORACLE: dict[str, Any] = json.loads((GOLDEN / "generation_config.json").read_text("utf-8"))
CASES: list[dict[str, Any]] = ORACLE["cases"]
PLAIN = CASES[0]
VOCAB_SIZE = 2048

# Of the settings that have a note, those that do not change a text with a given number of tokens on these prompts.
CHANGE_OTHER_TEXTS = {
    "file: encoder_no_repeat_ngram_size",
    "file: max_length",
    "file: max_new_tokens",
    "file: max_time",
    "file: do_sample",
    "config: do_sample",
    "file: no JSON",
    "file: no UTF-8",
    "file: empty",
    "file: negative end",
    "file: end beyond the vocabulary",
}

# The settings that a request may ask for too, which are applied to one that does not.
APPLIED = (
    "repetition_penalty 1.3", "repetition_penalty 1.0", "repetition_penalty 1", "repetition_penalty 0.8",
    "no_repeat_ngram_size 2", "no_repeat_ngram_size 0", "no_repeat_ngram_size 1", "bad_words_ids",
    "bad_words_ids, several tokens", "bad_words_ids, many", "bad_words_ids, the end alone", "suppress_tokens",
    "suppress_tokens, many", "sequence_bias", "sequence_bias, several", "all that a request may ask",
)  # fmt: skip
NEUTRAL: dict[str, Any] = {
    "repetition_penalty": 1, "no_repeat_ngram_size": 0, "bad_words": [], "suppress_tokens": [], "logit_bias": {},
}  # fmt: skip

# What transformers takes for an id and nobody means.
REFUSED = {"file: end as a text", "file: end true"}


def make_folder(tmp_path: Path, config: dict[str, Any], content: Any) -> Path:
    """Lay a changed copy of the shipped model's folder; None removes a field, "null" makes it null."""
    fields = {**json.loads((DEMO_FOLDER / "config.json").read_text()), **config}
    written = {name: None if value == "null" else value for name, value in fields.items() if value is not None}
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).symlink_to(DEMO_FOLDER / name)
    (tmp_path / "config.json").write_text(json.dumps(written))
    if content is not None:
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "generation_config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    return tmp_path


def read(tmp_path: Path, config: dict[str, Any], content: Any, source: str = "auto") -> GenerationConfig:
    folder = make_folder(tmp_path, config, content)
    return read_generation_config(folder, GPT2Config(vocab_size=VOCAB_SIZE), source)


def in_vocabulary(value: Any) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(int(one) for one in ids if 0 <= one < VOCAB_SIZE)


# --------------------------------------------------------------------------------- as transformers has it


@pytest.mark.parametrize("case", [c for c in CASES if c["name"] not in REFUSED], ids=lambda case: case["name"])
def test_ids_are_those_of_transformers(tmp_path: Path, case: dict[str, Any]) -> None:
    found = read(tmp_path, case["config"], case["file"])
    if "error" in case:  # transformers does not load it
        return
    assert found.eos_token_ids == in_vocabulary(case["eos_token_id"])
    assert found.bos_token_id == (in_vocabulary(case["bos_token_id"]) or (None,))[0]


@pytest.fixture(scope="module")
def demo() -> Engine:
    """The shipped model, of which each test changes the generation settings."""
    return Engine.load("demo", max_batch=len(ORACLE["prompts"]), threads=1)


def generated(engine: Engine, prompts: list[str], **options: Any) -> list[list[int]]:
    """Generate the texts of prompts side by side."""
    return [list(result.token_ids) for result in engine.generate(prompts, max_new_tokens=20, **options)]


@pytest.mark.parametrize("case", [c for c in CASES if c["name"] not in REFUSED], ids=lambda case: case["name"])
def test_a_text_is_that_of_transformers_or_a_note_says_why_not(
    demo: Engine, tmp_path: Path, case: dict[str, Any]
) -> None:
    found = demo.decoder.generation = read(tmp_path, case["config"], case["file"])
    expected = case.get("ids", PLAIN["ids"])
    texts = {prompt: ids for prompt, ids in zip(ORACLE["prompts"], expected, strict=True) if isinstance(ids, list)}
    if generated(demo, list(texts)) != list(texts.values()):
        assert found.notes
    elif not any(isinstance(ids, dict) for ids in expected) and case["name"] not in CHANGE_OTHER_TEXTS:
        assert "error" in case or found.notes == ()


@pytest.mark.parametrize("name", [*(f"file: {name}" for name in APPLIED), "config: repetition_penalty 1.3"])
def test_what_a_request_may_ask_is_applied_without_a_note(demo: Engine, tmp_path: Path, name: str) -> None:
    (case,) = [case for case in CASES if case["name"] == name]
    found = demo.decoder.generation = read(tmp_path, case["config"], case["file"])
    assert found.notes == ()
    assert generated(demo, ORACLE["prompts"]) == case["ids"]
    # A request's own values win, also those that do nothing.
    assert generated(demo, ORACLE["prompts"], min_new_tokens=1, **NEUTRAL) == PLAIN["ids"]


def test_the_applied_settings_change_texts() -> None:
    texts = {name: next(case["ids"] for case in CASES if case["name"] == f"file: {name}") for name in APPLIED}
    assert sum(ids != PLAIN["ids"] for ids in texts.values()) == len(APPLIED) - 4


def test_a_request_s_own_value_wins_one_by_one(demo: Engine, tmp_path: Path) -> None:
    """What the request does not name stays the model's."""
    words = next(case for case in CASES if case["name"] == "file: bad_words_ids, several tokens")
    content = {**words["file"], "repetition_penalty": 0.8, "no_repeat_ngram_size": 4}
    demo.decoder.generation = read(tmp_path, {}, content)
    found = generated(demo, ORACLE["prompts"], repetition_penalty=1.0, no_repeat_ngram_size=0)
    assert found == words["ids"]
    penalised = next(case for case in CASES if case["name"] == "file: repetition_penalty 1.3")
    own: dict[str, Any] = {**NEUTRAL, "repetition_penalty": 1.3}
    assert generated(demo, ORACLE["prompts"], **own) == penalised["ids"]


def test_the_cases_are_of_the_shipped_model() -> None:
    import hashlib

    digest = hashlib.sha256((DEMO_FOLDER / "model.safetensors").read_bytes()).hexdigest()
    assert digest == ORACLE["model_sha256"]


# --------------------------------------------------------------------------------- notes


def test_a_note_names_the_file_the_field_and_what_transformers_would_do(tmp_path: Path) -> None:
    content = {"eos_token_id": 0, "num_beams": 4, "do_sample": True, "temperature": 0.7, "top_k": 30}
    beams, sampling = read(tmp_path, {}, content).notes
    assert beams.startswith("generation_config.json: num_beams 4 is not applied: transformers would search with")
    assert sampling.startswith("generation_config.json: do_sample true is not applied: transformers would draw")
    assert (
        "fastgpt2 takes the likeliest token, unless a request asks for do_sample, by temperature 0.7, top_k 30, or"
        in sampling
    )
    assert all(
        one.endswith("; --generation-config none takes the ids in config.json and nothing else")
        for one in (beams, sampling)
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"repetition_penalty": 0}, "repetition_penalty 0 is not applied: it must be a number from 0.01 to 100"),
        ({"repetition_penalty": "1.2"}, 'repetition_penalty "1.2" is not applied: it must be a number from'),
        ({"repetition_penalty": True}, "repetition_penalty true is not applied: it must be a number from"),
        ('{"repetition_penalty": NaN}', "repetition_penalty NaN is not applied: it must be a number from"),
        ('{"repetition_penalty": 1e999}', "repetition_penalty Infinity is not applied: it must be a number from"),
        ({"no_repeat_ngram_size": 2.5}, "no_repeat_ngram_size 2.5 is not applied: it must be a whole number from 0"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size -1 is not applied: it must be a whole number from 0"),
        ({"top_p": 1.5}, "top_p 1.5 is not applied: it must be a number from 0 to 1"),
        ({"bad_words_ids": [5]}, "bad_words_ids [5] is not applied: it must list ids"),
        ({"bad_words_ids": [["the"]]}, 'bad_words_ids [["the"]] is not applied: it must list ids'),
        ({"suppress_tokens": 5}, "suppress_tokens 5 is not applied: it must list ids"),
        ({"suppress_tokens": ["5"]}, 'suppress_tokens ["5"] is not applied: it must list ids'),
        ({"suppress_tokens": list(range(100_000))}, "it must list ids, at most 65536"),
        ({"sequence_bias": [[[1, 2], -2.0]]}, "only single tokens can have a bias here, a finite one"),
        ({"sequence_bias": [[[1], "-2"]]}, "only single tokens can have a bias here, a finite one"),
        ({"sequence_bias": {"1": -2.0}}, "only single tokens can have a bias here, a finite one"),
        ({"sequence_bias": 5}, "only single tokens can have a bias here, a finite one"),
        ('{"sequence_bias": [[[1], -Infinity]]}', "only single tokens can have a bias here, a finite one"),
    ],
    ids=str,
)
def test_an_option_that_cannot_be_is_noted_and_left_out(tmp_path: Path, content: Any, said: str) -> None:
    found = read(tmp_path, {}, content)
    (one,) = found.notes
    assert said in one
    assert found.options == {}
    # And the others are applied.
    if isinstance(content, dict) and "no_repeat_ngram_size" not in content:
        (tmp_path / "generation_config.json").write_text(json.dumps({**content, "no_repeat_ngram_size": 3}))
        again = read_generation_config(tmp_path, GPT2Config(vocab_size=VOCAB_SIZE))
        assert again.options == {"no_repeat_ngram_size": 3}


def test_tokens_that_the_vocabulary_does_not_have_are_left_out(tmp_path: Path) -> None:
    content = {
        "suppress_tokens": [5, 2048, -1], "bad_words_ids": [[5], [7, 2048], [9, -1], []],
        "sequence_bias": [[[3], 1.5]],
    }  # fmt: skip
    found = read(tmp_path, {}, content)
    assert found.options == {"suppress_tokens": (5,), "bad_words": ((5,),), "logit_bias": {3: 1.5}}
    assert found.notes == ()


def test_notes_on_the_fields_of_config_json_name_that_file(tmp_path: Path) -> None:
    (one,) = read(tmp_path, {"num_beams": 3}, None).notes
    assert one.startswith("config.json: num_beams 3 is not applied")


def test_none_takes_the_ids_of_config_json_and_no_more(tmp_path: Path) -> None:
    content = {"eos_token_id": 5, "repetition_penalty": 1.2, "min_new_tokens": 7}
    found = read(tmp_path, {"eos_token_id": [3, 4], "num_beams": 4}, content, source="none")
    assert found == GenerationConfig(0, (3, 4))


def test_a_long_value_is_cut_in_a_note(tmp_path: Path) -> None:
    (one,) = read(tmp_path, {}, {"begin_suppress_tokens": list(range(1000))}).notes
    assert len(one) < 300


def test_notes_are_logged_once_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_folder(tmp_path, {}, {"bos_token_id": 0, "eos_token_id": 0, "num_beams": 2})
    with caplog.at_level(logging.WARNING, "fastgpt2.engine"):
        engine = Engine.load(folder, max_batch=1, threads=1)
    assert len(engine.notes) == 1
    assert [record.getMessage() for record in caplog.records] == [f"{folder}: {engine.notes[0]}"]
    assert Engine.load(folder, max_batch=1, threads=1, generation_config="none").notes == ()
    with pytest.raises(BadRequest, match="generation_config must be one of auto, none, not 'vllm'"):
        Engine.load(folder, generation_config="vllm")


# --------------------------------------------------------------------------------- files that are not as they should be


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"eos_token_id": "0"}, 'eos_token_id is "0"; it must be an id, a list of ids or null'),
        ({"eos_token_id": True}, "eos_token_id is true; it must be"),
        ({"eos_token_id": [[0]]}, "eos_token_id is [[0]]; it must be"),
        ({"eos_token_id": 1.5}, "eos_token_id is 1.5; it must be"),
        ('{"eos_token_id": 1e999}', "eos_token_id is Infinity; it must be"),
        ('{"eos_token_id": NaN}', "eos_token_id is NaN; it must be"),
        ({"bos_token_id": {}}, "bos_token_id is {}; it must be"),
        ({"min_new_tokens": "3"}, 'min_new_tokens is "3"; it must be a whole number or null'),
        ({"min_length": -1}, "min_length is -1; it must be"),
        ({"eos_token_id": [1] * 5000}, "eos_token_id lists 5000 ids; 1024 are the most"),
    ],
)
def test_a_value_that_cannot_be_is_named(tmp_path: Path, content: Any, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, {}, content)
    assert f"generation_config.json: {said}" in str(caught.value)
    if "lists" not in said:
        assert str(caught.value).endswith("correct it, or leave the file aside by --generation-config none")
    # The remedy.
    assert read_generation_config(tmp_path, GPT2Config(vocab_size=VOCAB_SIZE), "none").eos_token_ids == (0,)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "[" * 100_000, '{"a": ' + "9" * 5000 + "}", "\udcff"])
def test_a_file_that_is_no_json_object_is_passed_over_with_a_note(tmp_path: Path, content: str) -> None:
    found = read(tmp_path, {"eos_token_id": 3}, content)
    assert found.eos_token_ids == (3,)
    (one,) = found.notes
    assert "generation_config.json: not " in one
    assert one.endswith("; config.json counts in its place")


def test_a_file_too_large_is_passed_over_with_a_note(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, {}, "")
    with (folder / "generation_config.json").open("wb") as file:
        file.truncate(MAX_CONFIG_BYTES + 1)
    (one,) = read_generation_config(folder, GPT2Config(vocab_size=VOCAB_SIZE)).notes
    assert "at most" in one


def test_ids_outside_the_vocabulary_are_left_out_with_a_note(tmp_path: Path) -> None:
    found = read(tmp_path, {}, {"bos_token_id": 10**30, "eos_token_id": [7, -1, 2048]})
    assert (found.bos_token_id, found.eos_token_ids) == (None, (7,))
    assert found.notes[1] == (
        "generation_config.json: eos_token_id is [7, -1, 2048], outside the vocabulary of 2048: ignored"
    )


# --------------------------------------------------------------------------------- where nothing is said


def test_without_a_configuration_the_ids_are_those_of_gpt2(tmp_path: Path) -> None:
    """A checkpoint of nanoGPT has neither file."""
    assert read_generation_config(tmp_path, GPT2Config()) == GenerationConfig(50256, (50256,))


def test_an_empty_prompt_starts_somewhere(tmp_path: Path) -> None:
    """Where transformers has no token to start from, the first end stands in, or the end of GPT-2's vocabulary."""
    assert GenerationConfig(7, (5, 6)).start_token_id == 7
    assert GenerationConfig(None, (5, 6)).start_token_id == 5
    assert GenerationConfig().start_token_id == 0
    make_folder(tmp_path, {}, {})
    found = read_generation_config(tmp_path, GPT2Config())
    assert (found.start_token_id, found.eos_token_ids) == (50256, ())


def test_a_request_s_own_least_length_wins(tmp_path: Path) -> None:
    content = {"bos_token_id": 0, "eos_token_id": PLAIN["ids"][1][5], "min_new_tokens": 12}
    engine = Engine.load(make_folder(tmp_path, {}, content), max_batch=1, threads=1)
    lengths = [len(engine.generate(ORACLE["prompts"][1], min_new_tokens=n).token_ids) for n in (0, 1)]
    assert lengths[0] > 12
    assert lengths[1] == 6
