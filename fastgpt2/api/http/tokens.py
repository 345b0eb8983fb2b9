"""The tokens that requests to the endpoint may bear: the file that lists them, read again while the endpoint serves.

A line of the file is `NAME:TOKEN` or `NAME:sha256:HEX`, and may go on with `waiting=N` and `tokens_per_minute=N`. What
stands behind a `#` at the beginning of a line, or after a space, is a comment. A file of one token alone is one line
without a name. docs/tokens.md tells users.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import signal
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastgpt2 import settings
from fastgpt2.errors import BadRequest
from fastgpt2.plurals import counted
from fastgpt2.process import HangUp
from fastgpt2.protocol.keys import TOKEN_NAME

log = logging.getLogger("fastgpt2.http")

MIN_TOKEN_CHARACTERS = 16
MAX_TOKEN_CHARACTERS = 1024
# Each request is compared with all of them: a thousand take a tenth of a millisecond.
MAX_TOKENS = 1000
MAX_FILE_BYTES = 1 << 20
MAX_WAITING = 10**6
MAX_TOKENS_PER_MINUTE = 10**9

# How often it is looked whether a signal has asked to read the file again.
LOOK_SECONDS = 0.2

_TOKEN = re.compile(rf"[!-~]{{{MIN_TOKEN_CHARACTERS},{MAX_TOKEN_CHARACTERS}}}")
_NAME = re.compile(TOKEN_NAME)
_SHA256 = "sha256:"
# Other programs' hashes, as htpasswd, passwd(5) and LDAP write them, which would pass for plain tokens.
_OTHER_HASH = re.compile(r"(?i)(\$\w+\$|\{\w+\}|(md5|sha[-\d]*|blake\w+|bcrypt|scrypt|argon2\w*|pbkdf2\w*):)")
_HASH_OF_NOTHING = hashlib.sha256(b"").digest()
_LIMITS = {"waiting": MAX_WAITING, "tokens_per_minute": MAX_TOKENS_PER_MINUTE}
_MAKE_ONE = "`openssl rand -hex 32` makes one"


@dataclass(frozen=True, slots=True)
class Token:
    """One token, of which only the digest is kept.

    Attributes:
        digest: its SHA-256.
        name: how logs and metrics call who bears it; None for a token that stands alone.
        waiting: how many of its jobs may wait or run at once; None for no limit.
        tokens_per_minute: how many tokens its jobs may read and generate; None for no limit.
    """

    digest: bytes
    name: str | None = None
    waiting: int | None = None
    tokens_per_minute: int | None = None


class Tokens:
    """The tokens of an endpoint.

    Args:
        listed: those that are good now.
        file: where they stand; None if the environment gave the one that there is.
        hang_up: tells when the file is to be read again.

    Attributes:
        requests: how many requests were answered, by the token's name and the status.
    """

    def __init__(self, listed: Sequence[Token], file: str | None = None, hang_up: HangUp | None = None) -> None:
        self._listed = tuple(listed)
        self.file = file
        self._hang_up = hang_up
        self.requests: Counter[tuple[str, int]] = Counter()

    def __len__(self) -> int:
        return len(self._listed)

    @property
    def names(self) -> list[str]:
        """The names of all tokens that have one, in the order of the file."""
        return [token.name for token in self._listed if token.name is not None]

    def find(self, presented: bytes) -> Token | None:
        """Return the token that a request bears; None if it is none of these.

        Each is compared, and each comparison takes the same time: whoever guesses learns nothing from how long it took.
        """
        digest, found = hashlib.sha256(presented).digest(), None
        for token in self._listed:
            if hmac.compare_digest(token.digest, digest):
                found = token
        return found

    async def keep_fresh(self) -> None:
        """Read the file again whenever that is asked for, until cancelled; stop the process if its terminal closes."""
        import asyncio

        while self._hang_up is not None:
            if self._hang_up.is_stop():
                signal.raise_signal(signal.SIGTERM)
            elif self._hang_up.asks:
                self._hang_up.asks = False
                self.reload()
            await asyncio.sleep(LOOK_SECONDS)

    def reload(self) -> None:
        """Read the file again. If it cannot be used, the log says why, and the tokens stay as they are."""
        if self.file is None:
            return
        try:
            if Path(self.file).exists() and not Path(self.file).is_file():
                raise BadRequest(f"--token-file {self.file}: it is no regular file, and cannot be read again")
            listed = read_file(self.file)
        except BadRequest as error:
            log.error("%s; the tokens stay as they were, and a new start of the endpoint would fail", error)
            return
        before, after = set(self.names), {token.name for token in listed if token.name is not None}
        changed = [
            *(f"new: {name}" for name in sorted(after - before)),
            *(f"gone: {name}" for name in sorted(before - after)),
        ]
        self._listed = tuple(listed)
        told = ", ".join([counted(len(listed), "token"), *changed])
        log.info("--token-file %s: read again, %s", self.file, told)


def read_tokens(file: str | None, hang_up: HangUp | None = None) -> Tokens | None:
    """Return the token of `FASTGPT2_TOKEN` or those of a file; None if there is neither.

    No option holds a token, since every user of the machine can read the arguments of a process.

    Args:
        hang_up: see `Tokens`.

    Raises:
        BadRequest: both are given, the file cannot be read, or something in it is no token. The message quotes none.
    """
    given = settings.TOKEN.resolve()
    if file is not None:
        if given is not None:
            raise BadRequest(f"{settings.TOKEN.variable} and --token-file are both given; leave one out")
        return Tokens(read_file(file), file, hang_up)
    if given is None:
        return None
    return Tokens([Token(_digest_of_plain(given, f"the token of {settings.TOKEN.variable}"))])


def read_file(file: str) -> list[Token]:
    """Return the tokens of a file; the log warns if every user of this machine can read or change them.

    Raises:
        BadRequest: the file cannot be read, or a line of it is wrong.
    """
    text, mode = _read_text(file)
    entries = []
    for number, line in enumerate(re.split(r"\r\n|\n|\r", text), 1):
        words = re.sub(r"(^|[ \t])#.*", "", line).split()
        if words:
            entries.append((number, words))
    if not entries:
        raise BadRequest(f"--token-file {file}: it holds no token; write one into it, {_MAKE_ONE}")
    if len(entries) > MAX_TOKENS:
        raise BadRequest(f"--token-file {file}: it holds {len(entries)} tokens; the limit is {MAX_TOKENS}: remove some")
    tokens = []
    for number, words in entries:
        try:
            tokens.append(_parse_entry(words, is_alone=len(entries) == 1))
        except BadRequest as error:
            raise BadRequest(f"--token-file {file}, line {number}: {error}") from None
    _refuse_doubles(file, [number for number, _ in entries], tokens)
    if mode & stat.S_IWOTH or (mode & stat.S_IROTH and not all(_is_hashed(words) for _, words in entries)):
        what = "changed" if mode & stat.S_IWOTH else "read"
        log.warning("--token-file %s: it can be %s by every user of this machine; chmod o= mends that", file, what)
    return tokens


def _read_text(file: str) -> tuple[str, int]:
    """Return the text of a file, and its mode."""
    try:
        with Path(file).open("rb") as opened:
            if not stat.S_ISREG(mode := os.fstat(opened.fileno()).st_mode):
                mode = 0  # such as a pipe of a shell, which is this process's own
            raw = opened.read(MAX_FILE_BYTES + 1)
    except OSError as reason:
        raise BadRequest(f"--token-file {file}: cannot be read ({reason.strerror})") from None
    if len(raw) > MAX_FILE_BYTES:
        raise BadRequest(f"--token-file {file}: it has more than {MAX_FILE_BYTES} bytes; is it another file?")
    try:
        if b"\x00" in raw:
            raise UnicodeError
        return raw.decode("utf-8-sig"), mode
    except UnicodeError:
        raise BadRequest(f"--token-file {file}: it is no text in UTF-8; save it as such") from None


def _parse_entry(words: Sequence[str], is_alone: bool) -> Token:
    """Return the token of a line, which is given as its words. Errors quote nothing of it: any word may be secret.

    Args:
        is_alone: no other line has a token.
    """
    name, colon, secret = words[0].partition(":")
    if not colon:
        if not is_alone:
            raise BadRequest("the token has no name, and is not the only one: write NAME:TOKEN")
        digest = _digest_of_plain(words[0], "the token")
        if len(words) > 1:
            raise BadRequest("a token with limits needs a name, by which they are kept: write NAME:TOKEN before them")
        return Token(digest)
    if name.lower() == "sha256":
        raise BadRequest("a hash needs a name before it: write NAME:sha256:HEX")
    if not _NAME.fullmatch(name):
        raise BadRequest("the name before the colon must be 1 to 64 letters, digits and . _ @ + -")
    if not secret:
        raise BadRequest("no token follows the colon: write NAME:TOKEN without spaces")
    return Token(_digest_of(secret), name, **_parse_limits(words[1:]))


def _digest_of(secret: str) -> bytes:
    """Return the digest of a token as it stands behind a name, plain or hashed."""
    if not secret.lower().startswith(_SHA256):
        if _OTHER_HASH.match(secret):
            raise BadRequest("only the hash SHA-256 is known: write NAME:sha256:HEX, or the token itself")
        return _digest_of_plain(secret, "the token")
    text = secret[len(_SHA256) :]
    if not re.fullmatch(r"[0-9a-fA-F]{64}", text):
        raise BadRequest(
            f"a SHA-256 has 64 hexadecimal digits, and sha256: is followed by {len(text)} characters: "
            "printf %s TOKEN | sha256sum prints it"
        )
    digest = bytes.fromhex(text)
    if digest == _HASH_OF_NOTHING:
        raise BadRequest("the hash is that of an empty text: printf %s TOKEN | sha256sum prints that of a token")
    return digest


def _digest_of_plain(token: str, what: str) -> bytes:
    if not _TOKEN.fullmatch(token):
        raise BadRequest(
            f"{what} must be {MIN_TOKEN_CHARACTERS} to {MAX_TOKEN_CHARACTERS} visible ASCII characters; {_MAKE_ONE}"
        )
    return hashlib.sha256(token.encode("ascii")).digest()


def _parse_limits(words: Sequence[str]) -> dict[str, int]:
    limits: dict[str, int] = {}
    for word in words:
        name, _, value = word.partition("=")
        if name not in _LIMITS:
            raise BadRequest(f"only {' and '.join(f'{known}=N' for known in _LIMITS)} may stand behind the token")
        if name in limits:
            raise BadRequest(f"{name} is given twice; leave one out")
        if not re.fullmatch(r"[0-9]{1,12}", value) or not 1 <= int(value) <= _LIMITS[name]:
            raise BadRequest(f"{name} must be a whole number from 1 to {_LIMITS[name]}; without it there is no limit")
        limits[name] = int(value)
    return limits


def _refuse_doubles(file: str, lines: Sequence[int], tokens: Sequence[Token]) -> None:
    by_name: dict[str | None, int] = {}
    by_digest: dict[bytes, int] = {}
    for line, token in zip(lines, tokens, strict=True):
        where = f"--token-file {file}, line {line}"
        if token.name in by_name:
            raise BadRequest(f"{where}: line {by_name[token.name]} has the same name; give each token its own")
        if token.digest in by_digest:
            raise BadRequest(f"{where}: line {by_digest[token.digest]} has the same token; make another, {_MAKE_ONE}")
        by_name[token.name] = by_digest[token.digest] = line


def _is_hashed(words: Sequence[str]) -> bool:
    return words[0].partition(":")[2].lower().startswith(_SHA256)
