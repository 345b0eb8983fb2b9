"""`fastgpt2 up`: Redis, a pool of workers and the HTTP endpoint, started in order, supervised, stopped in order.

And `fastgpt2 pool`: only the workers, on a Redis that is there.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from fastgpt2.api.http.access import refuse_exposure
from fastgpt2.api.http.serve import bind, url_of
from fastgpt2.api.http.tokens import read_tokens
from fastgpt2.errors import FastGPT2Error, QueueUnavailable
from fastgpt2.events import about, are_logged
from fastgpt2.plurals import counted
from fastgpt2.process import HangUp, StopFlag, on_stop_signals, raise_open_file_limit, set_up_logging, stop_signals_held
from fastgpt2.protocol.connection import UP_STARTS_ONE, connect, redis_errors, without_password
from fastgpt2.protocol.keys import workers_key
from fastgpt2.system.leftovers import warn_of_losses, warn_of_waiting
from fastgpt2.system.pool import Child, Pool, ProcessGroup
from fastgpt2.system.redis_server import RedisKeeper, RedisServer
from fastgpt2.system.served_model import ServedModel, find_files, read_served_models
from fastgpt2.system.welcome import describe_models, named_by, welcome

log = logging.getLogger("fastgpt2.pool")

# How often the processes are looked at.
SUPERVISE_SECONDS = 0.1

# Long enough to pack the weights of gpt2-xl for the first time, on a slow disk.
READY_SECONDS = 600.0

# A worker that is told to stop keeps to `drain_timeout` itself; one that does not is told again, this much later.
STOP_MARGIN_SECONDS = 5.0

# How long the jobs of workers that did not end well may take to be put back, once everything else is stopped.
REAP_SECONDS = 5.0

# By environment, not by argument: an argument list can be read by every user of the machine. -P: else a file of the
# current folder could stand in for a module of the same name.
COMMAND = (sys.executable, "-P", "-m", "fastgpt2")
STOPPING = "stopping: workers finish the jobs that they run; Ctrl-C again hurries them"


class System(ProcessGroup):
    """The whole system on one machine, for `fastgpt2 up`, the demo and the tests: Redis, workers and endpoint.

    Args:
        values: what `settings.of_system` returns.

    Raises:
        BadRequest: the models and their names do not go together.

    Attributes:
        models: what the workers serve.
        redis: the embedded Redis; None if the values name a running one.
        ready: whether everything is ready to serve.
        stopping: set it to end `run_system`.
        hang_up: whether the endpoint is to read its tokens again.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__()
        self.values = values
        self.models = read_served_models(values)
        self.redis: RedisServer | None = None
        self.redis_url: str = values["redis_url"] or ""
        self.http_url = ""
        self.pool = Pool([])
        self.ready = False
        self._keeper: RedisKeeper | None = None
        self.stopping = StopFlag()
        self.hang_up = HangUp()

    def _start(self) -> None:
        tokens = read_tokens(self.values["token_file"])
        refuse_exposure(self.values["host"], tokens is not None, self.values["insecure"])
        # In the foreground, once: a download shows its progress here, and a wrong name ends it all at once.
        find_files(self.models, self.values)
        self._start_redis()
        before = self._registered_workers()
        self._start_children()
        self._wait_until_ready(before)
        self.ready = True

    def check(self, now: float) -> None:
        """Start again whatever has ended.

        Raises:
            FastGPT2Error: a process cannot be kept alive, or the embedded Redis has ended too often.
        """
        if self.hang_up.is_stop():
            self.stop_soon()
        elif self.hang_up.asks:
            self.hang_up.asks = False
            self._have_files_read_again()
        if self._keeper is not None:
            self._keeper.check(now)
        self.pool.check(now)

    def stop_soon(self) -> None:
        """End `run_system`; before everything is ready, by a KeyboardInterrupt."""
        if not self.ready:
            raise KeyboardInterrupt
        self.stopping.set()

    def _have_files_read_again(self) -> None:
        for child in self.pool.children:
            if child.rereads:
                log.info("SIGHUP: %s reads its files again", child.name)
                child.signal(signal.SIGHUP)

    def _start_redis(self) -> None:
        if self.redis_url:
            self._check_redis()
            self._stack.callback(warn_of_waiting, self.redis_url, self.values["queue"], self.models)
            return
        folder = self.values["redis_dir"]
        self.redis = RedisServer(self.values["redis_port"], Path(folder).expanduser().absolute() if folder else None)
        self._stack.callback(self.redis.stop)
        self.redis.start()
        self._keeper = RedisKeeper(self.redis)
        self.redis_url = self.redis.url
        if self.redis.is_temporary:
            self._stack.callback(warn_of_losses, self.redis_url, self.values["queue"])

    def _check_redis(self) -> None:
        from fastgpt2.protocol.server_check import check_server

        connection = connect(self.redis_url)
        with closing(connection):
            try:
                for rights in ("worker", "endpoint"):
                    check_server(connection, self.redis_url, rights, self.values["queue"])
            except QueueUnavailable as error:
                remedy = f"or leave out {named_by(self.redis_url)} and up starts a Redis of its own"
                reason = str(error).removesuffix(f"; {UP_STARTS_ONE}")
                raise type(error)(f"{reason}; {remedy}") from None

    def _start_children(self) -> None:
        values = self.values
        with bind(values["host"], values["port"]) as probe:
            self.http_url = url_of(probe)
        shared = child_environment(values, self.models, self.redis_url)
        environment = {**shared, "FASTGPT2_PORT": self.http_url.rpartition(":")[2]}
        rereads = values["token_file"] is not None
        endpoint = Child("endpoint", [*COMMAND, "api"], environment, stops_first=True, rereads=rereads)
        children = [*worker_children(values, self.models, self.redis_url), endpoint]
        self.pool = self._stack.enter_context(running_pool(children, values, self.redis_url))

    def _registered_workers(self) -> set[object]:
        connection = connect(self.redis_url)
        with closing(connection), redis_errors(self.redis_url):
            return set(connection.smembers(workers_key(self.values["queue"])))

    def _wait_until_ready(self, before: set[object]) -> None:
        """Wait until every worker is registered and the endpoint answers; what dies meanwhile is started again.

        Args:
            before: the workers that were registered before.

        Raises:
            FastGPT2Error: it takes too long, or a process cannot be kept alive.
        """
        deadline, wanted = time.monotonic() + READY_SECONDS, len(self.models) * self.values["workers"]
        registered, answers = 0, False
        while not answers or registered < wanted:
            if time.monotonic() > deadline:
                raise FastGPT2Error(
                    f"not ready after {READY_SECONDS:.0f} s: {registered} of {counted(wanted, 'worker')} "
                    f"{'has' if wanted == 1 else 'have'} registered, the endpoint "
                    f"{'answers' if answers else 'does not answer'}"
                )
            time.sleep(0.05)
            self.check(time.monotonic())
            registered = len(self._registered_workers() - before)
            answers = answers or self._endpoint_answers()

    def _endpoint_answers(self) -> bool:
        import http.client
        from urllib.parse import urlsplit

        url = urlsplit(self.http_url)
        probe = http.client.HTTPConnection(url.hostname or "", url.port, timeout=2)
        try:
            probe.request("GET", "/health")
            return probe.getresponse().status == 200
        except OSError:
            return False
        finally:
            probe.close()


@contextmanager
def running_pool(children: Sequence[Child], values: dict[str, Any], redis_url: str) -> Iterator[Pool]:
    """Start processes as a pool; when left, stop them, and put back the jobs of workers that did not end well."""
    from fastgpt2.worker.reaper import BackgroundReaper

    pool = Pool(children)
    reaper = BackgroundReaper(redis_url, values["queue"], pool.note_recovery)
    pool.reap, pool.count_restart = reaper.reap, reaper.count_restart
    try:
        pool.start()
        yield pool
    finally:
        with stop_signals_held():
            pool.stop(values["drain_timeout"] + STOP_MARGIN_SECONDS)
            reaper.close(REAP_SECONDS)


def supervise(check: Callable[[float], None], stopping: StopFlag) -> None:
    """Call `check` with the time again and again until `stopping` is set; then say that everything stops.

    Raises:
        FastGPT2Error: a process cannot be kept alive.
    """
    while not stopping.wait(SUPERVISE_SECONDS):
        check(time.monotonic())
    announce(STOPPING)


def announce(text: str, http_url: str = "") -> None:
    """Tell on standard output how the processes are doing; where events are logged, by one with the first line.

    Args:
        http_url: where the endpoint answers, if there is one.
    """
    if are_logged():
        log.info("%s", text.partition("\n")[0], extra=about(**({"endpoint": http_url} if http_url else {})))
    else:
        print(text, flush=True)


def child_environment(values: dict[str, Any], models: Sequence[ServedModel], redis_url: str) -> dict[str, str]:
    """Return what a child is told beside its command: every setting by its variable, empty if it is not set.

    The settings that each model has for itself are empty: `worker_children` adds them.
    """
    return {
        **{f"FASTGPT2_{name.upper()}": _as_text(value) for name, value in values.items()},
        **dict.fromkeys(models[0].variables(), ""),
        "FASTGPT2_REDIS_URL": redis_url,
        "FASTGPT2_POOL_WORKERS": str(len(models) * values["workers"]),
        "FASTGPT2_SUPERVISOR_PID": str(os.getpid()),
        # Settings of a single worker that may be set in the shell: a pool can use neither one name for all nor a burst.
        "FASTGPT2_NAME": "",  # each start of a worker has a name of its own
        "FASTGPT2_BURST": "",
    }


def _as_text(value: Any) -> str:
    """Return the text of which a setting reads this value again; empty if it is not set."""
    if isinstance(value, tuple):
        return ",".join(value)
    return "" if value is None else str(value)


def worker_children(
    values: dict[str, Any], models: Sequence[ServedModel], redis_url: str, output: int | None = None
) -> list[Child]:
    """Return the workers of a pool, not started yet, with the settings in `values` and their queue in this Redis.

    Each model has as many workers as the settings say.
    """
    # Workers have no use for the endpoint's token.
    shared = {**child_environment(values, models, redis_url), "FASTGPT2_TOKEN": "", "FASTGPT2_TOKEN_FILE": ""}
    ends_soon = values["max_jobs"] is not None
    return [
        Child(
            f"worker {number}",
            [*COMMAND, "worker"],
            {**shared, **model.variables()},
            ends_soon=ends_soon,
            is_worker=True,
            output=output,
        )
        for number, model in enumerate((model for model in models for _ in range(values["workers"])), 1)
    ]


def run_system(values: dict[str, Any]) -> int:
    """Run everything until SIGINT or SIGTERM, and say where to connect.

    Without a file of tokens, SIGHUP ends it too. With one, the endpoint then reads the file again; it is the end of
    the terminal that still ends all.

    Raises:
        KeyboardInterrupt: a signal came before everything was ready; what was started has been stopped.
    """
    set_up_logging(values["log_level"])
    raise_open_file_limit()
    system = System(values)

    def stop(_signum: int, _frame: FrameType | None) -> None:
        system.stop_soon()

    on_stop_signals(stop)
    if values["token_file"] is not None:
        system.hang_up.listen()
    with system:
        text = welcome(values, system.models, system.http_url, system.redis_url, system.redis is not None)
        announce(text, system.http_url)
        supervise(system.check, system.stopping)
    return 0


def run_pool(values: dict[str, Any]) -> int:
    """Keep workers running on a Redis that is there, or will be, until SIGINT, SIGTERM or SIGHUP.

    Raises:
        BadRequest: the models and their names do not go together.
        FastGPT2Error: a model cannot be used, Redis will not have its workers, or one cannot be kept alive.
        KeyboardInterrupt: a signal came before there was a worker.
    """
    set_up_logging(values["log_level"])
    raise_open_file_limit()
    models = read_served_models(values)
    on_stop_signals(signal.default_int_handler)
    redis_url = values["redis_url"]
    from fastgpt2.protocol.server_check import refuse_unfit

    refuse_unfit(redis_url, "worker", values["queue"])
    find_files(models, values)
    stopping = StopFlag()
    on_stop_signals(lambda _signum, _frame: stopping.set())
    announce(
        f"fastgpt2 pool: {describe_models(models, values['workers'])}, queue {values['queue']}, "
        f"Redis {without_password(redis_url)}; Ctrl-C stops it."
    )
    with running_pool(worker_children(values, models, redis_url), values, redis_url) as pool:
        supervise(pool.check, stopping)
    warn_of_waiting(redis_url, values["queue"], models)
    return 0
