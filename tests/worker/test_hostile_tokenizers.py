"""A tokenizer at which the library panics, grows or never ends costs the job that asks for it, and nobody else's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.running import StartWorker

from fastgpt2 import Client
from fastgpt2.engine.model.hub import DEMO_FOLDER
from fastgpt2.errors import FastGPT2Error
from fastgpt2.system.redis_server import RedisServer

pytestmark = pytest.mark.processes

PANICS = "a" * 60 + "c"
NEVER_ENDS = "b" * 6000
GROWS = "x" * 60


def test_a_worker_fails_those_jobs_and_serves_the_others(
    redis_server: RedisServer, queue_name: str, start_worker: StartWorker, tmp_path: Path
) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(DEMO_FOLDER / name)
    tokenizer: dict[str, Any] = json.loads((DEMO_FOLDER / "tokenizer.json").read_text("utf-8"))
    step = {"type": "Split", "behavior": "Isolated", "invert": False}
    steps = [{**step, "pattern": {"Regex": regex}} for regex in ("(a|aa)+$", r"(b+)\1+z")]
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*steps, tokenizer["pre_tokenizer"]]}
    replace = {"type": "Replace", "pattern": {"String": "x"}, "content": "xxxx"}
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": [replace] * 14}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    process = start_worker(FASTGPT2_MODEL=str(tmp_path))
    with Client(redis_server.url, queue_name) as client:
        hostile = {text: client.enqueue(text, max_new_tokens=3) for text in (PANICS, NEVER_ENDS, GROWS)}
        others = [client.enqueue("It is", max_new_tokens=3) for _ in range(3)]
        for job in others:
            assert job.result(timeout=60).usage.completion_tokens == 3
        for text, said in (
            (PANICS, "cannot encode this prompt (Onig"),
            (NEVER_ENDS, "expressions take more than 2 s"),
            (GROWS, "would make more than 65536 bytes of this prompt"),
        ):
            with pytest.raises(FastGPT2Error) as caught:
                hostile[text].result(timeout=60)
            assert said in str(caught.value)
        assert client.enqueue("It is", max_new_tokens=3).result(timeout=60).usage.completion_tokens == 3
    assert process.poll() is None
    assert "Traceback" not in (tmp_path / "worker-0.log").read_text()
