"""The answer to a request for a route or a method that does not exist: it names the one that was likely meant.

That is a route with another beginning or a slip in it, or the one that does here what the path does in another API:
OpenAI's, vLLM's, text-generation-inference's, llama.cpp's, ollama's, SGLang's, Kubernetes' probes.
"""

from __future__ import annotations

from collections.abc import Iterator

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from fastgpt2.api.http.responses import JSON, KINDS, Kind, error_body, is_openai
from fastgpt2.errors import BadRequest

# What Starlette refuses itself, by the status; OpenAI has the same codes.
_KINDS = {
    404: Kind("invalid_request_error", "unknown_url", "unknown_url"),
    405: Kind("invalid_request_error", "method_not_supported", "method_not_supported"),
}

# How alike the path of a route must be to be what was meant, by difflib's ratio: "/completions" and "/v1/completions"
# are by 0.89.
_LIKENESS = 0.8
MAX_SHOWN = 200

# How many of the last words of a path may be unknown behind one that is known: "/models/org/name".
MAX_PARENTS = 3

_ALL_ROUTES = "/openapi.json tells which routes there are"

# What stands for the part of a path that names a job or a model, while paths are compared.
_ANYTHING = "*"

# By the routes here: how paths of other APIs end that do the same. A route that is not there is left out. Of several
# rows the first one counts.
_ENDINGS: dict[tuple[str, ...], str] = {
    ("/v1/chat/completions", "/v1/completions"): "chat chat/completions chat/completion chat/complete responses "
    "messages conversation converse",
    ("/v1/completions",): "complete completion completions completions/render infill edits",
    ("/generate", "/v1/completions"): "generate invocations predict infer inference predictions text-generation",
    ("/generate_stream", "/v1/completions"): "generate-stream stream_generate infer_stream generatestream",
    ("/v1/models",): "model models tags list show ps",
    ("/info",): "model_info get_model_info model-info props server_info get_server_info config about",
    ("/version",): "ver versions buildinfo",
    ("/health",): "healthz livez live liveness alive ping heartbeat healthcheck health_check healthy health_generate "
    "_health",
    ("/ready",): "readyz readiness started startup startupz is_ready",
    ("/status",): "slots load get_load stats statistics state queue queues workers is_sleeping",
    ("/metrics",): "metric prometheus federate",
    ("/docs",): "doc documentation swagger swagger-ui swagger-ui.html swagger/index.html swagger-ui/index.html "
    "docs/index.html docs.html redoc rapidoc scalar api-docs apidocs reference help",
    ("/openapi.json",): "openapi openapi.yaml openapi.yml swagger.json schema schema.json api-docs.json v3/api-docs",
    ("/v1/jobs",): "job jobs task tasks enqueue submit",
    ("/v1",): "api v2 v3 v1beta openai",
    ("/",): "index index.html index.htm home ui web dashboard console playground chat.html",
}

# What other APIs have and this one has not.
_MISSING = {
    "no model here makes embeddings or ranks texts": "embeddings embedding embed embed_all embeddings_all api/embed "
    "rerank score pooling classify similarity encode",
    "no route tells a text's tokens: /v1/completions takes token ids, and tells tokens with logprobs": "tokenize "
    "detokenize chat_tokenize tokenizer apply-template count_tokens input_tokens",
    "OpenAI's batches are run by `fastgpt2 batch FILE`": "batches files uploads",
    "only text is generated here": "speech transcriptions translations generations images audio moderations realtime "
    "sdapi txt2img",
    "a model is chosen when workers are started, by --model": "pull push create copy delete unload "
    "load_lora_adapter unload_lora_adapter lora-adapters fine_tuning/jobs fine-tunes sleep wake_up",
}

_JOBS = ("job", "jobs", "task", "tasks")

# What is asked of one job elsewhere: how the path goes on behind the job, and what does that here.
_OF_A_JOB = {
    "cancel": "DELETE /v1/jobs/{job_id}",
    "delete": "DELETE /v1/jobs/{job_id}",
    "stop": "DELETE /v1/jobs/{job_id}",
    "abort": "DELETE /v1/jobs/{job_id}",
    "result": "/v1/jobs/{job_id}",
    "results": "/v1/jobs/{job_id}",
    "output": "/v1/jobs/{job_id}",
    "status": "/v1/jobs/{job_id}",
    "wait": "/v1/jobs/{job_id}",
    "events": "/v1/jobs/{job_id}/stream",
    "text": "/v1/jobs/{job_id}/stream",
    "follow": "/v1/jobs/{job_id}/stream",
    "retry": "/v1/jobs/{job_id}/requeue",
    "rerun": "/v1/jobs/{job_id}/requeue",
    "run": "/v1/jobs/{job_id}/requeue",
}


async def handle_unknown_route(request: Request, error: Exception) -> Response:
    """Answer a request for a route or a method that does not exist, for Starlette."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    routes = {route.path.replace(":path}", "}"): route for route in request.app.routes if isinstance(route, Route)}
    if error.status_code == 405:
        methods = (error.headers or {}).get("Allow", "").split(", ")
        hint = f"this route takes {', '.join(sorted(methods))}{_hint_of_method(request.method, path, routes)}"
    else:
        hint = _hint_of_path(path[:MAX_SHOWN], routes)
    message = f"{request.method} {path[:MAX_SHOWN]}: {error.detail}; {hint}"
    body = error_body(is_openai(path), message, _KINDS.get(error.status_code, KINDS[BadRequest]))
    return JSON(body, error.status_code, error.headers)


def _hint_of_method(method: str, path: str, routes: dict[str, Route]) -> str:
    """Return which route below a path takes a method that the path itself does not take; empty if there is none."""
    inner = (name for name, route in routes.items() if path != "/" and name.startswith(f"{path}/"))
    meant = next((name for name in inner if method in (routes[name].methods or ())), None)
    return f"; {meant} may be meant" if meant else ""


def _hint_of_path(path: str, routes: dict[str, Route]) -> str:
    """Return what there is instead of a path."""
    parts = path.split("/")
    for end in range(len(parts), max(1, len(parts) - MAX_PARENTS - 1), -1):
        here = "/".join(parts[:end])
        meant = list(_counterparts(here, routes)) or _with_other_beginning(here, routes)
        if not meant and here == path:
            meant = _most_alike(path, routes)
        # Each path of OpenAI's stands below /v1, which tells nothing of what was meant.
        if meant and (here == path or meant != ["/v1"]):
            return f"{' or '.join(meant)} may be meant"
        for reason, endings in _MISSING.items():
            if _ends_with_one_of(here, endings):
                return f"{reason}; {_ALL_ROUTES}"
    return _ALL_ROUTES


def _counterparts(path: str, routes: dict[str, Route]) -> Iterator[str]:
    """Yield the routes that do here what a path of another API does."""
    *_, list_name, job_id, what = ("", "", *path.split("/"))
    of_job = _OF_A_JOB.get(what.lower(), "") if list_name.lower() in _JOBS else ""
    if job_id.lower() in _JOBS and what:
        of_job, job_id = "/v1/jobs/{job_id}", what
    if of_job.split(" ")[-1] in routes:
        yield of_job.replace("{job_id}", job_id)
        return
    found = [others for others, endings in _ENDINGS.items() if _ends_with_one_of(path, endings)]
    yield from (other for others in found[:1] for other in others if other in routes)


def _ends_with_one_of(path: str, endings: str) -> bool:
    return any(path.lower().endswith(f"/{ending}") for ending in endings.split())


def _with_other_beginning(path: str, routes: dict[str, Route]) -> list[str]:
    """Return the route that a path ends with, or of which it is the end: "/jobs/ID" is that of "/v1/jobs/ID"."""
    for template in sorted(routes, key=len, reverse=True):
        aligned, pattern, meant = _align(path, template)
        has_words = bool(aligned.strip(f"/{_ANYTHING}"))
        if template != "/" and has_words and (aligned.endswith(pattern) or pattern.endswith(aligned)):
            return [meant]
    return []


def _most_alike(path: str, routes: dict[str, Route]) -> list[str]:
    from difflib import SequenceMatcher

    ratios = []
    for template in routes:
        aligned, pattern, filled = _align(path, template)
        meant = filled if path.count("/") == template.count("/") else template
        ratios.append((SequenceMatcher(None, aligned, pattern).ratio(), meant))
    ratio, meant = max(ratios)
    return [meant] if ratio >= _LIKENESS else []


def _align(path: str, template: str) -> tuple[str, str, str]:
    """Return a path in which a sign stands for what names a job or a model, if it went by this route's pattern.

    Returns:
        The path with that sign, the route with that sign, and the route with the path's names.
    """
    parts, wanted = path.lower().split("/"), template.split("/")
    named, filled = path.split("/"), template.split("/")
    for back in range(1, min(len(parts), len(wanted)) + 1):
        if wanted[-back].startswith("{") and parts[-back]:
            filled[-back] = named[-back]
            parts[-back] = wanted[-back] = _ANYTHING
    return "/".join(parts), "/".join(wanted), "/".join(filled)
