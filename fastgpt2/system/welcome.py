"""What `fastgpt2 up` says when it is ready: where to connect, and lines to try that work as they are printed."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastgpt2 import settings
from fastgpt2.api.http.access import is_loopback
from fastgpt2.api.http.tokens import read_tokens
from fastgpt2.plurals import counted
from fastgpt2.protocol.connection import holds_secret, without_password
from fastgpt2.system.served_model import ServedModel

_ALL_ADDRESSES = ("0.0.0.0", "::")


def welcome(
    values: dict[str, Any], models: Sequence[ServedModel], http_url: str, redis_url: str, embedded: bool
) -> str:
    """Return the text.

    Args:
        values: the settings of `fastgpt2 up`.
        models: what its workers serve.
        http_url: where the endpoint answers on this machine.
        embedded: whether the Redis is this program's own.
    """
    address = _name_to_ask(values, http_url)
    first = "nobody here" if models[0].named_only else models[0].names[0]
    of_several = f"  models    requests say by `model` which they are for; one that names none goes to {first}"
    return "\n".join(
        [
            f"fastgpt2 is ready: {describe_models(models, values['workers'])}, queue {values['queue']}",
            *([of_several] if len(models) > 1 or models[0].named_only else []),
            f"  endpoint  {address}/ in a browser, {address}/v1 for OpenAI's clients",
            *_where_a_proxy_shows_it(values["public_url"]),
            f"  Redis     {_where_redis_is(redis_url, embedded)}",
            f"  try       {_enqueue_line(values, models[0], redis_url)}",
            f"            {_curl_line(values, models[0], address)}",
            "Ctrl-C stops it.",
        ]
    )


def describe_models(models: Sequence[ServedModel], workers: int) -> str:
    """Return the names of models, and of how many workers each has: "models gpt2 and tiny (/a/folder), 2 workers each".

    Args:
        workers: the number of workers of each model.
    """
    *others, last = [_describe_names(model) for model in models]
    count = counted(workers, "worker")
    if not others:
        return f"model {last}, {count}"
    return f"models {', '.join(others)} and {last}, {count} each"


def _describe_names(model: ServedModel) -> str:
    """Return the first name of a model; in brackets what is loaded, if that is another name, and further names."""
    name, *further = model.names
    more = [*([] if name == model.model else [model.model]), *(f"also {other}" for other in further)]
    return f"{name} ({', '.join(more)})" if more else name


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


def _enqueue_line(values: dict[str, Any], model: ServedModel, redis_url: str) -> str:
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
    named = f"--model {shlex.quote(model.names[0])} " if model.named_only else ""
    return f"{' '.join([*variables, 'fastgpt2'])} enqueue --wait {named}'My name is'{end}"


def _curl_line(values: dict[str, Any], model: ServedModel, address: str) -> str:
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
    body: dict[str, Any] = {"inputs": "My name is"}
    if model.named_only:
        body["parameters"] = {"model": model.names[0]}
    return f"curl -s {shlex.quote(f'{address}/')}{token} -d {shlex.quote(json.dumps(body))}{end}"


def _name_to_ask(values: dict[str, Any], http_url: str) -> str:
    """Return the URL by which the endpoint may be asked: without a token, one that has a name listens to that only."""
    host, name = values["host"], values["host_name"]
    is_open = values["token_file"] or settings.TOKEN.resolve() is not None
    if is_open or not name or host in _ALL_ADDRESSES or is_loopback(host):
        return http_url
    return f"http://{name}:{urlsplit(http_url).port}"
