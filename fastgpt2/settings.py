"""All settings of the programs, each once, and which of them each program has."""

from __future__ import annotations

import operator
import os
from typing import Any

from fastgpt2.setting import Setting, Settings, choosing, duration, flag, texts
from fastgpt2.setting_values import (
    biases,
    delimiter,
    drafts,
    host_name,
    integer,
    log_level,
    networks,
    number,
    one_of,
    one_text,
    origins,
    public_url,
    queue,
    schema,
    seconds,
    served_names,
    size,
    size_or_none,
    token_ids,
    web_url,
    whole_number,
    word,
    yes_or_no,
)

# For each setting: its name, what `--help` calls the value, its reader, its default; then the help, and the default as
# the help shows it where that is not the value itself.
# fmt: off
MODEL = Setting(
    "model", "ID|PATH", str, "gpt2",
    "The model: an id on the hub such as gpt2-medium, a folder, or demo, the small model that comes with fastgpt2.",
)
MODELS: Setting[tuple[str, ...]] = Setting(
    "model", "ID|PATH", one_text, ("gpt2",),
    "The model: an id on the hub such as gpt2-medium, a folder, or demo, the small model that comes with fastgpt2. "
    "Given several times, each model has --workers workers, and jobs that name no model go to the first.",
    "gpt2", join=operator.add,
)
# Not by FASTGPT2_MODEL, which may be set for a pool that the batch is to be sent to.
OWN_MODEL: Setting[str | None] = Setting(
    "model", "ID|PATH", str, None,
    "Start Redis and workers with this model for this run alone, and stop them at its end: an id on the hub, a folder, "
    "or demo, the small model that comes with fastgpt2. The options of workers, such as --weights, go with it.",
    "none: a pool that runs already", variable_of="batch_model",
)
SERVED_MODEL_NAME: Setting[tuple[str, ...]] = Setting(
    "served_model_name", "NAME", served_names, (),
    "The name by which jobs ask for the model, instead of the model as it is given; of several names, given one by one "
    "or with commas between them, the first is the one that is shown. With several models: MODEL=NAME or "
    "MODEL=NAME,NAME.",
    "the model as it is given", join=operator.add,
)
BATCH_MODEL_NAME: Setting[tuple[str, ...]] = Setting(
    "served_model_name", "NAME", served_names, (),
    "With --model: the name by which lines may ask for it, given as for fastgpt2 up. Without: the model of the running "
    "pool that lines are for which name none.",
    "the model as it is given; without --model, the pool's first", join=operator.add,
    variable_of="batch_served_model_name",
)
JOB_MODEL: Setting[str | None] = Setting(
    "model", "NAME", str, None, "The name of the model that the job is for, of those that the pool serves.",
    "the pool's first", variable_of="job_model",
)
NAMED_ONLY = flag("named_only", "Take only jobs that name the model; those that name none are left to other workers.")
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
CHAT_TEMPLATE: Setting[str | None] = Setting(
    "chat_template", "FILE", str, None,
    "A file with the chat template, in jinja2's language, by which chats become prompts. It takes the extra `chat`.",
    "the one that comes with the model, if there is one",
)
REDIS_URL = Setting(
    "redis_url", "URL", str, "redis://127.0.0.1:6379/0",
    "The Redis to use. Other users of this machine can read options: set the variable if the URL holds a password, or "
    "add ?password_file=PATH to the URL.",
)
OWN_REDIS_URL: Setting[str | None] = Setting(
    "redis_url", "URL", str, None, "The Redis to use instead of an embedded one.", "an embedded Redis"
)
QUEUE = Setting("queue", "NAME", queue, "fastgpt2", "The name of the RQ queue.")
WORKERS = Setting("workers", "N", whole_number(1, 1024), 2, "The number of worker processes, for each --model.")
OWN_WORKERS: Setting[int | None] = Setting(
    "workers", "N", whole_number(1, 1024), None, "The number of worker processes.",
    "as many as cores, divided by --threads; no more than --in-flight",
)
THREADS: Setting[int | None] = Setting(
    "threads", "N", whole_number(1, 1024), None,
    "The number of cores to use, each by a process of its own.",
    "all cores; one for a small model, or elsewhere than on x86 Linux",
)
POOL_THREADS: Setting[int | None] = Setting(
    "threads", "N", whole_number(1, 1024), None,
    "The number of cores that each worker uses, each core by a process of its own.",
    "cores / workers; one for a small model, or elsewhere than on x86 Linux",
)
BLAS = Setting(
    "blas", "NAME", one_of("auto", "openblas", "mkl", "compiled"), "auto",
    "The code that multiplies float32 weights: openblas, mkl, compiled, or auto, which takes compiled code where it "
    "can be made, else the faster one of the others.",
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
    "as many as pay on this machine, which is measured, and then learnt from the jobs",
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
    "host_name", "NAME", host_name, None,
    "Without a token, serve only requests that are made to this name or to this machine's own, whatever address the "
    "endpoint listens on.",
    "this machine's own names if only this machine can reach the address, any name otherwise",
)
PORT = Setting("port", "PORT", whole_number(0, 65535), 8000, "The port of the HTTP endpoint; 0 takes a free one.")
# A variable only, as every user of the machine can read options.
TOKEN: Setting[str | None] = Setting(
    "token", "TOKEN", str, None, "The token that requests to the HTTP endpoint must have.", "none"
)
TOKEN_FILE: Setting[str | None] = Setting(
    "token_file", "FILE", str, None,
    "A file of the tokens of which requests to the HTTP endpoint must have one: lines NAME:TOKEN or NAME:sha256:HEX, "
    "also with waiting=N and tokens_per_minute=N, or one bare token. SIGHUP has it read again.",
    "the token of FASTGPT2_TOKEN, or none",
)
INSECURE = flag("insecure", "Serve other machines without a token.")
ALLOW_ORIGIN: Setting[tuple[str, ...]] = Setting(
    "allow_origin", "ORIGIN", origins, (),
    "Let web pages of this origin, such as https://app.example.com, use the HTTP endpoint (CORS); may be given several "
    "times. * stands for the pages of everybody.",
    "the endpoint's own page alone", join=operator.add,
)
PUBLIC_URL: Setting[str | None] = Setting(
    "public_url", "URL", public_url, None,
    "Where a proxy makes the HTTP endpoint reachable, such as https://pool.example.com or https://example.com/gpt2.",
    "none",
)
TRUSTED_PROXY: Setting[tuple[str, ...]] = Setting(
    "trusted_proxy", "ADDRESS", networks, (),
    "Believe this proxy, or those of a network such as 10.0.0.0/8, which name was asked for, by the header "
    "X-Forwarded-Host or Forwarded; may be given several times.",
    "nobody", join=operator.add,
)
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
CHAT = flag("chat", "Take the prompt for a user's message, and print the model's answer; it takes a chat template.")
SYSTEM: Setting[str | None] = Setting(
    "system", "TEXT", str, None, "With --chat: a system message, before the user's.", "none"
)
PRIORITY = Setting(
    "priority", "NAME", one_of("high", "normal", "low"), "normal", "The priority in the queue: high, normal or low."
)
# A file of prompts has time: whoever waits for one text goes before it.
BATCH_PRIORITY = Setting(
    "priority", "NAME", one_of("high", "normal", "low"), "low", "The priority in the queue: high, normal or low."
)
MAX_NEW_TOKENS: Setting[int | None] = Setting(
    "max_new_tokens", "N", whole_number(0, 1 << 20), None, "Generate at most N tokens; N may be 0.", "20"
)
STOP = texts("stop", "End the generated text before it contains TEXT; may be given several times.")
ESCAPE = flag(
    "escape",
    r"Read escapes in PROMPT, --stop, --bad-word and --choice: \n for a line end, \t for a tab, \\ for a backslash. "
    "Texts in a file are taken as they are.",
)
IGNORE_EOS = flag("ignore_eos", "Go on after the end-of-text token.")
STOP_TOKEN_IDS: Setting[tuple[int, ...]] = Setting(
    "stop_token_ids", "IDS", token_ids, (),
    "End the generated text at any of these tokens, which it leaves out: token ids with commas between them; may be "
    "given several times.",
    "none", join=operator.add,
)
TRUNCATE_PROMPT_TOKENS: Setting[int | None] = Setting(
    "truncate_prompt_tokens", "N", whole_number(-1, 1 << 17), None,
    "Read only the last N tokens of a longer prompt; -1 for as many as leave room for the new tokens.",
    "none",
)
MIN_NEW_TOKENS = Setting(
    "min_new_tokens", "N", whole_number(0, 1 << 20), 0,
    "Generate at least N tokens: until then, neither an end-of-text or stop token nor the stop text ends it.",
)
LOGPROBS: Setting[int | None] = Setting(
    "logprobs", "N", whole_number(0, 20), None,
    "Give each token's log probability, and those of the N likeliest tokens in its place, in results that are JSON.",
    "none",
)
ECHO = flag("echo", "Let the text begin with the prompt, in results that are JSON.")
DO_SAMPLE: Setting[bool | None] = Setting(
    "do_sample", "", yes_or_no, None,
    "Draw tokens at random, at the model's own temperature, or 1, if there is no --temperature. --no-do-sample takes "
    "the likeliest tokens, whatever else is given.",
)
TEMPERATURE = choosing(
    "temperature", "T", number,
    "Draw each token at random, by its probability; below 1, likely tokens become likelier. 0 takes the likeliest.",
    "0",
)
TOP_K = choosing("top_k", "K", integer, "Draw among the K likeliest tokens; 0 for all.")
TOP_P = choosing("top_p", "P", number, "Draw among the likeliest tokens that together have the probability P.")
MIN_P = choosing("min_p", "P", number, "Draw among the tokens at least P times as likely as the likeliest.")
TYPICAL_P = choosing(
    "typical_p", "P", number,
    "Draw among the tokens whose surprise is nearest to the expected one, which together have the probability P.",
)
SEED = choosing(
    "seed", "N", integer,
    "Draw by this seed: the same request with the same seed gives the same text.",
    "a random one, which is told",
)
TEXTS = Setting("n", "N", integer, 1, "Give N texts of the prompt.")
BEST_OF = choosing(
    "best_of", "N", integer, "Generate N texts, and give those that are likeliest a token, as many as --n says.", "--n"
)
REPETITION_PENALTY = choosing(
    "repetition_penalty", "X", number, "Above 1: make tokens less likely that the prompt or the text has already."
)
NO_REPEAT_NGRAM_SIZE = choosing(
    "no_repeat_ngram_size", "N", integer, "Never repeat N tokens in a row, of the prompt or the text; 0 may repeat all."
)
PRESENCE_PENALTY = choosing(
    "presence_penalty", "X", number, "Subtract X from the scores of tokens that the text has already.", "none"
)
FREQUENCY_PENALTY = choosing(
    "frequency_penalty", "X", number, "Subtract X from a token's score for each time that the text has it.", "none"
)
LOGIT_BIAS = choosing(
    "logit_bias", "BIASES", biases,
    "Add these to the scores of tokens: token ids with their biases, such as 198=-100,464=2.5, or a JSON object; may "
    "be given several times.",
    join=operator.or_,
)
BAD_WORD: Setting[tuple[str, ...] | None] = Setting(
    "bad_word", "TEXT", one_text, None, "Never generate TEXT; may be given several times.", "the model's own, or none",
    join=operator.add, field="bad_words",
)
SUPPRESS_TOKENS = choosing(
    "suppress_tokens", "IDS", token_ids,
    "Never generate these tokens: token ids with commas between them; may be given several times.",
    join=operator.add,
)
CHOICE = texts("choice", "The generated text is one of these; given once for each of them.", "choices")
REGEX = choosing("regex", "PATTERN", str, "The generated text matches this regular expression as a whole.", "none")
JSON_SCHEMA = choosing(
    "json_schema", "FILE|JSON", schema, "The generated text is JSON that this JSON schema describes.", "none"
)
DEADLINE: Setting[float | None] = Setting(
    "deadline", "SECONDS", seconds, None,
    "Let the job fail if it has not ended this long after it was enqueued.",
    "none",
)
STREAM = flag("stream", "Print the text as it comes.")
OUTPUT: Setting[str | None] = Setting(
    "output", "FILE", str, None,
    "The file for the results, in the format that its name tells: .jsonl, .csv, .tsv, .parquet; all but the last also "
    "with .gz or .zst. - is standard output.",
    "-",
)
FORMAT = Setting(
    "format", "NAME", one_of("auto", "txt", "jsonl", "ndjson", "csv", "tsv", "parquet", "openai"), "auto",
    "The format of the input: txt (a prompt a line), jsonl, csv, tsv, parquet, openai (lines of OpenAI's batches), or "
    "auto, which goes by the file's name, and is txt for standard input.",
)
OUTPUT_FORMAT = Setting(
    "output_format", "NAME", one_of("auto", "jsonl", "csv", "tsv", "parquet"), "auto",
    "The format of the output: jsonl, csv, tsv, parquet, or auto, which goes by the file's name, and is jsonl for "
    "standard output.",
)
PROMPT_COLUMN: Setting[str | None] = Setting(
    "prompt_column", "NAME", str, None,
    "The column that holds the prompts, of a table or of the objects of a jsonl file. The other columns stand beside "
    "the results in the output.",
    "prompt, else text, or the only one of a table",
)
DELIMITER: Setting[str | None] = Setting(
    "delimiter", "CHARACTER", delimiter, None,
    "The character between two values of a csv or tsv file; TAB for a tab.",
    "a comma in csv, a tab in tsv",
)
IN_FLIGHT = Setting("in_flight", "N", whole_number(1, 100_000), 256, "The most jobs to have in the queue at once.")
RESTART = flag("restart", "Begin anew, and drop the results that the output has.")
RETRY_ERRORS = flag("retry_errors", "Run the lines again that are errors in the output.")
KEEP_GOING = flag("keep_going", "Go on even if the first 20 lines all fail.")
TIMINGS = flag("timings", "Print on standard error how long each part took.")
JSON = flag("json", "Print all that is known, as JSON.")
FAILED = flag("failed", "List all jobs that failed, the latest first, each with its error.")
ALL_FAILED = flag("failed", "Run all jobs again that failed, or were stopped.")
STATE: Setting[str | None] = Setting(
    "state", "STATE",
    one_of("queued", "started", "finished", "failed", "deferred", "scheduled", "canceled"), None,
    "List all jobs in this state, in RQ's words: queued, started, finished, failed, deferred, scheduled or canceled.",
    "the jobs that run, and the latest that have ended",
)
LIMIT = Setting("limit", "N", whole_number(1, 100_000), 20, "List at most N jobs.")
WAIT = flag("wait", "Wait for the result and print it.")
VERIFY = flag("verify", "Check every byte of the packed file, and make it anew if one is wrong.")
MEASURE = flag(
    "measure",
    "Measure this machine again, whatever is known of it: all that a worker with the same --threads measures when it "
    "first starts here. Tell each figure, and how far its repeats lay apart.",
)
MEASURE_MISSING = flag("measure_missing", "Measure what a worker with the same --threads would, and is not known yet.")
ALL = flag("all", "With prune: remove every packed file, and what was measured of this machine.")
DRY_RUN = flag("dry_run", "With prune: say what would be removed, and remove nothing.")
TIMEOUT = duration("timeout", 60.0, "How long to wait for a result.")
DURABILITY = Setting(
    "durability", "HOW", one_of("memory", "disk", "replica"), "memory",
    "What a written job or result must have reached before it counts: Redis's memory, its disk, or a replica as well.",
)
KEEP_ALIVE = duration("keep_alive", 75.0, "How long the HTTP endpoint keeps a connection open that is not used.")
BODY_TIMEOUT = duration("body_timeout", 20.0, "How long the body of a request to the HTTP endpoint may take to come.")
SHOW_PROMPTS = flag("show_prompts", "Show prompts in lists of jobs and on the page of a job.")
LOG_PROMPTS = flag("log_prompts", "Write prompts into the workers' logs.")
LOG_LEVEL = Setting(
    "log_level", "LEVEL", log_level, "INFO",
    "The least important messages to log: debug, info, warning or error.",
    "info",
)
LOG_FORMAT = Setting(
    "log_format", "NAME", one_of("text", "json"), "text",
    "The form of the log, and of all else on standard error: text, or json, which is one JSON event a line.",
)
OTLP_TRACES_ENDPOINT: Setting[str | None] = Setting(
    "otlp_traces_endpoint", "URL", web_url, None,
    "Where to send OpenTelemetry's spans by OTLP over HTTP, such as http://127.0.0.1:4318/v1/traces. The standard "
    "variables OTEL_... say the rest, and also this.",
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT, or no tracing",
)
OWN_LOG_LEVEL = Setting(
    "log_level", "LEVEL", log_level, "WARNING",
    "The least important messages of the run's own workers to show: debug, info, warning or error.",
    "warning",
)

# fmt: on

# The settings of the commands, in the order in which `--help` shows them; first, groups that several commands share.
OF_MODEL = (MODEL, REVISION, TOKENIZER, GENERATION_CONFIG)
OF_NAMES = (SERVED_MODEL_NAME, NAMED_ONLY)
OF_QUEUE = (REDIS_URL, QUEUE)
OF_ARITHMETIC = (THREADS, BLAS, WEIGHTS)
OF_BATCH = (MAX_BATCH, KV_MEMORY, PREFIX_MEMORY)
OF_DRAW = (DO_SAMPLE, TEMPERATURE, TOP_K, TOP_P, MIN_P, TYPICAL_P, SEED, TEXTS, BEST_OF)
OF_SCORES = (
    REPETITION_PENALTY, NO_REPEAT_NGRAM_SIZE, PRESENCE_PENALTY, FREQUENCY_PENALTY, LOGIT_BIAS, BAD_WORD,
    SUPPRESS_TOKENS,
)  # fmt: skip
OF_FORM = (CHOICE, REGEX, JSON_SCHEMA)
# Each gives a field of a `GenerationRequest`, and has its default.
OF_REQUEST: Settings = (
    MAX_NEW_TOKENS, STOP, STOP_TOKEN_IDS, IGNORE_EOS, MIN_NEW_TOKENS, TRUNCATE_PROMPT_TOKENS, LOGPROBS, ECHO,
    *OF_DRAW, *OF_SCORES, *OF_FORM,
)  # fmt: skip
OF_CHAT: Settings = (CHAT, SYSTEM)
# Those that give texts, in which `ESCAPE` counts.
OF_TEXT: Settings = (STOP, BAD_WORD, CHOICE)
OF_LOAD: Settings = (*OF_MODEL, CHAT_TEMPLATE, *OF_ARITHMETIC, DRAFTS)
OF_WORKERS = (
    MODELS, *OF_NAMES, *OF_MODEL[1:], CHAT_TEMPLATE, POOL_THREADS, BLAS, WEIGHTS, DRAFTS, *OF_BATCH, WORKERS, MAX_JOBS,
    MAX_GROWTH,
)  # fmt: skip
# Of a pool that a command starts for itself. Without the first, the others mean nothing there.
OF_OWN_POOL: Settings = (
    OWN_MODEL, BATCH_MODEL_NAME, *OF_MODEL[1:], CHAT_TEMPLATE, OWN_WORKERS,
    POOL_THREADS, BLAS, WEIGHTS, DRAFTS, *OF_BATCH, MAX_JOBS, MAX_GROWTH,
    OWN_LOG_LEVEL,
)  # fmt: skip
OF_ADDRESS = (HOST, HOST_NAME, PORT, TOKEN_FILE, INSECURE, ALLOW_ORIGIN, PUBLIC_URL, TRUSTED_PROXY)
OF_ANSWERS = (TIMEOUT, BODY_TIMEOUT, KEEP_ALIVE, MAX_QUEUE, SHOW_PROMPTS)
OF_END = (DRAIN_TIMEOUT, MAX_JOBS, MAX_GROWTH, ALIVE_FILE, BURST)
OF_LOG = (LOG_PROMPTS, LOG_LEVEL, LOG_FORMAT, OTLP_TRACES_ENDPOINT)

OF_REDIS = (REDIS_PORT, REDIS_DIR)
OF_UP = (*OF_WORKERS, OWN_REDIS_URL, QUEUE, DURABILITY, *OF_ADDRESS, *OF_REDIS, DRAIN_TIMEOUT, *OF_ANSWERS, *OF_LOG)
OF_WORKER: Settings = (MODEL, *OF_NAMES, *OF_LOAD[1:], *OF_BATCH, *OF_QUEUE, DURABILITY, NAME, *OF_END, *OF_LOG)
OF_POOL = (*OF_WORKERS, *OF_QUEUE, DURABILITY, DRAIN_TIMEOUT, ALIVE_FILE, *OF_LOG)
OF_ENDPOINT = (*OF_QUEUE, DURABILITY, *OF_ADDRESS, *OF_ANSWERS, LOG_LEVEL, LOG_FORMAT, OTLP_TRACES_ENDPOINT)
OF_ENQUEUE: Settings = (
    *OF_CHAT, *OF_REQUEST, ESCAPE, JOB_MODEL, PRIORITY, DEADLINE, *OF_QUEUE, DURABILITY, MAX_QUEUE, WAIT, STREAM,
    TIMEOUT, JSON, LOG_FORMAT,
)  # fmt: skip
OF_FILE: Settings = (
    OUTPUT,
    OUTPUT_FORMAT,
    FORMAT,
    PROMPT_COLUMN,
    DELIMITER,
    IN_FLIGHT,
    RESTART,
    RETRY_ERRORS,
    KEEP_GOING,
    *OF_REQUEST,
    ESCAPE,
    BATCH_PRIORITY,
    DEADLINE,
    *OF_QUEUE,
    DURABILITY,
    MAX_QUEUE,
    *OF_OWN_POOL,
    LOG_FORMAT,
)

# Variables beside those of the settings: the cache's, those that a pool sets, and one that only the compose file reads.
_OTHER_VARIABLES = ("CACHE", "POOL_WORKERS", "RESTARTS", "SUPERVISOR_PID", "IMAGE")

# Kubernetes sets variables such as FASTGPT2_API_SERVICE_HOST for a service that is called fastgpt2-api.
_OF_A_SERVICE = ("_SERVICE_", "_TCP")


def variables() -> list[str]:
    """Return the variables of all settings."""
    return [value.variable for value in globals().values() if isinstance(value, Setting)]


def unknown_variables() -> list[str]:
    """Return the environment's variables whose names begin as the settings' do, and that are none."""
    given = [name for name, value in os.environ.items() if value and name.startswith("FASTGPT2_")]
    known = {*variables(), *(f"FASTGPT2_{name}" for name in _OTHER_VARIABLES)} if given else set()
    return [name for name in given if name not in known and not any(part in name for part in _OF_A_SERVICE)]


def of_system(**given: str) -> dict[str, Any]:
    """Return the settings of a whole system by name. A text that is given wins over the environment.

    Raises:
        BadRequest: one of them cannot be read.
    """
    return {setting.name: setting.resolve(given.get(setting.name)) for setting in OF_UP}
