#!/usr/bin/env python3
# transformers and torch live in an environment of their own, and carry no types.
# mypy: disable-error-code="import-not-found,no-untyped-call"
"""Ask transformers what a model gives: prompt ids, greedy tokens, text. It runs where transformers is installed.

    python tools/ask_transformers.py < question.json > answers.json

The question is {"model": folder or hub id, "prompts": {name: text}, "tokens": N}. The answer has `model_error` or
`tokenizer_error` if transformers cannot load the model, else `prompts`: for each name

ids, start_ids     the prompt's ids; the ids from which it generated, which differ for an empty prompt
new, text          the greedy tokens; their text alone, without special tokens
full_minus_prompt  the text of prompt and greedy tokens together, less the prompt's text
text_all           the text with special tokens
near               of each token, how far its logit is above the second; in float32, from one run over the whole text
greedy             whether each token is the likeliest: false if a setting such as a repetition penalty chose otherwise
plain              if not greedy: the tokens under those settings alone that fastgpt2 applies too, `plain_text`, and
                   `plain_near` by the scores that these settings leave
error              in place of all these, if it failed

`tools/zoo.py` and `tests/golden/make_zoo.py` use this file.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from typing import Any

# The settings that stay when the others are taken out: those that fastgpt2 applies too.
PLAIN_SETTINGS = (
    "bos_token_id", "eos_token_id", "pad_token_id", "min_length", "min_new_tokens", "repetition_penalty",
    "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "sequence_bias",
)  # fmt: skip


def ask(model_id: str, prompts: dict[str, str], tokens: int) -> dict[str, Any]:
    """Return what transformers makes of a model, as the module's head describes it."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    answer: dict[str, Any] = {"versions": {"transformers": transformers.__version__, "torch": torch.__version__}}
    tokenizer = model = None
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_id)
        answer["tokenizer_class"] = type(tokenizer).__name__
    except Exception as reason:
        answer["tokenizer_error"] = _in_a_line(reason)
    try:
        model = AutoModelForCausalLM.from_pretrained(model_id, dtype=torch.float32).eval()
        answer["generation_config"] = model.generation_config.to_diff_dict()
        answer["positions"] = int(model.config.n_positions)
    except Exception as reason:
        answer["model_error"] = _in_a_line(reason)
    if model is not None and tokenizer is not None:
        answer["prompts"] = {name: _continue(model, tokenizer, text, tokens) for name, text in prompts.items()}
    return answer


def _in_a_line(reason: Exception) -> str:
    return " ".join(f"{type(reason).__name__}: {reason}".split())[:400]


def _continue(model: Any, tokenizer: Any, prompt: str, tokens: int) -> dict[str, Any]:
    answer: dict[str, Any] = {"prompt": prompt}
    try:
        ids = answer["ids"] = tokenizer(prompt)["input_ids"]
        all_ids, start = _generate(model, ids, tokens)
        answer |= {"start_ids": all_ids[:start], "new": all_ids[start:]}
        answer |= _texts(tokenizer, all_ids, start)
        best, answer["near"] = _likeliest(model, all_ids, start)
        answer["greedy"] = best == answer["new"]
        answer["margin"] = min(answer["near"], default=None)
        if not answer["greedy"]:
            settings = model.generation_config
            # Fields that are not given to generate() are taken from the model's own settings, so those are replaced.
            kept = {name: getattr(settings, name) for name in PLAIN_SETTINGS}
            if any(len(words) > 1 for words, _ in kept["sequence_bias"] or ()):
                kept["sequence_bias"] = None
            model.generation_config = type(settings)(**kept)
            near = list[float]()
            all_ids, start = _generate(model, ids, tokens, near)
            model.generation_config = settings
            answer |= {"plain": all_ids[start:], "plain_near": near}
            answer["plain_text"] = _texts(tokenizer, all_ids, start)["full_minus_prompt"]
    except Exception as reason:
        answer["error"] = _in_a_line(reason)
    return answer


def _generate(model: Any, ids: list[int], tokens: int, near: list[float] | None = None) -> tuple[list[int], int]:
    """Return the ids of prompt and continuation, and where the continuation begins.

    Args:
        near: where to put how far each token is ahead of the second, by the scores that the settings leave.
    """
    import torch

    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": tokens}
    if ids:
        given = torch.tensor([ids])
        options |= {"inputs": given, "attention_mask": torch.ones_like(given)}
    with torch.no_grad():
        out = model.generate(**options, return_dict_in_generate=True, output_scores=near is not None)
    if near is not None:
        near += [float(f"{best - second:.6g}") for best, second in (row[0].topk(2).values for row in out.scores)]
    return out.sequences[0].tolist(), len(ids) or 1


def _likeliest(model: Any, ids: list[int], start: int) -> tuple[list[int], list[float]]:
    """Return the likeliest token at each place of the continuation, and how far it is ahead of the second."""
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, start - 1 : -1]
    values, best = logits.topk(2)
    return best[:, 0].tolist(), [float(f"{value:.6g}") for value in (values[:, 0] - values[:, 1]).tolist()]


def _texts(tokenizer: Any, ids: list[int], start: int) -> dict[str, str]:
    given = tokenizer.decode(ids[:start], skip_special_tokens=True)
    return {
        "text": tokenizer.decode(ids[start:], skip_special_tokens=True),
        "text_all": tokenizer.decode(ids[start:]),
        "text_nocleanup": tokenizer.decode(ids[start:], skip_special_tokens=True, clean_up_tokenization_spaces=False),
        "full_minus_prompt": tokenizer.decode(ids, skip_special_tokens=True)[len(given) :],
    }


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    question = json.load(sys.stdin)
    # What libraries print must not stand between the JSON.
    answers, sys.stdout = sys.stdout, sys.stderr
    json.dump(ask(question["model"], question["prompts"], question["tokens"]), answers, ensure_ascii=False)
