"""The models that live workers serve, by the names that requests may give; and `GET /v1/models`, as OpenAI has it.

They are read from the workers' own hashes in Redis.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from starlette.requests import Request
from starlette.responses import Response

from fastgpt2.api.client.flow import AsyncDriver, Command, Flow, Pipeline
from fastgpt2.api.http.responses import JSON
from fastgpt2.api.pool.snapshot import read_models
from fastgpt2.engine.decoding.records import Count
from fastgpt2.errors import ModelUnknown
from fastgpt2.protocol.keys import CHAT_FIELD, MODEL_FIELD, MODELS_FIELD, NAMED_ONLY_FIELD, workers_key
from fastgpt2.protocol.untrusted import by_name, epoch_seconds, whole

# How long the list of models is used before it is read again, and the limit for workers that are asked for theirs.
MODELS_FRESH_SECONDS = 5.0
MAX_WORKERS = 1000
_MODEL_FIELDS = (MODEL_FIELD, MODELS_FIELD, NAMED_ONLY_FIELD, CHAT_FIELD, "birth", "n_positions")


class ModelBody(TypedDict):
    """A model by one of its names. As vLLM's, it tells how many tokens a prompt and its continuation may have."""

    id: str
    object: Literal["model"]
    created: Count
    owned_by: str
    max_model_len: Count | None


@dataclass(frozen=True, slots=True)
class ModelCard:
    """A model by one of its names.

    Attributes:
        created: since when a worker serves it, in seconds since 1970.
        n_positions: the most tokens that a prompt and its continuation may have together; None if no worker tells.
        chats: a worker of it has a chat template.
    """

    created: int
    n_positions: int | None
    chats: bool


@dataclass(frozen=True, slots=True)
class PoolModels:
    """The models that live workers serve.

    Attributes:
        by_name: under each name that a request may give, the model that has requests without a name first.
        unnamed: the name of the model that has requests without a name, most of them if there are several such; None if
            no worker takes such requests.
    """

    by_name: dict[str, ModelCard]
    unnamed: str | None


class Models:
    """The models that live workers serve, and the routes that tell of them."""

    def __init__(self, driver: AsyncDriver, queue: str) -> None:
        self._driver = driver
        self._queue = queue
        self._known = PoolModels({}, None)
        self._fresh_until = 0.0

    async def read(self) -> PoolModels:
        """Return the models, as they were read in the last seconds.

        Raises:
            QueueUnavailable
        """
        if time.monotonic() >= self._fresh_until:
            self._known = await self._driver.run(read_pool_models(self._queue))
            # A pool without models may get its first one at any moment.
            self._fresh_until = time.monotonic() + MODELS_FRESH_SECONDS if self._known.by_name else 0.0
        return self._known

    async def list_all(self, _request: Request) -> Response:
        """Answer `GET /v1/models`: with each name by which a request may ask for a model."""
        served = (await self.read()).by_name
        return JSON({"object": "list", "data": [_model_body(*pair) for pair in served.items()]})

    async def show(self, request: Request) -> Response:
        """Answer `GET /v1/models/{model}`."""
        name = request.path_params["model"]
        served = (await self.read()).by_name
        if name not in served and f"/{name}" in served:
            name = f"/{name}"  # a folder, whose first slash was one too many in the path of the request
        if name not in served:
            raise ModelUnknown.among(name, served)
        return JSON(_model_body(name, served[name]))


def _model_body(name: str, model: ModelCard) -> ModelBody:
    return {
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "fastgpt2",
        "max_model_len": model.n_positions,
    }


def read_pool_models(queue: str) -> Flow[PoolModels]:
    """Return the models that the workers of a pool serve."""
    keys = yield Command("smembers", (workers_key(queue),))
    asked = tuple(Command("hmget", (key, *_MODEL_FIELDS)) for key in sorted(keys)[:MAX_WORKERS])
    replies = (yield Pipeline(asked)) if asked else ()
    return _list_models([by_name(_MODEL_FIELDS, reply) for reply in replies])


def _list_models(workers: Sequence[Mapping[str, Any]]) -> PoolModels:
    """Return the models of workers, of whose hashes these fields are known."""
    told: dict[str, list[Mapping[str, Any]]] = {}
    takers: list[str] = []
    for fields in workers:
        names = read_models(fields)
        for name in names:
            told.setdefault(name, []).append(fields)
        if names and fields.get(NAMED_ONLY_FIELD) != b"1":
            takers.append(names[0])
    unnamed = most_common(takers) if takers else None
    in_order = sorted(told, key=lambda name: (name != unnamed, name))
    return PoolModels({name: _describe(told[name]) for name in in_order}, unnamed)


def most_common(names: Iterable[str]) -> str:
    """Return the name that stands there most often, of several such the first in the alphabet; there is at least one.

    Of the models whose workers take requests without a name, that is the one which has most of these requests.
    """
    counts = Counter(names)
    return min(counts, key=lambda name: (-counts[name], name))


def _describe(workers: Sequence[Mapping[str, Any]]) -> ModelCard:
    births = [int(epoch_seconds(fields.get("birth")) or 0) for fields in workers]
    positions = [told for fields in workers if (told := whole(fields.get("n_positions")))]
    chats = any(fields.get(CHAT_FIELD) == b"1" for fields in workers)
    return ModelCard(max(0, min(births)), min(positions, default=None), chats)
