"""The OpenAPI document against the code: schemathesis asks whatever the document allows, and what it does not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
from starlette.routing import Route
from support.running import GOLDEN, StartEndpoint, StartWorker

from fastgpt2.api.http.app import create_app
from fastgpt2.api.http.openapi import document
from fastgpt2.api.http.service import Bounds
from fastgpt2.system.up import System

# What a schema cannot say: how many tokens a text has, and that an idempotency key belongs to one request. So what is
# refused although the schema allows it is no failure. What is accepted although it does not, is.
EXCLUDED = "positive_data_acceptance"
SAME_BODY = ("/generate", "/generate_stream")
# A job may fail, and may be given no time. All values of each field are tried on one of the two routes with the same
# body; examples and drawn values on both.
CONFIGURATION = f"""
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", 502, 503, 504]

[[operations]]
include-name = "POST {SAME_BODY[1]}"
phases.coverage.enabled = false
"""


def test_the_document_is_served_and_tells_of_every_route(system: System) -> None:
    assert httpx.get(f"{system.http_url}/openapi.json", trust_env=False).json() == json.loads(json.dumps(document()))
    app = create_app(system.redis_url, "fastgpt2", Bounds(), lambda: False)
    routes = {
        (route.path.replace(":path", ""), method.lower())
        for route in app.routes
        if isinstance(route, Route)
        for method in route.methods or ()
        if method != "HEAD"
    }
    assert routes == set(operations())


def operations() -> Iterator[tuple[str, str]]:
    """Yield the path and the method of every operation that the document tells of."""
    for path, about in document()["paths"].items():
        yield from ((path, method) for method in about if method != "parameters")


def test_schemathesis_finds_no_fault(start_endpoint: StartEndpoint, start_worker: StartWorker, tmp_path: Path) -> None:
    start_worker(FASTGPT2_CHAT_TEMPLATE=str(GOLDEN / "chat_templates" / "human-and-assistant.jinja"))
    endpoint = start_endpoint("--timeout", "2")
    bodies = [document()["paths"][path]["post"]["requestBody"]["content"] for path in SAME_BODY]
    assert bodies[0] == bodies[1]
    (tmp_path / "schemathesis.toml").write_text(CONFIGURATION)
    done = subprocess.run(
        [
            Path(sys.executable).with_name("schemathesis"), "run", f"{endpoint.url}/openapi.json", "--seed", "1",
            "--phases", "examples,coverage,fuzzing", "--max-examples", "8", "--exclude-checks", EXCLUDED,
            "--generation-database", "none", "--no-color",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    # schemathesis leaves out the route of the document itself.
    assert f"Tested: {len(list(operations())) - 1}\n" in done.stdout
    assert "Traceback" not in endpoint.log.read_text()
