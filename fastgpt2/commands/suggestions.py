"""What is said of a word on the command line, or of a variable, that means nothing here: what may be meant instead."""

from __future__ import annotations

import re
from argparse import ArgumentError
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from itertools import pairwise

from fastgpt2.commands.arguments import Command, options_of
from fastgpt2.foreign_fields import sentence_for

# How alike two names must be, by difflib's ratio and without dashes: "maxtoken" and "maxnewtokens" are by 0.8.
_LIKENESS = 0.78
_SHOWN_CHARACTERS = 100
_PREFIX = "FASTGPT2_"


def _by_name(names_of: Mapping[str, str]) -> dict[str, str]:
    """Return a table the other way round: for each name, what stands before it."""
    return {name: meant for meant, names in names_of.items() for name in names.split()}


# The options of other programs (transformers, vLLM, text-generation-inference, llama.cpp, the first GPT-2, OpenAI's
# and Redis's tools) by the names of ours.
_MEANT = _by_name(
    {
        "--alive-file": "health-file liveness-file",
        "--bad-word": "bad-words bad-words-ids ban",
        "--blas": "kernel math-library",
        "--choice": "choices guided-choice",
        "--deadline": "job-timeout time-limit ttl",
        "--do-sample": "sample sampling",
        "--drafts": "draft draft-max draft-model speculative-config speculative-model num-speculative-tokens speculate",
        "--escape": "e escapes unescape",
        "--failed": "all-failed errors",
        "--format": "input-format input-type",
        "--frequency-penalty": "freq-penalty",
        "--host": "address bind hostname listen ip",
        "--ignore-eos": "ignore-eos-token",
        "--in-flight": "concurrency jobs max-concurrency num-concurrent parallel-requests",
        "--json": "as-json output-json",
        "--json-schema": "guided-json response-format schema",
        "--kv-memory": "cache-ram cache-size kv-cache-memory kv-cache-memory-bytes kv-cache-size kv-cache swap-space",
        "--log-level": "debug log loglevel q quiet uvicorn-log-level v verbose verbosity",
        "--logprobs": "n-probs top-n-tokens",
        "--limit": "count lines",
        "--max-batch": "batch batch-size max-batch-size max-num-seqs n-parallel np parallel",
        "--max-new-tokens": "length max-completion-tokens max-gen-toks max-length max-tokens n-predict new-tokens "
        "num-predict num-tokens predict tokens",
        "--max-queue": "max-concurrent-requests max-depth queue-size",
        "--min-new-tokens": "min-length min-tokens",
        "--model": "checkpoint hf-repo m model-id model-name model-name-or-path model-path pretrained",
        "--n": "best nsamples num-return-sequences num-samples num-texts samples",
        "--no-repeat-ngram-size": "no-repeat-ngram",
        "--output": "o out out-file output-file output-path outfile",
        "--port": "http-port p",
        "--redis-url": "broker redis u url",
        "--regex": "guided-regex pattern",
        "--repetition-penalty": "repeat-penalty rep-pen",
        "--restart": "force overwrite",
        "--seed": "random-seed s",
        "--served-model-name": "a alias model-alias served-name",
        "--state": "filter status",
        "--stop": "r reverse-prompt stop-sequence stop-sequences stop-string stop-strings stop-words stopword until",
        "--suppress-tokens": "banned-tokens ban-tokens",
        "--temperature": "temp",
        "--threads": "cores cpu cpus num-shard num-threads t tensor-parallel-size tp threads-batch",
        "--timeout": "max-wait wait-timeout",
        "--token-file": "api-key-file token-path",
        "--tokenizer": "tokenizer-name tokenizer-path",
        "--typical-p": "typical",
        "--weights": "dtype precision quantization quantize torch-dtype type",
        "--workers": "c-workers data-parallel-size dp n-workers num-procs num-workers processes replicas",
    }
)

# The same where a command of ours has such an option and means something else: `rq requeue --all`.
_OF_COMMAND = {("requeue", "all"): "--failed"}

# What other programs have and this one does not, or has otherwise than by an option: what is said of that.
_ELSEWHERE = _by_name(
    {
        "models run on CPUs here; leave it out": (
            "cuda device device-map gpu gpu-layers gpu-memory-utilization gpus main-gpu n-gpu-layers ngl no-cuda "
            "tensor-split"
        ),
        "the model's own number of positions holds; leave it out": (
            "block-size c context-length ctx-size max-input-length max-input-tokens max-model-len max-total-tokens "
            "n-ctx"
        ),
        "no code that comes with a model is run here; leave it out": "trust-remote-code",
        "the folder of the cache is given by the variable FASTGPT2_CACHE, that of downloads by HF_HOME": (
            "cache cache-dir download-dir huggingface-hub-cache models-dir"
        ),
        "the token is given by the variable FASTGPT2_TOKEN or by --token-file FILE; other users can read options": (
            "api-key auth auth-token token"
        ),
        "the hub's token is given by the variable HF_TOKEN": "hf-token hf-api-token",
        "a password is part of the Redis URL, which the variable FASTGPT2_REDIS_URL gives": "password redis-password",
        "`fastgpt2 --version` prints the version": "version V",
    }
)

# Options of other programs for what is the one argument here.
_ARGUMENTS = {
    "prompt": "prompt p text inputs",
    "file": "file f i in in-file input input-file input-path dataset prompts",
    "job": "job job-id id",
    "action": "action",
}

# Commands of other programs.
_COMMANDS = _by_name(
    {
        "up": "dev launch run-server serve server start system",
        "api": "endpoint http rest",
        "worker": "consume work",
        "pool": "scale workers",
        "status": "health info monitor ps queue stats top",
        "jobs": "failed history list ls list-jobs",
        "requeue": "again redo rerun restart retry run-again",
        "enqueue": "add ask client push send submit",
        "result": "fetch get output wait",
        "cancel": "abort delete kill remove rm stop",
        "batch": "bulk file map run-batch",
        "generate": "chat complete completion completions eval gen predict prompt run sample text",
        "bench": "benchmark measure perf speed",
        "pack": "convert download prepare pull quantize",
        "cache": "clean prune",
    }
)


def about_argument(error: ArgumentError, command: Command) -> str:
    """Return the sentence for an option or an argument that argparse refuses."""
    option = (error.argument_name or "").partition("/")[0]  # of "--n/-n"
    own = options_of(command)
    if option not in own:
        return f"{error.argument_name}: {error.message}"
    setting, stands_for = own[option]
    if stands_for is not None:
        return f"{option} takes no value; write {setting.option}, or {setting.no_option}"
    return f"{option} needs a value: {option} {setting.metavar}; a value that begins with a dash is written {option}=-x"


def about_option(word: str, name: str, commands: Mapping[str, Command]) -> str:
    """Return the sentence for an option that the command `name` does not have."""
    own = options_of(commands[name])
    bare = word.lstrip("-").replace("_", "-")
    spelled = f"--{bare.lower()}"
    meant = _MEANT.get(bare) or _MEANT.get(bare.lower(), "")
    unknown = f"unknown option {_shown(word)}"
    positional = commands[name].positional
    if spelled in own:
        return f"{unknown}; did you mean {spelled}?"
    if positional is not None and bare in _ARGUMENTS.get(positional.name, "").split():
        return f"{unknown}; {positional.name.upper()} is given without one: {commands[name].usage(name)}"
    for option in (_OF_COMMAND.get((name, bare), ""), spelled, meant):
        if option in own:
            return f"{unknown}; did you mean {option}?"
        if option and (having := _having(option, commands)):
            return f"{unknown}; {having} {'it' if option == spelled else option}"
    if bare in _ELSEWHERE:
        return f"{unknown}: {_ELSEWHERE[bare]}"
    _, _, reason = sentence_for(bare.replace("-", "_"), ()).partition(" is refused: ")
    if reason:
        return f"{unknown}: {reason}"
    begun = [option for option in own if option.startswith(spelled) and len(bare) > 1]
    if begun:
        return f"{unknown}; did you mean {' or '.join(begun[:3])}?"
    if alike := _most_alike(spelled, own):
        return f"{unknown}; did you mean {alike}?"
    if alike := _most_alike(spelled, [option for command in commands.values() for option in options_of(command)]):
        return f"{unknown}; {_having(alike, commands)} {alike}"
    as_text = ""
    if positional is not None and positional.choices is None and not re.match("--[A-Za-z]", word):
        as_text = f". A {positional.name.upper()} that begins with a dash is put behind --"
    return f"{unknown}; `fastgpt2 {name} --help` lists the options{as_text}"


def about_first_word(word: str, commands: Mapping[str, Command]) -> str:
    """Return the sentence for a first word that is no command."""
    if word.startswith("-"):
        option = word.partition("=")[0]
        if having := _having(option, commands):
            return f"options come after the command: fastgpt2 COMMAND {option} ...; {having} it"
        return f"unknown option {_shown(option)}; the first word is a command, such as fastgpt2 generate"
    unknown = f"unknown command {word[:_SHOWN_CHARACTERS]!r}"
    if word in ("help", "version"):
        return f"{unknown}; did you mean fastgpt2 --{word}?"
    meant = _COMMANDS.get(word.lower()) or _most_alike(word.lower(), commands)
    if meant:
        return f"{unknown}; did you mean fastgpt2 {meant}?"
    if any(character.isspace() for character in word):
        return f"{unknown}; to continue a text: fastgpt2 generate TEXT"
    return f"{unknown}; there are {', '.join(commands)}"


def about_extra_words(others: Sequence[str], words: Sequence[str], name: str, command: Command) -> str:
    """Return the sentence for words that are neither options nor values, where there are too many of them.

    Args:
        others: the words of this kind.
        words: all words of the command.
    """
    dashed = next((word for word in others if re.match("[\u2010-\u2015\u2212]+[A-Za-z]", word)), None)
    if dashed:
        meant = "--" + dashed.lstrip("\u2010\u2011\u2012\u2013\u2014\u2015\u2212")
        return f"{_shown(dashed)} begins with another dash than that of the keyboard; write {_shown(meant)}"
    options = options_of(command)
    for before, word in pairwise(words):
        stands_for = options[before][1] if before in options else None
        if word in others and stands_for is not None and word.lower() in ("true", "false", "yes", "no", "1", "0"):
            setting = options[before][0]
            return f"{before} takes no value such as {word!r}; write {setting.option}, or {setting.no_option}"
    if command.positional is None:
        for before, _, word in zip(words, words[1:], words[2:], strict=False):
            if before in options and options[before][0].join is not None and word in others:
                return f"{word[:_SHOWN_CHARACTERS]!r} is one word too many: give {before} once for each value"
        return f"{others[0][:_SHOWN_CHARACTERS]!r} is one word too many: {command.usage(name)}"
    what = command.positional.name.upper()
    extra = f"{others[1][:_SHOWN_CHARACTERS]!r} is one word too many: {command.usage(name)}"
    if "--" in words[: words.index(others[1])]:
        return f"{extra}. Behind --, no word is an option"
    if command.positional.name == "prompt":
        return f"{extra}. Put quotes around a {what} of several words"
    return f"{extra}, with one {what}"


def about_variable(variable: str, known: Iterable[str]) -> str | None:
    """Return the sentence for an environment variable that begins as ours do and is none; None if none is alike.

    Kubernetes sets variables for each of its services, and people may have their own.
    """
    options = {f"--{name.removeprefix(_PREFIX).lower().replace('_', '-')}": name for name in known}
    bare = variable.removeprefix(_PREFIX).lower().replace("_", "-")
    meant = options.get(_MEANT.get(bare, "")) or options.get(_most_alike(f"--{bare}", options) or "")
    return f"{variable} is no setting of fastgpt2; did you mean {meant}?" if meant else None


def _having(option: str, commands: Mapping[str, Command]) -> str:
    """Return the commands that have an option, and the verb behind them; empty if there are none."""
    *names, last = [name for name, command in commands.items() if option in options_of(command)] or [""]
    if names:
        return f"fastgpt2 {', '.join(names)} and {last} have"
    return f"fastgpt2 {last} has" if last else ""


def _most_alike(name: str, known: Iterable[str]) -> str | None:
    """Return the name of those known that is most like this one, dashes apart; None if none is."""
    bare = {each.replace("-", ""): each for each in known}
    found = get_close_matches(name.replace("-", ""), bare, n=1, cutoff=_LIKENESS)
    return bare[found[0]] if found else None


def _shown(word: str) -> str:
    shown = word[:_SHOWN_CHARACTERS]
    return shown if shown.isprintable() else ascii(shown)
