"""The `fastgpt2` command. Each subcommand imports only what it needs, so that all of them start fast."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NoReturn

from fastgpt2 import __version__, settings
from fastgpt2.commands.arguments import LETTERS, Command, Positional, options_of
from fastgpt2.errors import BadRequest, FastGPT2Error
from fastgpt2.setting import Setting
from fastgpt2.setting_values import has_escape, unescape

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

DESCRIPTION = """Generate text with GPT-2 on CPUs: a pool of worker processes serves a queue in Redis.

  fastgpt2 generate --model demo "My name is"    continue one prompt, without a queue

  fastgpt2 up --model demo                       start Redis, workers and the HTTP endpoint; then, in another terminal:
  fastgpt2 enqueue --wait "My name is"           continue a prompt by the queue"""

HINT = "`fastgpt2 COMMAND --help` lists the options of a command."
EPILOG = (
    "Each option can also be set by the environment variable in its brackets; for an option without a value, the\n"
    "variable is yes or no, and --no-OPTION says no. An option wins over its variable, and a variable over the default."
)

Values = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0; 1 for a failure, 2 for wrong usage, 3 for a model that cannot be used, 4 for a Redis that
        cannot be used, 130 after Ctrl-C, 141 if the reader of the output has gone.
    """
    words = sys.argv[1:] if argv is None else argv
    name = words[0] if words else ""
    _prepare_streams()
    if _wants_events(words):
        from fastgpt2.events import log_events

        log_events(name if name in COMMANDS else "fastgpt2")
    who = f"fastgpt2 {name}" if name in COMMANDS else "fastgpt2"
    try:
        status = _run_command(name, words[1:]) if name in COMMANDS else _answer_without_command(name)
        sys.stdout.flush()
        return status
    except FastGPT2Error as error:
        _say(f"{who}: {error}", "ERROR")
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of the pipe has gone (`| head`).
        _drop_output()
        return 141
    except OSError as error:
        _drop_output()
        _say(f"{who}: {error.filename or 'standard output'}: {error.strerror}", "ERROR")
        return 1


def _wants_events(words: Sequence[str]) -> bool:
    """Tell whether errors are to be JSON events, also those in the words themselves: `--log-format json`."""
    setting = settings.LOG_FORMAT
    ours = words[: words.index("--")] if "--" in words else words
    given = [word.removeprefix(f"{setting.option}=") for word in ours if word.startswith(f"{setting.option}=")]
    given += [value for option, value in pairwise(ours) if option == setting.option]
    return (given or [os.environ.get(setting.variable, "")])[-1].lower() == "json"


def _answer_without_command(word: str) -> int:
    """Print the version, or the help; a first word that is missing, or no command, is wrong usage."""
    if word == "--version":
        print(f"fastgpt2 {__version__}")
        return 0
    if word in ("--help", "-h", ""):
        build_parser().print_help(sys.stdout if word else sys.stderr)
        return 0 if word else BadRequest.exit_code
    from fastgpt2.commands.suggestions import about_first_word

    raise BadRequest(about_first_word(word, COMMANDS))


def _run_command(name: str, words: Sequence[str]) -> int:
    """Run a command with the words that follow its name."""
    command = COMMANDS[name]
    try:
        arguments = read_arguments(name, words)
    except SystemExit:
        return 0  # argparse has printed the help
    for note in _notes(command, arguments):
        _say(f"fastgpt2 {name}: {note}")
    return command.run(resolve_values(command, arguments))


def read_arguments(name: str, words: Sequence[str]) -> argparse.Namespace:
    """Read the words that follow the name of a command.

    Returns:
        By each setting's name, the texts that its option gives, "yes" and "no" for a flag; None if it is not given. And
        `positional`, the argument without an option; a list of them if there may be several.

    Raises:
        BadRequest: an option is unknown, or lacks its value; or there are too many words, or too few.
        SystemExit: the words ask for the command's help, which is printed.
    """
    command = COMMANDS[name]
    try:
        arguments, extras = build_parser([name]).parse_known_args([name, *words])
    except argparse.ArgumentError as error:
        from fastgpt2.commands.suggestions import about_argument, about_option

        unknown = _unknown_option(words, command)
        sentence = about_option(unknown, name, COMMANDS) if unknown else about_argument(error, command)
        raise BadRequest(sentence) from None
    for texts in vars(arguments).values():
        if isinstance(texts, list):
            # argparse of Python 3.11 makes [] of the value of --stop=--
            texts[:] = ["--" if text == [] else text for text in texts]
    several = command.positional is not None and command.positional.several
    given = arguments.positional if several else [arguments.positional]
    if unknown := _unknown_option(words, command, given, extras):
        from fastgpt2.commands.suggestions import about_option

        raise BadRequest(about_option(unknown, name, COMMANDS))
    others = [word for word in (*given, *extras) if word not in (None, "--")]
    if several:
        arguments.positional = others or None
    elif len(others) > (command.positional is not None):
        from fastgpt2.commands.suggestions import about_extra_words

        raise BadRequest(about_extra_words(others, words, name, command))
    for word in (arguments.positional or [None]) if several else [arguments.positional]:
        _check_positional(name, word)
    return arguments


def _unknown_option(
    words: Sequence[str], command: Command, given: Sequence[str | None] = (), extras: Sequence[str] = ()
) -> str | None:
    """Return the first word that is meant as an option and is none of the command; None if there is none."""
    known = options_of(command)
    for word in words[: words.index("--")] if "--" in words else words:
        option = word.partition("=")[0]
        if (
            (word in extras and word.startswith("-") and word != "-")
            # -output, which argparse reads as -o utput, and -host as -h
            or (word.startswith("-") and f"-{option}" in known and option not in known)
            # --nosuch="a b", which argparse takes for a text, for the space in it
            or (word in given and re.match("--[^ =]+=", word))
        ):
            return option
    return None


def _check_positional(name: str, word: str | None) -> None:
    positional = COMMANDS[name].positional
    if positional is None or (positional.optional and not positional.several):
        return
    if word is None:
        if not positional.optional:
            raise BadRequest(f"{positional.name.upper()} is missing: {COMMANDS[name].usage(name)}")
        return
    if not word and positional.name != "prompt":
        raise BadRequest(f"{positional.name.upper()} is empty: {COMMANDS[name].usage(name)}")


def resolve_values(command: Command, arguments: argparse.Namespace) -> Values:
    """Return the values of a command's settings, and of its argument, by their names.

    Raises:
        BadRequest: one of them cannot be read, or is out of bounds.
    """
    values: Values = {}
    positional = command.positional
    given = {setting.name: texts for setting in command.settings if (texts := getattr(arguments, setting.name))}
    if positional is not None and arguments.positional is not None:
        if positional.name in given:
            raise BadRequest(f"{positional.name} is given twice, with and without --{positional.name}; leave one out")
        given[positional.name] = [arguments.positional]
    reads_escapes = settings.ESCAPE in command.settings and settings.ESCAPE.resolve(given.get("escape"))
    for setting in command.settings:
        value, source = setting.resolve(given.get(setting.name)), setting.source(given.get(setting.name))
        if setting in settings.OF_REQUEST and value != setting.default:
            if reads_escapes and setting in settings.OF_TEXT:
                value = tuple(_unescape(text, source) for text in value)
            from fastgpt2.commands.prompts import check_field

            check_field(setting, value, source)
        values[setting.name] = value
    if positional is not None:
        values.setdefault(positional.name, arguments.positional)
        if reads_escapes and positional.name == "prompt":
            values["prompt"] = _unescape(values["prompt"], "PROMPT")
    if command.tells_given:
        values["given"] = frozenset(given)
    return values


def _unescape(text: str, source: str) -> str:
    try:
        return unescape(text)
    except ValueError as reason:
        raise BadRequest(f"{source} {reason}") from None


def _notes(command: Command, arguments: argparse.Namespace) -> Iterator[str]:
    """Yield what the writer of these words should know, and would not find out otherwise."""
    for setting in command.settings:
        texts = getattr(arguments, setting.name) or []
        if setting.join is None and len(set(texts)) > 1:
            both = f"{setting.option} and {setting.no_option} are both given"
            yield f"{both if setting.is_flag else f'{setting.option} is given {len(texts)} times'}; the last one counts"
    if settings.ESCAPE in command.settings and not settings.ESCAPE.resolve(arguments.escape):
        for setting in settings.OF_TEXT:
            given = getattr(arguments, setting.name)
            texts = given or [os.environ.get(setting.variable, "")]
            if any(map(has_escape, texts)):
                yield (
                    f"{setting.source(given)} holds a backslash and a letter, and is taken as it stands; "
                    r"with --escape, \n is a line end and \t a tab; bash writes a line end as $'\n'"
                )
    # A pool has said it for its processes.
    unknown = [] if os.environ.get("FASTGPT2_SUPERVISOR_PID") else settings.unknown_variables()
    if unknown:
        from fastgpt2.commands.suggestions import about_variable

        yield from filter(None, (about_variable(variable, settings.variables()) for variable in unknown))


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


def _say(text: str, level: str = "WARNING") -> None:
    """Print a line on standard error, where it may be an event; if it cannot be written, there is nobody to tell."""
    emit = getattr(sys.stderr, "emit", None)  # of `fastgpt2.events`, which is not imported for a look
    with contextlib.suppress(OSError):
        if emit is None:
            print(text, file=sys.stderr)
        else:
            emit(level, text)


def _drop_output() -> None:
    """Keep the interpreter from flushing its buffer into a stream that has just failed."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class ArgumentParser(argparse.ArgumentParser):
    """A parser that raises what is wrong, be it in the words or in printing the help.

    argparse's own prints the usage and ends the process, and keeps silent of a help that cannot be written.
    """

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, exit_on_error=False, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise BadRequest(message)

    def print_help(self, file: SupportsWrite[str] | None = None) -> None:
        print(self.format_help(), end="", file=file)


def build_parser(names: Iterable[str] | None = None) -> ArgumentParser:
    """Return the parser for the commands with these names, by default for all."""
    parser = ArgumentParser(
        "fastgpt2",
        description=DESCRIPTION,
        epilog=f"{HINT}\n{EPILOG}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fastgpt2 {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS if names is None else names:
        command = COMMANDS[name]
        sub = subparsers.add_parser(
            name,
            help=command.help,
            description=f"{command.help} {command.details}",
            epilog=EPILOG,
            usage=command.usage(name),
        )
        if command.positional is None:
            sub.set_defaults(positional=None)
        else:
            _add_positional(sub, command.positional)
        for setting in command.settings:
            _add_option(sub, setting)
    return parser


def _add_positional(parser: ArgumentParser, positional: Positional) -> None:
    parser.add_argument(
        "positional",  # none of a setting's names
        metavar=positional.name.upper(),
        help=positional.help,
        choices=positional.choices,
        # If argparse found that it is missing, it would not come to tell of unknown options, such as a wrong --help.
        nargs="*" if positional.several else "?",
    )


def _add_option(parser: ArgumentParser, setting: Setting[Any]) -> None:
    names = [setting.option, *([LETTERS[setting.name]] if setting.name in LETTERS else [])]
    if setting.is_flag:
        text = f"{setting.help} [{setting.variable}]"
        parser.add_argument(*names, dest=setting.name, action="append_const", const="yes", help=text)
        no = argparse.SUPPRESS  # the epilog tells of these
        parser.add_argument(setting.no_option, dest=setting.name, action="append_const", const="no", help=no)
        return
    text = f"{setting.help} [{setting.variable}, default: {setting.shown or setting.default}]".replace("%", "%%")
    parser.add_argument(*names, action="append", dest=setting.name, metavar=setting.metavar, help=text)


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
        (*settings.OF_QUEUE, settings.JSON, settings.LOG_FORMAT),
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
        (*settings.OF_QUEUE, settings.TIMEOUT, settings.JSON, settings.LOG_FORMAT),
        Positional("job", "The id that `fastgpt2 enqueue` printed."),
    ),
    "cancel": Command(
        "fastgpt2.commands.prompts:cancel",
        "Cancel a job: take it out of the queue, or end it while it runs.",
        (*settings.OF_QUEUE, settings.LOG_FORMAT),
        Positional("job", "The id that `fastgpt2 enqueue` printed."),
        "What had been generated by then stays readable: in Python as JobCancelled.partial, over HTTP by GET "
        "/v1/jobs/JOB.",
    ),
    "jobs": Command(
        "fastgpt2.commands.jobs:jobs",
        "List jobs: those that run and the latest that have ended; with --failed, those that failed, and why.",
        (
            settings.FAILED,
            settings.STATE,
            settings.LIMIT,
            *settings.OF_QUEUE,
            settings.SHOW_PROMPTS,
            settings.JSON,
            settings.LOG_FORMAT,
        ),
        details="Without --show-prompts, no prompt is shown, also where an error quotes it. For example: "
        "fastgpt2 jobs --failed --limit 100.",
    ),
    "requeue": Command(
        "fastgpt2.commands.jobs:requeue",
        "Run jobs again: the named ones, or with --failed all that failed.",
        (settings.ALL_FAILED, *settings.OF_QUEUE, settings.DURABILITY, settings.MAX_QUEUE, settings.LOG_FORMAT),
        Positional("job", "The id of a job that has ended.", optional=True, several=True),
        "A failed job goes to the end of its queue under its own id, as `rq requeue` does. Of another that has ended, "
        "a new job with the same request is enqueued, and its id is told; one that draws has the same seed, and so the "
        "same text. For example: fastgpt2 requeue --failed.",
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
        "fastgpt2 batch prompts.csv -o results.csv. With --model, the command needs no pool: it starts what it "
        "needs and stops it, as in: fastgpt2 batch --model gpt2 prompts.txt -o results.jsonl.",
        tells_given=True,
    ),
    "generate": Command(
        "fastgpt2.commands.prompts:generate",
        "Load a model and continue a prompt, without a queue.",
        (
            *settings.OF_LOAD,
            *settings.OF_CHAT,
            *settings.OF_REQUEST,
            settings.ESCAPE,
            settings.TIMINGS,
            settings.JSON,
            settings.LOG_FORMAT,
        ),
        Positional("prompt", "The text to continue."),
        details='For example: fastgpt2 generate --model demo --max-new-tokens 40 "Once upon a time".',
    ),
    "bench": Command(
        "fastgpt2.bench:run",
        "Measure how fast a model runs on this machine.",
        (*settings.OF_MODEL, *settings.OF_ARITHMETIC, settings.JSON, settings.LOG_FORMAT),
    ),
    "pack": Command(
        "fastgpt2.commands.pack:run",
        "Make a model's packed file in the cache, and print its path and its size in bytes, with a tab between.",
        (*settings.OF_LOAD, settings.VERIFY, settings.MEASURE, settings.MEASURE_MISSING, settings.LOG_FORMAT),
        Positional("model", "The model; the same as --model.", optional=True),
        "A large model is packed when it is first loaded: this command does so before, and for small models too. With "
        "--drafts int8 it makes a second file. With --measure-missing, workers find all that they need in a cache to "
        "which they cannot write. A figure is a first guess: it is measured again after a month, or after an hour if "
        "the machine was busy, and running workers correct it. --measure does it now; let nothing else run "
        "meanwhile. The layout of the file can depend on the number of cores: run the command with as many "
        "cores as the workers will have.",
    ),
    "cache": Command(
        "fastgpt2.commands.cache:run",
        "List what lies in the cache of packed files, or remove what is of no more use there.",
        (settings.ALL, settings.DRY_RUN, settings.JSON, settings.LOG_FORMAT),
        Positional("action", "list (the default) or prune.", optional=True, choices=("list", "prune")),
        "prune removes files whose source is gone or has changed, files of outdated formats, damaged files, and what a "
        "killed process left. It keeps a file that is being packed. Workers that run on a file which is removed go on "
        "with it, as they have mapped it; its room on the disk is free when they end. The cache is the folder "
        "FASTGPT2_CACHE, by default ~/.cache/fastgpt2. The day of a file's last use comes from the file system, which "
        "does not know it where the disk is mounted with noatime.",
    ),
}
