"""The `fastgpt2` command. Each part is imported by the command that needs it, so that all of them start fast."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastgpt2 import __version__, settings
from fastgpt2.errors import FastGPT2Error
from fastgpt2.settings import Setting

DESCRIPTION = """GPT-2 text generation on CPUs: a pool of worker processes that serve a Redis queue.

  fastgpt2 up --model demo            Redis, workers and the HTTP endpoint; then, in another terminal:
  fastgpt2 enqueue --wait "My name is"
  fastgpt2 generate --model demo "My name is"       the same without a queue"""

EPILOG = "Every option is also an environment variable; an option wins over its variable, a variable over the default."

Values = dict[str, Any]

_QUEUE = (settings.REDIS_URL, settings.QUEUE)
_MODEL = (settings.MODEL, settings.REVISION, settings.THREADS)
_REQUEST = (settings.MAX_NEW_TOKENS, settings.STOP, settings.IGNORE_EOS)


@dataclass(frozen=True, slots=True)
class Command:
    """One subcommand: its settings, and what runs it."""

    run: Callable[[Values], int]
    help: str
    settings: tuple[Setting[Any], ...]
    positional: tuple[str, str] | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0, 1 for a failure, 2 for wrong usage, 3 model, 4 Redis."""
    parser = build_parser()
    _prepare_streams()
    options = parser.parse_args(argv)
    command = COMMANDS[options.command]
    try:
        values = {s.name: s.resolve(getattr(options, s.name)) for s in command.settings}
        if command.positional:
            values[command.positional[0]] = getattr(options, command.positional[0])
        status = command.run(values)
        sys.stdout.flush()
        return status
    except FastGPT2Error as error:
        print(f"fastgpt2 {options.command}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of a pipe has gone (`| head`).
        _drop_output()
        return 141
    except OSError as error:
        _drop_output()
        print(f"fastgpt2 {options.command}: {error.filename or 'standard output'}: {error.strerror}", file=sys.stderr)
        return 1


def _prepare_streams() -> None:
    """Whatever the terminal cannot show must not lose the rest, and a stream that was closed is no error."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace" if stream is sys.stdout else "backslashreplace")


def _drop_output() -> None:
    """Keep the interpreter from flushing once more into a stream that has just failed."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "fastgpt2", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"fastgpt2 {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        about = command.help
        sub = subparsers.add_parser(name, help=about, description=about, epilog=EPILOG, allow_abbrev=False)
        if command.positional:
            sub.add_argument(command.positional[0], metavar=command.positional[0].upper(), help=command.positional[1])
        for setting in command.settings:
            _add_option(sub, setting)
    return parser


def _add_option(parser: argparse.ArgumentParser, setting: Setting[Any]) -> None:
    if setting.is_flag:
        group = parser.add_mutually_exclusive_group()
        text = f"{setting.help} [{setting.variable}]"
        group.add_argument(setting.option, dest=setting.name, action="store_const", const="yes", help=text)
        no = setting.option.replace("--", "--no-", 1)
        group.add_argument(no, dest=setting.name, action="store_const", const="no", help=argparse.SUPPRESS)
        return
    default = setting.shown or str(setting.default)
    text = f"{setting.help} [{setting.variable}, default: {default}]"
    parser.add_argument(setting.option, dest=setting.name, metavar=setting.metavar, help=text.replace("%", "%%"))


def run_up(values: Values) -> int:
    from fastgpt2.system import run_system

    return run_system(values)


def run_worker(values: Values) -> int:
    """One worker process, in the foreground."""
    from fastgpt2.engine.blas import describe, limit_threads, usable_cores
    from fastgpt2.engine.engine import Engine
    from fastgpt2.logs import set_up_logging
    from fastgpt2.worker.connection import connect
    from fastgpt2.worker.generation_worker import GenerationWorker, log

    set_up_logging(values["log_level"])
    limit_threads(values["threads"] or usable_cores())
    connection = connect(values["redis_url"])
    engine = Engine.load(values["model"], revision=values["revision"], max_batch=1)
    engine.warm_up()
    log.info("loaded %s in %.0f ms; %s", engine.model, engine.load_times.loaded * 1e3, describe())
    supervisor = os.environ.get("FASTGPT2_SUPERVISOR_PID", "")
    supervisor_pid = int(supervisor) if supervisor.isdigit() else None
    GenerationWorker(engine, connection, values["queue"], values["name"], supervisor_pid).work()
    return 0


def run_api(values: Values) -> int:
    """The HTTP endpoint, in the foreground."""
    from fastgpt2.api.serve import serve

    serve(values)
    return 0


def run_status(values: Values) -> int:
    import asyncio

    from fastgpt2.api.status import read_status
    from fastgpt2.worker.connection import connect_async, redis_errors

    async def read() -> dict[str, Any]:
        connection = connect_async(values["redis_url"])
        try:
            return await read_status(connection, values["queue"])
        finally:
            await connection.aclose()

    with redis_errors(values["redis_url"]):
        status = asyncio.run(read())
    print(json.dumps(status, indent=2) if values["json"] else _status_text(status))
    return 0


def _status_text(status: Values) -> str:
    jobs = ", ".join(f"{count} {state}" for state, count in status["jobs"].items() if count) or "none"
    lines = [f"queue {status['queue']['name']}: {status['queue']['depth']} waiting; jobs: {jobs}"]
    for worker in status["workers"]:
        at_work = f" on job {worker['job']}" if worker["job"] else ""
        lines.append(
            f"worker {worker['name']}: {worker['state']}{at_work}, model {worker['model']}, "
            f"up {worker['age_seconds']} s, heard {worker['heartbeat_age_seconds']} s ago, "
            f"{worker['jobs_finished']} finished, {worker['jobs_failed']} failed"
        )
    if not status["workers"]:
        lines.append("no workers; start some with `fastgpt2 up` or `fastgpt2 worker`")
    return "\n".join(lines)


def run_enqueue(values: Values) -> int:
    from fastgpt2.api.client import Client
    from fastgpt2.engine.generation import GenerationRequest

    with Client(values["redis_url"], values["queue"]) as client:
        job = client.enqueue_request(_request(values, GenerationRequest))
        if not values["wait"]:
            print(job.id)
            return 0
        _print_result(job.result(values["timeout"]), values)
    return 0


def run_result(values: Values) -> int:
    from fastgpt2.api.client import Client

    with Client(values["redis_url"], values["queue"]) as client:
        _print_result(client.job(values["job"]).result(values["timeout"]), values)
    return 0


def run_generate(values: Values) -> int:
    """No queue: load, generate, print."""
    from time import perf_counter

    from fastgpt2.engine.blas import limit_threads, usable_cores
    from fastgpt2.engine.engine import Engine
    from fastgpt2.engine.generation import GenerationRequest

    started = perf_counter()
    request = _request(values, GenerationRequest)
    limit_threads(values["threads"] or usable_cores())
    engine = Engine.load(values["model"], revision=values["revision"], max_batch=1)
    sequence = engine.decoder.admit(engine.decoder.prepare(request))
    encoded = perf_counter()
    while not sequence.finished:
        engine.decoder.step()
    result = sequence.result(engine.model)
    if values["timings"]:
        times = engine.load_times
        lines = [
            ("mapped", times.mapped),
            ("tokenizer", times.tokenizer),
            ("loaded and encoded", encoded - started),
            *(("loop in", seconds) for seconds in sequence.step_seconds),
            ("total", perf_counter() - started),
        ]
        for name, seconds in lines:
            print(f"{name} {seconds * 1e3:.2f} ms", file=sys.stderr)
    _print_result(result, values, prompt=request.prompt)
    return 0


def _request(values: Values, make: Callable[..., Any]) -> Any:
    stop = (values["stop"],) if values["stop"] else ()
    return make(values["prompt"], values["max_new_tokens"], stop, values["ignore_eos"])


def _print_result(result: Any, values: Values, prompt: str | None = None) -> None:
    if values["json"]:
        from fastgpt2.worker.job import result_to_json

        print(json.dumps(result_to_json(result, result.timings.queue_seconds)))
        return
    text = (values.get("prompt", "") if prompt is None else prompt) + result.text
    print(text)


COMMANDS = {
    "up": Command(
        run_up,
        "run it all: Redis (embedded unless --redis-url is given), workers, the HTTP endpoint",
        settings.SYSTEM,
    ),
    "worker": Command(run_worker, "run one worker", (*_MODEL, *_QUEUE, settings.NAME, settings.LOG_LEVEL)),
    "api": Command(
        run_api,
        "run the HTTP endpoint alone",
        (*_QUEUE, settings.HOST, settings.PORT, settings.TIMEOUT, settings.LOG_LEVEL),
    ),
    "status": Command(run_status, "show the queue and the workers", (*_QUEUE, settings.JSON)),
    "enqueue": Command(
        run_enqueue,
        "put a prompt into the queue and print the job's id, or wait for its text",
        (*_REQUEST, *_QUEUE, settings.WAIT, settings.TIMEOUT, settings.JSON),
        ("prompt", "the text to continue"),
    ),
    "result": Command(
        run_result,
        "wait for a job's result and print it",
        (*_QUEUE, settings.TIMEOUT, settings.JSON),
        ("job", "the id that `fastgpt2 enqueue` printed"),
    ),
    "generate": Command(
        run_generate,
        "load a model and continue a prompt, without a queue",
        (*_MODEL, *_REQUEST, settings.TIMINGS, settings.JSON),
        ("prompt", "the text to continue"),
    ),
}
