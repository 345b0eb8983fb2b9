"""The `fastgpt2` command. Each part is imported by the command that needs it, so that all of them start fast."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any, NoReturn

from fastgpt2 import __version__, settings
from fastgpt2.errors import BadRequest, FastGPT2Error
from fastgpt2.settings import Setting

DESCRIPTION = """GPT-2 text generation on CPUs: a pool of worker processes that serve a Redis queue.

  fastgpt2 up --model demo            Redis, workers and the HTTP endpoint; then, in another terminal:
  fastgpt2 enqueue --wait "My name is"
  fastgpt2 generate --model demo "My name is"       the same without a queue"""

EPILOG = "Every option is also an environment variable; an option wins over its variable, a variable over the default."

Values = dict[str, Any]

_QUEUE = (settings.REDIS_URL, settings.QUEUE)
_MODEL = (settings.MODEL, settings.REVISION)
_ARITHMETIC = (settings.THREADS, settings.BLAS, settings.WEIGHTS)
_COMPUTE = (*_ARITHMETIC, settings.DRAFTS)
_REQUEST = (
    settings.MAX_NEW_TOKENS,
    settings.STOP,
    settings.IGNORE_EOS,
    settings.MIN_NEW_TOKENS,
    settings.LOGPROBS,
    settings.ECHO,
)
_JOB = (settings.PRIORITY, settings.DEADLINE)
_BATCH = (settings.MAX_BATCH, settings.KV_MEMORY, settings.PREFIX_MEMORY)
_RECYCLING = (settings.MAX_JOBS, settings.MAX_GROWTH)
# Options that have a letter too.
_LETTERS = {"output": "-o"}


@dataclass(frozen=True, slots=True)
class Positional:
    """The argument without an option. One that may be left out is None then, or what the setting of its name says."""

    name: str
    help: str
    optional: bool = False
    choices: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Command:
    """One subcommand: its settings, and what runs it, as "module:function". `details` are for its own `--help`."""

    runs: str
    help: str
    settings: tuple[Setting[Any], ...]
    positional: Positional | None = None
    details: str = ""

    def run(self, values: Values) -> int:
        function: Callable[[Values], int] = resolve_name(self.runs)
        return function(values)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0, 1 for a failure, 2 for wrong usage, 3 model, 4 Redis."""
    given = sys.argv[1:] if argv is None else argv
    # Of ten commands' options, those of the one that is asked for.
    parser = build_parser([given[0]] if given and given[0] in COMMANDS else COMMANDS)
    _prepare_streams()
    options = parser.parse_args(argv)
    command = COMMANDS[options.command]
    try:
        status = command.run(_values(command, options))
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


def _values(command: Command, options: argparse.Namespace) -> Values:
    given = {setting.name: getattr(options, setting.name) for setting in command.settings}
    positional = command.positional
    if positional is not None and positional.name in given:
        if None not in (options.positional, given[positional.name]):
            raise BadRequest(f"{positional.name} is given twice, with and without --{positional.name}; leave one out")
        if options.positional is not None:
            given[positional.name] = options.positional
    values: Values = {setting.name: setting.resolve(given[setting.name]) for setting in command.settings}
    if positional is not None:
        values.setdefault(positional.name, options.positional)
    return values


def run() -> NoReturn:
    """The command: `main`, and out."""
    status = main()
    with contextlib.suppress(OSError, ValueError):  # closed, or its reader has gone; `main` has said so
        sys.stdout.flush()
        sys.stderr.flush()
    # Whoever had something to tidy up has done so by now. The system takes down mappings and helper processes at once,
    # where the interpreter would take as long for it as for five tokens.
    os._exit(status)


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


def build_parser(names: Iterable[str] | None = None) -> argparse.ArgumentParser:
    """The parser for some of the commands, by default all of them."""
    parser = argparse.ArgumentParser(
        "fastgpt2", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"fastgpt2 {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS if names is None else names:
        command = COMMANDS[name]
        about = command.help
        description = f"{about}. {command.details}" if command.details else about
        sub = subparsers.add_parser(name, help=about, description=description, epilog=EPILOG, allow_abbrev=False)
        if command.positional is not None:
            _add_positional(sub, command.positional)
        for setting in command.settings:
            _add_option(sub, setting)
    return parser


def _add_positional(parser: argparse.ArgumentParser, positional: Positional) -> None:
    # A name of its own: an option of the same name would be lost where this one is left out.
    parser.add_argument(
        "positional",
        metavar=positional.name.upper(),
        help=positional.help,
        choices=positional.choices,
        nargs="?" if positional.optional else None,
    )


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
    names = [setting.option, *([_LETTERS[setting.name]] if setting.name in _LETTERS else [])]
    parser.add_argument(*names, dest=setting.name, metavar=setting.metavar, help=text.replace("%", "%%"))


COMMANDS = {
    "up": Command(
        "fastgpt2.system.up:run_system",
        "run it all: Redis (embedded unless --redis-url is given), workers, the HTTP endpoint",
        settings.SYSTEM,
    ),
    "worker": Command(
        "fastgpt2.commands.serving:worker",
        "run one worker",
        (
            *_MODEL,
            *_COMPUTE,
            *_BATCH,
            *_QUEUE,
            settings.NAME,
            settings.DRAIN_TIMEOUT,
            *_RECYCLING,
            settings.ALIVE_FILE,
            settings.BURST,
            settings.LOG_PROMPTS,
            settings.LOG_LEVEL,
        ),
    ),
    "pool": Command(
        "fastgpt2.system.up:run_pool",
        "run N workers, supervised, on a Redis that is there",
        (
            *_MODEL,
            settings.POOL_THREADS,
            settings.BLAS,
            settings.WEIGHTS,
            settings.DRAFTS,
            *_BATCH,
            settings.WORKERS,
            *_RECYCLING,
            *_QUEUE,
            settings.DRAIN_TIMEOUT,
            settings.ALIVE_FILE,
            settings.LOG_PROMPTS,
            settings.LOG_LEVEL,
        ),
    ),
    "api": Command(
        "fastgpt2.commands.serving:api",
        "run the HTTP endpoint alone",
        (
            *_QUEUE,
            settings.HOST,
            settings.HOST_NAME,
            settings.PORT,
            settings.TOKEN_FILE,
            settings.INSECURE,
            settings.TIMEOUT,
            settings.BODY_TIMEOUT,
            settings.MAX_QUEUE,
            settings.SHOW_PROMPTS,
            settings.LOG_LEVEL,
        ),
    ),
    "status": Command("fastgpt2.commands.prompts:status", "show the queue and the workers", (*_QUEUE, settings.JSON)),
    "enqueue": Command(
        "fastgpt2.commands.prompts:enqueue",
        "put a prompt into the queue and print the job's id, or wait for its text",
        (
            *_REQUEST,
            *_JOB,
            *_QUEUE,
            settings.MAX_QUEUE,
            settings.WAIT,
            settings.STREAM,
            settings.TIMEOUT,
            settings.JSON,
        ),
        Positional("prompt", "the text to continue"),
        "With --stream, Ctrl-C cancels the job.",
    ),
    "result": Command(
        "fastgpt2.commands.prompts:result",
        "wait for a job's result and print it",
        (*_QUEUE, settings.TIMEOUT, settings.JSON),
        Positional("job", "the id that `fastgpt2 enqueue` printed"),
    ),
    "cancel": Command(
        "fastgpt2.commands.prompts:cancel",
        "take a job out of the queue, or end it while it runs",
        _QUEUE,
        Positional("job", "the id that `fastgpt2 enqueue` printed"),
        "What had been generated by then can be read with `fastgpt2 result`.",
    ),
    "batch": Command(
        "fastgpt2.commands.batch:run",
        "send a file of prompts through the queue, and write a line of JSON for each",
        (
            settings.OUTPUT,
            settings.FORMAT,
            settings.IN_FLIGHT,
            settings.RESTART,
            *_REQUEST,
            *_JOB,
            *_QUEUE,
            settings.MAX_QUEUE,
        ),
        Positional("file", "the prompts; - is standard input"),
        "A txt file holds a prompt a line. A jsonl file holds on each line a string, or an object with a prompt and "
        "any of max_new_tokens, stop, ignore_eos, min_new_tokens, logprobs, prompt_logprobs, echo, timeout, id; the "
        "options are their defaults. Each line of input gives one line of output, in the same order, and one that "
        "fails gives an error in its place. An output that exists is continued after its last line: a run that was "
        "broken off, however that came, is taken up by giving the same command again.",
    ),
    "generate": Command(
        "fastgpt2.commands.prompts:generate",
        "load a model and continue a prompt, without a queue",
        (*_MODEL, *_COMPUTE, *_REQUEST, settings.TIMINGS, settings.JSON),
        Positional("prompt", "the text to continue"),
    ),
    "bench": Command(
        "fastgpt2.bench:run", "measure how fast a model runs here", (*_MODEL, *_ARITHMETIC, settings.JSON)
    ),
    "pack": Command(
        "fastgpt2.commands.pack:run",
        "make a model's packed file in the cache, and print its path and its size in bytes, a tab between; with "
        "--drafts int8 a second one",
        (*_MODEL, *_COMPUTE, settings.VERIFY, settings.MEASURE),
        Positional("model", "the same as --model", optional=True),
        "A large model is packed when it is first loaded: this does it before, and for small ones too. With --measure, "
        "workers find all that they need in a cache which they cannot write to. The panels' layout can depend on how "
        "many cores there are: run it with as many as the workers will have.",
    ),
    "cache": Command(
        "fastgpt2.commands.cache:run",
        "list what lies in the cache of packed files, or remove what is of no more use there",
        (settings.ALL, settings.DRY_RUN, settings.JSON),
        Positional("action", "list, the default, or prune", optional=True, choices=("list", "prune")),
        "Prune removes the files whose source is gone or has changed, those of outdated formats, the damaged, and what "
        "a killed process left. A file that is being packed is kept. Workers that run on a file which is removed go on "
        "with it, as they have it mapped; its room on the disk is free when they end. The cache is the folder "
        "FASTGPT2_CACHE, by default ~/.cache/fastgpt2. When a file was last used is known to the day, and where the "
        "disk is mounted with noatime, not at all.",
    ),
}
