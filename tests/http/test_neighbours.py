"""What a request for a route that does not exist is told: the one that does here what was asked for. In-process."""

from __future__ import annotations

import pytest
from starlette.testclient import TestClient

from fastgpt2.api.http.app import create_app
from fastgpt2.api.http.neighbours import MAX_SHOWN
from fastgpt2.api.http.service import Bounds

ALL = "/openapi.json tells which routes there are"


@pytest.fixture(scope="module")
def web() -> TestClient:
    app = create_app("redis://127.0.0.1:1", "q", Bounds(), lambda: False)
    return TestClient(app, base_url="http://localhost", raise_server_exceptions=False)


def hint(web: TestClient, method: str, path: str) -> str:
    """Return what is said after the path and the status's own words."""
    answer = web.request(method, path)
    assert answer.status_code == 404
    error = answer.json()["error"]
    message: str = error if isinstance(error, str) else error["message"]
    head, _, said = message.partition(": Not Found; ")
    assert head == f"{method} {path[:MAX_SHOWN]}"
    return said


# The routes of other servers, as their documentation and their code have them.
@pytest.mark.parametrize(
    ("others", "meant"),
    [
        ("/v1/engines/gpt2/completions /openai/deployments/x/completions /completion /v1/complete", "/v1/completions"),
        ("/v1/responses /v1/messages /api/chat /chat/completions /chat", "/v1/completions"),
        ("/api/generate /v1/generate /invocations /models/gpt2/predict", "/generate or /v1/completions"),
        ("/api/tags /models /api/show /v2/models", "/v1/models"),
        ("/get_model_info /props /server_info /api/info", "/info"),
        ("/api/version", "/version"),
        ("/healthz /livez /ping /v1/health /api/health /health_generate /-/healthy", "/health"),
        ("/readyz /health/ready /-/ready", "/ready"),
        ("/slots /load /stats", "/status"),
        ("/prometheus /actuator/prometheus /v1/metrics", "/metrics"),
        ("/redoc /swagger /swagger-ui/index.html /docs/oauth2-redirect /v1/docs /doc", "/docs"),
        ("/swagger.json /openapi.yaml /v1/openapi.json /api/openapi.json", "/openapi.json"),
        ("/index.html /ui /dashboard", "/"),
        ("/api /v2 /openai/v1", "/v1"),
    ],
)  # fmt: skip
def test_the_routes_of_other_apis_lead_to_those_here(web: TestClient, others: str, meant: str) -> None:
    for path in others.split():
        for method in ("GET", "POST"):
            # A model with a chat template has another route for chats, which is then named first.
            assert hint(web, method, path).endswith(f"{meant} may be meant"), path


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/completions", "/v1/completions"),
        ("/v1/completion", "/v1/completions"),
        ("/v1/chat/completion", "/v1/chat/completions"),
        ("/V1/Completions", "/v1/completions"),
        ("/v1/v1/completions", "/v1/completions"),
        ("/gpt2/v1/completions", "/v1/completions"),
        ("/v1/model/gpt2", "/v1/models/gpt2"),
        ("/models/org/gpt2", "/v1/models"),
        ("/jobs", "/v1/jobs"),
        ("/Jobs/3F-a", "/v1/jobs/3F-a"),
        ("/v1/job/3F-a", "/v1/jobs/3F-a"),
        ("/gpt2/v1/jobs/3F-a", "/v1/jobs/3F-a"),
        ("/v1/jobs/3F-a/streams", "/v1/jobs/3F-a/stream"),
        ("/jobs/3F-a/events", "/v1/jobs/3F-a/stream"),
        ("/v1/jobs/3F-a/cancel", "DELETE /v1/jobs/3F-a"),
        ("/v1/jobs/3F-a/result", "/v1/jobs/3F-a"),
        ("/generate-stream", "/generate_stream"),
        ("/metrcs", "/metrics"),
        ("/helth", "/health"),
        ("/verion", "/version"),
        ("/statuses", "/status"),
    ],
)
def test_a_slip_leads_to_the_route(web: TestClient, path: str, meant: str) -> None:
    said = hint(web, "GET", path)
    assert said.endswith(" may be meant")
    assert said.startswith(meant)


def test_what_there_is_not_is_said(web: TestClient) -> None:
    for paths, reason in (
        ("/v1/embeddings /api/embed /embedding /v1/rerank /rerank", "no model here makes embeddings or ranks texts"),
        ("/tokenize /v1/messages/count_tokens /apply-template", "no route tells a text's tokens"),
        ("/v1/batches /v1/files /v1/batches/batch_1", "OpenAI's batches are run by `fastgpt2 batch FILE`"),
        ("/v1/images/generations /v1/audio/speech /v1/moderations", "only text is generated here"),
        ("/api/pull /v1/load_lora_adapter", "a model is chosen when workers are started, by --model"),
    ):
        for path in paths.split():
            assert hint(web, "POST", path).startswith(reason), path
            assert hint(web, "POST", path).endswith(ALL)


def test_nothing_is_made_up(web: TestClient) -> None:
    paths = ("/nothing", "/v1/nothing", "/x/y/z", "/favicon.ico", "/robots.txt", "/.env", "/wp-login.php", "/x" * 2000)
    for path in (*paths, "/" + "a" * 5000, "/550e8400-e29b-41d4-a716-446655440000"):
        assert hint(web, "GET", path.rstrip("/")) == ALL, path[:40]


def test_a_method_that_a_route_does_not_take_is_told_with_those_that_it_takes(web: TestClient) -> None:
    for method, path, said in (
        ("POST", "/v1", "this route takes GET, HEAD; /v1/completions may be meant"),
        ("DELETE", "/v1/jobs", "this route takes GET, HEAD, POST; /v1/jobs/{job_id} may be meant"),
        ("POST", "/docs", "this route takes GET, HEAD"),
        ("DELETE", "/", "this route takes GET, HEAD, POST"),
    ):
        answer = web.request(method, path)
        assert answer.status_code == 405
        assert answer.text.rstrip('"}').partition('"error_type')[0].find(said) > 0, answer.text
