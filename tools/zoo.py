#!/usr/bin/env python3
"""Compare fastgpt2 with transformers on models of yours: prompt ids, greedy tokens, text.

    python tools/zoo.py check gpt2 path/to/a/model          # a folder, or a hub id
    python tools/zoo.py check model --prompts prompts.txt   # a prompt in each line; .json: a list of texts
    python tools/zoo.py build FOLDER                        # small models of all kinds that are known, to check them

transformers and torch run in an environment of their own, which is made once in the cache folder (about 1 GB) and used
again; --python names one that exists. For each model it prints `equal`, or where the two first differ. A difference
where transformers' two best logits lie nearer than 1e-3 is rounding, and is said to be a near tie. A model whose
generation_config.json asks for what fastgpt2 does not apply (beams, say) is compared without that, and the line says
so.

Exit status: 0 if all models are equal, up to near ties; 1 if one differs or is refused; 2 if nothing could be asked.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgpt2 import Engine, FastGPT2Error
from fastgpt2.engine.machine import cache_folder
from fastgpt2.engine.model.hub import find_model

HERE = Path(__file__).resolve().parent
ASK = HERE / "ask_transformers.py"
MAKE_ZOO = HERE.parent / "tests" / "golden" / "make_zoo.py"

# On Linux, torch from PyPI brings gigabytes for GPUs.
TORCH_FOR_CPUS = ("torch", "--index-url", "https://download.pytorch.org/whl/cpu", "--retries", "1", "--timeout", "30")
PACKAGES = ("torch", "transformers>=5", "tokenizers", "safetensors", "sentencepiece", "protobuf", "tiktoken")

NEAR_TIE = 1e-3
PROMPTS = {
    "words": "Hello, my name is",
    "languages": "Über München: 今日は, 안녕, привет, où",
    "emoji": "I am happy 😀🎉👍🏽 today",
    "spaces": " Two  spaces,\n\ta tab ﬁ ① don't é ",
    "end of text": "<|endoftext|>Once upon a time</s>",
    "empty": "",
}

# Settings of generation that change nothing where the likeliest token is taken, and those that fastgpt2 applies.
WITHOUT_EFFECT = frozenset({
    "_from_model_config", "bad_words_ids", "bos_token_id", "do_sample", "eos_token_id", "max_length", "max_new_tokens",
    "min_length", "min_new_tokens", "min_p", "no_repeat_ngram_size", "pad_token_id", "renormalize_logits",
    "repetition_penalty", "suppress_tokens", "temperature", "top_k", "top_p", "transformers_version", "typical_p",
})  # fmt: skip

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result for a model: `equal`, `differs`, `refused` or `not asked`, and the lines that say more."""

    model: str
    outcome: str
    lines: tuple[str, ...] = ()


class CannotAsk(Exception):
    """transformers could not be asked at all."""


def check(models: list[str], prompts: dict[str, str], tokens: int, python: Path) -> int:
    """Compare models, print what comes out, and return the exit status."""
    verdicts = []
    for model in models:
        try:
            verdict = compare(model, prompts, tokens, python)
        except CannotAsk as reason:
            verdict = Verdict(model, "not asked", (str(reason),))
        verdicts.append(verdict)
        print(f"{model}: {verdict.outcome}", *verdict.lines, sep="\n    ", flush=True)
    if len(verdicts) > 1:
        width = max(len(verdict.model) for verdict in verdicts)
        print("\n" + "\n".join(f"{verdict.model:{width}}  {verdict.outcome}" for verdict in verdicts))
    outcomes = {verdict.outcome for verdict in verdicts}
    if "not asked" in outcomes:
        return 2
    return int(outcomes != {"equal"})


def compare(model: str, prompts: dict[str, str], tokens: int, python: Path) -> Verdict:
    """Load a model on both sides, and compare what they make of the prompts."""
    engine: Engine | None = None
    ours, asked = "", model
    try:
        asked = os.fspath(find_model(model).resolve())
        engine = Engine.load(model)
    except FastGPT2Error as reason:
        ours = str(reason)
    answer = ask(asked, prompts, tokens, python)
    theirs = answer.get("model_error") or answer.get("tokenizer_error")
    if engine is None or theirs:
        said = (f"fastgpt2: {ours or 'serves it'}", f"transformers: {theirs or 'serves it'}")
        return Verdict(model, "refused", said)
    findings = [compare_prompt(engine, name, said, tokens) for name, said in answer["prompts"].items()]
    lines = [line for _, found in findings for line in found]
    if any(said.get("plain", said.get("new")) != said.get("new") for said in answer["prompts"].values()):
        settings = {k: v for k, v in answer["generation_config"].items() if k not in WITHOUT_EFFECT}
        asks_for = ", ".join(f"{name} {value}" for name, value in settings.items())
        lines.append(f"note: generation_config.json asks transformers for {asks_for}; where fastgpt2 does not apply")
        lines.append("    that, it is compared with what transformers gives without")
    lines += [f"note: {note}" for note in engine.notes]
    return Verdict(model, "equal" if all(equal for equal, _ in findings) else "differs", tuple(lines))


def ask(model: str, prompts: dict[str, str], tokens: int, python: Path) -> Json:
    """Return what transformers says; see tools/ask_transformers.py."""
    question = json.dumps({"model": model, "prompts": prompts, "tokens": tokens})
    try:
        run = subprocess.run([python, ASK], input=question, capture_output=True, text=True, check=False)
    except OSError as reason:
        raise CannotAsk(f"{python} cannot be run ({reason})") from None
    if run.returncode:
        raise CannotAsk(f"{python} failed: {run.stderr.strip()[-600:]}")
    return dict(json.loads(run.stdout))


def compare_prompt(engine: Engine, name: str, said: Json, tokens: int) -> tuple[bool, list[str]]:
    """Tell whether a prompt's ids, tokens and text are equal, and what there is to say."""
    prompt = f"prompt {name!r}, {said['prompt']!r}"
    if "error" in said:
        return True, [f"{prompt}: not compared, as transformers says {said['error']}"]
    ids = engine.tokenizer.encode(said["prompt"])
    if ids != said["ids"]:
        return False, [f"{prompt}: its ids are {ids} for fastgpt2", f"    and {said['ids']} for transformers"]
    try:
        (result,) = engine.generate([str(said["prompt"])], max_new_tokens=tokens)
    except FastGPT2Error as reason:
        return False, [f"{prompt}: fastgpt2 says {reason}"]
    new = list(result.token_ids)
    expected, text, near = said["new"], said["full_minus_prompt"], said["near"]
    if new != expected and "plain" in said:
        expected, text, near = said["plain"], said["plain_text"], said["plain_near"]
    place = next((n for n, pair in enumerate(zip(new, expected, strict=False)) if pair[0] != pair[1]), None)
    if place is None and len(new) != len(expected):
        place = min(len(new), len(expected))
    if place is not None:
        tie = place < len(near) and near[place] < NEAR_TIE
        remark = f"{prompt}: token {place + 1} is {_token(engine, new, place)} for fastgpt2, "
        remark += f"{_token(engine, expected, place)} for transformers"
        remark += f", whose two best logits differ by {near[place]:.2g}" if place < len(near) else ""
        remark += ": a near tie" if tie else ""
        return tie, [remark, f"    the prompt's ids: {ids}"]
    if result.text != text:
        return False, [f"{prompt}: the text is {result.text!r} for fastgpt2",
                       f"    and {text!r} for transformers, of the same tokens {new}"]  # fmt: skip
    return True, []


def _token(engine: Engine, ids: list[int], place: int) -> str:
    return f"{ids[place]} {engine.tokenizer.token_text(ids[place])!r}" if place < len(ids) else "none"


def read_prompts(path: Path) -> dict[str, str]:
    """Return the prompts of a file: a JSON list of texts, or a text in each line."""
    text = path.read_text("utf-8")
    texts = json.loads(text) if path.suffix == ".json" else text.splitlines()
    if not isinstance(texts, list) or not texts or not all(isinstance(prompt, str) for prompt in texts):
        raise ValueError("it holds no list of texts")
    return {str(n): prompt for n, prompt in enumerate(texts, 1)}


def make_environment(folder: Path) -> Path:
    """Return the Python of the environment that asks transformers, making it if there is none."""
    python = folder / "bin" / "python"
    finished = folder / "finished"
    if not finished.exists():
        print(f"making an environment with {', '.join(PACKAGES)} in {folder}: some minutes, once", file=sys.stderr)
        venv.create(folder, clear=True, with_pip=True)
        for packages in (TORCH_FOR_CPUS, PACKAGES):
            command = [str(python), "-m", "pip", "install", "--quiet", *packages]
            if subprocess.run(command, check=False).returncode:
                raise CannotAsk(f"{folder}: pip could not install {packages[0]}; name an environment with --python")
        finished.touch()
    return python


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--python", type=Path, help="the Python of an environment with torch and transformers")
    common.add_argument(
        "--environment", type=Path, default=cache_folder() / "transformers",
        help="where the environment is made without --python (default: %(default)s)",
    )  # fmt: skip
    checking = commands.add_parser("check", parents=[common], help="compare fastgpt2 with transformers on models")
    checking.add_argument("models", nargs="+", metavar="MODEL", help="a folder, or a hub id")
    checking.add_argument("--prompts", type=Path, help="a file with a prompt in each line, or a JSON list of texts")
    checking.add_argument("--tokens", type=int, default=20, help="tokens to generate (default: %(default)s)")
    building = commands.add_parser("build", parents=[common], help="build small models of all kinds that are known")
    building.add_argument("folder", type=Path)
    options = parser.parse_args()
    try:
        prompts = read_prompts(options.prompts) if options.command == "check" and options.prompts else PROMPTS
    except (OSError, ValueError) as reason:
        parser.error(f"{options.prompts}: {reason}")
    try:
        python = options.python or make_environment(options.environment)
    except (OSError, CannotAsk) as reason:
        print(reason, file=sys.stderr)
        return 2
    if options.command == "build":
        return subprocess.run([python, MAKE_ZOO, options.folder, "--full"], check=False).returncode
    return check(options.models, prompts, options.tokens, python)


if __name__ == "__main__":
    sys.exit(main())
