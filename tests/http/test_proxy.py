"""The endpoint behind a real nginx, and asked by pages of another site: all of it in a real browser."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import trustme
from axe_playwright_python.sync_playwright import Axe
from openai import OpenAI
from playwright.sync_api import Page, expect
from support.browser import Tabs
from support.nginx import free_ports, require_nginx, running_nginx
from support.running import GOLDEN, RunningEndpoint, wait_until

from fastgpt2.api.http.openapi import document
from fastgpt2.system.up import System

pytestmark = pytest.mark.processes

TOKEN = "correct-horse-battery-staple"
ENTRIES: list[dict[str, Any]] = json.loads((GOLDEN / "demo_continuations.json").read_text("utf-8"))["continuations"]
ENTRY = next(entry for entry in ENTRIES if entry["prompt"] == "Sherlock Holmes")

# Nothing but `proxy_pass` stands in most of these, as in a first configuration of somebody who tries it out.
SERVERS = """
server {{
    listen 127.0.0.1:{plain};
    location / {{ proxy_pass http://127.0.0.1:{locked}; }}
}}
server {{
    listen 127.0.0.1:{taken_off};
    location /gpt2/ {{ proxy_pass http://127.0.0.1:{open}/; }}
    location / {{ default_type text/html; return 200 '<!doctype html><title>a page of its own</title>'; }}
}}
server {{
    listen 127.0.0.1:{left_on};
    location / {{ proxy_pass http://127.0.0.1:{open}; }}
}}
server {{
    listen 127.0.0.1:{tls} ssl;
    ssl_certificate {folder}/server.pem;
    ssl_certificate_key {folder}/server.key;
    location / {{ proxy_pass http://127.0.0.1:{open}; proxy_set_header X-Forwarded-Host $http_host; }}
}}
"""


@dataclass
class Site:
    """Two endpoints of one pool, and the ports of nginx that lead to them.

    Attributes:
        locked: an endpoint with a token, which pages of `allowed` may use.
        open: one without, which has a public URL, and trusts nginx.
    """

    locked: RunningEndpoint
    open: RunningEndpoint
    plain: int
    taken_off: int
    left_on: int
    tls: int

    @property
    def allowed(self) -> str:
        return f"http://127.0.0.1:{self.taken_off}"


@pytest.fixture(scope="module")
def site(system: System, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    require_nginx()
    folder = tmp_path_factory.mktemp("nginx")
    certificate = trustme.CA().issue_cert("localhost")
    certificate.private_key_pem.write_to_path(folder / "server.key")
    for part in certificate.cert_chain_pems:
        part.write_to_path(folder / "server.pem", append=True)
    plain, taken_off, left_on, tls = free_ports(4)
    allowed = f"http://127.0.0.1:{taken_off}"
    with ExitStack() as stack:
        locked = start(stack, system, folder / "locked.log", "--allow-origin", allowed, FASTGPT2_TOKEN=TOKEN)
        web = ("--public-url", f"{allowed}/gpt2", "--trusted-proxy", "127.0.0.1")
        open_one = start(stack, system, folder / "open.log", *web)
        ports = {"plain": plain, "taken_off": taken_off, "left_on": left_on, "tls": tls}
        servers = SERVERS.format(folder=folder, locked=locked.port, open=open_one.port, **ports)
        stack.enter_context(running_nginx(folder, servers, tls))
        yield Site(locked, open_one, **ports)


def start(stack: ExitStack, system: System, log: Path, *options: str, **more: str) -> RunningEndpoint:
    """Start an endpoint of a pool, and stop it with the stack."""
    environment = {**os.environ, "FASTGPT2_REDIS_URL": system.redis_url, **more}
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "fastgpt2", "api", "--port", "0", *options], env=environment, stderr=out, text=True
        )
    stack.callback(process.wait)
    stack.callback(process.kill)
    wait_until(lambda: "endpoint on" in log.read_text(), "the endpoint to listen")
    return RunningEndpoint(process, log)


def try_box(page: Page) -> None:
    """Send a prompt from the page's own box, and read the answer, which is a stream."""
    page.get_by_role("textbox", name="Prompt").fill(ENTRY["prompt"])
    page.get_by_label("At most").fill("5")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#answer-end")).to_contain_text("+ 5 tokens")
    expect(page.get_by_role("log", name="Answer")).to_contain_text(ENTRY["prompt"])


class TestNginx:
    def test_the_token_is_enough_behind_proxy_pass_alone(self, site: Site, tabs: Tabs) -> None:
        tabs.expected = ("the server responded with a status of 401",)
        page = tabs.open(f"http://127.0.0.1:{site.plain}/")
        page.get_by_label("This endpoint asks for a token").fill(TOKEN)
        page.keyboard.press("Enter")
        try_box(page)

    def test_the_page_works_at_a_path_that_nginx_takes_off(self, site: Site, tabs: Tabs) -> None:
        page = tabs.open(f"{site.allowed}/gpt2")  # nginx leads on to /gpt2/
        try_box(page)

    def test_the_page_works_at_a_path_that_nginx_leaves_on(self, site: Site, tabs: Tabs) -> None:
        # The page of another address than the public one is one from elsewhere, and is told how to be none.
        tabs.expected = ("the server responded with a status of 403",)
        page = tabs.open(f"http://127.0.0.1:{site.left_on}/gpt2")  # the endpoint leads on to /gpt2/
        assert page.url.endswith("/gpt2/")
        page.get_by_role("textbox", name="Prompt").fill("a")
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("#answer-end")).to_contain_text("tell it so by --public-url URL")

    def test_what_a_trusted_proxy_says_makes_the_page_the_endpoints_own(self, site: Site, tabs: Tabs) -> None:
        try_box(tabs.open(f"https://localhost:{site.tls}/", ignore_https_errors=True))

    def test_openais_client_streams_below_a_path(self, site: Site) -> None:
        for base in (f"{site.allowed}/gpt2/v1", f"http://127.0.0.1:{site.left_on}/gpt2/v1"):
            with OpenAI(base_url=base, api_key="none", http_client=httpx.Client(trust_env=False)) as ai:
                events = list(ai.completions.create(model="demo", prompt="a", max_tokens=3, stream=True))
                assert events[-1].choices[0].finish_reason == "length"

    def test_the_document_names_the_public_url(self, site: Site) -> None:
        for port, path in ((site.open.port, ""), (site.left_on, "/gpt2")):
            told = httpx.get(f"http://127.0.0.1:{port}{path}/openapi.json", trust_env=False).json()
            assert told["servers"] == [{"url": f"{site.allowed}/gpt2"}]


# What a page of another site does: it streams, reads headers, and reads why it is refused.
ASK = """async ([url, token]) => {
    const headers = { "Content-Type": "application/json", Authorization: `Bearer ${token}` };
    const body = JSON.stringify({ prompt: "a", max_tokens: 3, stream: true });
    const answer = await fetch(url, { method: "POST", headers, body });
    return [answer.status, answer.headers.get("x-job-id"), await answer.text()];
}"""


class TestPagesOfOtherSites:
    def test_an_allowed_page_streams_and_reads_errors(self, site: Site, tabs: Tabs) -> None:
        tabs.expected = ("the server responded with a status of 401",)
        page = tabs.open(f"{site.allowed}/")
        url = f"{site.locked.url}/v1/completions"
        status, job_id, text = page.evaluate(ASK, [url, TOKEN])
        assert (status, len(job_id)) == (200, 36)
        assert text.endswith("data: [DONE]\n\n")
        status, _, text = page.evaluate(ASK, [url, "wrong"])
        assert (status, json.loads(text)["error"]["code"]) == (401, "invalid_api_key")
        jobs = f"{site.locked.url}/v1/jobs/{job_id}"
        script = "(u) => fetch(u, {method: 'DELETE', headers: {Authorization: `Bearer %s`}}).then((r) => r.status)"
        assert page.evaluate(script % TOKEN, jobs) == 200

    def test_another_page_reads_nothing(self, site: Site, tabs: Tabs) -> None:
        tabs.expected = ("blocked by CORS policy", "net::ERR_FAILED", "status of 403")
        page = tabs.open(f"http://localhost:{site.taken_off}/")  # another origin, though the same machine
        caught = "async (url) => { try { return await (await fetch(url)).text(); } catch { return 'nothing'; } }"
        for url in (f"{site.locked.url}/health", f"{site.open.url}/status"):
            assert page.evaluate(caught, url) == "nothing"
        simple = "(u) => fetch(u, {method: 'POST', mode: 'no-cors', body: '{\"prompt\": \"a\"}'}).then(() => 'sent')"
        assert page.evaluate(simple, f"{site.open.url}/v1/jobs") == "sent"
        assert "POST /v1/jobs 403" in site.open.log.read_text(), "and had nothing done"


KEEP_A_FEW = """() => {
    const kept = ["generate", "follow_job", "version", "schema-Usage"];
    for (const section of document.querySelectorAll("main section[aria-labelledby]"))
        if (!kept.includes(section.getAttribute("aria-labelledby"))) section.remove();
}"""


class TestRoutesPage:
    def test_all_routes_stand_on_it_and_nothing_comes_from_elsewhere(self, site: Site, tabs: Tabs) -> None:
        page = tabs.open("about:blank")
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        address = f"{site.allowed}/gpt2/docs/"
        page.goto(address)
        assert asked == [address]
        told = [(method, path) for path, about in document()["paths"].items() for method in about]
        for method, path in told:
            if method != "parameters":
                expect(page.get_by_role("heading", name=f"{method.upper()}{path}", exact=True)).to_have_count(1)
        for name in document()["components"]["schemas"]:
            assert page.locator(f"#schema-{name}").count() == 1
        ids = "new Set([...document.querySelectorAll('[id]')].map((element) => element.id)).size"
        assert page.evaluate(ids) == page.locator("[id]").count(), "each id stands once"
        broken = (
            "[...document.querySelectorAll('a[href^=\"#\"]')].filter((a) => !document.querySelector(a.hash)).length"
        )
        assert page.evaluate(broken) == 0
        page.get_by_role("link", name="openapi.json", exact=True).first.click()
        assert page.url == f"{site.allowed}/gpt2/openapi.json"
        page.go_back()
        page.get_by_role("link", name="the pool").click()
        assert page.url == f"{site.allowed}/gpt2/"

    def test_a_request_is_tried_from_it(self, site: Site, tabs: Tabs) -> None:
        tabs.expected = (*(f"the server responded with a status of {status}" for status in (400, 401, 404)),)
        page = tabs.open(f"http://127.0.0.1:{site.plain}/docs")
        form = page.get_by_role("form", name="Try POST /v1/completions")
        form.get_by_role("button", name="Send").click()
        expect(form.get_by_role("status")).to_contain_text("401 Unauthorized")
        expect(page.locator("#token-note")).to_have_text("This endpoint asks for a token.")
        expect(page.get_by_role("textbox", name="Token", exact=True)).to_be_focused()
        page.keyboard.type(TOKEN)
        page.keyboard.press("Enter")
        body = form.get_by_label("Body")
        body.fill(json.dumps({"prompt": ENTRY["prompt"], "max_tokens": 3, "stream": True, "user": "it's me"}))
        form.get_by_role("button", name="Send").click()
        answer = form.get_by_role("region", name="Answer of POST /v1/completions")
        expect(answer).to_contain_text("data: [DONE]")
        expect(form.get_by_role("status")).to_contain_text(re.compile(r"^200 OK, .* · x-job-id: \S+$"))
        form.get_by_text("With curl").click()
        line = form.locator(".curl").inner_text()
        done = subprocess.run(
            ["bash", "-c", line],
            env={**os.environ, "FASTGPT2_TOKEN": TOKEN},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.stdout.endswith("data: [DONE]\n\n"), "the line for a shell does the same"
        body.fill("{")
        form.get_by_role("button", name="Send").click()
        expect(answer).to_contain_text("the body is not JSON")
        job = page.get_by_role("form", name="Try GET /v1/jobs/{job_id}", exact=True)
        job.get_by_label("job_id", exact=True).fill("no/such job")
        job.get_by_role("button", name="Send").click()
        expect(job.get_by_role("status")).to_contain_text("404")
        assert TOKEN not in page.content()

    def test_axe_finds_nothing_and_a_phone_scrolls_down_only(self, site: Site, tabs: Tabs) -> None:
        page = tabs.open(f"{site.open.url}/docs", color_scheme="dark", viewport={"width": 320, "height": 740})
        page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
        form = page.get_by_role("form", name="Try GET /version")
        form.get_by_role("button", name="Send").click()
        expect(form.get_by_role("region")).to_contain_text('"version"')
        assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
        page.evaluate(KEEP_A_FEW)  # axe looks at each line of each table, of which there are a thousand
        results = Axe().run(page, options={})
        assert results.violations_count == 0, results.generate_report()
        assert len(results.response["passes"]) > 15, "it looked at something"
        page.emulate_media(color_scheme="light")
        page.set_viewport_size({"width": 1280, "height": 740})
        results = Axe().run(page, options={"runOnly": ["color-contrast"]})
        assert results.violations_count == 0, results.generate_report()
        assert results.response["passes"]
