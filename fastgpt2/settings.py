"""All settings, each once: its option, its environment variable, its default and how its text is read.

An option wins over the environment, and that over the default. The setting `max_new_tokens` has the option
`--max-new-tokens` and the variable `FASTGPT2_MAX_NEW_TOKENS`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fastgpt2.errors import BadRequest

T = TypeVar("T")


@dataclass(frozen=True)
class Setting(Generic[T]):
    """One setting.

    Attributes:
        parse: reads the value from a text; raises ValueError with the rest of a sentence that begins with the text.
        shown: the default as `--help` shows it, where that is not the value itself.
    """

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
        """Return the value of the option if it is `given`, else that of the environment, else the default.

        Raises:
            BadRequest: the text cannot be read; the message names the option or the variable.
        """
        text, source = given, self.option
        if text is None:
            text, source = os.environ.get(self.variable), self.variable
        # A compose file passes on a variable that is not set as an empty one.
        if text is None or (text == "" and source == self.variable):
            return self.default
        if text == "":
            raise BadRequest(f"{source} is empty; leave it out for the default")
        try:
            return self.parse(text)
        except ValueError as reason:
            # A secret (the Redis URL) gets into no message: it is read by `str`, which never fails, and checked where
            # it is used.
            raise BadRequest(f"{source}: {text!r} {reason}") from None


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """Return a reader of whole numbers within these bounds."""

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
    """Return the bytes that a text such as 2GB, 512M or 1.5GiB names."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmgt]?i?)b?", text.strip().lower())
    if found is None or found[2] not in _SIZES:
        raise ValueError("is not a size like 2GB or 512MiB")
    value = float(found[1]) * _SIZES[found[2]]
    if not 1 <= value <= 1 << 50:
        raise ValueError("is not between 1 byte and 1 PiB")
    return int(value)


def size_or_none(text: str) -> int:
    """Return the bytes as `size` reads them, and 0 for "0" or "off"."""
    return 0 if text.strip().lower() in ("0", "off") else size(text)


def yes_or_no(text: str) -> bool:
    yes, no = ("1", "true", "yes", "on"), ("0", "false", "no", "off", "")
    if text.lower() not in (*yes, *no):
        raise ValueError("is neither yes nor no")
    return text.lower() in yes


def word(text: str) -> str:
    if not text or any(c.isspace() for c in text):
        raise ValueError("must be one word")
    return text


def one_of(*choices: str) -> Callable[[str], str]:
    """Return a reader of one of these words, in any case."""

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


def token_ids(text: str) -> tuple[int, ...]:
    """Return the token ids of a text such as 50256 or 13,198."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and part.isascii() and len(part) < 11 for part in parts):
        raise ValueError("is not a list of token ids with commas between them")
    return tuple(int(part) for part in parts)


def log_level(text: str) -> str:
    if text.upper() not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise ValueError("is not one of debug, info, warning, error")
    return text.upper()


def flag(name: str, purpose: str) -> Setting[bool]:
    """Return a setting that is yes or no, and no by default."""
    return Setting(name, "", yes_or_no, False, purpose)


def duration(name: str, default: float, purpose: str) -> Setting[float]:
    """Return a setting in seconds."""
    return Setting(name, "SECONDS", seconds, default, purpose, f"{default:g} seconds")


# For each setting: its name, what `--help` calls the value, its reader, its default; then the help, and the default as
# the help shows it where that is not the value itself.
# fmt: off
MODEL = Setting(
    "model", "ID|PATH", str, "gpt2",
    "The model: an id on the hub such as gpt2-medium, a folder, or demo, the small model that comes with fastgpt2.",
)
REVISION: Setting[str | None] = Setting(
    "revision", "REV", str, None, "The branch, tag or commit of the model's repository on the hub.", "main"
)
TOKENIZER: Setting[str | None] = Setting(
    "tokenizer", "ID|PATH", str, None,
    "Another tokenizer than the model's own, for a model that has none: an id on the hub such as gpt2, or a folder.",
    "the model's own",
)
GENERATION_CONFIG = Setting(
    "generation_config", "HOW", one_of("auto", "none"), "auto",
    "The generation settings to follow. auto: the model's generation_config.json, as transformers does; what is not "
    "applied of it is logged. none: only the ids in config.json that begin and end a text.",
)
REDIS_URL = Setting(
    "redis_url", "URL", str, "redis://127.0.0.1:6379/0",
    "The Redis to use. Other users of this machine can read options: set the variable if the URL holds a password, or "
    "add ?password_file=PATH to the URL.",
)
OWN_REDIS_URL: Setting[str | None] = Setting(
    "redis_url", "URL", str, None, "The Redis to use instead of an embedded one.", "an embedded Redis"
)
QUEUE = Setting("queue", "NAME", word, "fastgpt2", "The name of the RQ queue.")
WORKERS = Setting("workers", "N", whole_number(1, 1024), 2, "The number of worker processes.")
THREADS: Setting[int | None] = Setting(
    "threads", "N", whole_number(1, 1024), None,
    "The number of cores to use, each by a process of its own.",
    "all cores, or one for a small model",
)
POOL_THREADS: Setting[int | None] = Setting(
    "threads", "N", whole_number(1, 1024), None,
    "The number of cores that each worker uses, each core by a process of its own.",
    "cores / workers, or one for a small model",
)
BLAS = Setting(
    "blas", "NAME", one_of("auto", "openblas", "mkl", "compiled"), "auto",
    "The code that multiplies float32 weights: openblas, mkl, compiled, or auto, which measures those that are "
    "installed and takes the fastest.",
)
WEIGHTS = Setting(
    "weights", "TYPE", one_of("float32", "bfloat16", "int8"), "float32",
    "The type of the weights: float32, bfloat16 or int8. The latter two are faster and smaller but rounded, so that "
    "texts may differ.",
)
DRAFTS: Setting[str | int] = Setting(
    "drafts", "HOW", drafts, "auto",
    "How to guess the next tokens, several of which one step then verifies; the text is the same. auto: look them up "
    "in the text so far, as many as pay. 1 to 15: look up this many. int8: as auto, and guess by int8 weights where "
    "that promises more. off: guess nothing.",
)
MAX_BATCH: Setting[int | None] = Setting(
    "max_batch", "N", whole_number(1, 1024), None,
    "The most jobs that a worker decodes together.",
    "as many as pay on this machine, which is measured",
)
KV_MEMORY: Setting[int | None] = Setting(
    "kv_memory", "SIZE", size, None,
    "The most memory for the keys and values of a worker's jobs, such as 2GB; further jobs wait.",
    "a quarter of the memory, divided by the pool's workers",
)
PREFIX_MEMORY: Setting[int | None] = Setting(
    "prefix_memory", "SIZE", size_or_none, None,
    "The most memory, on top of --kv-memory, in which a worker keeps the keys and values of prompts for later prompts "
    "that begin alike, such as 512MB; 0 for none.",
    "an eighth of the memory for keys and values",
)
MAX_JOBS: Setting[int | None] = Setting(
    "max_jobs", "N", whole_number(1, 1 << 40), None, "End a worker after N jobs; a pool starts another.", "no limit"
)
MAX_GROWTH = Setting(
    "max_growth", "SIZE", size, 512 * 1024 * 1024,
    "End a worker whose own memory, without keys and values, has grown by more than this; a pool starts another.",
    "512MiB",
)
ALIVE_FILE: Setting[str | None] = Setting(
    "alive_file", "FILE", str, None,
    "A file for probes: it exists while the worker serves, and is touched every few seconds while the worker's loop "
    "turns.",
    "no file",
)
BURST = flag("burst", "End when the queue is empty.")
NAME: Setting[str | None] = Setting("name", "NAME", word, None, "The name of the worker.", "host and process id")
HOST = Setting(
    "host", "ADDRESS", str, "127.0.0.1", "The address that the HTTP endpoint listens on; 0.0.0.0 for all of them."
)
HOST_NAME: Setting[str | None] = Setting(
    "host_name", "NAME", word, None,
    "Without a token, serve only requests that are made to this name or to localhost, whatever address the endpoint "
    "listens on.",
    "the address itself if only this machine can reach it, any name otherwise",
)
PORT = Setting("port", "PORT", whole_number(0, 65535), 8000, "The port of the HTTP endpoint; 0 takes a free one.")
# A variable only, as every user of the machine can read options.
TOKEN: Setting[str | None] = Setting(
    "token", "TOKEN", str, None, "The token that requests to the HTTP endpoint must have.", "none"
)
TOKEN_FILE: Setting[str | None] = Setting(
    "token_file", "FILE", str, None,
    "A file whose first line is the token that requests to the HTTP endpoint must have.",
    "the token of FASTGPT2_TOKEN, or none",
)
INSECURE = flag("insecure", "Serve other machines without a token.")
REDIS_PORT = Setting(
    "redis_port", "PORT", whole_number(0, 65535), 6379,
    "The port of the embedded Redis; a free one is taken if this one is in use.",
)
REDIS_DIR: Setting[str | None] = Setting(
    "redis_dir", "DIR", str, None,
    "The folder in which the embedded Redis keeps its append-only file.",
    "a temporary folder, removed at the end",
)
DRAIN_TIMEOUT = duration(
    "drain_timeout", 30.0, "How long workers may go on with their jobs when they are told to stop."
)
MAX_QUEUE: Setting[int | None] = Setting(
    "max_queue", "N", whole_number(1, 1 << 40), None, "Refuse new jobs while N jobs wait.", "no limit"
)
PRIORITY = Setting(
    "priority", "NAME", one_of("high", "normal", "low"), "normal", "The priority in the queue: high, normal or low."
)
MAX_NEW_TOKENS: Setting[int | None] = Setting(
    "max_new_tokens", "N", whole_number(0, 1 << 20), None, "Generate at most N tokens; N may be 0.", "20"
)
STOP: Setting[str | None] = Setting(
    "stop", "TEXT", str, None, "End the generated text before it contains TEXT.", "none"
)
IGNORE_EOS = flag("ignore_eos", "Go on after the end-of-text token.")
STOP_TOKEN_IDS: Setting[tuple[int, ...]] = Setting(
    "stop_token_ids", "IDS", token_ids, (),
    "End the generated text at any of these tokens, which it leaves out: token ids with commas between them.",
    "none",
)
MIN_NEW_TOKENS = Setting(
    "min_new_tokens", "N", whole_number(0, 1 << 20), 0,
    "Generate at least N tokens: until then, neither an end-of-text or stop token nor the stop text ends it.",
)
LOGPROBS: Setting[int | None] = Setting(
    "logprobs", "N", whole_number(0, 20), None,
    "In a JSON result, give each token's log probability, and those of the N likeliest tokens in its place.",
    "none",
)
ECHO = flag("echo", "In a JSON result, let the text begin with the prompt.")
DEADLINE: Setting[float | None] = Setting(
    "deadline", "SECONDS", seconds, None,
    "Let the job fail if it has not ended this long after it was enqueued.",
    "none",
)
STREAM = flag("stream", "Print the text as it comes.")
OUTPUT: Setting[str | None] = Setting(
    "output", "FILE", str, None, "The file for the results, a line of JSON each; - is standard output.", "-"
)
FORMAT = Setting(
    "format", "NAME", one_of("auto", "txt", "jsonl"), "auto",
    "The format of the prompts: txt (one prompt a line), jsonl, or auto, which goes by the file's name.",
)
IN_FLIGHT = Setting("in_flight", "N", whole_number(1, 100_000), 256, "The most jobs to have in the queue at once.")
RESTART = flag("restart", "Begin anew, and not after the last line of the output.")
TIMINGS = flag("timings", "Print on standard error how long each part took.")
JSON = flag("json", "Print all that is known, as JSON.")
WAIT = flag("wait", "Wait for the result and print it.")
VERIFY = flag("verify", "Check every byte of the packed file, and make it anew if one is wrong.")
MEASURE = flag(
    "measure", "Measure also what a worker with the same --threads measures when it first starts on this machine."
)
ALL = flag("all", "With prune: remove every packed file, and what was measured of this machine.")
DRY_RUN = flag("dry_run", "With prune: say what would be removed, and remove nothing.")
TIMEOUT = duration("timeout", 60.0, "How long to wait for a result.")
BODY_TIMEOUT = duration("body_timeout", 20.0, "How long the body of a request to the HTTP endpoint may take to come.")
SHOW_PROMPTS = flag("show_prompts", "Show prompts in the HTTP endpoint's list of the latest jobs.")
LOG_PROMPTS = flag("log_prompts", "Write prompts into the workers' logs.")
LOG_LEVEL = Setting(
    "log_level", "LEVEL", log_level, "INFO",
    "The least important messages to log: debug, info, warning or error.",
    "info",
)

# fmt: on

# The settings of the commands, in the order in which `--help` shows them; first, groups that several commands share.
OF_MODEL = (MODEL, REVISION, TOKENIZER, GENERATION_CONFIG)
OF_QUEUE = (REDIS_URL, QUEUE)
OF_ARITHMETIC = (THREADS, BLAS, WEIGHTS)
OF_BATCH = (MAX_BATCH, KV_MEMORY, PREFIX_MEMORY)
OF_REQUEST = (MAX_NEW_TOKENS, STOP, STOP_TOKEN_IDS, IGNORE_EOS, MIN_NEW_TOKENS, LOGPROBS, ECHO)
OF_LOAD = (*OF_MODEL, *OF_ARITHMETIC, DRAFTS)
OF_WORKERS = (*OF_MODEL, POOL_THREADS, BLAS, WEIGHTS, DRAFTS, *OF_BATCH, WORKERS, MAX_JOBS, MAX_GROWTH)
OF_ADDRESS = (HOST, HOST_NAME, PORT, TOKEN_FILE, INSECURE)
OF_ANSWERS = (TIMEOUT, BODY_TIMEOUT, MAX_QUEUE, SHOW_PROMPTS)
OF_END = (DRAIN_TIMEOUT, MAX_JOBS, MAX_GROWTH, ALIVE_FILE, BURST)
OF_LOG = (LOG_PROMPTS, LOG_LEVEL)

OF_REDIS = (REDIS_PORT, REDIS_DIR)
OF_UP = (*OF_WORKERS, OWN_REDIS_URL, QUEUE, *OF_ADDRESS, *OF_REDIS, DRAIN_TIMEOUT, *OF_ANSWERS, *OF_LOG)
OF_WORKER = (*OF_LOAD, *OF_BATCH, *OF_QUEUE, NAME, *OF_END, *OF_LOG)
OF_POOL = (*OF_WORKERS, *OF_QUEUE, DRAIN_TIMEOUT, ALIVE_FILE, *OF_LOG)
OF_ENDPOINT = (*OF_QUEUE, *OF_ADDRESS, *OF_ANSWERS, LOG_LEVEL)
OF_ENQUEUE = (*OF_REQUEST, PRIORITY, DEADLINE, *OF_QUEUE, MAX_QUEUE, WAIT, STREAM, TIMEOUT, JSON)
OF_FILE = (OUTPUT, FORMAT, IN_FLIGHT, RESTART, *OF_REQUEST, PRIORITY, DEADLINE, *OF_QUEUE, MAX_QUEUE)


def of_system(**given: str) -> dict[str, Any]:
    """Return the settings of a whole system by name. A text that is given wins over the environment.

    Raises:
        BadRequest: one of them cannot be read.
    """
    return {setting.name: setting.resolve(given.get(setting.name)) for setting in OF_UP}
