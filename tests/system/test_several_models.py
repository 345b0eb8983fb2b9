"""Several models on one queue: each request is answered by the model that it names, whoever asks, and in every way.

The second model always says one word, so that each text tells which of the two has made it.
"""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2 as httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect
from prometheus_client.parser import text_string_to_metric_families as parse
from support.browser import Tabs, chromium
from support.models import that_says
from support.running import GOLDEN, HOLDABLE, jobs_held, run, wait_until

from fastgpt2 import Client, Engine, settings
from fastgpt2.errors import ModelUnknown
from fastgpt2.protocol.connection import connect
from fastgpt2.protocol.keys import queue_of, workers_key
from fastgpt2.system.redis_server import RedisServer
from fastgpt2.system.up import System

if TYPE_CHECKING:
    from openai import OpenAI

pytestmark = pytest.mark.processes

ENTRIES: list[dict[str, Any]] = json.loads((GOLDEN / "demo_continuations.json").read_text("utf-8"))["continuations"]
OLD, NEW = " old", " new"
TOKENS = 6


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """`fastgpt2 up --model demo --model FOLDER`, with two names for the second and a worker for each."""
    folder = that_says(OLD, tmp_path_factory.mktemp("models") / "says old")
    values = settings.of_system(workers="1", port="0", redis_port="0", threads="1", log_level="warning")
    names = (f"{folder}=old", f"{folder}=older")
    with System({**values, "model": ("demo", str(folder)), "served_model_name": names}) as system:
        yield system


@pytest.fixture(scope="module")
def ai(both: System) -> Iterator[OpenAI]:
    from openai import OpenAI

    url = f"{both.http_url}/v1"
    with OpenAI(base_url=url, api_key="none", max_retries=0, http_client=httpx.Client(trust_env=False)) as client:
        yield client


@pytest.fixture
def http(both: System) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=both.http_url, trust_env=False, timeout=60) as client:
        yield client


@pytest.fixture
def asker(both: System) -> Iterator[Client]:
    with Client(both.redis_url) as client:
        yield client


def expected(engine: Engine, model: str | None, entry: dict[str, Any]) -> str:
    return OLD * TOKENS if model in ("old", "older") else engine.tokenizer.decode(entry["ids"][:TOKENS])


def variables(system: System) -> dict[str, str]:
    return {"FASTGPT2_REDIS_URL": system.redis_url}


def test_each_request_is_answered_by_the_model_that_it_names(ai: OpenAI, engine: Engine) -> None:
    """Thirty and more at once, in streams and as a whole: none is answered by the other model."""

    def ask(number: int) -> tuple[str, str]:
        entry, model = ENTRIES[number % len(ENTRIES)], ("demo", "old", "older", None)[number % 4]
        asked: Any = {"prompt": entry["prompt"], "max_tokens": TOKENS, "extra_body": {"ignore_eos": True}}
        if model is None:
            asked["extra_body"]["model"] = None
        if number % 3:
            whole = ai.completions.create(model=model or "", **asked)
            text, named = whole.choices[0].text, {whole.model}
        else:
            chunks = list(ai.completions.create(model=model or "", stream=True, **asked))
            text, named = "".join(chunk.choices[0].text for chunk in chunks), {chunk.model for chunk in chunks}
        assert named == {model or "demo"}
        return text, expected(engine, model, entry)

    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(ask, range(48)))
    assert [number for number, (text, wanted) in enumerate(answers) if text != wanted] == []


def test_the_list_of_models_is_true(ai: OpenAI, http: httpx.Client) -> None:
    assert [model.id for model in ai.models.list()] == ["demo", "old", "older"], "that of requests without a name first"
    shown = ai.models.retrieve("older")
    assert (shown.id, shown.object) == ("older", "model")
    assert shown.model_extra == {"max_model_len": 512}
    assert http.get("/info").json()["model_id"] == "demo"
    folder = http.get("/v1/models/says%20old")
    assert folder.status_code == 404, "a path is no name if there is another"


def test_a_model_that_no_worker_has_is_refused_at_once(ai: OpenAI, http: httpx.Client, asker: Client) -> None:
    from openai import NotFoundError

    sentence = "no worker serves the model 'gpt-4'; served are: demo, old, older"
    for stream in (False, True):
        with pytest.raises(NotFoundError) as caught:
            ai.completions.create(model="gpt-4", prompt="a", stream=stream)
        assert (caught.value.code, sentence in caught.value.message) == ("model_not_found", True)
    for path, body in (
        ("/v1/jobs", {"prompt": "a", "model": "gpt-4"}),
        ("/generate", {"inputs": "a", "parameters": {"model": "gpt-4"}}),
    ):
        answer = http.post(path, json=body)
        assert (answer.status_code, sentence in answer.text) == (404, True)
    with pytest.raises(ModelUnknown, match="served are: demo, old, older"):
        asker.enqueue("a", model="gpt-4")
    assert asker.connection.keys("rq:queue:*gpt-4*") == []


def test_jobs_and_routes_of_other_apis_name_models_too(http: httpx.Client, asker: Client, engine: Engine) -> None:
    entry = ENTRIES[0]
    fields: Any = {"max_new_tokens": TOKENS, "ignore_eos": True}
    for model in ("demo", "older", None):
        wanted = expected(engine, model, entry)
        result = asker.enqueue(entry["prompt"], model=model, priority="high", **fields).result(60)
        assert (result.text, result.model) == (wanted, model or "demo")
        parameters = {**fields, "model": model}
        body = {"inputs": entry["prompt"], "parameters": parameters}
        assert http.post("/generate", json=body).json() == {"generated_text": wanted}
        job = http.post("/v1/jobs", json={"prompt": entry["prompt"], "priority": "low", **parameters}).json()
        done = http.get(f"/v1/jobs/{job['id']}?wait=60").json()
        assert (done["result"]["text"], done["result"]["model"]) == (wanted, model or "demo")
    prompts: Any = [{"prompt": entry["prompt"], "model": model} for model in ("old", "demo", "older", None)]
    texts = [result.text for result in asker.map(prompts, **fields)]
    assert texts == [expected(engine, prompt["model"], entry) for prompt in prompts]


def test_the_command_line_names_models_too(both: System) -> None:
    entry = ENTRIES[0]
    few = ["--max-new-tokens", str(TOKENS), "--ignore-eos"]
    done = run("enqueue", "--wait", "--model", "old", *few, entry["prompt"], **variables(both))
    assert done.stdout == f"{entry['prompt']}{OLD * TOKENS}\n"
    done = run("enqueue", "--model", "none", "a", **variables(both))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "no worker serves the model 'none'; served are: demo, old, older" in done.stderr
    lines = run("status", **variables(both)).stdout.splitlines()
    models = [line.partition(":")[0] for line in lines if line.startswith("model ")]
    assert models == ["model demo", "model old", "model older"]
    assert "model old: 1 worker, 0 waiting by name, " in "\n".join(lines)


def test_lines_of_a_batch_name_models(both: System, engine: Engine, tmp_path: Path) -> None:
    entry = ENTRIES[0]
    models = ("demo", "old", None, "none")
    lines = [{"prompt": entry["prompt"], **({"model": model} if model else {})} for model in models]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    bodies = [{"prompt": entry["prompt"], "max_tokens": TOKENS, "model": model} for model in models]
    requests = [
        {"custom_id": str(body["model"]), "method": "POST", "url": "/v1/completions", "body": body} for body in bodies
    ]
    (tmp_path / "openai.jsonl").write_text("".join(json.dumps(line) + "\n" for line in requests))

    def batch(name: str, *options: str) -> list[dict[str, Any]]:
        few = ["--max-new-tokens", str(TOKENS), "--ignore-eos"]
        done = run("batch", str(tmp_path / name), *few, *options, **variables(both))
        assert "no worker serves the model 'none'; served are: demo, old, older" in done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    of_demo = expected(engine, "demo", entry)
    texts = [of_demo, OLD * TOKENS, of_demo, None]
    assert [line.get("text") for line in batch("in.jsonl")] == texts
    by_option = batch("in.jsonl", "--served-model-name", "older")
    assert [line.get("text") for line in by_option] == [of_demo, OLD * TOKENS, OLD * TOKENS, None]
    assert by_option[2]["model"] == "older"
    answers = [line["response"] for line in batch("openai.jsonl")]
    assert [answer["status_code"] for answer in answers] == [200, 200, 200, 404]
    assert [answer["body"]["choices"][0]["text"] for answer in answers[:3]] == texts[:3]
    assert answers[3]["body"]["error"]["code"] == "model_not_found"


def test_status_and_metrics_tell_the_models_apart(both: System, http: httpx.Client, asker: Client) -> None:
    """With jobs that wait for the second model alone, whose worker is paused meanwhile."""
    worker = both.pool.children[1]
    before = http.get("/status").json()["by_model"]["old"]["totals"]["generated_tokens"]
    asker.enqueue("a", model="old", max_new_tokens=3, ignore_eos=True).result(60)

    def counted() -> bool:
        totals = http.get("/status").json()["by_model"]["old"]["totals"]
        return bool(totals["generated_tokens"] >= before + 3)

    wait_until(counted, "the tokens to be counted with the model's first name")
    worker.signal(19)
    jobs = [asker.enqueue("a", model="older", max_new_tokens=1) for _ in range(60)]
    try:
        state: Any = {}

        def waits() -> bool:
            state.update(http.get("/status").json())
            return bool(state["by_model"]["older"]["depth"])

        wait_until(waits, "jobs to wait for the paused worker")
        samples = {
            (sample.name, *sorted(sample.labels.values())): sample.value
            for family in parse(http.get("/metrics").text)
            for sample in family.samples
        }
    finally:
        worker.signal(18)
    by_model = state["by_model"]
    assert list(by_model) == ["demo", "old", "older"]
    assert (by_model["demo"]["depth"], by_model["older"]["workers"], by_model["older"]["models"]) == (0, 1, ["old"])
    assert state["queue"]["depth"] == by_model["older"]["depth"]
    assert state["queue"]["oldest_wait_seconds"] == by_model["older"]["oldest_wait_seconds"] >= 0
    assert [worker["models"] for worker in state["workers"] if worker["named_only"]] == [["old", "older"]]
    assert samples["fastgpt2_model_queue_jobs", "older"] > 0
    assert samples["fastgpt2_model_queue_jobs", "demo"] == 0
    assert samples["fastgpt2_model_oldest_wait_seconds", "older"] >= 0
    assert sum(value for name, value in samples.items() if name[:2] == ("fastgpt2_model_workers", "demo")) == 1
    assert samples["fastgpt2_model_tokens_total", "generated", "old"] >= before + 3
    assert samples["fastgpt2_model_jobs_total", "finished", "length", "old"] > 0
    assert {job.result(60).text for job in jobs} == {OLD}


def test_the_page_tells_the_models_apart_and_lets_one_be_chosen(both: System) -> None:
    with chromium() as browser:
        tabs = Tabs(browser)
        page = tabs.open(both.http_url)
        rows = page.locator("#models tbody tr")
        expect(rows).to_have_count(3)
        expect(rows.nth(2)).to_contain_text("a name of old")
        choice = page.get_by_label("Model", exact=True)
        expect(choice.locator("option")).to_have_text(["demo (the pool's first)", "demo", "old", "older"])
        choice.select_option("older")
        page.get_by_role("textbox", name="Prompt").fill("a")
        page.get_by_label("At most").fill(str(TOKENS))
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("#answer")).to_contain_text((OLD * TOKENS).strip())
        results = Axe().run(page, options={})
        assert results.violations_count == 0, results.generate_report()
        page.set_viewport_size({"width": 320, "height": 700})
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        tabs.close()


def start_pool(server: RedisServer, queue: str, log: Path, *options: str) -> subprocess.Popen[bytes]:
    """Start `fastgpt2 pool` with a worker, its output in a file."""
    words = ["--redis-url", server.url, "--queue", queue, "--workers", "1", "--threads", "1", *options]
    with log.open("wb") as out:
        return subprocess.Popen([*HOLDABLE, "pool", *words], stdout=out, stderr=out)


def test_rolling_from_one_model_to_the_next_loses_nothing(
    redis_server: RedisServer, queue_name: str, tmp_path: Path
) -> None:
    """Under load: jobs for the old model, for the new one, and for a name that both have while the one follows."""
    old, new = (str(that_says(word, tmp_path / word.strip())) for word in (OLD, NEW))
    connection = connect(redis_server.url)
    ended = threading.Event()
    answers: list[tuple[str, str, str]] = []
    models = ["old", "ours"]

    def load(number: int) -> None:
        with Client(redis_server.url, queue_name) as client:
            while not ended.is_set():
                model = models[number % len(models)]
                result = client.enqueue("a", model=model, max_new_tokens=3, ignore_eos=True).result(60)
                answers.append((model, result.model, result.text))

    def answered(model: str, text: str) -> bool:
        return (model, model, text * 3) in answers

    def served(count: int) -> bool:
        return connection.scard(workers_key(queue_name)) == count

    first = start_pool(redis_server, queue_name, tmp_path / "1.log", "--model", old, "--served-model-name", "old,ours")
    second = None
    try:
        wait_until(partial(served, 1), "the old model's worker")
        with ThreadPoolExecutor(6) as threads:
            try:
                running = [threads.submit(load, number) for number in range(6)]
                wait_until(lambda: answered("old", OLD) and answered("ours", OLD), "answers of the old model")
                names = ["--served-model-name", "new,ours", "--named-only"]
                second = start_pool(redis_server, queue_name, tmp_path / "2.log", "--model", new, *names)
                wait_until(partial(served, 2), "the new model's worker")
                models[:] = ["new", "ours"]
                wait_until(lambda: answered("new", NEW) and answered("ours", NEW), "answers of the new model")
                wait_until(lambda: not connection.llen(f"rq:queue:{queue_of(queue_name, 'normal', 'old')}"), "the rest")
                first.terminate()
                assert first.wait(60) == 0
                count = len(answers)
                wait_until(lambda: len(answers) > count + 12, "answers after the old model's end")
            finally:
                ended.set()
        assert [one.exception() for one in running] == [None] * 6, "every job has its text"
    finally:
        for process in filter(None, (first, second)):
            process.terminate()
            process.wait(60)
    texts = {model: {text for name, _, text in answers if name == model} for model in ("old", "new", "ours")}
    assert texts == {"old": {OLD * 3}, "new": {NEW * 3}, "ours": {OLD * 3, NEW * 3}}
    assert all(named == told for named, told, _ in answers)
    assert "Traceback" not in (tmp_path / "1.log").read_text() + (tmp_path / "2.log").read_text()
    connection.close()


def test_a_pool_that_stops_tells_what_waits_for_its_models(
    redis_server: RedisServer, queue_name: str, tmp_path: Path
) -> None:
    process = start_pool(redis_server, queue_name, tmp_path / "log", "--model", "demo", "--max-batch", "1")
    connection = connect(redis_server.url)
    try:
        wait_until(lambda: connection.scard(workers_key(queue_name)), "the worker")
        with jobs_held():
            with Client(redis_server.url, queue_name) as client:
                jobs = [client.enqueue("a", model="demo", max_new_tokens=500, ignore_eos=True) for _ in range(3)]
                wait_until(lambda: jobs[0].status() == "started", "the first job to start")
            process.terminate()
            said = "a second signal gives back all"
            wait_until(lambda: said in (tmp_path / "log").read_text(), "the worker to be told")
            process.terminate()
            assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    assert "3 jobs wait for the model demo, which no worker serves any more" in (tmp_path / "log").read_text()
    connection.close()
