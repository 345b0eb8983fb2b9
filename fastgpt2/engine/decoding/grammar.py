"""Grammars: the forms that guided texts have."""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np
from numpy.typing import NDArray

from fastgpt2.engine.decoding.records import GenerationRequest
from fastgpt2.engine.text.tokenizer import Tokenizer
from fastgpt2.errors import BadRequest


class Matcher:
    may_end = False
    is_complete = False

    def mask(self, scores: NDArray[np.float32]) -> None:
        raise NotImplementedError

    def push(self, token_id: int) -> None:
        raise NotImplementedError

    def pop(self) -> None:
        raise NotImplementedError


class Grammar:
    def matcher(self) -> Matcher:
        return Matcher()


class Grammars:
    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        pass

    def compile(self, request: GenerationRequest) -> Future[Grammar]:
        raise BadRequest("not yet")
