"""The body of a request, read within its bounds."""

from __future__ import annotations

import asyncio
import json
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from fastgpt2.errors import BadRequest, RequestTooLarge, RequestTooSlow, UnsupportedEncoding
from fastgpt2.fields import why_no_json

MAX_BODY_BYTES = 8 << 20


class ClientGone(BadRequest):
    """Raised if the client has closed the connection, so that nobody reads the answer."""

    http_status = 499  # as nginx logs it


async def read_object(request: Request, seconds: float, example: str) -> dict[str, Any]:
    """Read the JSON object in the body, up to `MAX_BODY_BYTES` and for at most `seconds`.

    Args:
        example: a body that would be accepted, for the error message.

    Raises:
        RequestTooLarge, RequestTooSlow, UnsupportedEncoding
        BadRequest: the body is not JSON, or not an object.
    """
    _refuse_encoding(request)
    try:
        async with asyncio.timeout(seconds):
            body = await _read_body(request)
    except TimeoutError:
        raise RequestTooSlow(
            f"the body did not come within {seconds:g} s; send it faster, send less, or raise --body-timeout"
        ) from None
    except ClientDisconnect:
        raise ClientGone("the client closed the connection") from None
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as reason:
        raise BadRequest(f"the body is not JSON ({why_no_json(reason)}); send an object such as {example}") from None
    if not isinstance(value, dict):
        raise BadRequest(f"the body must be an object such as {example}")
    return value


async def _read_body(request: Request) -> bytearray:
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
    """Refuse NaN and Infinity, which Python's JSON has and the standard has not."""
    raise ValueError(f"{text} is not a JSON value")


def _refuse_encoding(request: Request) -> None:
    """Raise UnsupportedEncoding for a compressed body: what a small one inflates to has no bound that is known before.

    A body of plain JSON has no such header, or `identity`.
    """
    named = ", ".join(request.headers.getlist("content-encoding")).strip()
    if any(one.strip().lower() not in ("", "identity") for one in named.split(",")):
        raise UnsupportedEncoding(
            f"the body has the content-encoding {named[:100]!r}, and compressed bodies are not read: send plain JSON "
            "without that header"
        )
