"""A Redis password that stands in a file: `redis://host:6379/0?password_file=/run/secrets/redis`.

An environment can be read by `docker inspect` and by whoever may read a pod's manifest; a file is given to those alone
who need it. It is read for each new connection, so that another password can be put there while everything runs.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit

from redis.credentials import CredentialProvider

from fastgpt2.errors import BadRequest

OPTION = "password_file"
MAX_PASSWORD_CHARACTERS = 4096


class PasswordFile(CredentialProvider):
    """The first line of a file, for redis-py.

    Raises:
        BadRequest: the file cannot be read, or has no such line.
    """

    def __init__(self, path: str, user: str | None) -> None:
        self._path, self._user = path, user
        self._password = self._read()

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        # It is just being replaced, perhaps; Redis says whether the last one still holds.
        with contextlib.suppress(BadRequest):
            self._password = self._read()
        return (self._password,) if self._user is None else (self._user, self._password)

    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        """redis-py's own warns that it should be overridden. A line of a local file keeps no loop waiting."""
        return self.get_credentials()

    def _read(self) -> str:
        where = f"the Redis password file {self._path}, named by {OPTION} in the URL,"
        try:
            with Path(self._path).open(encoding="utf-8") as lines:
                line = lines.readline(MAX_PASSWORD_CHARACTERS + 2).rstrip("\r\n")
        except OSError as reason:
            raise BadRequest(f"{where} cannot be read ({reason.strerror})") from None
        except UnicodeDecodeError:
            raise BadRequest(f"{where} is no text in UTF-8") from None
        if not 0 < len(line) <= MAX_PASSWORD_CHARACTERS:
            raise BadRequest(f"{where} has a first line of 0 or over {MAX_PASSWORD_CHARACTERS} characters")
        return line


def without_password_file(url: str) -> tuple[str, dict[str, Any]]:
    """The URL as redis-py knows it, and what else to tell it: nothing, if the URL names no file.

    Raises:
        BadRequest: as `PasswordFile`; or the URL has a password too, or names several files.
        ValueError: it is no URL.
    """
    parts = urlsplit(url)
    options = parse_qsl(parts.query, keep_blank_values=True)
    files = [value for name, value in options if name == OPTION]
    if not files:
        return url, {}
    if len(files) > 1 or parts.password:
        raise BadRequest(f"the Redis URL has more than one password; name one {OPTION}, or give a password, not both")
    others = urlencode([(name, value) for name, value in options if name != OPTION])
    place = parts.netloc.rpartition("@")[2]
    bare = SplitResult(parts.scheme, place, parts.path, others, "").geturl()
    if parts.scheme == "unix":  # `geturl` leaves out the slashes of an empty host
        bare = f"unix://{place}{parts.path}{'?' + others if others else ''}"
    user = unquote(parts.username) if parts.username else None
    return bare, {"credential_provider": PasswordFile(files[0], user)}
