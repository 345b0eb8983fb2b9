"""Tests of the page that `GET /` gives a browser, in a real browser and with the whole system behind it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, Route, expect
from support.browser import Tabs
from support.running import GOLDEN, StartEndpoint, jobs_held, wait_until

from fastgpt2 import Client, Engine, Job
from fastgpt2.api.page import page as made_page
from fastgpt2.engine.model.hub import DEMO_FOLDER
from fastgpt2.engine.text.tokenizer import Tokenizer
from fastgpt2.errors import JobCancelled
from fastgpt2.system.redis_server import RedisServer
from fastgpt2.system.up import System

ENTRIES: list[dict[str, Any]] = json.loads((GOLDEN / "demo_continuations.json").read_text("utf-8"))["continuations"]
ENTRY = next(entry for entry in ENTRIES if entry["prompt"] == "Sherlock Holmes")
TOKEN = "correct-horse-battery-staple"
PHONE = {"viewport": {"width": 360, "height": 740}}
HOSTILE = "</script></textarea><img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))

WORKERS_KEY = "rq:workers:fastgpt2"

SET_HIDDEN = """(hidden) => {
    Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
    document.dispatchEvent(new Event("visibilitychange"));
}"""


@contextmanager
def running_jobs(system: System) -> Iterator[list[Job]]:
    """Have some jobs run that do not end within the context, and are cancelled then."""
    long: dict[str, Any] = {"max_new_tokens": 480, "ignore_eos": True, "priority": "low", "stream": True}
    with jobs_held(), Client(system.redis_url) as client:
        jobs = [client.enqueue("a", **long) for _ in range(4)]
        wait_until(lambda: all(job.status() == "started" for job in jobs), "the jobs to start")
        try:
            yield jobs
        finally:
            for job in jobs:
                job.cancel()


@contextmanager
def waiting_jobs(system: System, count: int) -> Iterator[None]:
    """Keep a queue from getting shorter, however fast the workers are: a new job follows for each that they take."""
    enough, jobs = threading.Event(), []

    def fill() -> None:
        with Client(system.redis_url) as client:
            while not enough.is_set():
                for _ in range(count - client.connection.llen("rq:queue:fastgpt2-low")):
                    jobs.append(client.enqueue("a", max_new_tokens=480, ignore_eos=True, priority="low"))
                enough.wait(0.05)
            for job in jobs:
                job.cancel()

    filler = threading.Thread(target=fill)
    filler.start()
    try:
        yield
    finally:
        enough.set()
        filler.join()


def own_endpoint(system: System) -> dict[str, str]:
    """Return the environment of another endpoint on the same pool."""
    return {"FASTGPT2_REDIS_URL": system.redis_url, "FASTGPT2_QUEUE": "fastgpt2"}


def golden_text(tokens: int) -> str:
    return Tokenizer.from_folder(DEMO_FOLDER).decode(ENTRY["ids"][:tokens])


def text_of(value: object) -> str:
    """Return the text of bytes that come from Redis."""
    assert isinstance(value, bytes)
    return value.decode()


def expect_end(page: Page, text: str | re.Pattern[str]) -> None:
    expect(page.locator("#answer-end")).to_contain_text(text, timeout=30_000)


def expect_workers(page: Page) -> None:
    expect(page.locator("#workers tbody tr")).to_have_count(2)


def expect_no_violations(page: Page) -> None:
    results = Axe().run(page, options={})
    assert results.violations_count == 0, results.generate_report()
    assert len(results.response["passes"]) > 15, "it looked at something"


class TestDocument:
    def fetch(self, url: str, accept: str | None) -> tuple[str, dict[str, str], str]:
        """Return (content type, headers by lower-case name, body)."""
        headers = {} if accept is None else {"accept": accept}
        with OPENER.open(urllib.request.Request(f"{url}/", headers=headers), timeout=30) as answer:
            kind = answer.headers["content-type"]
            return kind, {name.lower(): value for name, value in answer.headers.items()}, answer.read().decode()

    @pytest.mark.parametrize("accept", [None, "*/*", "application/json", "text/plain"])
    def test_who_does_not_ask_for_html_gets_the_ok_of_the_original(self, system: System, accept: str | None) -> None:
        kind, headers, body = self.fetch(system.http_url, accept)
        assert (kind, body) == ("text/plain; charset=utf-8", "Ok")
        assert "accept" in headers["vary"].lower()

    def test_browsers_get_a_document_that_needs_nothing_else(self, system: System) -> None:
        asked = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
        kind, headers, body = self.fetch(system.http_url, asked)
        assert kind == "text/html; charset=utf-8"
        assert body.encode() == made_page()[0]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cache-control"] == "no-store"
        assert headers["vary"].lower() == "accept"
        named = set(re.findall(r"(?:https?:)?//[\w.]+", body)) - {"http://www.w3.org"}  # the name of SVG
        assert not [name for name in named if "." in name], "nothing from elsewhere"

    def test_its_policy_allows_its_own_style_and_script_alone(self) -> None:
        body, headers = made_page()
        policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        for name, directive in (("style", "style-src"), ("script", "script-src")):
            (content,) = re.findall(rb"<%s\b[^>]*>(.*?)</%s>" % (name.encode(), name.encode()), body, re.DOTALL)
            digest = base64.b64encode(hashlib.sha256(content).digest()).decode()
            assert policy[directive] == f"'sha256-{digest}'"
        assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == "'none'"
        assert policy["frame-ancestors"] == "'none'"
        assert policy["connect-src"] == "'self'"
        assert b" style=" not in body
        assert not re.search(rb"\son\w+=", body.partition(b"<script")[0])


class TestPrompt:
    def test_a_prompt_is_typed_and_its_answer_read(self, system: System, tabs: Tabs) -> None:
        page = tabs.open(system.http_url)
        page.get_by_role("textbox", name="Prompt").press_sequentially(ENTRY["prompt"])
        page.get_by_label("At most").fill("40")
        with page.expect_response("**/v1/completions") as answered:
            page.get_by_role("button", name="Generate").click()
        expect_end(page, "Stopped at the limit")
        assert page.get_by_role("log", name="Answer").text_content() == ENTRY["prompt"] + golden_text(40)
        expect_end(page, f"{len(ENTRY['prompt_ids'])} + 40 tokens")
        expect_end(page, "tokens/s")
        expect(page.get_by_role("button", name="Generate")).to_be_enabled()
        expect(page.get_by_role("button", name="Cancel", exact=True)).to_be_disabled()
        job_id = answered.value.headers["x-job-id"]
        row = page.locator("#jobs tbody tr", has=page.locator(f"[title='{job_id}']"))
        expect(row).to_contain_text("finished")
        expect(row).to_contain_text(re.compile(rf"{len(ENTRY['prompt_ids'])}\s\+\s40"))
        assert ENTRY["prompt"] not in page.locator("#jobs").inner_text()
        # Another answer comes in the same place.
        page.get_by_label("At most").fill("3")
        page.get_by_role("button", name="Generate").click()
        expect_end(page, "+ 3 tokens")
        assert page.get_by_role("log", name="Answer").text_content() == ENTRY["prompt"] + golden_text(3)

    def test_by_keyboard_alone(self, system: System, tabs: Tabs) -> None:
        page = tabs.open(system.http_url)
        expect_workers(page)
        for _ in range(10):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.id") == "prompt":
                break
        page.keyboard.type(ENTRY["prompt"])
        for name in ("Temperature", "Top p", "Repetition penalty", "Seed", "At most"):
            page.keyboard.press("Tab")
            expect(page.get_by_label(name, exact=True)).to_be_focused()
        page.keyboard.type("5")
        page.keyboard.press("Control+Enter")
        expect_end(page, "+ 5 tokens")
        assert page.locator("#answer").text_content() == ENTRY["prompt"] + golden_text(5)
        expect(page.get_by_label("At most")).to_be_focused()
        page.keyboard.press("Tab")
        expect(page.get_by_role("button", name="Generate")).to_be_focused()
        page.keyboard.press("Space")
        expect_end(page, "+ 5 tokens")
        expect(page.get_by_role("button", name="Generate")).to_be_focused()

    def test_a_text_is_drawn_and_had_again_by_its_seed(self, system: System, tabs: Tabs, engine: Engine) -> None:
        page = tabs.open(system.http_url)
        answer, keep = page.get_by_role("log", name="Answer"), page.get_by_role("button", name="Keep the seed")
        page.get_by_role("textbox", name="Prompt").fill(ENTRY["prompt"])
        page.get_by_role("button", name="Generate").click()
        expect_end(page, "in all")
        assert answer.text_content() == ENTRY["prompt"] + golden_text(60), "nothing is drawn unasked"
        expect(page.locator("#answer-end")).not_to_contain_text("seed")
        expect(keep).to_be_disabled()
        for name, value in (("Temperature", "0.9"), ("Top p", "0.95"), ("Repetition penalty", "1.1")):
            page.get_by_label(name).fill(value)
        page.get_by_role("button", name="Generate").click()
        expect_end(page, re.compile(r"seed\s\d+$"))
        drawn = answer.text_content()
        keep.click()
        seed = page.get_by_label("Seed", exact=True).input_value()
        expect_end(page, f"seed\u00a0{seed}")
        options: Any = {"temperature": 0.9, "top_p": 0.95, "repetition_penalty": 1.1, "seed": int(seed)}
        expected = ENTRY["prompt"] + engine.generate(ENTRY["prompt"], max_new_tokens=60, **options).text
        assert drawn == expected
        page.get_by_label("At most").fill("59")
        page.get_by_role("button", name="Generate").click()
        expect_end(page, "+ 59 tokens")
        again = answer.text_content()
        assert again is not None
        assert expected.startswith(again)

    def test_cancelling_midway_cancels_the_job(self, system: System, tabs: Tabs) -> None:
        page = tabs.open(system.http_url)
        expect_workers(page)
        page.get_by_role("textbox", name="Prompt").fill("a")
        page.get_by_label("At most").fill("480")
        with jobs_held():
            with page.expect_response("**/v1/completions") as answered:
                page.get_by_role("button", name="Generate").click()
            expect(page.locator("#answer")).to_have_text(re.compile(r"^a.{3,}", re.DOTALL))
            page.get_by_role("button", name="Cancel", exact=True).click()
            expect_end(page, re.compile("^Cancelled"))
        with Client(system.redis_url) as client, pytest.raises(JobCancelled) as caught:
            client.result(answered.value.headers["x-job-id"], timeout=20)
        assert caught.value.partial is not None
        assert 0 < caught.value.partial.usage.completion_tokens < 480
        text = page.locator("#answer").text_content()
        assert text is not None
        assert caught.value.partial.text.startswith(text[1:]), "what was shown had been generated"

    def test_leaving_cancels_the_job(self, system: System, tabs: Tabs) -> None:
        page = tabs.open(system.http_url)
        page.get_by_role("textbox", name="Prompt").fill("a")
        page.get_by_label("At most").fill("480")
        with jobs_held():
            with page.expect_response("**/v1/completions") as answered:
                page.get_by_role("button", name="Generate").click()
            job_id = answered.value.headers["x-job-id"]
            page.goto("about:blank")
            with Client(system.redis_url) as client, pytest.raises(JobCancelled):
                client.result(job_id, timeout=20)

    def test_a_refusal_is_told(self, system: System, tabs: Tabs) -> None:
        tabs.expected = ("the server responded with a status of 400",)
        page = tabs.open(system.http_url)
        page.get_by_role("textbox", name="Prompt").fill("the " * 700)
        page.get_by_role("button", name="Generate").click()
        expect_end(page, re.compile("^Failed: .*512 positions"))
        expect(page.get_by_role("button", name="Generate")).to_be_enabled()

    def test_hostile_text_is_text(self, system: System, tabs: Tabs, start_endpoint: StartEndpoint) -> None:
        page = tabs.open(start_endpoint(**own_endpoint(system), FASTGPT2_SHOW_PROMPTS="1").url)
        expect_workers(page)
        before = page.locator("script, img").count()
        page.get_by_role("textbox", name="Prompt").fill(HOSTILE)
        page.get_by_label("At most").fill("4")
        page.get_by_role("button", name="Generate").click()
        expect_end(page, "+ 4 tokens")
        expect(page.locator("#answer .asked")).to_have_text(HOSTILE)
        expect(page.locator("#jobs td.prompt").first).to_be_visible()
        expect(page.locator("#jobs td.prompt", has_text=HOSTILE[:20])).not_to_have_count(0)
        assert page.locator("script, img").count() == before
        expect(page).to_have_title("fastgpt2")


class TestFigures:
    def test_workers_are_listed_by_name(self, system: System, tabs: Tabs) -> None:
        page = tabs.open(system.http_url)
        expect_workers(page)
        with Client(system.redis_url) as client:
            names = [text_of(key).removeprefix("rq:worker:") for key in client.connection.smembers(WORKERS_KEY)]
        assert len(names) == 2
        for name in names:
            row = page.get_by_role("row").filter(has=page.get_by_role("rowheader", name=name))
            expect(row).to_contain_text("demo")
            expect(row).to_contain_text(re.compile("idle|busy"))
        expect(page.locator("#state")).to_contain_text(re.compile(r"demo · 2\sworkers"))

    def test_load_shows_and_goes(self, system: System, tabs: Tabs) -> None:
        page = tabs.open(system.http_url)
        expect_workers(page)
        depth = page.locator("figure", has_text="Queue depth")
        with waiting_jobs(system, 200):
            expect(page.locator("#state")).to_contain_text(re.compile(r"^Serving.*\s[\d,]+\swaiting"))
            expect(depth.locator(".now span")).not_to_have_text("0")
            expect(page.locator("#workers [data-kind=busy]")).to_have_count(2)
            expect(page.locator("#jobs [data-kind=started]").first).to_be_visible()
            occupancy = page.locator("figure", has_text="Batch occupancy").locator(".now span")
            expect(occupancy).to_have_text(re.compile(r"^[1-9]\d*\s%$"))
            # The depth is recorded every ten seconds; without a record nothing could show afterwards.
            expect(depth.get_by_role("img")).to_have_attribute("aria-label", re.compile(r"highest [\d,]{3,},"))
        expect(page.locator("#state")).to_contain_text(re.compile(r"^Idle.*\s0\swaiting"))
        expect(depth.get_by_role("img")).to_have_attribute(
            "aria-label", re.compile(r"^Queue depth, last 15 minutes: now 0, highest [\d,]{3,}, lowest 0")
        )
        # One looks back with the arrow keys, by a native control, so that a screen reader says the values.
        back = depth.get_by_role("slider", name="Queue depth: look back")
        back.focus()
        page.keyboard.press("ArrowLeft")
        expect(back).to_have_attribute("aria-valuetext", re.compile(r"^\d\d:\d\d:\d\d · [\d,]+ waiting$"))
        expect(depth.locator(".detail")).to_have_text(re.compile(r"^\d\d:\d\d:\d\d · [\d,]+ waiting$"))
        page.keyboard.press("Tab")
        expect(back).to_have_attribute("aria-valuetext", "now, 0")

    def test_a_job_is_cancelled_from_the_table(self, system: System, tabs: Tabs) -> None:
        page = tabs.open(system.http_url)
        with running_jobs(system) as jobs:
            button = page.get_by_role("button", name=f"Cancel job {jobs[2].id[:8]}")
            button.focus()
            page.keyboard.press("Enter")
            row = page.locator("#jobs tbody tr", has=page.locator(f"[title='{jobs[2].id}']"))
            expect(row).to_contain_text("cancelled")
            expect(button).to_be_hidden()
            expect(page.get_by_role("group", name="Latest jobs"), "the focus is not lost").to_be_focused()
            expect(page.get_by_role("status").first).to_have_text(f"Job {jobs[2].id[:8]} is cancelled")
            with pytest.raises(JobCancelled):
                jobs[2].result(timeout=20)

    def test_nobody_is_asked_while_nobody_looks(self, system: System, tabs: Tabs) -> None:
        page = tabs.open("about:blank")
        asked: list[str] = []

        def note(route: Route) -> None:
            asked.append(route.request.url)
            route.continue_()

        page.route("**/status*", note)
        page.clock.install()
        page.goto(system.http_url)
        expect_workers(page)
        with page.expect_response("**/status"):
            page.clock.run_for(2_500)
        page.evaluate(SET_HIDDEN, True)
        page.clock.run_for(60_000)
        seen = len(asked)
        page.clock.run_for(60_000)
        assert len(asked) == seen
        with page.expect_response("**/status?history=true"):
            page.evaluate(SET_HIDDEN, False)


class TestToken:
    def test_it_is_asked_for_and_kept_in_the_tab_alone(
        self, system: System, tabs: Tabs, start_endpoint: StartEndpoint
    ) -> None:
        tabs.expected = ("the server responded with a status of 401",)
        url = start_endpoint(**own_endpoint(system), FASTGPT2_TOKEN=TOKEN).url
        page = tabs.open(url)
        field = page.get_by_label("This endpoint asks for a token")
        expect(field).to_be_focused()
        expect(field).to_have_attribute("type", "password")
        expect(page.locator("#prompt")).to_be_hidden()
        expect(field).to_have_attribute("aria-invalid", "false")
        expect_no_violations(page)
        page.keyboard.type("wrong-horse-battery-staple")
        page.keyboard.press("Enter")
        expect(page.locator("#token-note")).to_have_text("That token was refused.")
        expect(field).to_have_attribute("aria-invalid", "true")
        expect_no_violations(page)
        expect(field).to_have_value("")
        page.keyboard.type(TOKEN)
        page.keyboard.press("Enter")
        expect_workers(page)
        expect(page.get_by_role("textbox", name="Prompt")).to_be_focused()
        page.keyboard.type(ENTRY["prompt"])
        page.keyboard.press("Control+Enter")
        expect_end(page, "+ 60 tokens")
        assert page.locator("#answer").text_content() == ENTRY["prompt"] + golden_text(60)
        page.reload()
        expect_workers(page)
        assert page.evaluate("Object.values(sessionStorage)") == [TOKEN]
        assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
        assert TOKEN not in page.content()
        page.context.new_page().goto(url)
        expect(page.context.pages[1].get_by_label("This endpoint asks for a token")).to_be_visible()


def test_redis_goes_away_and_comes_back(tabs: Tabs, start_endpoint: StartEndpoint, tmp_path: Path) -> None:
    tabs.expected = ("the server responded with a status of 503",)
    server = RedisServer(folder=tmp_path / "redis").start()
    try:
        page = tabs.open(start_endpoint(FASTGPT2_REDIS_URL=server.url, FASTGPT2_QUEUE="fastgpt2").url)
        state = page.locator("#state")
        expect(state).to_have_text("No workers · 0\u00a0waiting")
        with Client(server.url) as client:
            client.enqueue("a")
            expect(state).to_have_text("No workers · 1\u00a0waiting")
            client.connection.sadd("rq:workers:fastgpt2", "rq:worker:w1")
            client.connection.hset("rq:worker:w1", mapping={"state": "idle", "heard_at": 1})
            expect(state).to_have_text("No worker answers · 1\u00a0silent · 1\u00a0waiting")
            expect(page.locator("#workers .state span[data-kind=silent]")).to_have_text("silent")
            client.connection.delete("rq:workers:fastgpt2", "rq:worker:w1")
            expect(state).to_have_text("No workers · 1\u00a0waiting")
        server.stop()
        expect(state).to_contain_text("Redis is away")
        expect(page.locator("#as-of")).to_have_text(re.compile(r"as of \d\d:\d\d:\d\d"))
        expect(page.get_by_role("status").first).to_have_text("Redis is away")
        expect(page.locator("figure .now span").first, "what was known stays").to_have_text("1")
        expect_no_violations(page)
        server = RedisServer(server.port, tmp_path / "redis").start()
        expect(state).to_have_text("No workers · 1\u00a0waiting")
        expect(page.locator("#as-of")).to_have_text(re.compile(r"^\d\d:\d\d:\d\d"))
    finally:
        server.stop()


class TestLook:
    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_axe_finds_nothing(self, system: System, tabs: Tabs, scheme: str) -> None:
        page = tabs.open(system.http_url, color_scheme=scheme)
        expect_workers(page)
        page.get_by_role("textbox", name="Prompt").fill("a")
        page.get_by_role("button", name="Generate").click()
        expect_end(page, "tokens/s")
        with running_jobs(system):
            expect(page.locator("#jobs button:visible").first).to_be_visible()
            page.evaluate(SET_HIDDEN, True)  # so that all of it stays as it is
        expect_no_violations(page)

    def test_a_phone_scrolls_down_only(self, system: System, tabs: Tabs) -> None:
        page = tabs.open(system.http_url, **PHONE)
        expect_workers(page)
        page.get_by_role("textbox", name="Prompt").fill("x" * 300)
        page.get_by_role("button", name="Generate").click()
        expect_end(page, "tokens/s")
        with running_jobs(system):
            expect(page.locator("#jobs button:visible").first).to_be_visible()
            assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
            # The tables scroll sideways, each for itself, and by keyboard too.
            for name in ("Workers", "Latest jobs"):
                table = page.get_by_role("group", name=name)
                assert table.evaluate("(element) => element.scrollWidth > element.clientWidth")
                table.focus()
                page.keyboard.press("ArrowRight")
                expect(table).not_to_have_js_property("scrollLeft", 0)
        expect_no_violations(page)

    def test_labels_stand_above_their_own_controls(self, system: System, tabs: Tabs) -> None:
        page = tabs.open(system.http_url)
        expect_workers(page)
        for width in (320, 700, 961, 1024, 1250, 1280, 1600):
            page.set_viewport_size({"width": width, "height": 700})
            for group in page.locator("#choosing > span").all():
                label, control = (group.locator(part).bounding_box() for part in ("label", "input"))
                assert label is not None
                assert control is not None
                assert label["x"] + label["width"] <= control["x"] + control["width"] + 2, f"at {width} pixels"

    def test_nothing_moves_for_who_asks_for_that(self, system: System, tabs: Tabs) -> None:
        page = tabs.open(system.http_url, reduced_motion="reduce")
        expect_workers(page)
        page.get_by_role("textbox", name="Prompt").fill("a")
        page.get_by_label("At most").fill("480")
        with jobs_held():
            page.get_by_role("button", name="Generate").click()
            expect(page.locator("#answer.coming")).to_be_visible()
            assert page.evaluate("document.getAnimations().length") == 0
            page.get_by_role("button", name="Cancel", exact=True).click()
            expect_end(page, "Cancelled")
