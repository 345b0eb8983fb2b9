"""What `fastgpt2 up` says when it is ready: where to connect, and lines to try that work as they are printed."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastgpt2 import settings
from fastgpt2.api.http.access import is_loopback
from fastgpt2.api.http.tokens import read_tokens
from fastgpt2.protocol.connection import holds_secret, without_password

_ALL_ADDRESSES = ("0.0.0.0", "::")


def welcome(values: dict[str, Any], http_url: str, redis_url: str, embedded: bool) -> str:
    """Return the text.

    Args:
        values: the settings of `fastgpt2 up`.
        http_url: where the endpoint answers on this machine.
        embedded: whether the Redis is this program's own.
    """
    address = _name_to_ask(values, http_url)
    workers = "1 worker" if values["workers"] == 1 else f"{values['workers']} workers"
    return "\n".join(
        [
            f"fastgpt2 is ready: model {values['model']}, {workers}, queue {values['queue']}",
            f"  endpoint  {address}/ in a browser, {address}/v1 for OpenAI's clients",
            *_where_a_proxy_shows_it(values["public_url"]),
            f"  Redis     {_where_redis_is(redis_url, embedded)}",
            f"  try       {_enqueue_line(values, redis_url)}",
            f"            {_curl_line(values, address)}",
            "Ctrl-C stops it.",
        ]
    )


def _where_a_proxy_shows_it(public_url: str | None) -> list[str]:
    return [] if public_url is None else [f"            {public_url}/ and {public_url}/v1 through the proxy"]


def named_by(redis_url: str) -> str:
    """Return what names this Redis: the variable, which may be left in the shell from another day, or the option."""
    variable = settings.REDIS_URL.variable
    return f"{variable}, which is set in this shell," if os.environ.get(variable) == redis_url else "--redis-url"


def _where_redis_is(redis_url: str, embedded: bool) -> str:
    if embedded:
        return f"{redis_url} (embedded)"
    shown = without_password(redis_url)
    variable = settings.REDIS_URL.variable
    if os.environ.get(variable) == redis_url:
        return f"{shown} ({variable} is set in this shell; without it, up starts a Redis of its own)"
    return shown


def _enqueue_line(values: dict[str, Any], redis_url: str) -> str:
    variables = []
    variable, end = settings.REDIS_URL.variable, ""
    if not holds_secret(redis_url):
        variables.append(f"{variable}={shlex.quote(redis_url)}")
    elif os.environ.get(variable) != redis_url:
        end = f"   # after: export {variable}=URL, with the URL that up was given, and its password"
    else:
        end = f"   # where {variable} is set as it is for up"
    if values["queue"] != settings.QUEUE.default:
        variables.append(f"{settings.QUEUE.variable}={shlex.quote(values['queue'])}")
    return f"{' '.join([*variables, 'fastgpt2'])} enqueue --wait 'My name is'{end}"


def _curl_line(values: dict[str, Any], address: str) -> str:
    token = end = ""
    if values["token_file"]:
        file = shlex.quote(str(Path(values["token_file"]).absolute()))
        tokens = read_tokens(values["token_file"])
        if tokens is not None and tokens.names:
            token, end = ' -H "Authorization: Bearer $TOKEN"', f"   # after: TOKEN=one of those in {file}"
        else:
            token = f""" -H "Authorization: Bearer $(grep -m 1 '^[^#]' {file})\""""
    elif settings.TOKEN.resolve() is not None:
        token = f' -H "Authorization: Bearer ${settings.TOKEN.variable}"'
    return f'curl -s {shlex.quote(f"{address}/")}{token} -d \'{{"inputs": "My name is"}}\'{end}'


def _name_to_ask(values: dict[str, Any], http_url: str) -> str:
    """Return the URL by which the endpoint may be asked: without a token, one that has a name listens to that only."""
    host, name = values["host"], values["host_name"]
    is_open = values["token_file"] or settings.TOKEN.resolve() is not None
    if is_open or not name or host in _ALL_ADDRESSES or is_loopback(host):
        return http_url
    return f"http://{name}:{urlsplit(http_url).port}"
