"""What the models of live workers can take: a prompt that surely does not fit is refused before it waits in a queue."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

from fastgpt2.api.client.enqueue import JobPlan
from fastgpt2.api.client.flow import Command, Flow, Pipeline
from fastgpt2.engine.decoding.records import GenerationRequest
from fastgpt2.errors import PromptTooLong
from fastgpt2.plurals import counted
from fastgpt2.protocol.keys import MODEL_FIELD, MODELS_FIELD, NAMED_ONLY_FIELD, workers_key
from fastgpt2.protocol.untrusted import read_model_list, whole

# For how long what the workers told of their models is relied on.
MODEL_LIMITS_SECONDS = 30.0
_LIMIT_FIELDS = ("n_positions", "longest_token_bytes", MODEL_FIELD, MODELS_FIELD, NAMED_ONLY_FIELD)


@dataclass(frozen=True, slots=True)
class ModelLimit:
    """What a model can take: N positions, and no token of its tokenizer is longer than M bytes."""

    n_positions: int
    longest_token_bytes: int

    def including(self, other: ModelLimit) -> ModelLimit:
        """Return what one of the two can take."""
        return ModelLimit(
            max(self.n_positions, other.n_positions), max(self.longest_token_bytes, other.longest_token_bytes)
        )


class ModelLimits:
    """The limits of the live workers' models, by the names that jobs give; of several models of a name, the largest."""

    def __init__(self) -> None:
        self._fresh_until = 0.0
        # By the models' names; under None, of those that take jobs which name no model.
        self._limits: dict[str | None, ModelLimit] = {}
        # The models of the workers that take jobs which name no model. Workers of earlier releases take no others.
        self._of_unnamed: set[str] = set()

    def refresh(self, queue: str) -> Flow[None]:
        """Read the limits from the workers' own hashes, unless they were read just now."""
        if time.monotonic() < self._fresh_until:
            return
        workers = yield Command("smembers", (workers_key(queue),))
        asked = tuple(Command("hmget", (key, *_LIMIT_FIELDS)) for key in workers)
        self._limits, self._of_unnamed = {}, set()
        for fields in (yield Pipeline(asked)) if asked else ():
            self._add(*fields)
        # Without a worker the next job asks again.
        self._fresh_until = time.monotonic() + MODEL_LIMITS_SECONDS if self._limits else 0.0

    def _add(self, n_positions: Any, longest_token_bytes: Any, model: Any, models: Any, named_only: Any) -> None:
        """Add a worker, of whose fields an earlier release writes the first three."""
        limit = ModelLimit(whole(n_positions) or 0, whole(longest_token_bytes) or 0)
        if not (limit.n_positions and limit.longest_token_bytes):
            return
        for name in (*read_model_list(models), *(() if named_only else (None,))):
            self._limits[name] = limit.including(self._limits.get(name, limit))
        if not named_only and isinstance(model, bytes):
            self._of_unnamed.add(model.decode("utf-8", "replace"))

    def adapt(self, plan: JobPlan) -> JobPlan:
        """Return the plan as the live workers take it: workers of an earlier release know no jobs that name a model.

        If such workers alone serve the model, and no other model's worker could take the job from them, it names none.
        """
        model = plan.options.model
        if model is not None and model not in self._limits and self._of_unnamed == {model}:
            return replace(plan, options=replace(plan.options, model=None))
        return plan

    def check(self, request: GenerationRequest, model: str | None = None) -> None:
        """Refuse what surely cannot fit: as no token is longer than the longest, a text has a least number of tokens.

        Args:
            model: the one that the job names.

        Raises:
            PromptTooLong: the message says what would fit.
        """
        limit = self._limits.get(model)
        if limit is None:
            return
        n_positions = limit.n_positions
        if isinstance(request.prompt, str):
            size = len(request.prompt.encode())
            tokens = max(1, -(-size // limit.longest_token_bytes))
            has, needs = f"{counted(size, 'byte')}, so at least {counted(tokens, 'token')}", f"{tokens} or more"
        else:
            tokens = max(1, len(request.prompt))
            has, needs = counted(tokens, "token"), str(tokens)
        most = request.most_prompt_tokens(n_positions)
        if most is not None and tokens > most:
            tokens, has, needs = most, counted(most, "token that is kept", "tokens that are kept"), str(most)
        if tokens + request.least_room > n_positions:
            raise PromptTooLong(f"the prompt has {has}, over {request.describe_positions(n_positions)}: shorten it")
        room = n_positions - tokens
        for name, value in (("max_new_tokens", request.max_new_tokens), ("min_new_tokens", request.min_new_tokens)):
            if value is not None and value > room:
                raise PromptTooLong(
                    f"{name} is {value}; of the model's {n_positions} positions this prompt needs {needs}: "
                    f"ask for at most {room}"
                )
