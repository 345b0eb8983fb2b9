"""A Redis password that stands in a file: `redis://host:6379/0?password_file=/run/secrets/redis`.

`docker inspect` shows a container's environment, and so does a pod's manifest; a file is given only to those who need
it. The file is read for each new connection, so that the password can be changed while everything runs.
"""

from __future__ import annotations

import contextlib
import stat
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit

from redis.credentials import CredentialProvider

from fastgpt2.errors import BadRequest

OPTION = "password_file"
MAX_PASSWORD_CHARACTERS = 4096


class PasswordFile(CredentialProvider):
    """The password in the first line of a file, for redis-py.

    Args:
        option: by which option of the URL the file is named, for messages.

    Raises:
        BadRequest: the file cannot be read, or its first line cannot be a password.
    """

    def __init__(self, path: str, user: str | None, option: str = OPTION) -> None:
        self._path, self._user, self._option = path, user, option
        self._password = self._read()

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        # Perhaps the file is being replaced now. Redis tells whether the last password is still right.
        with contextlib.suppress(BadRequest):
            self._password = self._read()
        return (self._password,) if self._user is None else (self._user, self._password)

    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        """Return the same; redis-py's own method warns. To read a line of a local file does not hold up the loop."""
        return self.get_credentials()

    def _read(self) -> str:
        where = f"the Redis password file {self._path}, named by {self._option} in the URL,"
        try:
            if not stat.S_ISREG(Path(self._path).stat().st_mode):
                # A pipe would keep whoever opens it waiting, and give its line once.
                raise BadRequest(f"{where} is no regular file")
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
    """Split a URL that may name a password file.

    Returns:
        The URL as redis-py knows it, and redis-py's further arguments; none if the URL names no file.

    Raises:
        BadRequest: as `PasswordFile`; or the URL has a password too, or names several files.
        ValueError: the text is no URL.
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
    if parts.scheme == "unix":  # `geturl` leaves out the two slashes before an empty host
        bare = f"unix://{place}{parts.path}{'?' + others if others else ''}"
    user = unquote(parts.username) if parts.username else None
    return bare, {"credential_provider": PasswordFile(files[0], user)}
