"""The `fastgpt2` command. Each subcommand imports only what it needs, so that all of them start fast."""

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

DESCRIPTION = """Generate text with GPT-2 on CPUs: a pool of worker processes serves a queue in Redis.

  fastgpt2 generate --model demo "My name is"    continue one prompt, without a queue

  fastgpt2 up --model demo                       start Redis, workers and the HTTP endpoint; then, in another terminal:
  fastgpt2 enqueue --wait "My name is"           continue a prompt by the queue"""

EPILOG = (
    "Each option can also be set by the environment variable in its brackets; for an option without a value, the\n"
    "variable is yes or no. An option wins over its variable, and a variable over the default."
)

Values = dict[str, Any]

# Options that have a letter as well.
_LETTERS = {"output": "-o", "n": "-n"}


@dataclass(frozen=True, slots=True)
class Positional:
    """The argument that has no option.

    Attributes:
        optional: it may be left out. Its value is then that of the setting of the same name, or None if there is none.
    """

    name: str
    help: str
    optional: bool = False
    choices: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Command:
    """One subcommand.

    Attributes:
        runs: the function that runs it, as "module:function".
        details: more sentences for its own `--help`.
    """

    runs: str
    help: str
    settings: tuple[Setting[Any], ...]
    positional: Positional | None = None
    details: str = ""

    def run(self, values: Values) -> int:
        function: Callable[[Values], int] = resolve_name(self.runs)
        return function(values)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0; 1 for a failure, 2 for wrong usage, 3 for a model that cannot be used, 4 for a Redis that
        cannot be used, 130 after Ctrl-C, 141 if the reader of the output has gone.
    """
    given = sys.argv[1:] if argv is None else argv
    # To make the options of all commands takes a while; those of the one that is asked for are enough.
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
        # The reader of the pipe has gone (`| head`).
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
    """Run `main`, and end the process."""
    status = main()
    with contextlib.suppress(OSError, ValueError):  # closed, or its reader has gone; `main` has said so
        sys.stdout.flush()
        sys.stderr.flush()
    # All that had to be tidied up has been. The system takes down mappings and helper processes at once, for which the
    # interpreter would need as long as for five tokens.
    os._exit(status)


def _prepare_streams() -> None:
    """Let characters that the terminal cannot show be replaced, and output to a closed stream be dropped."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace" if stream is sys.stdout else "backslashreplace")


def _drop_output() -> None:
    """Keep the interpreter from flushing its buffer into a stream that has just failed."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def build_parser(names: Iterable[str] | None = None) -> argparse.ArgumentParser:
    """Return the parser for the commands with these names, by default for all."""
    parser = argparse.ArgumentParser(
        "fastgpt2", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"fastgpt2 {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS if names is None else names:
        command = COMMANDS[name]
        description = f"{command.help} {command.details}"
        sub = subparsers.add_parser(name, help=command.help, description=description, epilog=EPILOG, allow_abbrev=False)
        if command.positional is not None:
            _add_positional(sub, command.positional)
        for setting in command.settings:
            _add_option(sub, setting)
    return parser


def _add_positional(parser: argparse.ArgumentParser, positional: Positional) -> None:
    # It has a name of its own, as an option of the same name would be lost where this argument is left out.
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
    action = "append" if setting.repeated else "store"
    parser.add_argument(*names, action=action, dest=setting.name, metavar=setting.metavar, help=text.replace("%", "%%"))


COMMANDS = {
    "up": Command(
        "fastgpt2.system.up:run_system",
        "Run everything: Redis (an embedded one unless --redis-url is given), workers and the HTTP endpoint.",
        settings.OF_UP,
        details="For example: fastgpt2 up --model gpt2 --workers 4.",
    ),
    "worker": Command(
        "fastgpt2.commands.serving:worker",
        "Run one worker on a Redis that is running.",
        settings.OF_WORKER,
    ),
    "pool": Command(
        "fastgpt2.system.up:run_pool",
        "Run N workers on a Redis that is running, and start again those that end.",
        settings.OF_POOL,
    ),
    "api": Command(
        "fastgpt2.commands.serving:api",
        "Run the HTTP endpoint alone, on a Redis that is running.",
        settings.OF_ENDPOINT,
    ),
    "status": Command(
        "fastgpt2.commands.prompts:status",
        "Show the state of the queue and of the workers.",
        (*settings.OF_QUEUE, settings.JSON),
    ),
    "enqueue": Command(
        "fastgpt2.commands.prompts:enqueue",
        "Put a prompt into the queue and print the job's id, or wait for its text.",
        settings.OF_ENQUEUE,
        Positional("prompt", "The text to continue."),
        'With --stream, Ctrl-C cancels the job. For example: fastgpt2 enqueue --stream "Once upon a time".',
    ),
    "result": Command(
        "fastgpt2.commands.prompts:result",
        "Wait for a job's result and print it.",
        (*settings.OF_QUEUE, settings.TIMEOUT, settings.JSON),
        Positional("job", "The id that `fastgpt2 enqueue` printed."),
    ),
    "cancel": Command(
        "fastgpt2.commands.prompts:cancel",
        "Cancel a job: take it out of the queue, or end it while it runs.",
        settings.OF_QUEUE,
        Positional("job", "The id that `fastgpt2 enqueue` printed."),
        "What had been generated by then stays readable: in Python as JobCancelled.partial, over HTTP by GET "
        "/v1/jobs/JOB.",
    ),
    "batch": Command(
        "fastgpt2.commands.batch.command:run",
        "Send a file of prompts through the queue, and write a line or a row for each.",
        settings.OF_FILE,
        Positional("file", "The file of prompts; - is standard input."),
        "The format goes by the file's name, or by --format. A txt file holds one prompt a line. A jsonl file holds on "
        "each line a string, or an object with a prompt and any of the fields that a job has in Python, such as "
        "max_new_tokens, temperature or json_schema, and an id of yours; the options give their defaults. Of a csv, "
        "tsv or Parquet file, and of a jsonl file with --prompt-column, one column is the prompt, and the others stand "
        "beside the results. Lines of OpenAI's batches are answered as OpenAI does. All but Parquet may be compressed "
        "(.gz, .zst). The output has a line or a row for each of the input, in the same order, an error for a prompt "
        "that failed. To go on with a run that broke off, however that came, or after you have corrected some lines, "
        "give the same command again: it runs the lines that have no result. For example: "
        "fastgpt2 batch prompts.csv -o results.csv.",
    ),
    "generate": Command(
        "fastgpt2.commands.prompts:generate",
        "Load a model and continue a prompt, without a queue.",
        (*settings.OF_LOAD, *settings.OF_REQUEST, settings.TIMINGS, settings.JSON),
        Positional("prompt", "The text to continue."),
        details='For example: fastgpt2 generate --model demo --max-new-tokens 40 "Once upon a time".',
    ),
    "bench": Command(
        "fastgpt2.bench:run",
        "Measure how fast a model runs on this machine.",
        (*settings.OF_MODEL, *settings.OF_ARITHMETIC, settings.JSON),
    ),
    "pack": Command(
        "fastgpt2.commands.pack:run",
        "Make a model's packed file in the cache, and print its path and its size in bytes, with a tab between.",
        (*settings.OF_LOAD, settings.VERIFY, settings.MEASURE),
        Positional("model", "The model; the same as --model.", optional=True),
        "A large model is packed when it is first loaded: this command does so before, and for small models too. With "
        "--drafts int8 it makes a second file. With --measure, workers find all that they need in a cache to which "
        "they cannot write. The layout of the file can depend on the number of cores: run the command with as many "
        "cores as the workers will have.",
    ),
    "cache": Command(
        "fastgpt2.commands.cache:run",
        "List what lies in the cache of packed files, or remove what is of no more use there.",
        (settings.ALL, settings.DRY_RUN, settings.JSON),
        Positional("action", "list (the default) or prune.", optional=True, choices=("list", "prune")),
        "prune removes files whose source is gone or has changed, files of outdated formats, damaged files, and what a "
        "killed process left. It keeps a file that is being packed. Workers that run on a file which is removed go on "
        "with it, as they have mapped it; its room on the disk is free when they end. The cache is the folder "
        "FASTGPT2_CACHE, by default ~/.cache/fastgpt2. The day of a file's last use comes from the file system, which "
        "does not know it where the disk is mounted with noatime.",
    ),
}
