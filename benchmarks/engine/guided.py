#!/usr/bin/env python3
"""Guided texts: what grammars cost, by llguidance and by outlines-core, and what a guided step costs.

    pip install outlines-core                               # only for this comparison
    python benchmarks/engine/guided.py --model gpt2

Three tables. The first has what a library takes for the model's vocabulary, once, and then for some typical grammars:
to compile one, for the first mask, and for a mask of a text of random tokens that the grammar allows. "pause" is the
longest time for which another thread of Python was kept from running meanwhile. Each library has a process of its own,
in turns; one that is not installed is left out.

The second has hostile grammars, each in a process with --seconds of CPU and 2 GB: what the library takes for the
grammar and 40 tokens of a text, whether it came to an end ("done"), to a limit of its own ("refused"), or to that of
the process ("killed"), and how fastgpt2 ends such a job.

The third has the steps of one engine in which all of --batch sequences are guided, against greedy ones, in turns within
a round. The goal is a ratio of at most 1.10.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the clone's root, where `benchmarks` is

from benchmarks.common import (
    HELD_OUT_TEXT,
    Failed,
    begin,
    heading,
    in_turns,
    medians,
    parse,
    parser,
    ratio,
    run_json,
    write,
)
from benchmarks.engine.sampling import GREEDY, cells, time_steps
from fastgpt2.bench import Values, layout, layout_line, let_helpers_sleep, summary, table
from fastgpt2.errors import BadRequest

LIBRARIES = {"llguidance": "llguidance", "outlines-core": "outlines_core"}
MEGABYTES = 2048
TOKENS = 40
SEED = 18

_PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 5},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
_NAMES = [f"p{n}" for n in range(20)]
TYPICAL: dict[str, dict[str, Any]] = {
    "2 choices": {"choices": [" positive", " negative"]},
    "256 choices": {"choices": [f" number {n} of the choices" for n in range(256)]},
    "a date": {"regex": "[0-9]{4}-[0-9]{2}-[0-9]{2}"},
    "an address": {"regex": r"[a-z0-9._]{1,30}@[a-z0-9-]{1,30}\.[a-z]{2,8}"},
    "a small schema": {"json_schema": _PERSON},
    "a schema of 20 objects": {
        "json_schema": {
            "type": "object",
            "properties": dict.fromkeys(_NAMES, _PERSON),
            "required": _NAMES,
            "additionalProperties": False,
        }
    },
    "an enum of 2,000": {"json_schema": {"enum": [f"value {n}" for n in range(2000)]}},
}
HOSTILE: dict[str, dict[str, Any]] = {
    "(a{1,1000}){1,1000}": {"regex": "(a{1,1000}){1,1000}"},
    "(.*a){30}": {"regex": "(.*a){30}"},
    "(a*)*b": {"regex": "(a*)*b"},
    "(a|b)*a(a|b){20}": {"regex": "(a|b)*a(a|b){20}"},
    r"\w{1000}": {"regex": r"\w{1000}"},
    "a* 4,000 times": {"regex": "a*" * 4000},
    "minItems 10^9": {"json_schema": {"type": "array", "items": {"type": "string"}, "minItems": 10**9}},
    "3,000 properties": {"json_schema": {"type": "object", "properties": {f"p{n}": {} for n in range(3000)}}},
    "8 multipleOf": {"json_schema": {"anyOf": [{"type": "integer", "multipleOf": 900 + 7 * n} for n in range(8)]}},
    "600 patterns": {
        "json_schema": {
            "allOf": [{"type": "string", "pattern": f"{chr(97 + n % 26)}.*{chr(97 + n // 26)}"} for n in range(600)]
        }
    },
}
# Texts that are longer than what is timed.
STEPS: dict[str, dict[str, Any]] = {
    GREEDY: {},
    "regex": {"regex": r"[a-z ,.]+"},
    "regex with a count": {"regex": r"[a-z ,.]{900,}"},
    "json_schema": {"json_schema": {"type": "array", "items": _PERSON, "minItems": 200}},
    "any JSON": {"json_schema": {"type": "array", "minItems": 1000}},
}
QUICK = {"batch": 2, "steps": 2, "context": 8, "seconds": 1, "some": 1}


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(measure_library(json.loads(sys.argv[2]))))
        return
    arguments = parser(__doc__, rounds=9)
    arguments.add_argument("--threads", type=int, help="processes of the engine; default: all cores")
    arguments.add_argument("--batch", type=int, default=16, help="sequences; default: 16")
    arguments.add_argument("--steps", type=int, default=20, help="steps a turn; default: 20")
    arguments.add_argument("--context", type=int, default=64, help="tokens of each prompt; default: 64")
    arguments.add_argument("--seconds", type=int, default=20, help="CPU of a hostile grammar; default: 20")
    arguments.add_argument("--some", type=int, help="only this many grammars of each kind; default: all")
    asked = parse(arguments, QUICK)
    result = begin("guided", asked)
    result["models"] = [measure(model, asked) for model in asked.model]
    write(result, asked.output)


def measure(model: str, asked: argparse.Namespace) -> Values:
    """Return what the grammars cost for one model."""
    from fastgpt2.engine.engine import Engine
    from fastgpt2.engine.model.hub import find_folders

    engine = Engine.load(model, threads=asked.threads, max_batch=asked.batch, prefix_memory=0, drafts="off")
    engine.warm_up()
    heading(f"{model}: {layout_line(layout(engine.decoder.model))}")
    vocabulary = {"folder": str(find_folders(model)[1]), "vocab_size": engine.config.vocab_size}
    entry: Values = {
        "model": model,
        **layout(engine.decoder.model),
        "vocab_size": engine.config.vocab_size,
        "libraries": time_libraries(vocabulary, asked),
        "hostile": try_hostile(vocabulary, asked, engine),
        **time_guided_steps(engine, asked),
    }
    engine.decoder.model.close()
    for title, headers, rows in tables(entry):
        heading(title)
        print(table(headers, rows))
    return entry


def time_libraries(vocabulary: Values, asked: argparse.Namespace) -> Values:
    """Return what each library takes for the vocabulary and for typical grammars."""
    grammars = dict(list(TYPICAL.items())[: asked.some])
    found = in_turns({name: partial(ask, name, vocabulary, grammars) for name in installed()}, asked.rounds)
    kept = ("import_ms", "import_mb", "parts")
    return {name: medians([{key: run[key] for key in kept} for run in runs]) for name, runs in found.items()}


def installed() -> list[str]:
    return [name for name, module in LIBRARIES.items() if find_spec(module) is not None]


def ask(library: str, vocabulary: Values, grammars: Values, seconds: int = 0) -> Values:
    """Have a process of its own measure a library; raise Failed if it is ended, as it is after `seconds` of CPU."""
    order = {"library": library, **vocabulary, "grammars": grammars, "seconds": seconds}
    try:
        return run_json([sys.executable, __file__, "--child", json.dumps(order)], timeout=6.0 * (seconds or 100))[0]
    except subprocess.TimeoutExpired:
        raise Failed("took too long") from None


def try_hostile(vocabulary: Values, asked: argparse.Namespace, engine: Any) -> Values:
    """Return what comes of hostile grammars, in each library and here."""
    outcomes: Values = {}
    for title, guide in list(HOSTILE.items())[-(asked.some or 0) :]:
        outcomes[title] = {}
        for library in installed():
            try:
                found = ask(library, vocabulary, {title: guide}, asked.seconds)
                outcomes[title][library] = {"seconds": found["seconds"], "mb": found["mb"], "end": found["end"]}
            except Failed:
                outcomes[title][library] = {"seconds": float(asked.seconds), "mb": float(MEGABYTES), "end": "killed"}
        outcomes[title]["fastgpt2"] = serve(engine, guide)
    return outcomes


def serve(engine: Any, guide: Values) -> Values:
    """Return how a job with a hostile grammar ends."""
    started = perf_counter()
    try:
        end = str(engine.generate("The", max_new_tokens=TOKENS, **guide).finish_reason)
    except BadRequest:
        end = "refused"
    return {"seconds": perf_counter() - started, "end": end}


def time_guided_steps(engine: Any, asked: argparse.Namespace) -> Values:
    """Return the times of greedy and of guided steps."""
    ids = engine.tokenizer.encode(HELD_OUT_TEXT.read_text("utf-8"))[: asked.batch * asked.context]
    prompts = [tuple(ids[at : at + asked.context]) for at in range(0, len(ids), asked.context)]
    turns: dict[str, Callable[[], float]] = {
        kind: partial(time_steps, engine, prompts, asked.steps, guide) for kind, guide in STEPS.items()
    }
    for turn in turns.values():
        turn()  # not measured: memory is committed
    found = in_turns(turns, asked.rounds, between=let_helpers_sleep)
    return {
        "batch": asked.batch,
        "context": asked.context,
        "ms": {kind: summary(seconds, 1e3) for kind, seconds in found.items()},
        "ratios": {kind: ratio(found[GREEDY], seconds) for kind, seconds in found.items()},
    }


def tables(entry: Values) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return the tables of one model, each with its title and its headers."""
    costs = []
    for library, found in entry["libraries"].items():
        costs.append(
            [
                library,
                "import",
                f"{found['import_ms']['median']:.0f}",
                "",
                "",
                f"{found['import_mb']['median']:.1f}",
                "",
            ]
        )
        for name, each in found["parts"].items():
            forms = {"ms": ".1f", "first_ms": ".2f", "mask_ms": ".3f", "mb": ".1f", "pause_ms": ".1f"}
            numbers = [f"{each[key]['median']:{form}}" for key, form in forms.items()]
            if name == "vocabulary":
                numbers[1:3] = ["", ""]
            costs.append([library, name, *numbers])
    ends = []
    for title, found in entry["hostile"].items():
        *theirs, (_, here) = found.items()
        told = [f"{each['end']}: {each['seconds']:.2f} s, {each['mb']:.0f} MB" for _, each in theirs]
        ends.append([f"`{title}`".replace("|", "\\|"), *told, f"{here['end']}: {here['seconds']:.2f} s"])
    steps = [cells(entry, kind) for kind in entry["ms"]]
    return [
        (
            f"Grammars over {entry['vocab_size']:,} tokens",
            ["library", "what", "ms", "first mask, ms", "a mask, ms", "MB", "pause, ms"],
            costs,
        ),
        ("Hostile grammars", ["grammar", *entry["libraries"], "a job of fastgpt2"], ends),
        (f"Steps of {entry['batch']} sequences", ["all sequences", "ms/step", "quartiles", "times greedy"], steps),
    ]


# What a process of its own does.


def measure_library(order: Values) -> Values:
    """Return what a library takes for a vocabulary and for grammars, one after the other."""
    if order["seconds"]:
        resource.setrlimit(resource.RLIMIT_CPU, (order["seconds"], order["seconds"] + 1))
        resource.setrlimit(resource.RLIMIT_AS, (MEGABYTES << 20, MEGABYTES << 20))
    from fastgpt2.engine.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(Path(order["folder"]))
    tokens = [tokenizer.token_bytes(token_id) for token_id in range(order["vocab_size"])]
    started, before = perf_counter(), peak_mb()
    __import__(LIBRARIES[order["library"]])
    found: Values = {"import_ms": (perf_counter() - started) * 1e3, "import_mb": peak_mb() - before, "parts": {}}
    with timed() as times:
        library = (LLGuidance if order["library"] == "llguidance" else OutlinesCore)(tokens)
    found["parts"]["vocabulary"] = {**times, "first_ms": 0.0, "mask_ms": 0.0}
    found["end"] = "done"
    started, before = perf_counter(), peak_mb()
    for name, guide in order["grammars"].items():
        with timed() as times:
            text = library.compile(guide)
        masks, found["end"] = walk(text, random.Random(SEED))
        seconds = masks or [0.0]
        of_masks = {"first_ms": seconds[0] * 1e3, "mask_ms": sum(seconds) / len(seconds) * 1e3}
        found["parts"][name] = {**times, **of_masks}
    return {**found, "seconds": perf_counter() - started, "mb": peak_mb() - before}


def walk(text: Any, dice: random.Random) -> tuple[list[float], str]:
    """Write a text of random tokens that a grammar allows. Return the seconds of its masks, and how it ended."""
    import numpy as np

    seconds: list[float] = []
    if text is None:
        return seconds, "refused"
    try:
        while len(seconds) < TOKENS:
            started = perf_counter()
            mask = text.mask()
            seconds.append(perf_counter() - started)
            allowed = np.flatnonzero(np.unpackbits(mask, bitorder="little"))
            if not len(allowed) or not text.push(int(dice.choice(allowed))):
                break
    except BadRequest:
        return seconds, "refused"
    return seconds, "done"


@contextmanager
def timed() -> Iterator[Values]:
    """Note the milliseconds that something takes, the peak of memory, and how long another thread was held up."""
    times: Values = {}
    pauses, is_over = [0.0], threading.Event()

    def tick() -> None:
        last = perf_counter()
        while not is_over.is_set():
            time.sleep(0.0002)
            now = perf_counter()
            pauses.append(now - last)
            last = now

    ticking = threading.Thread(target=tick)
    ticking.start()
    started, before = perf_counter(), peak_mb()
    yield times
    times |= {"ms": (perf_counter() - started) * 1e3, "mb": peak_mb() - before}
    is_over.set()
    ticking.join()
    times["pause_ms"] = max(pauses) * 1e3


def peak_mb() -> float:
    """Return the most memory that this process has had, in megabytes; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) / 1024 if found is not None else 0.0


class LLGuidance:
    """llguidance as fastgpt2 uses it, without the process that tries grammars."""

    def __init__(self, tokens: list[bytes]) -> None:
        from fastgpt2.engine.decoding.grammar import make_vocabulary

        self._vocabulary = make_vocabulary(tokens)

    def compile(self, guide: Values) -> Any:
        from fastgpt2.engine.decoding.grammar import Grammar, key_of, source_of
        from fastgpt2.engine.decoding.records import GenerationRequest

        name, value = key_of(GenerationRequest("", **guide))
        try:
            return self.Text(Grammar(name, source_of(name, value), self._vocabulary))
        except BadRequest:
            return None

    class Text:
        def __init__(self, grammar: Any) -> None:
            self._matcher = grammar.matcher()

        def mask(self) -> Any:
            return self._matcher.allowed_bits()

        def push(self, token_id: int) -> bool:
            """Take a token in; tell whether another may follow."""
            self._matcher.push(token_id)
            return not self._matcher.is_complete


class OutlinesCore:
    """outlines-core, which knows regular expressions and makes one of a schema."""

    def __init__(self, tokens: list[bytes]) -> None:
        import outlines_core

        ids: dict[bytes | str, list[int]] = {}
        for token_id, token in enumerate(tokens):
            if token:
                ids.setdefault(token, []).append(token_id)
        self._tokens, self._vocabulary = len(tokens), outlines_core.Vocabulary(len(tokens), ids)

    def compile(self, guide: Values) -> Any:
        import outlines_core

        try:
            if "json_schema" in guide:
                regex = outlines_core.json_schema.build_regex_from_schema(json.dumps(guide["json_schema"]), " ?")
            else:
                regex = guide.get("regex") or "|".join(map(re.escape, guide["choices"]))
            return self.Text(outlines_core.Guide(outlines_core.Index(regex, self._vocabulary)), self._tokens)
        except (TypeError, ValueError):
            return None

    class Text:
        def __init__(self, guide: Any, tokens: int) -> None:
            import numpy as np

            self._guide, self._bits = guide, np.zeros((tokens + 32) // 32, np.int32)

        def mask(self) -> Any:
            import numpy as np

            self._guide.write_mask_into(self._bits.ctypes.data, self._bits.size, 4)
            return self._bits.view(np.uint8)

        def push(self, token_id: int) -> bool:
            """Take a token in; tell whether another may follow."""
            self._guide.advance(token_id, False)
            return not self._guide.is_finished()


if __name__ == "__main__":
    main()
