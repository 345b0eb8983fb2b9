# The oracle libraries are absent from the environment that checks the types, or carry no types themselves.
# mypy: disable-error-code="import-not-found,import-untyped,no-any-return,no-untyped-call,untyped-decorator"
"""Make `generation_config.json` in this directory: what each field of a generation configuration does to greedy text.

    python -m venv oracle && oracle/bin/pip install torch transformers tokenizers safetensors
    oracle/bin/python tests/golden/make_generation_config.py --model path/to/model

Every case is the model's folder with changed fields in `config.json` and, or not, a `generation_config.json`. The
script writes what transformers makes of the folder: the ids that its configuration holds, and the tokens that
`generate(do_sample=False, max_new_tokens=20)` gives after each prompt; or the error.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

HERE = Path(__file__).resolve().parent
PROMPTS = (
    "",
    "Sherlock Holmes",
    "KING RICHARD III:\nMy gracious lord, I pray thee, my lord, my gracious lord, I pray",
    "The man who was the first man to see the man who was",
)
NEW_TOKENS = 20

# Fields of the file that stand for a kind of content.
ABSENT = None

PLAIN = {"bos_token_id": 0, "eos_token_id": 0}


def cases(met: list[int]) -> dict[str, tuple[dict[str, Any], Any]]:
    """Return the cases: changes of `config.json` (None removes a field) and the content of the other file.

    A content that is a string stands in the file as it is.

    Args:
        met: tokens that the plain continuation of the second prompt meets early, in their order.
    """
    first, second, third = met[2], met[5], met[8]
    files: dict[str, tuple[dict[str, Any], Any]] = {
        # Which file counts, and for what.
        "neither": ({}, ABSENT),
        "config: another end": ({"eos_token_id": second}, ABSENT),
        "config: ends in a list": ({"eos_token_id": [third, second]}, ABSENT),
        "config: bos": ({"bos_token_id": second}, ABSENT),
        "config: no bos, no end": ({"bos_token_id": None, "eos_token_id": None}, ABSENT),
        "config: null": ({"bos_token_id": "null", "eos_token_id": "null"}, ABSENT),
        "file: empty object": ({}, {}),
        "file: empty object, config: another end": ({"eos_token_id": second}, {}),
        "file: end": ({"eos_token_id": first}, {"eos_token_id": second}),
        "file: ends in a list": ({}, {**PLAIN, "eos_token_id": [third, second]}),
        "file: ends in an empty list": ({}, {**PLAIN, "eos_token_id": []}),
        "file: end null": ({"eos_token_id": second}, {"bos_token_id": 0, "eos_token_id": None}),
        "file: bos": ({}, {"bos_token_id": second, "eos_token_id": 0}),
        "file: bos null": ({}, {"bos_token_id": None, "eos_token_id": 0}),
        "file: bos in a list": ({}, {"bos_token_id": [second], "eos_token_id": 0}),
        "file: end, no bos": ({}, {"eos_token_id": 0}),
        "file: pad": ({}, {**PLAIN, "pad_token_id": second}),
        "file: decoder_start_token_id": ({}, {**PLAIN, "decoder_start_token_id": second}),
        "file: end beyond the vocabulary": ({}, {**PLAIN, "eos_token_id": [5000, second]}),
        "file: negative end": ({}, {**PLAIN, "eos_token_id": -1}),
        "file: end as a text": ({}, {**PLAIN, "eos_token_id": "0"}),
        "file: end as a fraction": ({}, {**PLAIN, "eos_token_id": float(second)}),
        "file: end true": ({}, {**PLAIN, "eos_token_id": True}),
        "file: bos beyond the vocabulary": ({}, {**PLAIN, "bos_token_id": 5000}),
        "file: from the model's configuration": (
            {"eos_token_id": first},
            {**PLAIN, "eos_token_id": second, "_from_model_config": True, "transformers_version": "4.35.2"},
        ),
        "file: no JSON": ({"eos_token_id": second}, "{"),
        "file: no UTF-8": ({"eos_token_id": second}, "\udcff"),
        "file: empty": ({"eos_token_id": second}, ""),
        "file: a list": ({}, "[]"),
        "file: null": ({}, "null"),
        "file: unknown field": ({}, {**PLAIN, "chat_format": "chatml", "repetition_penality": 9.0}),
        "file: logits_processor": ({}, {**PLAIN, "logits_processor": []}),
    }
    for name, value in fields(met).items():
        files[f"file: {name}"] = ({}, {**PLAIN, **value})
    # The same in config.json counts without the other file only.
    for name in ("repetition_penalty 1.3", "num_beams 3", "do_sample", "min_length 40", "task_specific_params"):
        files[f"config: {name}"] = (fields(met)[name], ABSENT)
        files[f"config: {name}, and a file"] = (fields(met)[name], PLAIN)
    files["config: force_bos_token_to_be_generated"] = ({"force_bos_token_to_be_generated": True}, ABSENT)
    files["config: null repetition_penalty"] = ({"repetition_penalty": "null"}, ABSENT)
    return files


def fields(met: list[int]) -> dict[str, dict[str, Any]]:
    """Return fields of a generation configuration, each under a name for people."""
    first, second, third = met[2], met[5], met[8]
    ends_early = {"eos_token_id": second}
    return {
        "repetition_penalty 1.3": {"repetition_penalty": 1.3},
        "repetition_penalty 1.0": {"repetition_penalty": 1.0},
        "repetition_penalty 1": {"repetition_penalty": 1},
        "repetition_penalty 0": {"repetition_penalty": 0},
        "repetition_penalty 0.8": {"repetition_penalty": 0.8},
        "repetition_penalty as a text": {"repetition_penalty": "1.2"},
        "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.5},
        "no_repeat_ngram_size 2": {"no_repeat_ngram_size": 2},
        "no_repeat_ngram_size 0": {"no_repeat_ngram_size": 0},
        "no_repeat_ngram_size 1": {"no_repeat_ngram_size": 1},
        "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 2},
        "bad_words_ids": {"bad_words_ids": [[second]]},
        "bad_words_ids, empty": {"bad_words_ids": []},
        "bad_words_ids, several tokens": {"bad_words_ids": [met[1:3], met[4:7], [third], [0]]},
        "bad_words_ids, many": {"bad_words_ids": [[n] for n in range(1, 2000) if n % 3]},
        "bad_words_ids, the end alone": {"bad_words_ids": [[0]]},
        "min_length 0": {"min_length": 0},
        "min_length 40": {**ends_early, "min_length": 40},
        "min_new_tokens": {**ends_early, "min_new_tokens": 12},
        "min_new_tokens 0": {**ends_early, "min_new_tokens": 0},
        "min_new_tokens without an end": {"eos_token_id": None, "min_new_tokens": 12},
        "forced_bos_token_id": {"forced_bos_token_id": second},
        "forced_eos_token_id": {"forced_eos_token_id": second},
        "forced_eos_token_id in a list": {"forced_eos_token_id": [second, third]},
        "remove_invalid_values": {"remove_invalid_values": True},
        "exponential_decay_length_penalty": {"exponential_decay_length_penalty": [2, 3.0]},
        "suppress_tokens": {"suppress_tokens": [first]},
        "suppress_tokens, empty": {"suppress_tokens": []},
        "suppress_tokens, many": {"suppress_tokens": [n for n in range(1, 2048) if n % 2]},
        "begin_suppress_tokens": {"begin_suppress_tokens": [met[0]]},
        "begin_suppress_tokens, empty": {"begin_suppress_tokens": []},
        "sequence_bias": {"sequence_bias": [[[first], -20.0]]},
        "sequence_bias, several": {"sequence_bias": [[[first], -20.0], [[met[3]], 2.5], [[17], 4.0]]},
        "sequence_bias, two tokens": {"sequence_bias": [[[met[0], met[1]], -20.0]]},
        "all that a request may ask": {
            "repetition_penalty": 1.1,
            "no_repeat_ngram_size": 3,
            "bad_words_ids": [[second]],
            "suppress_tokens": [first],
            "sequence_bias": [[[third], -3.0]],
            "min_new_tokens": 4,
        },
        "token_healing": {"token_healing": True},
        "token_healing false": {"token_healing": False},
        "guidance_scale 1.5": {"guidance_scale": 1.5},
        "guidance_scale 1": {"guidance_scale": 1},
        "watermarking_config": {"watermarking_config": {"bias": 20.0, "greenlist_ratio": 0.25}},
        "watermarking_config, SynthID": {"watermarking_config": {"ngram_len": 5, "keys": [654, 400, 836, 123]}},
        "renormalize_logits": {"renormalize_logits": True},
        "stop_strings": {"stop_strings": ["the"]},
        "stop_strings, empty": {"stop_strings": []},
        "max_length": {"max_length": 30},
        "max_new_tokens": {"max_new_tokens": 3},
        "max_new_tokens 0": {"max_new_tokens": 0},
        "max_time": {"max_time": 1000.0},
        "early_stopping": {"early_stopping": True},
        "early_stopping maybe": {"early_stopping": "maybe"},
        "length_penalty": {"length_penalty": 2.0},
        "num_beams 1": {"num_beams": 1},
        "num_beams 3": {"num_beams": 3},
        "num_beams 3, num_beam_groups 3": {"num_beams": 3, "num_beam_groups": 3, "diversity_penalty": 0.5},
        "num_return_sequences 1": {"num_return_sequences": 1},
        "num_return_sequences 2": {"num_return_sequences": 2},
        "num_return_sequences 2, do_sample": {"num_return_sequences": 2, "do_sample": True},
        "num_return_sequences 2, num_beams 2": {"num_return_sequences": 2, "num_beams": 2},
        "constraints": {"constraints": [{}]},
        "force_words_ids": {"force_words_ids": [[first]]},
        "diversity_penalty": {"diversity_penalty": 0.5},
        "penalty_alpha": {"penalty_alpha": 0.6},
        "penalty_alpha, top_k": {"penalty_alpha": 0.6, "top_k": 4},
        "penalty_alpha, top_k 1": {"penalty_alpha": 0.6, "top_k": 1},
        "penalty_alpha, do_sample": {"penalty_alpha": 0.6, "top_k": 4, "do_sample": True},
        "dola_layers": {"dola_layers": "low"},
        "do_sample": {"do_sample": True, "temperature": 0.7, "top_k": 40, "top_p": 0.9},
        "do_sample false": {"do_sample": False, "temperature": 0.7, "top_p": 0.9},
        "top_p": {"top_p": 0.2, "typical_p": 0.2, "min_p": 0.2, "top_h": 0.5, "top_k": 3, "temperature": 2.0},
        "epsilon_cutoff": {"epsilon_cutoff": 0.5, "eta_cutoff": 0.5},
        "use_cache false": {"use_cache": False},
        "cache_implementation static": {"cache_implementation": "static"},
        "cache_implementation hybrid": {"cache_implementation": "hybrid"},
        "cache_implementation unknown": {"cache_implementation": "unknown"},
        "output_scores": {"output_scores": True, "output_attentions": True},
        "return_dict_in_generate": {"return_dict_in_generate": True},
        "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 3},
        "assistant_early_exit": {"assistant_early_exit": 2},
        "num_assistant_tokens": {"num_assistant_tokens": 5, "is_assistant": False},
        "is_assistant": {"is_assistant": True},
        "use_mtp": {"use_mtp": True},
        "low_memory": {"low_memory": True},
        "prefill_chunk_size": {"prefill_chunk_size": 2},
        "compile_config": {"compile_config": {}},
        "disable_compile": {"disable_compile": True},
        "task_specific_params": {"task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}},
        "suppressed and forced": {"suppress_tokens": [second], "forced_eos_token_id": second},
        "speculation_type": {"speculation_type": "dflash"},
        "continuous_batching_config": {"continuous_batching_config": {}},
    }


def make(model: Path, changes: dict[str, Any], content: Any) -> Path:
    """Lay a changed copy of the model's folder into a temporary one, and return its path."""
    folder = Path(tempfile.mkdtemp())
    for name in ("model.safetensors", "tokenizer.json"):
        (folder / name).symlink_to(model / name)
    config = json.loads((model / "config.json").read_text("utf-8"))
    for name, value in changes.items():
        if value is None:
            config.pop(name, None)
        else:
            config[name] = None if value == "null" else value
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    if content is not ABSENT:
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / "generation_config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    return folder


@torch.no_grad()
def ask(folder: Path, tokenizer: Any) -> dict[str, Any]:
    """Return what transformers makes of a folder."""
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    except Exception as reason:
        return {"error": described(reason)}
    generation = model.generation_config
    found: dict[str, Any] = {"bos_token_id": generation.bos_token_id, "eos_token_id": generation.eos_token_id}
    # Every text of the answers, or the error that each has.
    answers: list[Any] = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        given = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        try:
            output = model.generate(**(given if ids else {}), do_sample=False, max_new_tokens=NEW_TOKENS)
            rows = output if isinstance(output, torch.Tensor) else output.sequences
            answers.append(rows[0, len(ids) or 1 :].tolist())  # an empty prompt starts from one token
        except Exception as reason:
            answers.append({"error": described(reason)})
    return {**found, "ids": answers}


def described(reason: Exception) -> str:
    """Return the kind of an error and the beginning of its message, without a path."""
    return f"{type(reason).__name__}: {str(reason).splitlines()[0] if str(reason) else ''}"[:120]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    model: Path = parser.parse_args().model.resolve()
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.filterwarnings("ignore")
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(model)
    plain = make(model, {}, ABSENT)
    met = ask(plain, tokenizer)["ids"][1]
    shutil.rmtree(plain)
    entries = []
    for name, (changes, content) in cases(met).items():
        folder = make(model, changes, content)
        entries.append({"name": name, "config": changes, "file": content, **ask(folder, tokenizer)})
        shutil.rmtree(folder)
    digest = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    with (HERE / "generation_config.json").open("w", encoding="ascii", newline="\n") as file:
        file.write(f'{{"model_sha256": "{digest}",\n"transformers": "{transformers.__version__}",\n')
        file.write(f'"prompts": {json.dumps(PROMPTS)},\n"cases": [\n')
        file.write(",\n".join(json.dumps(entry) for entry in entries) + "\n]}\n")
    print(f"{len(entries)} cases")


if __name__ == "__main__":
    main()
