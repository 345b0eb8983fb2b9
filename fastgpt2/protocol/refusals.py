"""The sentence for a field that a request may not have: why it is refused, or which field may be meant."""

from __future__ import annotations

from collections.abc import Collection

SHOWN_CHARACTERS = 100

# How alike two names must be, by difflib's ratio: "max_tokens" and "max_new_tokens" are by 0.83.
_LIKENESS = 0.8

# What other APIs have and fastgpt2 does not: the names, and what can be asked instead. Those of transformers'
# `GenerationConfig`, of vLLM's `SamplingParams`, of text-generation-inference and of llama.cpp's server.
_REFUSED = {
    "no beams are searched here; ask for several texts by n, or for the best of several by best_of": (
        "num_beams", "num_beam_groups", "use_beam_search", "beam_size", "beam_width", "length_penalty",
        "early_stopping", "diversity_penalty",
    ),
    "no watermark is put into texts here; leave it out": ("watermark", "watermarking_config"),
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
        "guided_whitespace_pattern",
    ),
}  # fmt: skip
_REASONS = {name: reason for reason, names in _REFUSED.items() for name in names}

# Names that other APIs have for fields, and that are not alike.
_OTHER_NAMES = {
    "guided_choice": "choices",
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "inputs": "prompt",
    "max_completion_tokens": "max_new_tokens",
    "max_length": "max_new_tokens",
    "min_length": "min_new_tokens",
    "n_predict": "max_new_tokens",
    "n_probs": "logprobs",
    "num_return_sequences": "n",
    "repeat_penalty": "repetition_penalty",
    "response_format": "json_schema",
    "stop_sequences": "stop",
    "top_n_tokens": "logprobs",
}


def sentence_for(name: object, known: Collection[str]) -> str:
    """Return what is said of a field that is none of those `known`."""
    shown = str(name)[:SHOWN_CHARACTERS]
    if shown in _REASONS:
        return f"{shown} is refused: {_REASONS[shown]}"
    meant = _likely_meant(shown, known)
    hint = f"; {meant} may be meant" if meant else ""
    return f"unknown field {shown!r}{hint}; known are {', '.join(known)}"


def _likely_meant(name: str, known: Collection[str]) -> str | None:
    """Return the field of another API's name, else the one whose name is most alike; None if none is alike."""
    if (other := _OTHER_NAMES.get(name)) in known:
        return other
    from difflib import get_close_matches

    return next(iter(get_close_matches(name, known, n=1, cutoff=_LIKENESS)), None)
