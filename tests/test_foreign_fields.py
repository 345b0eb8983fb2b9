"""What is said of fields that a request may not have."""

from __future__ import annotations

import re

import pytest

from fastgpt2.engine.decoding.records import GenerationRequest
from fastgpt2.fields import fields_of
from fastgpt2.foreign_fields import _OTHER_NAMES, _REASONS, SHOWN_CHARACTERS, sentence_for

KNOWN = fields_of(GenerationRequest)

# What transformers, vLLM, text-generation-inference and llama.cpp have, and nobody here can honour.
NEVER = (
    "num_beams", "beam_size", "use_beam_search", "length_penalty", "early_stopping", "num_beam_groups",
    "diversity_penalty", "watermark", "watermarking_config", "penalty_alpha", "epsilon_cutoff", "eta_cutoff", "top_h",
    "mirostat", "mirostat_tau", "mirostat_eta", "tfs_z", "dry_multiplier", "dry_base", "guidance_scale",
    "encoder_repetition_penalty", "encoder_no_repeat_ngram_size", "sequence_bias", "xtc_probability",
)  # fmt: skip


@pytest.mark.parametrize("name", NEVER)
def test_what_cannot_be_honoured_is_one_sentence(name: str) -> None:
    said = sentence_for(name, KNOWN)
    assert said.startswith(f"{name} is refused: ")
    assert "\n" not in said
    assert ("ask for" in said) or said.endswith("leave it out")


def test_what_the_sentences_name_can_be_asked() -> None:
    assert not set(_REASONS) & set(KNOWN)
    assert not set(_OTHER_NAMES) & set(KNOWN)
    assert set(_OTHER_NAMES.values()) <= set(KNOWN)
    for reason in _REASONS.values():
        assert set(re.findall(r"\w+_\w+|\btemperature|\bchoices|\bregex|\bn\b", reason)) <= set(KNOWN)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("max_tokens", "max_new_tokens"),
        ("min_tokens", "min_new_tokens"),
        ("temprature", "temperature"),
        ("Temperature", "temperature"),
        ("topp", "top_p"),
        ("repetition_penality", "repetition_penalty"),
        ("repeat_penalty", "repetition_penalty"),
        ("bad_words_ids", "bad_words"),
        ("num_return_sequences", "n"),
        ("guided_json", "json_schema"),
        ("stop_sequences", "stop"),
        ("inputs", "prompt"),
    ],
)
def test_a_likely_neighbour_is_named(name: str, meant: str) -> None:
    said = sentence_for(name, KNOWN)
    assert said.startswith(f"unknown field {name!r}; {meant} may be meant; known are prompt, max_new_tokens, ")


@pytest.mark.parametrize("name", ["x", "", "model", "🦜", 3, None, (1, 2)])
def test_what_is_like_nothing_gets_the_list_alone(name: object) -> None:
    assert sentence_for(name, KNOWN).startswith(f"unknown field {str(name)!r}; known are prompt, ")


def test_another_apis_name_is_explained_only_where_the_field_is_known() -> None:
    assert sentence_for("n_predict", ("inputs",)) == "unknown field 'n_predict'; known are inputs"


def test_of_a_name_of_any_length_only_its_beginning_is_compared() -> None:
    said = sentence_for("temperature" * 10_000_000, KNOWN)
    assert len(said) < SHOWN_CHARACTERS + 1000
