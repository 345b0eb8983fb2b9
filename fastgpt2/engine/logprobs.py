"""Log probabilities of one token's place."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastgpt2.engine.generation import TokenLogprob
from fastgpt2.engine.tokenizer import Tokenizer


def token_logprob(
    tokenizer: Tokenizer, logits: NDArray[np.float32], token_id: int, k: int, text_offset: int = 0
) -> TokenLogprob:
    """The log-softmax, in float64, of a token and of the `k` likeliest; of two that are alike, the lower id first.

    Args:
        logits: [vocab_size], as the model gives them; not changed.
    """
    told = [token_id, *likeliest(logits, k)]
    values = logits.astype(np.float64)
    values -= values.max()
    logprobs = values[told]
    logprobs -= np.log(np.exp(values, out=values).sum())
    of, *top = zip(told, map(tokenizer.token_text, told), logprobs.tolist(), strict=True)
    return TokenLogprob(*of, tuple(TokenLogprob(*other) for other in top), text_offset)


def likeliest(values: NDArray[np.floating[Any]], k: int) -> list[int]:
    """Where the k largest are, the largest first, the lower index first among equals."""
    k = min(k, len(values))
    if k == 0:
        return []
    # All that reach the k-th largest: more than k where some equal it. Sorting everything would take milliseconds.
    found = np.flatnonzero(values >= np.partition(values, -k)[-k])
    ordered: list[int] = found[np.argsort(-values[found], kind="stable")][:k].tolist()
    return ordered
