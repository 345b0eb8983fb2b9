"""The fields of other APIs: those that are taken since they ask for nothing, and what is said of the others.

Programs that are made for OpenAI's API, vLLM, text-generation-inference and the like send fields that fastgpt2 does not
have, most of them with a value that asks for nothing: `skip_special_tokens: true`, `length_penalty: 1`. Such a field is
dropped. One that asks for something is refused: the text would be another than what was asked for. All ways in for a
request read its fields by `take_known`, so that they all give the same answer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from fastgpt2.errors import BadRequest
from fastgpt2.fields import is_listed, is_same, plain

SHOWN_CHARACTERS = 100

# How alike two names must be, by difflib's ratio: "max_tokens" and "max_new_tokens" are by 0.83.
_LIKENESS = 0.8

_EMPTY: tuple[Any, ...] = ("", [], {})

# The values of fields that ask for nothing. A type stands for all its values: a name for somebody's log, or what makes
# no difference to a text. Null asks for nothing in any field. A field may stand in several rows.
_NEUTRAL: tuple[tuple[tuple[Any, ...], tuple[str, ...]], ...] = (
    ((str,), (
        "user", "safety_identifier", "prompt_cache_key", "request_id", "rid", "session_id", "guided_decoding_backend",
        "keep_alive",
    )),
    ((dict,), ("metadata", "custom_labels", "litellm_metadata")),
    ((bool,), (
        # A result is kept for its `result_ttl` in any case.
        "store",
        # It adds the same number to all scores, which changes no draw.
        "renormalize_logits",
        "parallel_tool_calls", "cache_prompt", "use_cache", "spaces_between_special_tokens", "include_reasoning",
        "return_text_in_logprobs", "disable_compile", "low_memory", "separate_reasoning", "stream_reasoning",
        "return_mm_kwargs", "disable_fallback",
        # Whether a template stands around the prompt: there is none.
        "raw",
    )),
    # There is no padding that would stand in a text.
    ((int,), ("pad_token_id", "keep_alive")),
    # Guesses make a text quicker, and no other.
    ((int, float), ("speculative.n_max", "speculative.n_min", "speculative.p_min")),
    ((True,), ("skip_special_tokens", "add_special_tokens", "add_bos_token", "detokenize", "return_text")),
    ((False,), (
        "stream", "echo", "use_beam_search", "early_stopping", "watermark", "watermarking", "do_sample", "ignore_eos",
        "include_stop_str_in_output", "no_stop_trim", "return_full_text", "details", "decoder_input_details",
        "return_token_ids", "return_tokens_as_token_ids", "return_token_offsets", "return_prompt_token_ids",
        "return_tokens", "return_tensors", "return_hidden_states", "return_routed_experts", "return_logprob",
        "return_cached_tokens_details", "return_dict_in_generate", "return_progress", "output_attentions",
        "output_hidden_states", "output_scores", "output_logits", "flat_logprobs", "post_sampling_probs",
        "timings_per_token", "remove_invalid_values", "token_healing", "is_assistant", "temperature_last",
        "dynamic_temperature", "ban_eos_token", "auto_max_new_tokens", "think", "truncation", "guided_json_object",
        "skip_reading_prefix_cache", "return_weight_versions",
    )),
    ((0,), (
        "presence_penalty", "frequency_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_tokens",
        "min_new_tokens", "min_length", "top_k", "min_p", "top_a", "top_n_sigma", "penalty_alpha", "diversity_penalty",
        "epsilon_cutoff", "eta_cutoff", "xtc_probability", "dry_multiplier", "mirostat", "mirostat_mode",
        "dynatemp_range", "smoothing_factor", "priority", "n_keep", "num_keep", "n_discard", "n_indent", "min_keep",
        "n_probs", "top_logprobs", "top_logprobs_num", "top_n_tokens", "routed_experts_prompt_start",
        "routed_experts_start_len", "thinking_token_budget", "t_max_prompt_ms", "t_max_predict_ms",
        "truncation_length", "max_tokens_second", "prompt_lookup_num_tokens",
    )),
    ((1,), (
        "n", "best_of", "num_return_sequences", "num_beams", "num_beam_groups", "beam_size", "beam_width",
        "length_penalty", "repetition_penalty", "repeat_penalty", "encoder_repetition_penalty", "guidance_scale",
        "cfg_scale", "top_p", "typical_p", "typical", "tfs", "tfs_z", "top_h", "stream_interval",
    )),
    # llama.cpp's and SGLang's "all", "none" or "no limit".
    ((-1,), (
        "top_k", "top_n_sigma", "repeat_last_n", "n_keep", "num_keep", "id_slot", "slot_id", "logprob_start_len",
        "thinking_token_budget", "t_max_prompt_ms", "t_max_predict_ms",
    )),
    (_EMPTY, (
        "suffix", "prefix", "stop", "stop_sequence", "stop_sequences", "stop_strings", "stop_regex", "bad_words",
        "bad_words_ids", "banned_strings", "custom_token_bans", "suppress_tokens", "begin_suppress_tokens",
        "force_words_ids", "logit_bias", "sequence_bias", "logits_processor", "logits_processors", "negative_prompt",
        "negative_prompt_ids", "grammar", "grammar_string", "guided_grammar", "ebnf", "structural_tag",
        "structured_outputs", "format", "system", "system_prompt", "template", "context", "images", "image_data",
        "images_config", "documents", "tools", "functions", "lora", "lora_path", "samplers", "sampler_priority",
        "response_fields", "stream_options", "options", "model_kwargs", "generate_kwargs", "chat_template_kwargs",
        "mm_processor_kwargs", "extra_body", "extra_headers", "extra_query", "extra_args", "vllm_xargs", "nvext",
        "kv_transfer_params", "ec_transfer_params", "session_params", "custom_params", "provider", "models",
        "transforms", "plugins", "stop_token_ids", "guided_whitespace_pattern", "adapter_id",
    )),
    (("auto", "default"), ("service_tier",)),
    (("none", "auto"), ("tool_choice", "function_call")),
    ((["text"],), ("modalities",)),
    (("none",), ("reasoning_effort",)),
    (("medium",), ("verbosity",)),
    (("in_memory", "in-memory"), ("prompt_cache_retention",)),
    (("left",), ("truncation_side",)),
    (("tensors", "none"), ("mm_payload",)),
    (("normal",), ("priority",)),
    (("error",), ("context_length_exceeded_behavior",)),
    (({"type": "text"},), ("response_format",)),
)  # fmt: skip
_NEUTRAL_VALUES: dict[str, list[Any]] = {}
for _values, _names in _NEUTRAL:
    for _name in _names:
        _NEUTRAL_VALUES.setdefault(_name, []).extend(_values)

# Fields that some ways in know and check, and others do not know: what is empty asks for nothing in any of them.
_LEFT_OUT_IF_EMPTY = frozenset(
    {"adapter_id", "grammar", "guided_grammar", "guided_whitespace_pattern", "structural_tag", "whitespace_pattern"}
)

# Objects that ask for nothing if each of their parts asks for nothing.
_NEUTRAL_PARTS: dict[str, dict[str, type]] = {
    "stream_options": {"include_usage": bool, "include_obfuscation": bool, "continuous_usage_stats": bool},
    # Of the hub's inference API.
    "options": {"use_cache": bool, "use_gpu": bool, "wait_for_model": bool},
}

# Fields that only shape what others ask for, and so ask for nothing where none of these does.
_SHAPED: dict[tuple[str, ...], tuple[str, ...]] = {
    ("dry_multiplier",): (
        "dry_base", "dry_allowed_length", "dry_penalty_last_n", "dry_range", "dry_sequence_breakers",
    ),
    ("mirostat", "mirostat_mode"): ("mirostat_tau", "mirostat_eta"),
    ("xtc_probability",): ("xtc_threshold",),
    ("dynatemp_range", "dynamic_temperature"): ("dynatemp_exponent", "dynatemp_low", "dynatemp_high"),
    ("smoothing_factor",): ("smoothing_curve",),
    ("repetition_penalty", "repeat_penalty", "presence_penalty", "frequency_penalty"): (
        "repeat_last_n", "repetition_penalty_range", "penalize_nl", "penalty_decay",
    ),
    ("guidance_scale", "cfg_scale"): ("negative_prompt", "negative_prompt_ids"),
    ("return_logprob",): ("logprob_start_len", "top_logprobs_num"),
}  # fmt: skip
_SHAPED_BY = {name: others for others, names in _SHAPED.items() for name in names}

# What can be asked instead of what other APIs have and fastgpt2 does not. All names here are fields of OpenAI's API, of
# vLLM's `SamplingParams` and requests, of SGLang, text-generation-inference, transformers' `GenerationConfig` and
# pipelines, llama.cpp's server, ollama, and of what programs between these and a client add.
_REFUSED = {
    "no beams are searched here; ask for several texts by n, or for the best of several by best_of": (
        "num_beams", "num_beam_groups", "use_beam_search", "beam_size", "beam_width", "length_penalty",
        "early_stopping", "diversity_penalty",
    ),
    "no watermark is put into texts here; leave it out": ("watermark", "watermarking", "watermarking_config"),
    "tokens are drawn by temperature, top_k, top_p, min_p and typical_p here; ask for these instead": (
        "penalty_alpha", "epsilon_cutoff", "eta_cutoff", "top_h", "top_a", "top_n_sigma", "tfs", "tfs_z", "mirostat",
        "mirostat_mode", "mirostat_tau", "mirostat_eta", "xtc_probability", "xtc_threshold", "dynatemp_range",
        "dynatemp_exponent", "smoothing_factor", "smoothing_curve", "min_keep", "samplers", "renormalize_logits",
    ),
    "repetitions are made less likely by repetition_penalty, no_repeat_ngram_size, presence_penalty and "
    "frequency_penalty here; ask for these instead": (
        "encoder_repetition_penalty", "encoder_no_repeat_ngram_size", "dry_multiplier", "dry_base",
        "dry_allowed_length", "dry_penalty_last_n", "dry_range", "dry_sequence_breakers", "repeat_last_n",
        "penalty_decay", "penalize_nl",
    ),
    "a text has one prompt here, and no second model or layer that it is compared with; leave it out": (
        "guidance_scale", "cfg_scale", "negative_prompt", "negative_prompt_ids", "dola_layers",
    ),
    "tokens are made likelier by logit_bias and forbidden by bad_words and suppress_tokens here; ask for these "
    "instead": (
        "sequence_bias", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "forced_decoder_ids",
        "allowed_token_ids", "exponential_decay_length_penalty", "logits_processor", "logits_processors",
    ),
    "a text is guided by choices, regex or json_schema here; ask for one of these instead": (
        "grammar", "guided_grammar", "lark", "structural_tag", "force_words_ids", "constraints",
        "guided_whitespace_pattern", "ebnf", "grammar_string",
    ),
    "special tokens are no part of a text here; leave it out": ("skip_special_tokens",),
    "a text ends before its stop string here; leave it out": (
        "include_stop_str_in_output", "no_stop_trim",
    ),
    "the tokenizer's own rules say which tokens stand around a text here; give token ids instead": (
        "add_special_tokens", "add_bos_token",
    ),
    "the last tokens of a prompt are kept here; leave it out": ("truncation_side",),
    "a chat template comes with the model, or is given to its workers by --chat-template; leave it out": (
        "chat_template",
    ),
}  # fmt: skip
_REASONS = {name: reason for reason, names in _REFUSED.items() for name in names}

# Names that other APIs have for fields, and that are not alike.
_OTHER_NAMES = {
    "bad_words_ids": "bad_words",
    "banned_strings": "bad_words",
    "guided_choice": "choices",
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "inputs": "prompt",
    "max_completion_tokens": "max_new_tokens",
    "max_length": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "min_length": "min_new_tokens",
    "min_tokens": "min_new_tokens",
    "n_predict": "max_new_tokens",
    "num_predict": "max_new_tokens",
    "n_probs": "logprobs",
    "num_return_sequences": "n",
    "repeat_penalty": "repetition_penalty",
    "response_format": "json_schema",
    "stop_sequences": "stop",
    "stop_strings": "stop",
    "truncate": "truncate_prompt_tokens",
    "typical": "typical_p",
    "top_logprobs": "logprobs",
    "top_n_tokens": "logprobs",
}

# Fields of a job that have another name in OpenAI's API and vLLM's, and so in /v1/completions.
OPENAI_NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}


def take_known(given: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Return the fields of a request that are known and ask for something; null stands for a default.

    Raises:
        BadRequest: as `refuse_unknown`.
    """
    refuse_unknown(given, known)
    return {name: value for name, value in given.items() if name in known and not _is_left_out(name, value)}


def refuse_unknown(given: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise BadRequest if a field of a request is not known and asks for something; see `sentence_for`."""
    if (unknown := find_unknown(given, known)) is not None:
        raise BadRequest(sentence_for(unknown, known))


def find_unknown(given: Mapping[str, Any], known: Collection[str]) -> str | None:
    """Return the first field of a request that is not known and asks for something; None if there is none."""
    return next((name for name in given if name not in known and not is_neutral(name, given)), None)


def _is_left_out(name: str, value: Any) -> bool:
    return value is None or (name in _LEFT_OUT_IF_EMPTY and any(is_same(_own(value), empty) for empty in _EMPTY))


def _own(value: Any) -> Any:
    """Return a value as Python's own, and what holds nothing, a tuple or an array, as the empty list."""
    found = plain(value)
    return [] if is_listed(found) and not len(found) else found


def is_neutral(name: str, given: Mapping[str, Any]) -> bool:
    """Tell whether a field of a request asks for nothing that is not done in any case."""
    value = _own(given[name])
    if value is None or any(_stands_for(one, value) for one in _NEUTRAL_VALUES.get(name, ())):
        return True
    if name in _SHAPED_BY:
        return all(is_neutral(other, given) for other in _SHAPED_BY[name] if other in given)
    parts = _NEUTRAL_PARTS.get(name)
    return (
        parts is not None
        and isinstance(value, dict)
        and all(part in parts and isinstance(inner, parts[part] | None) for part, inner in value.items())
    )


def _stands_for(neutral: Any, value: Any) -> bool:
    if not isinstance(neutral, type):
        return is_same(value, neutral)
    return type(value) is neutral or (neutral is int and isinstance(value, float) and value.is_integer())


def sentence_for(name: object, known: Collection[str]) -> str:
    """Return what is said of a field that is none of those `known`, and asks for something.

    The sentence says what can be asked instead, which values ask for nothing, or which field may be meant.
    """
    shown = str(name)[:SHOWN_CHARACTERS]
    if shown in _REASONS:
        return f"{shown} is refused: {_REASONS[shown]}"
    other = _OTHER_NAMES.get(shown, "")
    if (other := other if other in known else OPENAI_NAMES.get(other, "")) in known:
        return f"unknown field {shown!r}; {other} may be meant; known are {', '.join(known)}"
    if shown in _NEUTRAL_VALUES:
        values = dict.fromkeys(map(_in_words, _NEUTRAL_VALUES[shown]))
        return f"{shown} must be {' or '.join(values)}, or left out: nothing else can be asked by it here"
    from difflib import get_close_matches

    meant = next(iter(get_close_matches(shown, known, n=1, cutoff=_LIKENESS)), None)
    hint = f"; {meant} may be meant" if meant else ""
    return f"unknown field {shown!r}{hint}; known are {', '.join(known)}"


_WORDS_FOR_TYPES = {str: "a string", int: "a whole number", float: "a number", bool: "true or false", dict: "an object"}


def _in_words(value: Any) -> str:
    """Return a neutral value for a message, as JSON has it."""
    if isinstance(value, type):
        return _WORDS_FOR_TYPES[value]
    if value in _EMPTY:
        return "empty"
    import json

    return json.dumps(value)
