"""What a model's files ask for and is not done is said everywhere: log, worker's hash, status, command line."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from safetensors.numpy import load_file, save_file
from support.models import with_end_of_text
from support.running import StartWorker, run

from fastgpt2 import Client, Engine
from fastgpt2.api.pool.status import read_status
from fastgpt2.engine.model.hub import DEMO_FOLDER
from fastgpt2.errors import BadRequest
from fastgpt2.protocol.keys import MAX_NOTE_CHARACTERS, MAX_NOTES
from fastgpt2.system.redis_server import RedisServer
from fastgpt2.worker.reporting import notes_to_field


def status_of(url: str, queue: str) -> dict[str, Any]:
    async def read() -> dict[str, Any]:
        async with AsyncRedis.from_url(url) as connection:
            return await read_status(connection, queue)

    return asyncio.run(read())


def folder_with(tmp_path: Path, tokenizer: bool = True, **fields: Any) -> Path:
    """Lay the shipped model into a folder, with these generation settings."""
    for name in ("config.json", "model.safetensors", *(["tokenizer.json"] if tokenizer else [])):
        (tmp_path / name).symlink_to(DEMO_FOLDER / name)
    (tmp_path / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 0, **fields}))
    return tmp_path


@pytest.mark.processes
def test_a_worker_tells_what_is_not_applied(
    redis_server: RedisServer, client: Client, start_worker: StartWorker, tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    folder = folder_with(tmp_path / "model", tokenizer=False, num_beams=4, do_sample=True)
    start_worker(FASTGPT2_MODEL=str(folder), FASTGPT2_TOKENIZER="demo")
    assert client.enqueue("Sherlock Holmes", max_new_tokens=3).result(60).token_ids
    (worker,) = status_of(redis_server.url, client.queue_name)["workers"]
    beams, sampling = worker["notes"]
    assert beams.startswith("generation_config.json: num_beams 4 is not applied: transformers would")
    assert sampling.startswith("generation_config.json: do_sample true is not applied: transformers would draw")
    log = (tmp_path / "worker-0.log").read_text()
    assert log.count(beams) == log.count(sampling) == 1
    text = run("status", FASTGPT2_REDIS_URL=redis_server.url, FASTGPT2_QUEUE=client.queue_name).stdout
    assert f"note on {folder}: {beams}\nnote on {folder}: {sampling}\n" in text


def test_notes_in_redis_are_bounded_on_both_sides(redis: Redis, redis_server: RedisServer, queue_name: str) -> None:
    written = notes_to_field(["é" * 1000, *(f"note {n}" for n in range(30))])
    key = f"rq:worker:w-{queue_name}"
    redis.sadd(f"rq:workers:{queue_name}", key)
    redis.hset(key, mapping={"state": "idle", "notes": written})
    (worker,) = status_of(redis_server.url, queue_name)["workers"]
    assert worker["notes"][0] == "é" * MAX_NOTE_CHARACTERS
    assert worker["notes"][1:] == [*(f"note {n}" for n in range(MAX_NOTES - 2)), "16 more are in the worker's log"]
    for hostile in ("", "{", "{}", "3", "[" * 100_000, json.dumps(["x" * 10**6]), json.dumps([1, None, {}]), b"\xff"):
        redis.hset(key, "notes", hostile)
        (worker,) = status_of(redis_server.url, queue_name)["workers"]
        assert worker["notes"] == [], hostile
    redis.hset(key, "notes", json.dumps(["n"] * 100))
    (worker,) = status_of(redis_server.url, queue_name)["workers"]
    assert worker["notes"] == ["n"] * MAX_NOTES


@pytest.mark.processes
def test_pack_opens_what_a_worker_will_open(tmp_path: Path) -> None:
    for name in ("model", "cache"):
        (tmp_path / name).mkdir()
    folder = folder_with(tmp_path / "model", tokenizer=False, num_beams=4)
    cache = {"FASTGPT2_CACHE": str(tmp_path / "cache")}
    refused = run("pack", str(folder), **cache)
    assert refused.returncode == 3
    assert "holds no tokenizer, which is tokenizer.json, or" in refused.stderr
    assert "by --tokenizer" in refused.stderr
    assert list((tmp_path / "cache").iterdir()) == []
    # The remedy.
    packed = run("pack", str(folder), "--tokenizer", "demo", **cache)
    assert packed.returncode == 0, packed.stderr
    assert "num_beams 4 is not applied: transformers would search with" in packed.stderr
    (folder / "tokenizer.json").write_text("{")
    damaged = run("pack", str(folder), **cache)
    assert damaged.returncode == 3
    assert "tokenizer.json" in damaged.stderr
    assert "Traceback" not in damaged.stderr


@pytest.mark.processes
def test_generate_with_another_tokenizer_and_without_the_settings(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, tokenizer=False, num_beams=4)
    (tmp_path / "other").symlink_to(DEMO_FOLDER)
    options = ["--model", str(folder), "--tokenizer", str(tmp_path / "other"), "--max-new-tokens", "3", "It was"]
    told = run("generate", *options)
    silent = run("generate", *options, FASTGPT2_GENERATION_CONFIG="none")
    assert told.returncode == silent.returncode == 0, told.stderr
    assert told.stdout == silent.stdout == run("generate", "--model", "demo", *options[4:]).stdout
    assert told.stderr.count("num_beams") == 1
    assert silent.stderr == ""
    wrong = run("generate", *options, "--generation-config", "vllm")
    assert (wrong.returncode, "'vllm' is not one of auto, none" in wrong.stderr) == (2, True)


def test_a_tokenizer_with_more_tokens_than_the_table_is_noted(tmp_path: Path) -> None:
    tokenizer = json.loads((DEMO_FOLDER / "tokenizer.json").read_text())
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer["added_tokens"] += [{"id": 2048 + n, "content": f"[PAD{n}]", **added} for n in range(2)]
    folder = folder_with(tmp_path, tokenizer=False)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    engine = Engine.load(folder, max_batch=1, threads=1)
    (one,) = engine.notes
    said = "the tokenizer has 2 tokens beyond the model's table of 2048; the first is 2048, '[PAD0]'"
    assert one == f"{said}: a prompt with such a token is refused"
    assert engine.generate("It was", max_new_tokens=3) is not None
    with pytest.raises(
        BadRequest, match=r"'\[PAD1\]' in the prompt as token 2049, and the model's vocabulary has 2048"
    ):
        engine.generate("It was[PAD1]")


def test_tensors_that_are_left_out_are_noted(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    tensors = {**load_file(DEMO_FOLDER / "model.safetensors"), "v_head.summary.weight": np.zeros((1, 224), np.float32)}
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors")
    (one,) = Engine.load(folder, max_batch=1, threads=1).notes
    assert "v_head.summary.weight" in one


def test_a_model_without_notes_has_none(tmp_path: Path) -> None:
    assert Engine.load("demo", max_batch=1, threads=1).notes == ()
    assert with_end_of_text(tmp_path, [3, 4]).notes == ()
