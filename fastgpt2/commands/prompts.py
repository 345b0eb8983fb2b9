"""The commands for one prompt or one job: `fastgpt2 generate`, `enqueue`, `result`, `cancel`; and `fastgpt2 status`.

`generate` loads a model and needs no queue. The others ask a running pool.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from time import perf_counter
from typing import TYPE_CHECKING, Any

from fastgpt2 import settings
from fastgpt2.errors import BadRequest
from fastgpt2.plurals import counted

if TYPE_CHECKING:
    from fastgpt2.engine.decoding.decoder import Decoder
    from fastgpt2.engine.decoding.records import GenerationRequest, GenerationResult
    from fastgpt2.engine.decoding.sequence import Sequence, TokenizedPrompt
    from fastgpt2.protocol.messages import Piece
    from fastgpt2.setting import Setting

# The most texts of one prompt that `generate` decodes together: about as many as pay. Further ones follow.
MOST_TOGETHER = 16


def generate(values: dict[str, Any]) -> int:
    """Load a model, continue the prompt, print the result."""
    from fastgpt2.engine.decoding.records import combine
    from fastgpt2.engine.engine import Engine
    from fastgpt2.engine.machine import hold_to_one_thread

    started = perf_counter()
    request = build_request(values)
    note_unprinted(values)
    hold_to_one_thread()
    engine = Engine.load(
        values["model"],
        revision=values["revision"],
        max_batch=min(request.texts, MOST_TOGETHER),
        prefix_memory=0,  # there is no second prompt
        threads=values["threads"],
        blas=values["blas"],
        weights=values["weights"],
        drafts=values["drafts"],
        tokenizer=values["tokenizer"],
        generation_config=values["generation_config"],
        chat_template=values["chat_template"],
    )
    prompt = engine.decoder.prepare(request)
    encoded = perf_counter()
    sequences, step_seconds = _decode(engine.decoder, prompt)
    result = combine(request, [sequence.result(engine.model) for sequence in sequences])
    if values["timings"]:
        times = engine.load_times
        lines = [
            ("mapped", times.mapped),
            ("tokenizer", times.tokenizer),
            ("loaded and encoded", encoded - started),
            *(("loop in", seconds) for seconds in step_seconds),
            ("total", perf_counter() - started),
        ]
        for name, seconds in lines:
            print(f"{name} {seconds * 1e3:.2f} ms", file=sys.stderr)
    print_result(result, values)
    return 0


def _decode(decoder: Decoder, prompt: TokenizedPrompt) -> tuple[list[Sequence], list[float]]:
    """Generate all texts of a prompt, as many together as there is room for. Return them, and the seconds of each step.

    Raises:
        FastGPT2Error: one of them cannot be generated.
    """
    sequences: list[Sequence] = []
    step_seconds: list[float] = []
    while len(sequences) < prompt.request.texts or decoder.running:
        while len(sequences) < prompt.request.texts and decoder.has_room(prompt):
            sequences.append(decoder.admit(prompt, len(sequences)))
        started = perf_counter()
        finished = decoder.step()
        step_seconds.append(perf_counter() - started)
        for sequence in finished:
            if sequence.error is not None:
                raise sequence.error
    return sequences, step_seconds


def status(values: dict[str, Any]) -> int:
    """Print what the queue and the workers do, in words or as JSON."""
    import asyncio

    from fastgpt2.api.pool.status import read_status
    from fastgpt2.protocol.connection import connect_async, redis_errors

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


def _status_text(status: dict[str, Any]) -> str:
    jobs = ", ".join(f"{count} {state}" for state, count in status["jobs"].items() if count) or "none"
    queue, rates = status["queue"], status["rates"]["1m"]
    wait = queue["oldest_wait_seconds"]
    waiting = f"{queue['depth']} waiting" + ("" if wait is None else f", the first for {wait:.1f} s")
    lines = [
        f"queue {queue['name']}: {waiting}; jobs: {jobs}",
        f"last minute: {rates['tokens_per_second']:.1f} tokens/s, {60 * rates['jobs_per_second']:.1f} jobs/min",
    ]
    lines += _model_lines(status["by_model"])
    for worker in status["workers"]:
        count = worker["in_hand"]
        at_work = f" on {count} of up to {counted(worker['max_batch'], 'job')}" if count else ""
        usual = {"weights": "float32", "drafts": "auto"}
        otherwise = "".join(f", {name} {worker[name]}" for name in usual if worker[name] not in (None, usual[name]))
        lines.append(
            f"worker {worker['name']}: {worker['state']}{at_work}, model {worker['model']} ({worker['computes_by']})"
            f"{otherwise}, up {worker['age_seconds']} s, heard {worker['heartbeat_age_seconds']} s ago, "
            f"{worker['tokens_per_second'] or 0.0:.1f} tokens/s, "
            f"{worker['jobs_finished']} finished, {worker['jobs_failed']} failed"
        )
    for worker, notes in _notes_by_worker(status["workers"]):
        lines += [f"note on {worker}: {note}" for note in notes]
    if not status["workers"]:
        lines.append("no workers; start some with `fastgpt2 up` or `fastgpt2 worker`")
    return "\n".join(lines)


def _model_lines(by_model: dict[str, dict[str, Any]]) -> list[str]:
    """Return a line for each name of a model; none if there is one, which workers serve: it would say nothing new."""
    if len(by_model) < 2 and all(state["workers"] for state in by_model.values()):
        return []
    lines = []
    for name, state in by_model.items():
        count, depth, wait = state["workers"], state["depth"], state["oldest_wait_seconds"]
        workers = counted(count, "worker") if count else "no workers"
        waiting = f"{depth} waiting by name" + ("" if wait is None else f", the first for {wait:.1f} s")
        remedy = "" if count or not depth else "; a worker with --served-model-name of this name serves them"
        done = state["totals"]
        lines.append(
            f"model {name}: {workers}, {waiting}, {state['in_hand']} in hand, {state['tokens_per_second']:.1f} "
            f"tokens/s, {done['finished']} finished, {done['failed']} failed{remedy}"
        )
    return lines


def _notes_by_worker(workers: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return the notes on models, each once for all workers that have the same ones on the same model."""
    found: dict[str, tuple[str, list[str]]] = {}
    for worker in workers:
        found.setdefault(f"{worker['model']} {worker['notes']}", (worker["model"], worker["notes"]))
    return list(found.values())


def enqueue(values: dict[str, Any]) -> int:
    """Enqueue the prompt, and print the job's id, or wait for its text.

    Raises:
        BadRequest: a value is out of bounds, or --stream is given with --json.
    """
    from fastgpt2.api.client.client import Client
    from fastgpt2.protocol.messages import JobOptions
    from fastgpt2.protocol.request_context import take_from_environment

    take_from_environment()
    if values["stream"] and values["json"]:
        raise BadRequest("--stream prints text, --json a whole result; leave one out")
    request = build_request(values)
    if values["stream"] and request.texts > 1:
        raise BadRequest(f"--stream prints one text as it comes, not {request.texts}; print them at the end by --wait")
    note_unprinted(values)
    options = JobOptions(timeout=values["deadline"], stream=values["stream"], model=values["model"])
    with Client(values["redis_url"], values["queue"], values["max_queue"], values["durability"]) as client:
        job = client.enqueue_request(request, options, priority=values["priority"])
        if values["stream"]:
            try:
                print_pieces(job.stream(values["timeout"], replacements=True), values)
                if request.samples and request.seed is None:
                    print_seed(job.result(values["timeout"]), values)
            except KeyboardInterrupt:
                if job.cancel():
                    print(f"\njob {job.id} is cancelled", file=sys.stderr)
                raise
        elif values["wait"]:
            print_result(job.result(values["timeout"]), values)
        else:
            print(job.id)
    return 0


def result(values: dict[str, Any]) -> int:
    """Wait for a job's result and print it."""
    from fastgpt2.api.client.client import Client

    with Client(values["redis_url"], values["queue"]) as client:
        print_result(client.result(values["job"], values["timeout"]), values)
    return 0


def cancel(values: dict[str, Any]) -> int:
    """Cancel a job, and say whether it had ended."""
    from fastgpt2.api.client.client import Client

    with Client(values["redis_url"], values["queue"]) as client:
        if client.cancel(values["job"]):
            print(f"job {values['job']} is cancelled")
        else:
            print(f"job {values['job']} had ended: {client.status(values['job'])}")
    return 0


def request_fields(values: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a `GenerationRequest` that the options give, without the prompt."""
    return {setting.field or setting.name: values[setting.name] for setting in settings.OF_REQUEST}


def check_field(setting: Setting[Any], value: Any, source: str) -> None:
    """Check a value as the field of a request that it gives; the message names its source, which a person has written.

    Raises:
        BadRequest: the value is out of bounds.
    """
    from fastgpt2.engine.decoding.records import GenerationRequest
    from fastgpt2.fields import fields_of

    fields_of(GenerationRequest)[setting.field or setting.name].check(source, value)


def build_request(values: dict[str, Any]) -> GenerationRequest:
    """Return the request that the options give, and say on standard error which of them do nothing.

    Raises:
        BadRequest: a value is out of bounds.
    """
    from fastgpt2.engine.decoding.records import GenerationRequest

    if values["chat"]:
        request = GenerationRequest(messages=_messages(values), **request_fields(values))
    else:
        if values["system"] is not None:
            raise BadRequest("--system goes with --chat: a prompt that is continued has no system message")
        request = GenerationRequest(values["prompt"], **request_fields(values))
    note_idle_options(request)
    return request


def _messages(values: dict[str, Any]) -> tuple[dict[str, str], ...]:
    user = {"role": "user", "content": values["prompt"]}
    return (user,) if values["system"] is None else ({"role": "system", "content": values["system"]}, user)


def note_idle_options(request: GenerationRequest) -> None:
    """Say on standard error if options shape a draw, and nothing is drawn because nobody has asked for it."""
    if request.samples or request.temperature is not None or request.do_sample is not None:
        return
    idle = [
        setting.option
        for setting in settings.OF_DRAW
        if setting not in (settings.DO_SAMPLE, settings.TEMPERATURE)
        and getattr(request, setting.name) != setting.default
    ]
    if idle:
        print(
            f"{', '.join(idle)}: nothing is drawn at random without --temperature or --do-sample; the likeliest tokens "
            "are taken",
            file=sys.stderr,
        )


def note_unprinted(values: dict[str, Any]) -> None:
    """Say on standard error if something is asked for that is not printed: log probabilities, or a result as JSON."""
    waits = values.get("wait", True) or values.get("stream")
    if values["json"] and not waits:
        print("--json: without --wait, the job's id alone is printed", file=sys.stderr)
    if values["logprobs"] is not None and not values["json"] and waits:
        print("--logprobs: log probabilities are printed with --json alone", file=sys.stderr)


def print_result(result: GenerationResult, values: dict[str, Any]) -> None:
    """Print the texts, each after its prompt, or, on request, all of the result as JSON."""
    if values["json"]:
        from fastgpt2.protocol.messages import result_to_json

        print(json.dumps(result_to_json(result, result.timings.queue_seconds)))
        return
    results = [result, *result.alternatives]
    for number, one in enumerate(results, 1):
        if len(results) > 1:
            print(f"--- text {number} of {len(results)} ---")
        print(_prompt_to_print(values) + one.text)
    print_seed(result, values)


def print_seed(result: GenerationResult, values: dict[str, Any]) -> None:
    """Say on standard error how to have a text again that was drawn, unless the command line has the seed."""
    if result.seed is None or values.get("seed") is not None:
        return
    # `fastgpt2 result` knows the job by its id only.
    again = f"the same command with --seed {result.seed}" if "prompt" in values else "the same request with this seed"
    what = "these texts" if result.alternatives else "this text"
    sys.stdout.flush()
    print(f"seed {result.seed}: {again} gives {what} again", file=sys.stderr)


def print_pieces(pieces: Iterable[Piece], values: dict[str, Any]) -> None:
    """Print the text after its prompt, as it comes."""
    text = ""
    print(_prompt_to_print(values), end="", flush=True)
    for piece in pieces:
        if piece.at < len(text):
            print("\n(the job was started again on another worker, and its text differs)", file=sys.stderr, flush=True)
            print(_prompt_to_print(values) + text[: piece.at], end="")
        print(piece.text, end="", flush=True)
        text = text[: piece.at] + piece.text
    print(flush=True)


def _prompt_to_print(values: dict[str, Any]) -> str:
    """Return the prompt of the command line; empty if there is none, if it is answered, or the text begins with it."""
    prompt: str = "" if values.get("echo") or values.get("chat") else values.get("prompt", "")
    return prompt
