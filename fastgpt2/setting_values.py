"""The values of settings, read from texts: each reader returns the value, or says why the text is none.

A reader raises ValueError with the rest of a sentence that begins with the text. Readers of what a request asks read
its form only: its bounds are in the request's own fields.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable

# Room for indentation: of the schema itself, a request takes less.
MAX_SCHEMA_FILE = 1 << 20

# Of a model's name, as `protocol.keys.MAX_MODEL_CHARACTERS`.
MAX_NAME_CHARACTERS = 500

# Eleven days.
MAX_SECONDS = 1_000_000

# What a backslash and the character behind it stand for, as in JSON and in C.
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", '"': '"', "'": "'"}
_ESCAPE = re.compile(r"\\(u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|.|$)", re.DOTALL)


def integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError("is not a whole number") from None


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("is not a number") from None


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """Return a reader of whole numbers within these bounds."""

    def parse(text: str) -> int:
        value = integer(text)
        if not low <= value <= high:
            raise ValueError(f"is not between {low} and {high}")
        return value

    return parse


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError("is not a number of seconds") from None
    if math.isnan(value):
        raise ValueError("is not a number of seconds")
    if not 0 < value <= MAX_SECONDS:
        raise ValueError(f"is out of bounds: more than 0 and at most {MAX_SECONDS} seconds")
    return value


_SIZES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


def size(text: str) -> int:
    """Return the bytes that a text such as 2GB, 512M or 1.5GiB names."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmgt]?i?)b?", text.strip().lower())
    if found is None or found[2] not in _SIZES:
        raise ValueError("is not a size like 2GB or 512MiB")
    value = float(found[1]) * _SIZES[found[2]]
    if not 1 <= value <= 1 << 50:
        raise ValueError("is not between 1 byte and 1 PiB")
    return int(value)


def size_or_none(text: str) -> int:
    """Return the bytes as `size` reads them, and 0 for "0" or "off"."""
    return 0 if text.strip().lower() in ("0", "off") else size(text)


def web_url(text: str) -> str:
    """Return the URL of something that is spoken to by HTTP."""
    if re.fullmatch(r"https?://[^\s/?#]+(/\S*)?", text, re.IGNORECASE) is None:
        raise ValueError("is not a URL like http://127.0.0.1:4318/v1/traces")
    return text


def yes_or_no(text: str) -> bool:
    yes, no = ("1", "true", "yes", "on"), ("0", "false", "no", "off", "")
    if text.lower() not in (*yes, *no):
        raise ValueError("is neither yes nor no")
    return text.lower() in yes


def word(text: str) -> str:
    if not text or any(c.isspace() for c in text):
        raise ValueError("must be one word")
    return text


def served_names(text: str) -> tuple[str, ...]:
    """Return the names of models that a text lists, each as NAME or as MODEL=NAME; in MODEL=A,B both are MODEL's."""
    names = []
    model = ""
    for part in text.split(","):
        given, equals, own = part.strip().rpartition("=")
        model = given + equals or model
        if not own or not own.isprintable() or any(c.isspace() for c in own):
            raise ValueError("is not a list of names with commas between them; a name has no spaces")
        if len(own) > MAX_NAME_CHARACTERS:
            raise ValueError(f"holds a name of {len(own)} characters; the limit is {MAX_NAME_CHARACTERS}")
        names.append(model + own)
    return tuple(names)


def queue(text: str) -> str:
    if "@" in word(text):
        raise ValueError("must be one word without @, which stands between the names of a queue and of a model")
    return text


def host_name(text: str) -> str:
    """Return the name of a host, without a scheme, a port or a path."""
    if "/" in text or re.fullmatch(r"[^:]*:\d*", text):
        raise ValueError("must be a name alone, without http://, a port or a path, such as pool.example.com")
    return word(text)


def origins(text: str) -> tuple[str, ...]:
    """Return the origins of web pages that a text holds, with commas or spaces between them, as browsers write them."""
    return tuple(_origin(part) for part in re.split(r"[\s,]+", text.strip(" \t\n,")))


def _origin(text: str) -> str:
    if text in ("*", "null"):
        return text
    if "*" in text:
        raise ValueError("holds a *, which is for all pages where it stands alone: name each origin instead")
    scheme, host, path = _split_url(text)
    if path:
        raise ValueError(f"holds the path {path!r}, and the origin of a page has none: leave it out")
    return f"{scheme}://{host}"


def public_url(text: str) -> str:
    """Return a URL of http or https in which only the path may follow the host, without a slash at its end."""
    scheme, host, path = _split_url(text)
    if scheme not in ("http", "https"):
        raise ValueError("does not begin with http:// or https://")
    if path.endswith("/v1"):
        raise ValueError("ends with /v1, which is a part of the endpoint: leave that out")
    if not re.fullmatch(r"(/[\w.~%+@-]+)*", path, re.ASCII):
        raise ValueError("has a path of other characters than letters, digits and ._~%+@-")
    return f"{scheme}://{host}{path}"


_DEFAULT_PORTS = {"http": 80, "https": 443}


def _split_url(text: str) -> tuple[str, str, str]:
    """Return the scheme, the host with any port that is not the scheme's own, and the path of a URL."""
    from urllib.parse import urlsplit

    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]*://.", text):
        raise ValueError("does not begin with a scheme and a host, as in https://pool.example.com")
    try:
        url = urlsplit(text)
        host, port = url.hostname, url.port
        if not host or any(c in text for c in "\\\"'<>"):
            raise ValueError
        host = host if host.isascii() else host.encode("idna").decode()
    except ValueError:
        raise ValueError("has a host or a port that cannot be; write them as in http://localhost:3000") from None
    if url.username is not None:
        raise ValueError("holds a user's name or a password: leave these out")
    if url.query or url.fragment:
        raise ValueError("holds a ? or a #: leave out what begins there")
    host = f"[{host}]" if ":" in host else host
    is_own_port = port is None or port == _DEFAULT_PORTS.get(url.scheme)
    return url.scheme, host if is_own_port else f"{host}:{port}", url.path.rstrip("/")


def networks(text: str) -> tuple[str, ...]:
    """Return the addresses and networks that a text holds, with commas or spaces between them."""
    from ipaddress import ip_network

    parts = re.split(r"[\s,]+", text.strip(" \t\n,"))
    try:
        return tuple(str(ip_network(part, strict=False)) for part in parts)
    except ValueError:
        raise ValueError("is no address or network, such as 127.0.0.1 or 10.0.0.0/8, and no list of these") from None


def delimiter(text: str) -> str:
    """Return the one character that a text is; a tab for TAB."""
    character = "\t" if text.upper() in ("TAB", "\\T") else text
    if len(character) != 1 or character in '"\r\n\0':
        raise ValueError("is not one character that may stand between values; TAB stands for a tab")
    return character


def one_of(*choices: str) -> Callable[[str], str]:
    """Return a reader of one of these words, in any case."""

    def parse(text: str) -> str:
        if text.lower() not in choices:
            raise ValueError(f"is not one of {', '.join(choices)}")
        return text.lower()

    return parse


def drafts(text: str) -> str | int:
    if text.lower() in ("off", "auto", "int8"):
        return text.lower()
    if text.isdecimal() and text.isascii() and 1 <= int(text[:3]) <= 15 and len(text) < 3:
        return int(text)
    raise ValueError("is not off, auto, int8 or a number from 1 to 15")


def token_ids(text: str) -> tuple[int, ...]:
    """Return the token ids of a text such as 50256 or 13,198."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and part.isascii() and len(part) < 11 for part in parts):
        raise ValueError("is not a list of token ids with commas between them")
    return tuple(int(part) for part in parts)


def one_text(text: str) -> tuple[str, ...]:
    """Return the text as one of those that an option gives which may be repeated."""
    return (text,)


def unescape(text: str) -> str:
    """Return a text with the characters that its escapes stand for: a line end for \\n, for example."""
    return _ESCAPE.sub(_character, text)


def _character(escape: re.Match[str]) -> str:
    written = escape[1]
    if written in _ESCAPES:
        return _ESCAPES[written]
    if len(written) > 1 and int(written[1:], 16) <= sys.maxunicode:
        return chr(int(written[1:], 16))
    raise ValueError(
        f"holds {escape[0]}, which is no escape; there are "
        r"\\ (a backslash), \n, \t, \r, \", \', \uHHHH and \UHHHHHHHH"
    )


def has_escape(text: str) -> bool:
    """Tell whether a text holds a backslash and an n, t or r, as one who means a line end or a tab may write it."""
    return re.search(r"\\[ntr]", text) is not None


def biases(text: str) -> dict[int, float]:
    """Return the biases by token id of a text such as 198=-100,464=2.5, or of a JSON object."""
    if text.lstrip().startswith("{"):
        import json

        try:
            given: dict[int, float] = json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError("is not a JSON object") from None
        return given
    found = {}
    for part in text.split(","):
        token_id, _, bias = part.partition("=")
        try:
            found[token_ids(token_id)[0]] = number(bias)
        except ValueError:
            raise ValueError("is neither a list such as 198=-100,464=2.5 nor a JSON object") from None
    return found


def schema(text: str) -> str:
    """Return the JSON schema that a text is, or that the file holds which the text names."""
    if text.lstrip().startswith("{") or text in ("true", "false"):
        return text
    try:
        with open(text, encoding="utf-8") as file:  # noqa: PTH123 - pathlib is not imported for this
            content = file.read(MAX_SCHEMA_FILE + 1)
    except OSError as reason:
        raise ValueError(f"is neither a JSON object nor a file that can be read ({reason.strerror})") from None
    except ValueError:
        raise ValueError("is a file that is not UTF-8") from None
    if len(content) > MAX_SCHEMA_FILE:
        raise ValueError(f"is a file of more than {MAX_SCHEMA_FILE} characters")
    return content


def log_level(text: str) -> str:
    if text.upper() not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise ValueError("is not one of debug, info, warning, error")
    return text.upper()
