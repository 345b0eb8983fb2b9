"""The golden cases of logits processors: the scores they begin with, and what transformers leaves of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastgpt2.engine.decoding.logits_processors import LogitsProcessors
from fastgpt2.engine.decoding.records import GenerationRequest
from support.rows import make_row
from support.running import GOLDEN

DRAWING = frozenset({"temperature", "top_k", "top_p", "min_p", "typical_p"})


@dataclass(frozen=True)
class Case:
    """One set of options and one row of scores.

    Attributes:
        row: the scores float32 [vocab_size] before anything is done to them.
        options: of a request, by its names.
        ids, scores: the tokens that are left, and their scores: finite ones. Of a large case, some of them.
        left: of a large case, how many are left, and the sha256 of their ids as int32.
    """

    name: str
    row: NDArray[np.float32]
    prompt: list[int]
    text: list[int]
    options: Mapping[str, Any]
    ids: NDArray[np.int32]
    scores: NDArray[np.float32]
    left: tuple[int, str] | None

    @property
    def draws(self) -> bool:
        return not DRAWING.isdisjoint(self.options)

    def request(self) -> GenerationRequest:
        own = {name: value for name, value in self.options.items() if name != "min_new_tokens"}
        return GenerationRequest("", seed=0, do_sample=True if self.draws else None, **own)

    def processed(self) -> NDArray[np.float32]:
        """Return the scores as the processors under test leave them, with the ends of a text where they may come."""
        words = [tuple(word) for word in self.options.get("bad_words", ()) if tuple(word) not in ENDING_WORDS]
        processors = LogitsProcessors(self.request(), self.prompt, words)
        for token_id in self.text:
            processors.push(token_id)
        scores = self.row.copy()
        processors.apply(scores)
        if len(self.text) < self.options.get("min_new_tokens", 0):
            scores[ENDS] = -np.inf
        return scores


def _load() -> tuple[dict[str, Any], list[Case]]:
    golden: dict[str, Any] = json.loads((GOLDEN / "processors.json").read_text("utf-8"))
    cases, at = [], 0
    with np.load(GOLDEN / "processors.npz") as arrays:
        ids, scores, rows = arrays["ids"], arrays["scores"], arrays["rows"].astype(np.float32)
    for case in golden["cases"]:
        kind, size, seed = case["row"]
        row = make_row(kind, size, seed) if size else rows[int(kind.split()[1])]
        prompt, text = golden["contexts"][case["context"]]
        end = at + case["count"]
        left = (case["left"], case["sha256"]) if "left" in case else None
        name = f"{kind}: {case['name']}"
        cases.append(Case(name, row, prompt, text, case["options"], ids[at:end], scores[at:end], left))
        at = end
    return golden, cases


golden, cases = _load()
ENDS: list[int] = golden["ends"]
ENDING_WORDS = {(token_id,) for token_id in ENDS}
