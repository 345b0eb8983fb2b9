"""One process of a pool in the foreground: `fastgpt2 worker` and `fastgpt2 api`."""

from __future__ import annotations

import os
from typing import Any


def worker(values: dict[str, Any]) -> int:
    """Run one worker until it is told to stop; with `burst`, until the queue is empty."""
    from fastgpt2.engine.engine import Engine
    from fastgpt2.engine.machine import hold_to_one_thread
    from fastgpt2.process import raise_open_file_limit, set_up_logging
    from fastgpt2.protocol.connection import connect
    from fastgpt2.protocol.server_check import refuse_unfit
    from fastgpt2.system.served_model import read_served_models
    from fastgpt2.tracing import close_tracing, set_up_tracing
    from fastgpt2.worker.liveness import AliveFile
    from fastgpt2.worker.recycling import Recycling
    from fastgpt2.worker.worker import GenerationWorker, log

    set_up_logging(values["log_level"])
    set_up_tracing("fastgpt2-worker", values["otlp_traces_endpoint"], values["name"])
    (served,) = read_served_models(values)
    raise_open_file_limit()
    hold_to_one_thread()
    refuse_unfit(values["redis_url"], "worker", values["queue"])
    connection = connect(values["redis_url"])
    engine = Engine.load(
        values["model"],
        revision=values["revision"],
        threads=values["threads"],
        max_batch=values["max_batch"],
        kv_memory=values["kv_memory"],
        prefix_memory=values["prefix_memory"],
        blas=values["blas"],
        weights=values["weights"],
        drafts=values["drafts"],
        tokenizer=values["tokenizer"],
        generation_config=values["generation_config"],
        chat_template=values["chat_template"],
    )
    engine.warm_up()
    log.info("loaded %s in %.0f ms; %s", engine.model, engine.load_times.loaded * 1e3, engine.describe())
    worker = GenerationWorker(
        engine,
        connection,
        values["queue"],
        values["name"],
        supervisor_pid=_number("FASTGPT2_SUPERVISOR_PID"),
        drain_timeout=values["drain_timeout"],
        recycling=Recycling(values["max_jobs"], values["max_growth"]),
        log_prompts=values["log_prompts"],
        restarts=_number("FASTGPT2_RESTARTS") or 0,
        alive=AliveFile(values["alive_file"]) if values["alive_file"] else None,
        durability=values["durability"],
        names=served.names,
        named_only=served.named_only,
    )
    try:
        worker.work(burst=values["burst"])
    finally:
        close_tracing()
    return 0


def api(values: dict[str, Any]) -> int:
    """Run the HTTP endpoint until it is told to stop."""
    from fastgpt2.api.http.serve import serve

    serve(values)
    return 0


def _number(variable: str) -> int | None:
    """Return the number with which the supervisor has set a variable; None if it has not."""
    text = os.environ.get(variable, "")
    return int(text) if text.isdigit() else None
