"""The pool that serves one run of a command: its own, started for the run alone, or one that runs already.

Of its own are Redis, on a socket in a folder that only this user can enter, and worker processes. Both end with the
run, however that ends.
"""

from __future__ import annotations

import os
import time
from contextlib import closing
from typing import Any, Self

from redis.exceptions import RedisError

from fastgpt2 import settings
from fastgpt2.engine.machine import can_share_steps, usable_cores
from fastgpt2.errors import BadRequest, FastGPT2Error, QueueUnavailable
from fastgpt2.plurals import counted
from fastgpt2.process import raise_open_file_limit, set_up_logging
from fastgpt2.protocol.connection import UP_STARTS_ONE, connect
from fastgpt2.protocol.durability import REPLICA
from fastgpt2.protocol.keys import workers_key
from fastgpt2.system.pool import ChildFailed, Pool, ProcessGroup
from fastgpt2.system.redis_server import RedisKeeper, RedisServer
from fastgpt2.system.served_model import find_files, read_served_models
from fastgpt2.system.up import READY_SECONDS, SUPERVISE_SECONDS, running_pool, worker_children
from fastgpt2.system.worker_output import BesideBar, WorkerOutput, show_beside_bar

# Nobody wants the jobs that still run when the run ends: they go on for a moment only.
DRAIN_SECONDS = 0.1

# A load that takes longer is worth a line.
SLOW_SECONDS = 10.0

_LEVELS_WITH_JOBS = ("DEBUG", "INFO")


def pool_of_run(values: dict[str, Any]) -> OwnPool | RunningPool:
    """Return the pool that is to serve a run, not entered yet: its own if the settings name a model.

    Args:
        values: `settings.OF_OWN_POOL` and those of the queue by name; "given" holds the names of those that were
            given as options.

    Raises:
        BadRequest: options do not go together.
    """
    given, own = values["given"], settings.OF_OWN_POOL
    if values["model"] is None or ("redis_url" in given and "model" not in given):
        idle = [setting.option for setting in own[2:] if setting.name in given]
        if idle:
            raise BadRequest(
                f"{', '.join(idle)}: this is for workers that the run starts itself; give --model ID too, or leave it "
                "out for a pool that runs already"
            )
        if len(values["served_model_name"]) > 1:
            raise BadRequest(
                "without --model, --served-model-name is the model for lines that name none: give one name, or name "
                "the model in each line"
            )
        return RunningPool(values["redis_url"], next(iter(values["served_model_name"]), None))
    if "redis_url" in given:
        raise BadRequest(
            "--model starts Redis and workers for this run alone, and --redis-url names a Redis whose workers run "
            "already; give only one of them"
        )
    if values["durability"] == REPLICA:
        raise BadRequest(
            "--durability replica: the Redis that --model starts has no replica; take memory or disk, or a pool that "
            "runs already"
        )
    return OwnPool(values)


class RunningPool:
    """A pool that others run, and use as well.

    Attributes:
        redis_url: where its Redis is.
        model: the name of the model that jobs ask for which are told none; None for the pool's first model.
        is_own: whether this run is the only one that uses the pool.

    Raises:
        BadRequest: the URL cannot be used.
    """

    is_own = False

    def __init__(self, redis_url: str, model: str | None = None) -> None:
        connect(redis_url).close()  # a URL that cannot be used is refused before anything is begun
        self.redis_url = redis_url
        self.model = model

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, QueueUnavailable) and str(error).endswith(UP_STARTS_ONE):
            raise type(error)(f"{error}, and --model ID starts both for this run alone") from None

    def check(self) -> None:
        """Do nothing: others see to it."""


class OwnPool(ProcessGroup):
    """Redis and workers of one run's own.

    It is entered when the first worker serves. `check` is to be called every few seconds meanwhile, in the main thread:
    on Linux, children end with the thread that starts them.

    Attributes:
        redis_url: where the Redis is, once it runs.
        model: None: the pool has one model, under whatever names, for all jobs.
        is_own: whether this run is the only one that uses the pool.
    """

    is_own = True
    model: str | None = None

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__()
        self._values = _of_workers(values)
        self._models = read_served_models(self._values)
        self.redis_url = ""
        self._keeper: RedisKeeper | None = None
        self._pool = Pool([])
        self._output: WorkerOutput | None = None
        self._check_at = 0.0

    def _start(self) -> None:
        began = time.monotonic()
        set_up_logging(self._values["log_level"], BesideBar())
        raise_open_file_limit()
        # In the foreground, once: a download shows its progress here, and a wrong name ends it all at once.
        find_files(self._models, self._values)
        self._start_processes()
        self._wait_until_ready(began)
        unused = settings.REDIS_URL.variable
        hint = f"; {unused}, which is set, is not used" if os.environ.get(unused) else ""
        model, count = self._values["model"], self._values["workers"]
        workers = f"{counted(count, 'worker')} of this run's own"
        show_beside_bar(f"{workers} with {model} ready after {time.monotonic() - began:.1f} s{hint}")

    def check(self) -> None:
        """Start again whatever has ended.

        Raises:
            FastGPT2Error: a process cannot be kept alive. If it is a worker that cannot use its model or its settings,
                the error has the worker's words and its exit code.
        """
        now = time.monotonic()
        if now < self._check_at or self._keeper is None or self._output is None:
            return
        self._check_at = now + SUPERVISE_SECONDS
        self._keeper.check(now)
        try:
            self._pool.check(now)
        except ChildFailed as failure:
            self._output.settle()
            raise ChildFailed(self._output.reason or str(failure), failure.exit_code) from None
        if any(child.process is None for child in self._pool.children):
            self._output.show_reasons()

    def _start_processes(self) -> None:
        server = RedisServer(is_private=True)
        self._stack.callback(server.stop)
        server.start()
        self._keeper = RedisKeeper(server)
        self.redis_url = server.url
        self._output = self._stack.enter_context(closing(WorkerOutput(self._values["log_level"] in _LEVELS_WITH_JOBS)))
        children = worker_children(self._values, self._models, self.redis_url, self._output.writer)
        self._pool = self._stack.enter_context(running_pool(children, self._values, self.redis_url))

    def _wait_until_ready(self, began: float) -> None:
        """Wait until a worker is registered; what dies meanwhile is started again.

        Raises:
            FastGPT2Error: it takes too long, or a process cannot be kept alive.
        """
        slow_at = began + SLOW_SECONDS
        while not self._is_served():
            now = time.monotonic()
            if now > began + READY_SECONDS:
                raise FastGPT2Error(
                    f"no worker is ready after {READY_SECONDS:.0f} s; --log-level info says what they do"
                )
            if now > slow_at:
                slow_at = began + READY_SECONDS
                show_beside_bar(
                    "the workers still load the model: the first time, a large one is packed for this machine"
                )
            time.sleep(0.02)
            self.check()

    def _is_served(self) -> bool:
        connection = connect(self.redis_url)
        with closing(connection):
            try:
                return bool(connection.exists(workers_key(self._values["queue"])))
            except RedisError:  # it is being started again
                return False


def _of_workers(values: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the workers by name."""
    own = {
        setting.name: values[setting.name]
        for setting in (*settings.OF_OWN_POOL, settings.QUEUE, settings.DURABILITY, settings.LOG_FORMAT)
    }
    if own["workers"] is None:
        # Workers of one core each generate the most in all; more than jobs at once would have nothing to do.
        cores = (own["threads"] or 1) if can_share_steps() else 1
        own["workers"] = max(1, min(usable_cores() // cores, values["in_flight"]))
    return {**own, "named_only": False, "drain_timeout": DRAIN_SECONDS, "alive_file": None}
