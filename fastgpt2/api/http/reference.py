"""The routes that tell what the endpoint is: its document, the page made of that, OpenAI's part, its version."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from fastgpt2 import __version__
from fastgpt2.api.http.openapi import document
from fastgpt2.api.http.responses import JSON, is_openai


class Reference:
    """The handlers of these routes.

    Args:
        public_url: where a proxy makes the endpoint reachable; None if nobody has told.
    """

    def __init__(self, public_url: str | None) -> None:
        self._public_url = public_url

    @cached_property
    def _document(self) -> dict[str, Any]:
        return document() if self._public_url is None else {**document(), "servers": [{"url": self._public_url}]}

    async def document(self, _request: Request) -> Response:
        """Answer `GET /openapi.json`."""
        return JSON(self._document)

    async def docs(self, _request: Request) -> Response:
        """Answer `GET /docs`: the document as a page for a browser."""
        from fastgpt2.api.http.docs_page import docs_page

        body, headers = docs_page()
        return Response(body, headers=headers)

    async def v1(self, _request: Request) -> Response:
        """Answer `GET /v1`: what there is below it, for who has opened the address that OpenAI's clients take."""
        routes = [
            {"method": method.upper(), "path": path, "summary": operation["summary"]}
            for path, operations in self._document["paths"].items()
            if is_openai(path)
            for method, operation in operations.items()
            if method != "parameters"
        ]
        return JSON({"object": "api", "version": __version__, "docs": "/docs", "routes": routes})

    async def version(self, _request: Request) -> Response:
        """Answer `GET /version`, as vLLM and ollama do."""
        return JSON({"version": __version__})
