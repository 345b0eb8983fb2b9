"""The names under which a worker serves its model: checked, told to the pool while the worker lives, and given up."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from fastgpt2.errors import BadRequest
from fastgpt2.protocol import keys
from fastgpt2.protocol.scripts import Script
from fastgpt2.protocol.untrusted import read_model_names

if TYPE_CHECKING:
    from redis import Redis

_SERVE_NAMES = Script(__file__, "serve_names")
_LEAVE_NAMES = Script(__file__, "leave_names")


class ServedNames:
    """The names of one worker's model, among all those that the pool's workers serve, or have served.

    Args:
        queue: the name of the pool's queue.
        names: the first one is the model's own; the others are taken for it as well.

    Attributes:
        own: the names of this worker's model, each once.

    Raises:
        BadRequest: there are too many names, or one is no name that a job can give.
    """

    def __init__(self, connection: Redis, queue: str, names: Iterable[str]) -> None:
        self.own = tuple(dict.fromkeys(names))
        _refuse_unfit(self.own)
        self._connection = connection
        self._queue = queue
        self._pool = frozenset(self.own)

    @property
    def first(self) -> str:
        """Return the model's own name."""
        return self.own[0]

    @property
    def queues(self) -> list[str]:
        """Return the RQ queues of the pool that are known, those of models that other workers serve among them."""
        return keys.queues_of(self._queue, sorted(self._pool))

    def renew(self) -> None:
        """Tell the pool that these names are served, and learn which others it has.

        Raises:
            BadRequest: the pool has too many names already.
        """
        plain = keys.queues_of(self._queue)
        of_script = [keys.models_key(self._queue), keys.leases_key(self._queue)]
        is_taken, found = _SERVE_NAMES.run(self._connection, of_script, [len(plain), *plain, *self.own])
        if not is_taken:
            raise BadRequest(
                f"the workers of the queue {self._queue!r} serve, or have served, models under {found} names, and "
                f"{keys.MAX_MODELS_OF_POOL} is the limit: give this model a name that is known there, or another queue"
            )
        self._pool = frozenset({*self.own, *read_model_names(found)})

    def leave(self, worker_key: str) -> None:
        """Let the names lapse, as the worker with the hash `worker_key` ends."""
        of_script = [keys.models_key(self._queue), keys.workers_key(self._queue)]
        _LEAVE_NAMES.run(self._connection, of_script, [worker_key, *self.own])


def _refuse_unfit(names: tuple[str, ...]) -> None:
    if len(names) > keys.MAX_MODELS_OF_WORKER:
        raise BadRequest(
            f"{len(names)} names are given to one model by --served-model-name; the limit is "
            f"{keys.MAX_MODELS_OF_WORKER}: leave some out"
        )
    for name in names:
        try:
            keys.check_model_name("the model's name", name)
        except BadRequest:
            raise BadRequest(
                f"a model cannot be served under the name {name[:100]!r}, which has {len(name)} characters: give it "
                f"one of 1 to {keys.MAX_MODEL_CHARACTERS} characters, all of them printable, by --served-model-name"
            ) from None
