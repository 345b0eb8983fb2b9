# The oracle libraries are absent from the environment that checks the types, or carry no types themselves.
# mypy: disable-error-code="import-not-found,import-untyped,no-any-return,no-untyped-call,untyped-decorator,misc"
"""Make `processors.json` and `processors.npz`: what transformers' processors make of scores, and texts with penalties.

    oracle/bin/python tests/golden/make_processors.py --model path/to/model

The environment is that of `make_golden.py`. `processors.json` holds

cases   of each: `row`, the kind, the size and the seed of the scores (`tests/support/rows.py`), or "model N", 0, 0 for
        a row of the model's own scores (`rows` in `processors.npz`); the number of the `context`, among
        `contexts`: the tokens of the prompt, and those of the text; and the `options`, by the names of fastgpt2. The
        scores that are left, finite ones, stand in `processors.npz`: `ids` and `scores`, `count` of them for a case,
        one case after the other. Of a large case (`left`) they are those of the likeliest 64 and of tokens that an
        option names; `left` and `sha256` tell of all ids that are left (int32, little-endian).
ends    the ids that end a text in the cases.
texts   the tokens that `generate(do_sample=False)` gives under some options, by the model of `--model` (`demo`) and by
        a kind of the zoo. Every token is 1e-3 ahead of the second.

The processors are those that transformers' own `_get_logits_processor` makes for a tiny GPT-2, in its order. OpenAI's
two penalties are written down here, as its API's documentation has them. The survivors of a draw were computed in
float64 here too: a case whose survivors hang on rounding is made again of the next seed.

The same versions of the libraries, on the same kind of processor, write the same files again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, GenerationConfig, GPT2Config, GPT2LMHeadModel, LogitsProcessor
from transformers.generation.logits_process import LogitsProcessorList
from transformers.utils import logging as transformers_logging

sys.path.append(str(Path(__file__).resolve().parents[1]))
from support.rows import KINDS, make_row

HERE = Path(__file__).resolve().parent
Json = dict[str, Any]

SMALL, MIDDLE, LARGE = 300, 2000, 50257
MOST_KEPT_OF_LARGE = 64
MOST_SEEDS = 200
# How near to a limit of float32 sums a token may be that survives, or does not.
ROUNDING = 3e-6
NEAR_TIE = 1e-3

ZOO_KIND = "openai-gpt2"
NEW_TOKENS = 24
ENDS = (0, 5)
DRAWING = ("temperature", "top_k", "top_p", "min_p", "typical_p")


# -------------------------------------------------------------------------------------------- the processors


class OpenAIPenalties(LogitsProcessor):
    """mu[j] -> mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence.

    c[j] is how often token j has been sampled so far, so of the generated text alone.
    """

    def __init__(self, prompt_length: int, presence: float, frequency: float) -> None:
        self.prompt_length, self.presence, self.frequency = prompt_length, presence, frequency

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        mu = scores.clone()
        for row, ids in enumerate(input_ids[:, self.prompt_length :].tolist()):
            for j in set(ids):
                c = ids.count(j)
                mu[row, j] = mu[row, j] - c * self.frequency - float(c > 0) * self.presence
        return mu


def transformers_settings(options: Json, words: list[list[int]]) -> Json:
    """Translate fastgpt2's options of a request into transformers' fields of a generation configuration."""
    same = ("repetition_penalty", "no_repeat_ngram_size", "suppress_tokens", "min_new_tokens", *DRAWING)
    given = {name: options[name] for name in same if name in options}
    if words:
        given["bad_words_ids"] = words
    if "logit_bias" in options:
        given["sequence_bias"] = [[[int(key)], float(bias)] for key, bias in options["logit_bias"].items()]
    return given


def own_penalties(options: Json, prompt_length: int) -> LogitsProcessorList:
    presence, frequency = options.get("presence_penalty", 0.0), options.get("frequency_penalty", 0.0)
    made = [OpenAIPenalties(prompt_length, presence, frequency)] if presence or frequency else []
    return LogitsProcessorList(made)


def process(model: GPT2LMHeadModel, case: Json, row: torch.Tensor) -> torch.Tensor:
    """Return the scores [vocab_size] that transformers makes of a row."""
    options = case["options"]
    settings = transformers_settings(options, options.get("bad_words", []))
    drawn = any(name in options for name in DRAWING)
    # None in place of defaults that shape a draw.
    plain = dict.fromkeys(DRAWING)
    config = GenerationConfig(**{**plain, **settings}, do_sample=drawn, eos_token_id=list(ENDS))
    model._prepare_special_tokens(config, device="cpu")
    ids = torch.tensor([case["prompt"] + case["text"]])
    processors = model._get_logits_processor(
        config,
        input_ids_seq_length=len(case["prompt"]),
        encoder_input_ids=ids,
        logits_processor=own_penalties(options, len(case["prompt"])),
        device="cpu",
        model_kwargs={"attention_mask": torch.ones_like(ids)},
    )
    return processors(ids, row[None])[0]


def survivors_in_float64(scores: np.ndarray, options: Json, nudge: float) -> np.ndarray:
    """Return which tokens a draw is among, in float64; limits are moved by `nudge`."""
    scores = scores / float(options.get("temperature") or 1.0)
    left = np.isfinite(scores)
    if options.get("top_k"):
        limit = np.sort(scores)[-min(options["top_k"], len(scores))]
        left &= scores >= limit
    if options.get("top_p", 1.0) < 1.0:
        order = np.argsort(np.where(left, scores, -np.inf), kind="stable")
        below = np.cumsum(_softmax(scores, left)[order]) <= 1.0 - options["top_p"] + nudge
        below[-1] = False
        left[order[below]] = False
    if options.get("min_p"):
        probabilities = _softmax(scores, left)
        left &= probabilities >= options["min_p"] * probabilities.max() * (1.0 + nudge)
    if options.get("typical_p", 1.0) < 1.0:
        probabilities = _softmax(scores, left)
        highest = scores[left].max()
        surprise = highest + np.log(np.exp(scores[left] - highest).sum()) - scores
        entropy = (surprise[left] * probabilities[left]).sum()
        distance = np.where(left, np.abs(surprise - entropy), np.inf)
        order = np.argsort(distance, kind="stable")
        last = min(int((np.cumsum(probabilities[order]) < options["typical_p"] + nudge).sum()), left.sum() - 1)
        left &= distance <= distance[order[last]] + abs(nudge)
    return left


def _softmax(scores: np.ndarray, left: np.ndarray) -> np.ndarray:
    raised = np.where(left, np.exp(scores - scores[left].max()), 0.0)
    return raised / raised.sum()


def is_firm(scores: np.ndarray, kept: np.ndarray, options: Json) -> bool:
    """Tell whether rounding cannot change who survives, and no survivor's equal is left out.

    Args:
        scores: before a draw's rules, in float32.
        kept: which tokens transformers has left.
    """
    wide = scores.astype(np.float64)
    # A limit of min_p that is 1 is the likeliest token itself.
    nudges = (0.0,) if options.get("min_p") == 1.0 else (-ROUNDING, 0.0, ROUNDING)
    if not all(np.array_equal(survivors_in_float64(wide, options, nudge), kept) for nudge in nudges):
        return False
    out = np.isfinite(scores) & ~kept
    return not np.isin(scores[out], scores[kept]).any()


# ---------------------------------------------------------------------------------------------- the cases


def context(dice: random.Random, vocab_size: int, length: int) -> list[int]:
    """Return tokens of few kinds, so that they repeat one another, some of them twice in a row."""
    few = dice.sample(range(vocab_size), 5)
    return [dice.choice(few) for _ in range(length)]


def penalties(dice: random.Random, vocab_size: int, ids: list[int]) -> Iterator[tuple[str, Json]]:
    """Yield options that change scores, each under a name.

    Args:
        ids: the prompt's tokens and the text's.
    """
    end, last, other = ENDS[0], ids[-1], dice.randrange(vocab_size)
    for penalty in (0.5, 1.0, 1.2, 7.5):
        yield f"repetition_penalty {penalty}", {"repetition_penalty": penalty}
    for size in (1, 2, 3, 4, 100):
        yield f"no_repeat_ngram_size {size}", {"no_repeat_ngram_size": size}
    words = {
        "one token": [[other]],
        "the end": [[end]],
        "the end and others": [[end], [other], [last]],
        "ends with the end": [[last, end]],
        "two tokens": [[last, other], [other, last]],
        "three tokens": [[*ids[-2:], other], [other, last, 7], [*ids[-2:], 9]],
        "the whole context before": [[*ids, other]],
        "longer than the context": [[1, *ids, other]],
        "the same last token twice": [[last, other], [*ids[-2:], other], [other]],
        "the same word twice": [[last, other], [last, other]],
    }
    for name, bad in words.items():
        yield f"bad_words: {name}", {"bad_words": bad}
    yield "suppress_tokens", {"suppress_tokens": dice.sample(range(vocab_size), 9)}
    yield "suppress_tokens: the end", {"suppress_tokens": [end, other, other]}
    biased = dice.sample(range(vocab_size), 6)
    values = (100.0, -100.0, 0.5, -1.25, 3.7, 0.0)
    yield "logit_bias", {"logit_bias": {str(key): bias for key, bias in zip(biased, values, strict=True)}}
    yield "min_new_tokens, not reached", {"min_new_tokens": 50}
    yield "min_new_tokens, reached", {"min_new_tokens": 1}
    for name, presence, frequency in (("both", 0.6, 0.35), ("one", 1.7, 0.0), ("other", 0.0, 2.0), ("below", -1, -0.8)):
        yield f"penalties of OpenAI: {name}", {"presence_penalty": presence, "frequency_penalty": frequency}
    for number in range(3):
        yield f"all together {number}", all_penalties(dice, vocab_size, ids)


def all_penalties(dice: random.Random, vocab_size: int, ids: list[int]) -> Json:
    return {
        "repetition_penalty": dice.choice((0.8, 1.1, 1.3)),
        "no_repeat_ngram_size": dice.choice((1, 2, 3)),
        "presence_penalty": dice.choice((0.4, -0.3)),
        "frequency_penalty": dice.choice((0.2, -0.1)),
        "logit_bias": {str(key): dice.uniform(-5, 5) for key in [*ids[-3:], dice.randrange(vocab_size)]},
        "bad_words": [[dice.randrange(vocab_size)], [ids[-1], dice.randrange(vocab_size)]],
        "suppress_tokens": dice.sample(range(vocab_size), 3),
        "min_new_tokens": dice.choice((1, 40)),
    }


def draws() -> Iterator[tuple[str, Json]]:
    """Yield options that shape a draw, each under a name."""
    alone: dict[str, tuple[float, ...]] = {
        "temperature": (0.1, 0.7, 1.0, 1.9),
        "top_k": (1, 2, 5, 50, SMALL, SMALL + 100),
        "top_p": (0.0, 1e-4, 0.1, 0.5, 0.9, 0.95, 1.0),
        "min_p": (0.0, 0.01, 0.1, 0.5, 1.0),
        "typical_p": (0.05, 0.5, 0.9, 0.95, 0.999),
    }
    for name, values in alone.items():
        for value in values:
            yield f"{name} {value}", {name: value}
    yield "top_k, top_p", {"temperature": 0.8, "top_k": 20, "top_p": 0.9}
    yield "top_p, min_p", {"temperature": 1.3, "top_p": 0.95, "min_p": 0.05}
    yield "top_k, typical_p", {"temperature": 1.1, "top_k": 40, "typical_p": 0.7}
    yield "all rules", {"temperature": 1.2, "top_k": 60, "top_p": 0.95, "min_p": 0.02, "typical_p": 0.9}


def cases() -> Iterator[Json]:
    """Yield the cases, each with a seed for its row that may still have to be changed."""
    dice = random.Random(18)
    for number, kind in enumerate((*KINDS, "model 0")):
        size = MIDDLE if kind == "negative" else SMALL
        size = 0 if kind.startswith("model") else size
        prompt, text = context(dice, size or SMALL, 9), context(dice, size or SMALL, 7)
        text[-1] = prompt[3]
        for name, options in penalties(dice, size or SMALL, prompt + text):
            row = [kind, size, 100 + number if size else 0]
            yield {"name": name, "row": row, "prompt": prompt, "text": text, "options": options}
    # The borders of contexts.
    for prompt, text in (([7], []), ([7, 7], []), ([7], [7]), (context(dice, SMALL, 130), context(dice, SMALL, 110))):
        for name, options in penalties(dice, SMALL, prompt + text):
            if "three" not in name or len(prompt + text) > 1:
                name = f"{len(prompt)} and {len(text)} tokens: {name}"
                yield {"name": name, "row": ["normal", SMALL, 3], "prompt": prompt, "text": text, "options": options}
    for kind in (*KINDS, "model 0", "model 1"):
        size = 0 if kind.startswith("model") else SMALL
        for name, options in draws():
            yield {"name": name, "row": [kind, size, 1000], "prompt": [3], "text": [], "options": options}
    # Penalties and rules of a draw together.
    for number in range(40):
        kind = (*KINDS, "model 1")[number % (len(KINDS) + 1)]
        size = 0 if kind.startswith("model") else SMALL
        prompt, text = context(dice, SMALL, 12), context(dice, SMALL, 12)
        rules = {
            "temperature": dice.choice((0.6, 0.9, 1.4)),
            "top_k": dice.choice((0, 10, 60)),
            "top_p": dice.choice((0.7, 0.95, 1.0)),
            "min_p": dice.choice((0.0, 0.02)),
            "typical_p": dice.choice((0.8, 0.95, 1.0)),
        }
        options = {**all_penalties(dice, SMALL, prompt + text), **rules}
        yield {"name": f"all {number}", "row": [kind, size, 2000], "prompt": prompt, "text": text, "options": options}
    for kind in ("normal", "peaked"):
        prompt, text = context(dice, LARGE, 300), context(dice, LARGE, 60)
        rules = {"temperature": 0.8, "top_k": 200, "top_p": 0.9}
        for name, options in (
            ("penalties", all_penalties(dice, LARGE, prompt + text)),
            ("rules", {"temperature": 0.7, "top_p": 0.95}),
            ("typical_p", {"temperature": 0.7, "typical_p": 0.6}),
            ("min_p", {"min_p": 0.1}),
            ("both", {**all_penalties(dice, LARGE, prompt + text), **rules}),
        ):
            row = [kind, LARGE, 3000]
            yield {"name": f"large: {name}", "row": row, "prompt": prompt, "text": text, "options": options}


def answer(model: GPT2LMHeadModel, case: Json, model_rows: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the ids that a case leaves and their scores, and set the seed of its row to one that suits.

    None for a row of the model, which has no seed, if rounding decides who survives.
    """
    options, (kind, size, first_seed) = case["options"], case["row"]
    drawn = any(name in options for name in DRAWING)
    for seed in range(first_seed, first_seed + MOST_SEEDS):
        row = make_row(kind, size, seed) if size else model_rows[int(kind.split()[1])]
        given = torch.from_numpy(row.astype(np.float32))
        scores = process(model, case, given.clone()).numpy()
        kept = np.isfinite(scores)
        if drawn:
            before = {name: value for name, value in options.items() if name not in DRAWING}
            scaled = process(model, {**case, "options": before}, given.clone()).numpy()
            if not is_firm(scaled, kept, options):
                continue
        case["row"] = [kind, size, seed]
        ids = np.flatnonzero(kept).astype("<i4")
        return ids, scores[ids].astype("<f4")
    if not size:
        return None
    raise SystemExit(f"{case['name']} of {kind}: no seed suits")


def in_part(case: Json, ids: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return of a large case what is stored, and note what identifies the rest."""
    case |= {"left": len(ids), "sha256": hashlib.sha256(ids.tobytes()).hexdigest()}
    likeliest = ids[np.argsort(-scores, kind="stable")][:MOST_KEPT_OF_LARGE].tolist()
    named = [*case["prompt"], *case["text"], *map(int, case["options"].get("logit_bias", {}))]
    chosen = np.isin(ids, [*likeliest, *named])
    return ids[chosen], scores[chosen]


def make_cases(rows: np.ndarray) -> tuple[list[Json], list[np.ndarray], list[np.ndarray]]:
    """Return the cases, the ids that are left by each, and their scores."""
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=4, n_positions=8, vocab_size=8))
    made, all_ids, all_scores = [], [], []
    for case in cases():
        found = answer(model, case, rows)
        if found is None:
            print(f"left out: {case['name']} of {case['row'][0]}")
            continue
        ids, scores = found
        if case["row"][1] == LARGE:
            ids, scores = in_part(case, ids, scores)
        case["count"] = len(ids)
        made.append(case)
        all_ids.append(ids)
        all_scores.append(scores)
    return made, all_ids, all_scores


def number_contexts(made: list[Json]) -> list[Any]:
    """Return the contexts of all cases, each once, and put the number of its own in place of each case's tokens."""
    contexts: list[Any] = []
    for case in made:
        one = [case.pop("prompt"), case.pop("text")]
        if one not in contexts:
            contexts.append(one)
        case["context"] = contexts.index(one)
    return contexts


# ------------------------------------------------------------------------------------------------ the texts


DEMO_PROMPTS = (
    "My name is",
    "Sherlock Holmes",
    "“My dear Watson,” said he,",
    "It was a cold morning",
    "KING RICHARD III:\n",
    "First Citizen:\n",
    "What light",
    "The man who was the first man to see the man who was",
    "O my lord, O my lord, O my",
    "He rose from his chair",
    "The king is dead",
    "She was a tall woman",
    "Once upon a time",
    "I pray thee, I pray",
    "There was no doubt that",
    "We drove through the streets of London",
    "His eyes were",
    "The bell rang",
)
LEAST_PROMPTS = 10


def text_options(met: list[int], vocab_size: int) -> dict[str, Json]:
    """Return options under names; `met` are the tokens of the plain continuation."""
    often = max(met, key=met.count)
    return {
        "plain": {},
        "repetition_penalty": {"repetition_penalty": 1.3},
        "repetition_penalty, weak": {"repetition_penalty": 1.05},
        "no_repeat_ngram_size 1": {"no_repeat_ngram_size": 1},
        "no_repeat_ngram_size 2": {"no_repeat_ngram_size": 2},
        "no_repeat_ngram_size 3": {"no_repeat_ngram_size": 3},
        "bad_words": {"bad_words": [[met[1]], [met[2], met[3]], met[4:8], [often]]},
        "suppress_tokens": {"suppress_tokens": [met[0], met[5]]},
        "logit_bias": {"logit_bias": {str(met[2]): -2.5, str((met[3] + 11) % vocab_size): 2.0}},
        "presence_penalty": {"presence_penalty": 1.5},
        "frequency_penalty": {"frequency_penalty": 0.8},
        "min_new_tokens": {"min_new_tokens": 12, "ends": [met[2], met[6]]},
        "all": {
            "repetition_penalty": 1.15,
            "no_repeat_ngram_size": 3,
            "bad_words": [[met[1]], [met[2], met[3]]],
            "suppress_tokens": [met[5]],
            "logit_bias": {str(met[4]): 1.0},
            "presence_penalty": 0.2,
            "frequency_penalty": 0.1,
            "min_new_tokens": 9,
            "ends": [met[7], met[8]],
        },
    }


WORDS = ("the", "my", "of", "I", "and")


@torch.no_grad()
def generate(model: Any, ids: list[int], options: Json, words: list[list[int]]) -> tuple[list[int], float]:
    """Return the tokens of `generate`, and by how much each is ahead of the second at least."""
    settings = transformers_settings(options, words)
    given = torch.tensor([ids])
    output = model.generate(
        given,
        attention_mask=torch.ones_like(given),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=options.get("ends"),
        pad_token_id=0,
        logits_processor=own_penalties(options, len(ids)),
        return_dict_in_generate=True,
        output_scores=True,
        **settings,
    )
    gaps = [float(top[0] - top[1]) for top in (scores[0].topk(2).values for scores in output.scores)]
    return output.sequences[0, len(ids) :].tolist(), min(gaps)


def make_texts(name: str, folder: Path, prompts: dict[str, list[int]], tokenizer: Tokenizer | None) -> list[Json]:
    """Return the texts of a model: those without a near tie.

    Args:
        prompts: texts with their ids.
        tokenizer: for bad words that are given as strings; None leaves these out.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    model.generation_config = GenerationConfig()
    entries, left_out = [], 0
    for prompt, ids in prompts.items():
        met, _ = generate(model, ids, {}, [])
        kinds = text_options(met, model.config.vocab_size)
        if tokenizer is not None:
            kinds["bad_words as strings"] = {"bad_words": list(WORDS)}
        for kind, options in kinds.items():
            words = options.get("bad_words", [])
            if words and isinstance(words[0], str):
                assert tokenizer is not None
                words = [tokenizer.encode(space + word).ids for word in words for space in ("", " ")]
            new, gap = generate(model, ids, options, words)
            if gap < NEAR_TIE:
                left_out += 1
                continue
            entries.append({"model": name, "prompt": prompt, "ids": ids, "kind": kind, "options": options, "new": new})
    asked = {entry["prompt"] for entry in entries}
    changed = sum(entry["new"] != plain_of(entries, entry) for entry in entries)
    print(f"{name}: {len(entries)} texts after {len(asked)} prompts, {changed} unlike plain; {left_out} near ties")
    for kind in {entry["kind"] for entry in entries}:
        if name == "demo" and sum(entry["kind"] == kind for entry in entries) < LEAST_PROMPTS:
            raise SystemExit(f"{kind}: fewer than {LEAST_PROMPTS} prompts without a near tie")
    return entries


def plain_of(entries: list[Json], entry: Json) -> list[int]:
    found = [one["new"] for one in entries if (one["prompt"], one["kind"]) == (entry["prompt"], "plain")]
    return found[0] if found else []


# ------------------------------------------------------------------------------------------------- together


@torch.no_grad()
def scores_of(folder: Path, tokenizer: Tokenizer) -> np.ndarray:
    """Return rows of the model's own scores float16 [2, vocab_size], rounded so that they are small to store."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    texts = ("Sherlock Holmes", "KING RICHARD III:\nMy gracious")
    rows = [model(torch.tensor([tokenizer.encode(text).ids])).logits[0, -1] for text in texts]
    return torch.stack(rows).numpy().astype("<f2")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    folder: Path = parser.parse_args().model.resolve()
    warnings.filterwarnings("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rows = scores_of(folder, tokenizer)
    made, ids, scores = make_cases(rows)
    contexts = number_contexts(made)
    texts = make_texts("demo", folder, {prompt: tokenizer.encode(prompt).ids for prompt in DEMO_PROMPTS}, tokenizer)
    asked = json.loads((HERE / "zoo/meta.json").read_text("utf-8"))[ZOO_KIND]["prompts"]
    answers = json.loads((HERE / "zoo/answers.json").read_text("utf-8"))[ZOO_KIND]["prompts"]
    prompts = {asked[key]: found["ids"] for key, found in answers.items() if found.get("ids")}
    texts += make_texts(ZOO_KIND, HERE / "zoo" / ZOO_KIND, prompts, None)
    arrays = {"ids": np.concatenate(ids), "scores": np.concatenate(scores), "rows": rows}
    np.savez_compressed(HERE / "processors.npz", **arrays)
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    with (HERE / "processors.json").open("w", encoding="ascii", newline="\n") as file:
        file.write(f'{{"model_sha256": "{digest}",\n"transformers": "{transformers.__version__}",\n')
        file.write(f'"ends": {json.dumps(ENDS)},\n"contexts": [\n')
        file.write(",\n".join(json.dumps(one) for one in contexts) + '\n],\n"cases": [\n')
        file.write(",\n".join(json.dumps(case) for case in made))
        file.write('\n],\n"texts": [\n' + ",\n".join(json.dumps(entry) for entry in texts) + "\n]}\n")
    sizes = [(HERE / f"processors.{end}").stat().st_size for end in ("json", "npz")]
    print(f"{len(made)} cases, {len(texts)} texts, {sizes} bytes")


if __name__ == "__main__":
    main()
