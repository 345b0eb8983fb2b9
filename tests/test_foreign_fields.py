"""What is said of fields that a request may not have."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest

from fastgpt2 import Engine
from fastgpt2.api.client.enqueue import plan_job
from fastgpt2.api.http.completion_request import parse_completion
from fastgpt2.api.http.generate import _parse
from fastgpt2.engine.decoding.records import GenerationRequest
from fastgpt2.errors import BadRequest
from fastgpt2.fields import fields_of
from fastgpt2.foreign_fields import _OTHER_NAMES, _REASONS, SHOWN_CHARACTERS, sentence_for
from fastgpt2.protocol.messages import parse_job
from fastgpt2.system.up import System

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


@pytest.mark.parametrize(
    ("name", "meant"), [("n_predict", "max_tokens"), ("max_length", "max_tokens"), ("min_length", "min_tokens")]
)
def test_completions_name_what_is_meant_as_openai_does(name: str, meant: str) -> None:
    with pytest.raises(BadRequest, match=f"unknown field '{name}'; {meant} may be meant"):
        parse_completion({"prompt": "a", name: 5})


def test_of_a_name_of_any_length_only_its_beginning_is_compared() -> None:
    said = sentence_for("temperature" * 10_000_000, KNOWN)
    assert len(said) < SHOWN_CHARACTERS + 1000


# What programs send by default, or when they are told to ask for nothing: by the documentation of each.
OPENAI: dict[str, Any] = {
    "user": "someone", "safety_identifier": "a hash", "prompt_cache_key": "a key", "store": False,
    "metadata": {"run": "7"}, "service_tier": "auto", "parallel_tool_calls": True, "tools": [], "tool_choice": "none",
    "modalities": ["text"], "verbosity": "medium", "reasoning_effort": "none", "response_format": {"type": "text"},
    "suffix": "", "stop": [], "top_logprobs": 0, "logit_bias": {}, "prediction": None, "audio": None,
    "prompt_cache_retention": "in_memory", "n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "top_p": 1,
    "best_of": 1, "functions": [], "function_call": "auto", "moderation": None, "web_search_options": None,
}  # fmt: skip
VLLM: dict[str, Any] = {
    "use_beam_search": False, "length_penalty": 1.0, "early_stopping": False, "include_stop_str_in_output": False,
    "skip_special_tokens": True, "spaces_between_special_tokens": True, "add_special_tokens": True, "detokenize": True,
    "truncate_prompt_tokens": None, "truncation_side": "left", "allowed_token_ids": None, "prompt_embeds": None,
    "guided_grammar": None, "guided_json": None, "guided_decoding_backend": "xgrammar", "structural_tag": None,
    "structured_outputs": {}, "priority": 0, "request_id": "cmpl-7", "session_id": "s", "return_token_ids": False,
    "return_tokens_as_token_ids": False, "return_token_offsets": False, "kv_transfer_params": None, "vllm_xargs": {},
    "ec_transfer_params": None, "logprob_token_ids": None, "cache_salt": None, "repetition_detection": None,
    "thinking_token_budget": -1, "stream_interval": 1, "watermarking": False, "logits_processors": [],
    "mm_processor_kwargs": None, "routed_experts_prompt_start": 0, "repetition_penalty": 1.0, "top_k": -1, "min_p": 0.0,
    "flat_logprobs": False, "extra_args": {}, "return_weight_versions": False, "mm_payload": "tensors",
    "return_mm_kwargs": False,
}  # fmt: skip
SGLANG: dict[str, Any] = {
    "return_hidden_states": False, "return_routed_experts": False, "return_cached_tokens_details": False,
    "no_stop_trim": False, "stop_regex": None, "ebnf": None, "lora_path": None, "session_params": None, "rid": "r",
    "custom_params": {}, "custom_logit_processor": None, "custom_labels": {"a": "b"}, "bootstrap_host": None,
    "routed_dp_rank": None, "data_parallel_rank": None, "extra_key": None, "return_logprob": False,
    "logprob_start_len": -1, "top_logprobs_num": 0, "images_config": None,
    "separate_reasoning": True, "stream_reasoning": True,
}  # fmt: skip
TRANSFORMERS: dict[str, Any] = {
    "num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "diversity_penalty": 0.0, "penalty_alpha": 0,
    "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "encoder_repetition_penalty": 1.0, "encoder_no_repeat_ngram_size": 0,
    "renormalize_logits": True, "remove_invalid_values": False, "guidance_scale": 1.0, "use_cache": True,
    "pad_token_id": 50256, "bad_words_ids": None, "force_words_ids": None, "sequence_bias": None, "tfs": 1.0,
    "begin_suppress_tokens": None, "forced_bos_token_id": None, "forced_eos_token_id": None, "token_healing": False,
    "exponential_decay_length_penalty": None, "output_attentions": False, "output_hidden_states": False,
    "output_scores": False, "output_logits": None, "return_dict_in_generate": False, "low_memory": None,
    "cache_implementation": None, "max_time": None, "stop_strings": None, "watermarking_config": None, "prefix": "",
    "return_tensors": False, "return_text": True, "clean_up_tokenization_spaces": None, "dola_layers": None,
    "handle_long_generation": None, "negative_prompt_ids": None, "prompt_lookup_num_tokens": None,
}  # fmt: skip
TGI: dict[str, Any] = {
    "watermark": False, "return_full_text": None, "details": False, "decoder_input_details": False, "truncate": None,
    "top_n_tokens": None, "adapter_id": None, "grammar": None, "stop_sequences": [], "do_sample": False,
    "typical_p": None,
}  # fmt: skip
LLAMA_CPP: dict[str, Any] = {
    "cache_prompt": True, "id_slot": -1, "n_keep": 0, "n_probs": 0, "min_keep": 0, "repeat_penalty": 1.0,
    "repeat_last_n": 64, "penalize_nl": False, "tfs_z": 1.0, "mirostat": 0, "mirostat_tau": 5.0, "mirostat_eta": 0.1,
    "dynatemp_range": 0.0, "dynatemp_exponent": 1.0, "xtc_probability": 0.0, "xtc_threshold": 0.1, "top_n_sigma": -1.0,
    "dry_multiplier": 0.0, "dry_base": 1.75, "dry_allowed_length": 2, "dry_penalty_last_n": -1,
    "dry_sequence_breakers": ["\\n", ":"], "samplers": [], "timings_per_token": False, "return_tokens": False,
    "post_sampling_probs": False, "response_fields": [], "t_max_predict_ms": 0, "lora": [], "image_data": [],
    "speculative.n_max": 16, "speculative.n_min": 0, "speculative.p_min": 0.75,
}  # fmt: skip
OTHERS: dict[str, Any] = {
    "keep_alive": "5m", "raw": True, "think": False, "images": [], "format": "", "system": "", "template": "",
    "context": [], "options": {"use_cache": True, "wait_for_model": True}, "nvext": None, "transforms": [],
    "provider": {}, "extra_body": None, "model_kwargs": {}, "context_length_exceeded_behavior": "error",
    "smoothing_factor": 0, "smoothing_curve": 1.5, "custom_token_bans": "", "ban_eos_token": False,
    "add_bos_token": True, "truncation_length": 0, "negative_prompt": "", "unheard_of": None,
}  # fmt: skip
NEUTRAL = {**OPENAI, **VLLM, **SGLANG, **TRANSFORMERS, **TGI, **LLAMA_CPP, **OTHERS}

# Further values that ask for nothing, of fields that stand above or are known in some places only.
ALSO_NEUTRAL: list[dict[str, Any]] = [
    {"grammar": ""}, {"grammar": {}}, {"guided_grammar": ""}, {"structural_tag": ""}, {"guided_whitespace_pattern": ""},
    {"adapter_id": ""}, {"raw": False}, {"n_keep": -1}, {"num_keep": -1}, {"mm_payload": "none"},
    {"service_tier": "default"}, {"thinking_token_budget": 0}, {"priority": "normal"}, {"priority": 0.0},
    {"stream_options": {"include_usage": False}}, {"keep_alive": 300},
]  # fmt: skip

# What asks for something that is not done; a few pairs need each other.
REFUSED: list[dict[str, Any]] = [
    {"use_beam_search": True}, {"length_penalty": 0.8}, {"early_stopping": True}, {"num_beams": 4},
    {"skip_special_tokens": False}, {"include_stop_str_in_output": True}, {"add_special_tokens": False},
    {"return_token_ids": True}, {"metadata": "a label"}, {"user": 3}, {"service_tier": "flex"}, {"tools": [{}]},
    {"suffix": " end"}, {"num_return_sequences": 2}, {"guidance_scale": 1.5}, {"penalty_alpha": 0.6},
    {"encoder_repetition_penalty": 1.2}, {"eos_token_id": 50256}, {"watermarking": True}, {"cache_salt": "x"},
    {"mirostat": 2, "mirostat_tau": 5.0}, {"dry_multiplier": 0.8, "dry_base": 1.75}, {"xtc_probability": 0.5},
    {"repeat_last_n": 64, "repetition_penalty": 1.2}, {"top_n_sigma": 2}, {"options": {"num_ctx": 100}},
    {"truncation_side": "right"}, {"negative_prompt": "x", "cfg_scale": 2}, {"length_penalty": True},
    {"thinking_token_budget": 5}, {"stop_regex": "a"}, {"lora_path": "x"}, {"modalities": ["text", "audio"]},
    {"num_beams": "1"}, {"skip_special_tokens": 1}, {"min_keep": 0.5}, {"temprature": 1}, {"unheard_of": 0},
]  # fmt: skip


def tgi(listed: bool, stream: bool) -> Callable[[Mapping[str, Any]], GenerationRequest]:
    return lambda fields: _parse({"inputs": "a", "parameters": dict(fields)}, listed, stream).plan.request


WAYS_IN: dict[str, Callable[[Mapping[str, Any]], GenerationRequest]] = {
    "a client": lambda fields: plan_job("a", fields).request,
    "a job enqueued by RQ": lambda fields: parse_job(["a"], fields)[0],
    "/v1/completions": lambda fields: parse_completion({"prompt": "a", **fields}).plans[0].request,
    "POST /": tgi(listed=True, stream=False),
    "/generate": tgi(listed=False, stream=False),
    "/generate_stream": tgi(listed=False, stream=True),
}


@pytest.mark.parametrize("way", WAYS_IN)
def test_what_asks_for_nothing_is_taken(way: str) -> None:
    read = WAYS_IN[way]
    plain = read({})
    for name, value in NEUTRAL.items():
        assert name in KNOWN or read({name: value}) == plain, name
    read(NEUTRAL)
    for fields in (*ALSO_NEUTRAL, {"tools": ()}, {"logits_processors": np.array([])}):
        assert read(fields) == plain, fields


@pytest.mark.parametrize("way", WAYS_IN)
def test_what_asks_for_something_else_is_refused_by_its_name(way: str) -> None:
    for fields in REFUSED:
        with pytest.raises(BadRequest) as caught:
            WAYS_IN[way](fields)
        assert any(name in str(caught.value) for name in fields), fields
        assert "\n" not in str(caught.value)


def test_the_engine_takes_and_refuses_the_same(engine: Engine) -> None:
    plain = engine.generate("It was", max_new_tokens=4)
    # Of what a job asks a worker, an engine knows nothing.
    generate: Any = engine.generate
    assert generate("It was", max_new_tokens=4, **NEUTRAL).token_ids == plain.token_ids
    for fields in (*REFUSED, {"foo": 1}, {"timeout": 5}):
        with pytest.raises(BadRequest):
            generate("It was", **fields)
    with pytest.raises(BadRequest, match="unknown field 'temprature'; temperature may be meant; known are max_new_tok"):
        generate("It was", temprature=1)


def test_options_of_a_load_are_named_too() -> None:
    load: Any = Engine.load
    for options, said in (
        ({"threads": "5"}, 'threads must be a whole number, not the string "5"'),
        ({"max_batch": True}, "max_batch must be a whole number, not true"),
        ({"kv_memory": "1GB"}, 'kv_memory must be a whole number, not the string "1GB"'),
        ({"prefix_memory": 0.5}, "prefix_memory must be a whole number, not 0.5"),
        ({"max_batch": 0.0}, "max_batch must be 1 or more, not 0"),
    ):
        with pytest.raises(BadRequest) as caught:
            load("demo", **options)
        assert str(caught.value) == said
    assert load("demo", threads=np.int64(1), max_batch=2.0).max_batch == 2


class Table:
    """A table of pandas': to go through it gives the names of its columns."""

    ndim = 2

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Iterator[str]:
        return iter(("id", "text"))


def test_the_engine_s_prompts_by_other_libraries(engine: Engine) -> None:
    generate: Any = engine.generate
    texts = ["It was", "My name is"]
    ids = [engine.tokenizer.encode(text)[:2] for text in texts]
    by_text = [result.text for result in generate(texts, max_new_tokens=3)]
    by_ids = [result.text for result in generate(ids, max_new_tokens=3)]
    assert generate(np.array(ids[0]), max_new_tokens=np.int64(3)).text == by_ids[0]
    assert generate([float(one) for one in ids[0]], max_new_tokens=3.0).text == by_ids[0]
    for rows in (np.array(ids), list(np.array(ids)), np.array(ids, float)):
        assert [result.text for result in generate(rows, max_new_tokens=3)] == by_ids
    assert [result.text for result in generate(np.array(texts), max_new_tokens=3)] == by_text
    assert generate(np.str_(texts[0]), max_new_tokens=3).text == by_text[0]
    assert generate([]) == generate(np.array([], int)) == []
    for wrong in (Table(), np.array(3), {"a": 1}, {"a"}, None, b"ab", np.zeros((1, 1, 1), int)):
        with pytest.raises(BadRequest, match="prompts must be a string, a list of token ids or a list of such, not "):
            generate(wrong)


@pytest.mark.processes
def test_a_running_pool_takes_the_same(system: System, tmp_path: Path, engine: Engine) -> None:
    """Over HTTP, by RQ and by a batch, with all of them at once."""
    expected = engine.generate("It was", max_new_tokens=4).text
    fields = {"prompt": "It was", "max_new_tokens": 4, **NEUTRAL, "stream": None}
    with httpx.Client(base_url=system.http_url, trust_env=False, timeout=60) as web:
        job = web.post("/v1/jobs", json=fields)
        assert job.status_code == 202, job.text
        assert web.get(f"/v1/jobs/{job.json()['id']}?wait=60").json()["result"]["text"] == expected
        for wrong in REFUSED:
            assert web.post("/v1/jobs", json={"prompt": "a", **wrong}).status_code == 400
    lines, found = tmp_path / "lines.jsonl", tmp_path / "found.jsonl"
    lines.write_text(json.dumps(fields) + "\n")
    command = [sys.executable, "-m", "fastgpt2", "batch", str(lines), "-o", str(found), "--redis-url", system.redis_url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(found.read_text())["text"] == expected
