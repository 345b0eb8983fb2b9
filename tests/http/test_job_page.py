"""The pages of a job and of the failed jobs, in a real browser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect
from rq import Queue
from rq.job import JobStatus
from rq.results import Result
from rq.serializers import JSONSerializer
from support.browser import Tabs
from support.running import StartEndpoint

from fastgpt2 import Client
from fastgpt2.protocol.keys import queues_of, registry_key
from fastgpt2.system.up import System

TASK = "fastgpt2.worker.tasks.generate"
TOKEN = "correct-horse-battery-staple"
PROMPT = "A prompt that nobody sees"
HOSTILE = "</pre><img src=x onerror=\"document.title='taken'\"> \u202eback\u202c \x1b[31m"
PHONE: Any = {"viewport": {"width": 320, "height": 600}, "color_scheme": "dark"}
DESK: Any = {"viewport": {"width": 1280, "height": 800}, "color_scheme": "light"}


@pytest.fixture
def client(system: System) -> Iterator[Client]:
    """A client of the system's own queue, none of whose jobs has failed."""
    with Client(system.redis_url) as client:
        client.connection.delete(*(registry_key("failed", name) for name in queues_of("fastgpt2", ["demo"])))
        yield client


def fail(client: Client, job_id: str, text: str) -> str:
    """Write a failed job as a stock worker does; the ids of older releases of RQ may hold any character."""
    queue = Queue("fastgpt2", connection=client.connection, serializer=JSONSerializer)
    job = queue.create_job(TASK, kwargs={"prompt": PROMPT, "max_new_tokens": 5}, result_ttl=600)
    job._id = job_id
    job.origin = queue.name
    job._status = JobStatus.FAILED
    with client.connection.pipeline() as pipeline:
        job.save(pipeline)
        job.failed_job_registry.add(job, 600, text, pipeline)
        Result.create_failure(job, 600, text, pipeline=pipeline)
        pipeline.execute()
    return job_id


def expect_no_violations(page: Page) -> None:
    results = Axe().run(page, options={})
    assert results.violations_count == 0, results.generate_report()
    assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth"), "it scrolls down only"


def expect_state(page: Page, word: str | re.Pattern[str]) -> None:
    expect(page.locator("#job-state")).to_have_text(word)


def test_a_job_is_found_and_run_again_and_one_comes_back_by_keyboard(
    system: System, tabs: Tabs, client: Client
) -> None:
    job = client.enqueue(PROMPT, max_new_tokens=20, temperature=1.1, n=2)
    result = job.result(60)
    page = tabs.open(system.http_url)
    link = page.locator(f"#jobs a[title='{job.id}']")
    expect(link).to_have_text(job.id[:8])
    link.focus()
    page.keyboard.press("Enter")
    expect_state(page, "Finished")
    expect(page.get_by_role("heading", name="Job")).to_be_focused()
    expect(page).to_have_title(f"Job {job.id} · fastgpt2")
    for nth, text in enumerate([result.text, result.alternatives[0].text], 1):
        assert page.get_by_role("group", name=f"Text {nth} of 2").text_content() == text
    for term, figure in (("attempts", "1"), ("priority", "normal"), ("model", "demo"), ("seed", str(result.seed))):
        expect(
            page.locator("#job-figures, #job-tokens").get_by_text(term, exact=True).locator("xpath=..")
        ).to_contain_text(figure)
    expect(page.locator("#job-fields")).to_contain_text("temperature1.1")
    expect(page.locator("#job-fields")).to_contain_text("promptnot shown; --show-prompts of the endpoint shows it")
    assert PROMPT not in page.content()
    assert result.text in page.content()
    expect(page.get_by_role("button", name="Cancel", exact=True)).to_be_disabled()
    for _ in range(8):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "run-again":
            break
    page.keyboard.press("Enter")
    expect(page.locator("#job-id")).not_to_have_text(job.id)
    expect_state(page, "Finished")
    new_id = page.locator("#job-id").text_content()
    assert page.get_by_role("group", name="Text 1 of 2").text_content() == result.text
    assert client.result(str(new_id), 5).text == result.text
    page.go_back()
    expect(page.locator("#job-id")).to_have_text(job.id)
    expect_state(page, "Finished")
    page.go_back()
    expect(page.locator("#prompt")).to_be_visible()
    expect(page).to_have_title("fastgpt2")
    expect(link).to_be_focused()


def test_failed_jobs_are_read_and_run_again(system: System, tabs: Tabs, client: Client) -> None:
    traceback = "Traceback (most recent call last):\n" + "".join(f"  line {nth}\n" for nth in range(500))
    odd = fail(client, "user:42 <b>\u202e/é", f"{traceback}KeyError: {PROMPT!r} {HOSTILE}")
    others = [fail(client, f"another-{nth}", "fastgpt2.errors.ModelError: no room") for nth in range(25)]
    page = tabs.open(f"{system.http_url}/#/jobs?state=failed", **PHONE)
    rows = page.locator("#listed tbody tr")
    expect(rows).to_have_count(20)
    expect(page.locator("#list-total")).to_have_text("26 in all")
    expect(rows.nth(1)).to_contain_text("no room")
    expect_no_violations(page)
    page.get_by_role("link", name="Next page").click()
    expect(rows).to_have_count(6)
    page.go_back()
    expect(rows).to_have_count(20)
    # One that fails again is requeued under its id, and the focus is not lost.
    row = rows.filter(has_text="another")
    button = row.first.get_by_role("button")
    name = button.get_attribute("aria-label")
    assert name == f"Run job {others[0][:8]} again"
    button.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#news")).to_have_text(re.compile("^Job another- runs again$"))
    expect(page.locator("#list-total")).to_have_text("25 in all")
    # The page of one, as a link that somebody has passed on.
    for options in (PHONE, DESK):
        page = tabs.open(f"{system.http_url}/#/jobs/user%3A42%20%3Cb%3E%E2%80%AE%2F%C3%A9", **options)
        expect(page.locator("#job-id")).to_have_text("user:42 <b>\\u202e/é")
        expect_state(page, "Failed")
        expect(page.locator("#job-error")).to_contain_text("</pre><img src=x")
        page.get_by_text("All that is kept of it").click()
        kept = page.locator("#job-traceback pre")
        expect(kept).to_contain_text("KeyError: '[prompt]'")
        expect(kept).to_contain_text("line 499")
        expect(kept).to_contain_text("\\u202eback\\u202c \\u001b[31m")
        assert page.locator("img").count() == 0
        expect(page).to_have_title("Job user:42 <b>\\u202e/é · fastgpt2")
        assert PROMPT not in page.content()
        assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth"), "it scrolls down only"
    expect_no_violations(page)
    page.get_by_role("button", name="Run again").click()
    expect_state(page, "Finished")
    assert client.result(odd, 5).usage.completion_tokens == 5
    expect(page.locator("#job-failure")).to_be_hidden()


def test_a_job_that_waits_for_another_is_cancelled(system: System, tabs: Tabs, client: Client) -> None:
    queue = Queue("fastgpt2", connection=client.connection, serializer=JSONSerializer)
    first = queue.create_job(TASK, ("a",))
    first.save()
    job = queue.enqueue(TASK, "a", depends_on=first)
    page = tabs.open(f"{system.http_url}/#/jobs/{job.id}")
    expect_state(page, "Waiting for another job")
    expect(page.locator("#job-figures")).to_contain_text(first.id)
    expect(page.get_by_role("button", name="Run again")).to_be_disabled()
    page.get_by_role("button", name="Cancel", exact=True).click()
    expect_state(page, "Cancelled")
    expect(page.locator("#news")).to_have_text("The job is cancelled")
    expect(page.get_by_role("button", name="Run again")).to_be_enabled()
    first.delete()


def test_what_is_not_there_and_what_has_gone(system: System, tabs: Tabs, client: Client) -> None:
    tabs.expected = ("the server responded with a status of 40",)
    page = tabs.open(f"{system.http_url}/#/jobs/nosuch")
    expect_state(page, re.compile("^There is no such job: no job 'nosuch'"))
    expect(page.get_by_role("button", name="Run again")).to_be_disabled()
    page.goto(f"{system.http_url}/#/jobs?state=nosuch")
    expect(page.locator("#list-trouble")).to_contain_text("state must be one of")
    page.goto(f"{system.http_url}/#/nosuch")
    expect(page.locator("#prompt")).to_be_visible()
    job_id = fail(client, "soon-gone", "KeyError: 1")
    page.goto(f"{system.http_url}/#/jobs/{job_id}")
    expect_state(page, "Failed")
    client.connection.delete(f"rq:job:{job_id}")
    page.get_by_role("button", name="Run again").click()
    expect(page.locator("#run-again-note")).to_contain_text("no job 'soon-gone'")


def test_a_link_to_a_job_asks_for_the_token_first(
    system: System, tabs: Tabs, client: Client, start_endpoint: StartEndpoint
) -> None:
    tabs.expected = ("the server responded with a status of 401",)
    job_id = fail(client, "behind-a-token", "fastgpt2.errors.ModelError: no room")
    own = {"FASTGPT2_REDIS_URL": system.redis_url, "FASTGPT2_QUEUE": "fastgpt2", "FASTGPT2_SHOW_PROMPTS": "1"}
    page = tabs.open(f"{start_endpoint(**own, FASTGPT2_TOKEN=TOKEN).url}/#/jobs/{job_id}")
    expect(page.get_by_label("This endpoint asks for a token")).to_be_focused()
    expect(page.locator("#job")).to_be_hidden()
    page.keyboard.type(TOKEN)
    page.keyboard.press("Enter")
    expect_state(page, "Failed")
    expect(page.locator("#job-error")).to_contain_text("no room")
    expect(page.locator("#job-fields")).to_contain_text(PROMPT)
    expect(page.get_by_role("heading", name="Job")).to_be_focused()
    page.get_by_role("link", name="Failed jobs").click()
    expect(page.locator("#listed td.prompt").first).to_contain_text(PROMPT[:10])
    assert page.url.endswith("/#/jobs?state=failed")
