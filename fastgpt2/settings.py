"""Every setting once: its option, its environment variable, its default and how it is read.

Precedence: option > environment > default. `max_new_tokens` is `--max-new-tokens` and `FASTGPT2_MAX_NEW_TOKENS`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fastgpt2.errors import BadRequest

T = TypeVar("T")

_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off", ""}


@dataclass(frozen=True)
class Setting(Generic[T]):
    """One setting. `shown` is how its default reads in `--help`."""

    name: str
    metavar: str
    parse: Callable[[str], T]
    default: T
    help: str
    shown: str = ""

    @property
    def option(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return "FASTGPT2_" + self.name.upper()

    @property
    def is_flag(self) -> bool:
        return isinstance(self.default, bool)

    def resolve(self, given: str | None = None) -> T:
        """The value: of the option if `given`, else of the environment, else the default.

        Raises:
            BadRequest: the text cannot be read; the message names where it came from.
        """
        text, source = given, self.option
        if text is None:
            text, source = os.environ.get(self.variable), self.variable
        # An empty variable is what a compose file passes on for one that is not set.
        if text is None or (text == "" and source == self.variable):
            return self.default
        if text == "":
            raise BadRequest(f"{source} is empty; leave it out for the default")
        try:
            return self.parse(text)
        except ValueError as reason:
            # What is secret (the Redis URL) is read by `str`, which never fails, and checked where it is used.
            raise BadRequest(f"{source}: {text!r} {reason}") from None


def whole_number(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ValueError("is not a whole number") from None
        if not low <= value <= high:
            raise ValueError(f"is not between {low} and {high}")
        return value

    return parse


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError("is not a number of seconds") from None
    if not 0 < value <= 1e6:
        raise ValueError("is not between 0 and 1000000 seconds")
    return value


_SIZES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


def size(text: str) -> int:
    """Bytes, of such texts as 2GB, 512M, 1.5GiB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmgt]?i?)b?", text.strip().lower())
    if found is None or found[2] not in _SIZES:
        raise ValueError("is not a size like 2GB or 512MiB")
    value = float(found[1]) * _SIZES[found[2]]
    if not 1 <= value <= 1 << 50:
        raise ValueError("is not between 1 byte and 1 PiB")
    return int(value)


def size_or_none(text: str) -> int:
    """Bytes as `size` reads them, and 0 for "0" or "off"."""
    return 0 if text.strip().lower() in ("0", "off") else size(text)


def yes_or_no(text: str) -> bool:
    if text.lower() in _TRUE:
        return True
    if text.lower() in _FALSE:
        return False
    raise ValueError("is neither yes nor no")


def word(text: str) -> str:
    if not text or any(c.isspace() for c in text):
        raise ValueError("must be one word")
    return text


def one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text.lower() not in choices:
            raise ValueError(f"is not one of {', '.join(choices)}")
        return text.lower()

    return parse


def drafts(text: str) -> str | int:
    if text.lower() in ("off", "auto", "int8"):
        return text.lower()
    if text.isdecimal() and text.isascii() and 1 <= int(text[:3]) <= 15 and len(text) < 3:
        return int(text)
    raise ValueError("is not off, auto, int8 or a number from 1 to 15")


def log_level(text: str) -> str:
    if text.upper() not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise ValueError("is not one of debug, info, warning, error")
    return text.upper()


MODEL = Setting("model", "ID|PATH", str, "gpt2", "hub id, folder, or 'demo' for the small model that comes along")
REVISION: Setting[str | None] = Setting(
    "revision", "REV", str, None, "branch, tag or commit of the hub's repository", "main"
)
REDIS_URL = Setting(
    "redis_url",
    "URL",
    str,
    "redis://127.0.0.1:6379/0",
    "Redis to use; better set as a variable if it holds a password, or with ?password_file=PATH",
)
OWN_REDIS_URL: Setting[str | None] = Setting(
    "redis_url", "URL", str, None, "Redis to use instead of an embedded one", "embedded"
)
QUEUE = Setting("queue", "NAME", word, "fastgpt2", "name of the RQ queue")
WORKERS = Setting("workers", "N", whole_number(1, 1024), 2, "number of worker processes")
THREADS: Setting[int | None] = Setting(
    "threads",
    "N",
    whole_number(1, 1024),
    None,
    "cores to use, each by a process of its own",
    "all cores, or one for a small model",
)
POOL_THREADS: Setting[int | None] = Setting(
    "threads",
    "N",
    whole_number(1, 1024),
    None,
    "cores a worker uses, each by a process of its own",
    "cores / workers, or one for a small model",
)
BLAS = Setting(
    "blas",
    "NAME",
    one_of("auto", "openblas", "mkl", "compiled"),
    "auto",
    "what multiplies float32 weights: auto, openblas, mkl or compiled; auto measures what is installed",
)
WEIGHTS = Setting(
    "weights",
    "TYPE",
    one_of("float32", "bfloat16", "int8"),
    "float32",
    "float32, bfloat16 or int8; the latter two are faster, smaller and not quite the model: texts may differ",
)
DRAFTS: Setting[str | int] = Setting(
    "drafts",
    "HOW",
    drafts,
    "auto",
    "verify several guessed tokens in one step, for the same text: auto, looked up in the text so far, as many as pay; "
    "1 to 15, so many; int8, as auto and made by int8 weights; off",
)
MAX_BATCH: Setting[int | None] = Setting(
    "max_batch",
    "N",
    whole_number(1, 1024),
    None,
    "jobs that a worker decodes together",
    "as many as pay here, measured",
)
KV_MEMORY: Setting[int | None] = Setting(
    "kv_memory",
    "SIZE",
    size,
    None,
    "memory that the keys and values of a worker's jobs may take, such as 2GB; further jobs wait",
    "a quarter of the memory, divided by the pool's workers",
)
PREFIX_MEMORY: Setting[int | None] = Setting(
    "prefix_memory",
    "SIZE",
    size_or_none,
    None,
    "memory, beside that, in which a worker keeps keys and values of prompts for others that begin alike; 0 for none",
    "an eighth of that for keys and values",
)
MAX_JOBS: Setting[int | None] = Setting(
    "max_jobs", "N", whole_number(1, 1 << 40), None, "end a worker after so many jobs; a pool starts another", "none"
)
MAX_GROWTH = Setting(
    "max_growth",
    "SIZE",
    size,
    512 * 1024 * 1024,
    "end a worker whose own memory has grown by more than this, beside all keys and values",
    "512MiB",
)
ALIVE_FILE: Setting[str | None] = Setting(
    "alive_file",
    "FILE",
    str,
    None,
    "for probes: a file that is there while the worker serves, touched every few seconds while its loop turns",
    "none",
)
BURST = Setting("burst", "", yes_or_no, False, "end when the queue is empty")
NAME: Setting[str | None] = Setting("name", "NAME", word, None, "name of the worker", "host and process id")
HOST = Setting("host", "ADDRESS", str, "127.0.0.1", "address that the HTTP endpoint binds to")
HOST_NAME: Setting[str | None] = Setting(
    "host_name",
    "NAME",
    word,
    None,
    "without a token: serve only requests made to this name, or to localhost, wherever the endpoint is bound to",
    "none, but of a loopback --host its own",
)
PORT = Setting("port", "PORT", whole_number(0, 65535), 8000, "port of the HTTP endpoint; 0 takes a free one")
# A variable only: what is an option can be read by every user of the machine.
TOKEN: Setting[str | None] = Setting(
    "token", "TOKEN", str, None, "what requests to the HTTP endpoint must bear", "none"
)
TOKEN_FILE: Setting[str | None] = Setting(
    "token_file",
    "FILE",
    str,
    None,
    "file whose first line is the token that requests to the HTTP endpoint must bear",
    "that of FASTGPT2_TOKEN, or none",
)
INSECURE = Setting("insecure", "", yes_or_no, False, "serve other machines without a token")
REDIS_PORT = Setting(
    "redis_port", "PORT", whole_number(0, 65535), 6379, "port of the embedded Redis; a free one if taken"
)
REDIS_DIR: Setting[str | None] = Setting(
    "redis_dir", "DIR", str, None, "where the embedded Redis keeps its append-only file", "temporary, gone at the end"
)
DRAIN_TIMEOUT = Setting(
    "drain_timeout", "SECONDS", seconds, 30.0, "how long workers may finish their jobs when told to stop"
)
MAX_QUEUE: Setting[int | None] = Setting(
    "max_queue", "N", whole_number(1, 1 << 40), None, "refuse new jobs while so many wait", "no limit"
)
PRIORITY = Setting("priority", "NAME", one_of("high", "normal", "low"), "normal", "high, normal or low")
MAX_NEW_TOKENS: Setting[int | None] = Setting(
    "max_new_tokens", "N", whole_number(0, 1 << 20), None, "generate at most so many tokens, perhaps none", "20"
)
STOP: Setting[str | None] = Setting("stop", "TEXT", str, None, "end before this text", "none")
IGNORE_EOS = Setting("ignore_eos", "", yes_or_no, False, "go on past the end-of-text token")
MIN_NEW_TOKENS = Setting(
    "min_new_tokens", "N", whole_number(0, 1 << 20), 0, "end at no end-of-text token or stop text before so many tokens"
)
LOGPROBS: Setting[int | None] = Setting(
    "logprobs",
    "N",
    whole_number(0, 20),
    None,
    "with --json: each token's log probability, and those of the N likeliest",
    "none",
)
ECHO = Setting("echo", "", yes_or_no, False, "with --json: the prompt is part of the text")
DEADLINE: Setting[float | None] = Setting(
    "deadline", "SECONDS", seconds, None, "the job fails when it is not done so long after being enqueued", "none"
)
STREAM = Setting("stream", "", yes_or_no, False, "print the text as it comes")
OUTPUT: Setting[str | None] = Setting(
    "output", "FILE", str, None, "where the results go, a line of JSON each; - is standard output", "-"
)
FORMAT = Setting(
    "format", "NAME", one_of("auto", "txt", "jsonl"), "auto", "txt, a prompt a line, or jsonl; auto goes by the name"
)
IN_FLIGHT = Setting("in_flight", "N", whole_number(1, 100_000), 256, "jobs in the queue at once, at most")
RESTART = Setting("restart", "", yes_or_no, False, "begin anew instead of after the last line of the output")
TIMINGS = Setting("timings", "", yes_or_no, False, "show how long each part took, on standard error")
JSON = Setting("json", "", yes_or_no, False, "print the whole result as JSON")
WAIT = Setting("wait", "", yes_or_no, False, "wait for the result and print it")
VERIFY = Setting(
    "verify", "", yes_or_no, False, "check every byte of the packed file, and make it anew if one is wrong"
)
MEASURE = Setting(
    "measure", "", yes_or_no, False, "also measure what a worker with such --threads measures when it first starts here"
)
ALL = Setting(
    "all", "", yes_or_no, False, "with prune: remove every packed file, and what was measured of this machine"
)
DRY_RUN = Setting("dry_run", "", yes_or_no, False, "with prune: say what would go, and remove nothing")
TIMEOUT = Setting("timeout", "SECONDS", seconds, 60.0, "how long to wait for a result")
BODY_TIMEOUT = Setting(
    "body_timeout", "SECONDS", seconds, 20.0, "how long the body of a request to the HTTP endpoint may take to come"
)
SHOW_PROMPTS = Setting("show_prompts", "", yes_or_no, False, "show the prompts of the latest jobs on the HTTP endpoint")
LOG_PROMPTS = Setting("log_prompts", "", yes_or_no, False, "write the prompts into the workers' logs")
LOG_LEVEL = Setting("log_level", "LEVEL", log_level, "INFO", "debug, info, warning or error", "info")

# What `fastgpt2 up` takes.
SYSTEM: tuple[Setting[Any], ...] = (
    MODEL,
    REVISION,
    POOL_THREADS,
    BLAS,
    WEIGHTS,
    DRAFTS,
    MAX_BATCH,
    KV_MEMORY,
    PREFIX_MEMORY,
    WORKERS,
    MAX_JOBS,
    MAX_GROWTH,
    OWN_REDIS_URL,
    QUEUE,
    HOST,
    HOST_NAME,
    PORT,
    TOKEN_FILE,
    INSECURE,
    REDIS_PORT,
    REDIS_DIR,
    DRAIN_TIMEOUT,
    TIMEOUT,
    BODY_TIMEOUT,
    MAX_QUEUE,
    SHOW_PROMPTS,
    LOG_PROMPTS,
    LOG_LEVEL,
)


def of_system(**given: str) -> dict[str, Any]:
    """The settings of a whole system by name: those given, as text, before the environment's, before the defaults.

    Raises:
        BadRequest: one of them cannot be read.
    """
    return {setting.name: setting.resolve(given.get(setting.name)) for setting in SYSTEM}
