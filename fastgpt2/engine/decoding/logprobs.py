"""Log probabilities of tokens, by the model's own logits: before penalties, temperature and all else."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fastgpt2.engine.decoding.records import TokenLogprob
from fastgpt2.engine.decoding.sampler import kth_largest
from fastgpt2.engine.text.tokenizer import Tokenizer

Logits = NDArray[np.float32]


def logprob_of(logits: Logits, token_id: int) -> float:
    """Return the log-softmax, in float64, of a token; the logits [vocab_size] are not changed."""
    values = logits.astype(np.float64)
    values -= values.max()
    logprob = float(values[token_id])
    return logprob - math.log(np.exp(values, out=values).sum())


def token_logprob(tokenizer: Tokenizer, logits: Logits, token_id: int, k: int, text_offset: int = 0) -> TokenLogprob:
    """Return the log-softmax, in float64, of a token and of the `k` likeliest; among equals, the lower id comes first.

    The logits [vocab_size] are not changed.
    """
    ids = [token_id, *likeliest(logits, k)]
    values = logits.astype(np.float64)
    values -= values.max()
    logprobs = values[ids]
    logprobs -= np.log(np.exp(values, out=values).sum())
    told = [
        TokenLogprob(one, tokenizer.token_text(one), logprob, special=tokenizer.is_special(one))
        for one, logprob in zip(ids, logprobs.tolist(), strict=True)
    ]
    return replace(told[0], top=tuple(told[1:]), text_offset=text_offset)


def likeliest(values: Logits, k: int) -> list[int]:
    """Return the indices of the k largest values, the largest first, the lower index first among equals."""
    k = min(k, len(values))
    if k == 0:
        return []
    # All that reach the k-th largest: more than k where some equal it. Sorting everything would take milliseconds.
    found = np.flatnonzero(values >= kth_largest(values, k))
    ordered: list[int] = found[np.argsort(-values[found], kind="stable")][:k].tolist()
    return ordered
