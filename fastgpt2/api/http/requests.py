"""Who asked: the request's body, read within its bounds, and whether anybody still waits for the answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, NoReturn, Self

from starlette.requests import ClientDisconnect, Request

from fastgpt2.errors import BadRequest, ForbiddenOrigin, RequestTooLarge, RequestTooSlow

MAX_BODY_BYTES = 8 << 20


class CallerGone(BadRequest):
    """The client has hung up; nobody reads what is answered."""

    http_status = 499  # as nginx logs it


async def read_object(request: Request, seconds: float, example: str) -> dict[str, Any]:
    """The JSON object in the body, read only up to the limit and only for so long.

    Args:
        example: a body that would do, for the message.

    Raises:
        RequestTooLarge, RequestTooSlow, ForbiddenOrigin
        BadRequest: not JSON, or not an object.
    """
    _refuse_foreign(request)
    try:
        async with asyncio.timeout(seconds):
            body = await _read(request)
    except TimeoutError:
        raise RequestTooSlow(f"the body did not come within {seconds:g} s; send it faster, or less of it") from None
    except ClientDisconnect:
        raise CallerGone("the client hung up") from None
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as reason:
        raise BadRequest(f"the body is not JSON ({reason})") from None
    if not isinstance(value, dict):
        raise BadRequest(f"the body must be an object: {example}")
    return value


async def _read(request: Request) -> bytearray:
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > MAX_BODY_BYTES:
        raise RequestTooLarge(f"the body has {length[:20]} bytes; the limit is {MAX_BODY_BYTES}: send less at once")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise RequestTooLarge(f"the body has more bytes than the limit, {MAX_BODY_BYTES}: send less at once")
    return body


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")


def _refuse_foreign(request: Request) -> None:
    """Raise ForbiddenOrigin for a request that a browser sends on behalf of a page from elsewhere."""
    origin = request.headers.get("origin")
    if origin is not None and origin.partition("://")[2] != request.headers.get("host"):
        raise ForbiddenOrigin(f"requests from pages of {origin[:100]!r} are refused")


class Caller:
    """Notices that the client hangs up, once the body has been read. A context manager.

    Attributes:
        gone: whether it has.
    """

    def __init__(self, request: Request, noticed: Callable[[], None]) -> None:
        self._request = request
        self._noticed = noticed
        self.gone = False

    def __enter__(self) -> Self:
        self._task = asyncio.create_task(self._listen())
        return self

    def __exit__(self, *_: object) -> None:
        self._task.cancel()

    async def _listen(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        self._noticed()
