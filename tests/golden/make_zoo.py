# The oracle libraries are absent from the environment that checks the types, or carry no types themselves.
# mypy: disable-error-code="import-not-found,import-untyped,no-any-return,no-untyped-call"
"""Build the zoo: small models, each of which looks as one kind of public GPT-2 repository, and what transformers says.

It runs where torch, transformers, tokenizers, safetensors and sentencepiece are:

    oracle/bin/python tests/golden/make_zoo.py                  # tests/golden/zoo: the kinds that tests try, tiny
    oracle/bin/python tests/golden/make_zoo.py FOLDER --full    # all kinds, with GPT-2's own tokenizer
    oracle/bin/python tests/golden/make_zoo.py FOLDER --full --only rinna gpt-sw3

Each kind is a folder with true kinds of files, names and oddities, and random weights. Beside the folders stand

meta.json      of each kind: `repos` that look so, the `prompts`, and what fastgpt2 must say: parts of the sentence with
               which it refuses the kind (`refused`), parts of the notes when it loads it (`notes`)
answers.json   what transformers answers; tools/ask_transformers.py describes the fields. The small zoo keeps of a
               prompt `ids`, `start_ids`, `new` and `text` (there: the text of prompt and tokens, less the prompt's)

transformers cannot read some kinds as their makers meant them (prefixed names, nanoGPT's file). There a twin is asked,
which holds the same weights under the names that transformers knows; the answers say so (`twin`).

The same versions build the same files again, but for those in torch's old format, which name storages by addresses.
Weights are drawn again, from the next seed, until every token is 1e-3 ahead of the second and the tokens that a kind
wants to see (the end of a text, say) come up.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

# These are imported for the kinds that they register.
import zoo_byte_level  # noqa: F401
import zoo_refusals  # noqa: F401
import zoo_sentencepiece  # noqa: F401
import zoo_weights  # noqa: F401
import zoo_words  # noqa: F401
from zoo_pieces import FULL, HERE, KINDS, SMALL, Box, Json, Kind, Size

sys.path.append(str(HERE.parents[1] / "tools"))
from ask_transformers import ask

LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "sentencepiece")
NEW_TOKENS = 20
LEAST_MARGIN = 1e-3
MOST_SEEDS = 40
# Where in an answer a token is taken whose place another one shall have: early, and not at the very beginning.
PLACE = 4
KEPT_OF_SMALL = ("ids", "start_ids", "new")


def make(kind: Kind, root: Path, size: Size) -> Json:
    """Build the folder of a kind, with weights of a seed that suits, and return transformers' answers."""
    first_seed = sum(kind.name.encode())
    for seed in range(first_seed, first_seed + MOST_SEEDS):
        box, answers = build(kind, root, size, seed, [])
        wanted = [size.eot + int(w[3:] or 0) if isinstance(w, str) else w for w in kind.occur]
        if wanted and "prompts" in answers:
            prompts = [p for p in answers["prompts"].values() if len(p.get("new", ())) > PLACE]
            if not prompts:
                continue
            swaps = [(w, prompts[n % len(prompts)]["new"][PLACE]) for n, w in enumerate(wanted)]
            box, answers = build(kind, root, size, seed, swaps)
        if box.reference is not None:
            answers["twin"] = True
            shutil.rmtree(box.reference.folder)
        if suits(answers, wanted):
            return answers
    raise SystemExit(f"{kind.name}: no seed suits; the last answers: {json.dumps(answers)[:2000]}")


def build(kind: Kind, root: Path, size: Size, seed: int, swaps: list[tuple[int, int]]) -> tuple[Box, Json]:
    folder = root / kind.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    box = Box(folder, size, seed, swaps)
    kind.build(box)
    asked = box.reference or box
    return box, ask(str(asked.folder), kind.prompts, NEW_TOKENS)


def suits(answers: Json, wanted: list[int]) -> bool:
    """Tell whether each greedy token is clearly the likeliest, all wanted tokens come up, and there is some variety."""
    if "prompts" not in answers:
        return True
    prompts = [prompt for prompt in answers["prompts"].values() if "error" not in prompt]
    margins = [margin for prompt in prompts for margin in prompt.get("plain_near", prompt["near"])]
    seen = [token for prompt in prompts for token in prompt["new"]]
    # Most answers go on for some tokens, and are no loops.
    rich = len(set(seen)) >= 2 * len(prompts) and 2 * sum(len(p["new"]) > PLACE for p in prompts) > len(prompts)
    return all(margin > LEAST_MARGIN for margin in margins) and set(seen).issuperset(wanted) and rich


def in_small(kind: Kind, answers: Json) -> Json:
    """Return of the answers what tests compare."""
    kept: Json = {k: answers[k] for k in ("tokenizer_class", "twin") if k in answers}
    # Their messages name the folder.
    kept |= {k: answers[k].partition(":")[0] for k in ("tokenizer_error", "model_error") if k in answers}
    # For weights that it lacks, transformers takes random ones.
    if "prompts" in answers and not kind.refused:
        kept["prompts"] = {name: _prompt_in_small(answer) for name, answer in answers["prompts"].items()}
    return kept


def _prompt_in_small(answer: Json) -> Json:
    if "error" in answer:
        return {"error": answer["error"].partition(":")[0]}
    kept: Json = {name: answer[name] for name in KEPT_OF_SMALL} | {"text": answer["full_minus_prompt"]}
    if not answer["greedy"]:
        kept |= {"new": answer["plain"], "text": answer["plain_text"]}
        if answer["plain"] != answer["new"]:
            kept["with_its_settings"] = answer["new"]
    if kept["start_ids"] == kept["ids"]:
        del kept["start_ids"]
    return kept


def write(path: Path, value: dict[str, Any], lines: bool) -> None:
    """Write JSON, one kind a line if it stands in the repository."""
    if lines:
        rows = [f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in value.items()]
        path.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
    else:
        path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=HERE / "zoo")
    parser.add_argument("--full", action="store_true", help="all kinds, with GPT-2's own tokenizer")
    parser.add_argument("--only", nargs="+", metavar="KIND", help="build these again, and keep the others")
    options = parser.parse_args()
    kinds = {name: kind for name, kind in KINDS.items() if options.full or kind.small}
    root, size = options.folder, FULL if options.full else SMALL
    root.mkdir(parents=True, exist_ok=True)
    answers: dict[str, Any] = {}
    if options.only:
        answers = json.loads((root / "answers.json").read_text("utf-8"))
    for name in options.only or kinds:
        answer = make(kinds[name], root, size)
        answers[name] = answer if options.full else in_small(kinds[name], answer)
        print(name, answer.get("tokenizer_error") or answer.get("model_error") or "", flush=True)
    for folder in root.iterdir():
        if folder.is_dir() and folder.name not in kinds:
            shutil.rmtree(folder)
    meta = {
        name: {"repos": kind.repos, "prompts": kind.prompts, "refused": kind.refused, "notes": kind.notes}
        for name, kind in kinds.items()
    }
    write(root / "meta.json", meta, not options.full)
    write(root / "answers.json", {name: answers[name] for name in kinds if name in answers}, not options.full)
    versions = [f"python {platform.python_version()}", *(f"{name} {version(name)}" for name in LIBRARIES)]
    (root / "VERSIONS.txt").write_text("\n".join(versions) + "\n")
    print(len(kinds), "kinds in", root)


if __name__ == "__main__":
    main()
