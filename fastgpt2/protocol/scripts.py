"""Lua scripts, which Redis runs as one command: each stands in a `.lua` file beside the module that uses it.

A file begins with its KEYS and ARGV in comments. Two things in it are filled in when it is read: `$NAME` is the
constant of that name in `keys.py`, so that a name in Redis is written down once, and a line `-- include NAME` is the
file `NAME.lua` of the same folder, or of this one. Redis is sent the digest of a script (EVALSHA) and, if it does not
know that, the text (EVAL), which it then keeps.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redis.exceptions import NoPermissionError, NoScriptError

from fastgpt2.protocol import keys as names

if TYPE_CHECKING:
    from redis import Redis
    from redis.asyncio import Redis as AsyncRedis
    from redis.client import Pipeline

# The texts of all scripts, by their digests.
_texts: dict[str, str] = {}


class Script:
    """A script of the file `NAME.lua` beside a module, read at once: a later release's file may replace it any time.

    Args:
        module: the module's `__file__`.

    Attributes:
        digest: the SHA1 by which Redis knows the script.
    """

    def __init__(self, module: str, name: str) -> None:
        self.text = _read(Path(module).with_name(f"{name}.lua"))
        self.digest = hashlib.sha1(self.text.encode("utf-8"), usedforsecurity=False).hexdigest()
        _texts[self.digest] = self.text

    def command(self, keys: Sequence[Any], arguments: Sequence[Any]) -> tuple[Any, ...]:
        """Return the words of the command that runs the script; see `with_text` for when Redis does not know it."""
        return "EVALSHA", self.digest, len(keys), *keys, *arguments

    def run(self, connection: Redis, keys: Sequence[Any], arguments: Sequence[Any]) -> Any:
        """Run the script and return its reply."""
        command = self.command(keys, arguments)
        try:
            return connection.execute_command(*command)  # type: ignore[no-untyped-call]
        except Exception as error:
            if not is_unknown(error):
                raise
        return connection.execute_command(*with_text(command))  # type: ignore[no-untyped-call]

    async def run_async(self, connection: AsyncRedis, keys: Sequence[Any], arguments: Sequence[Any]) -> Any:
        """See `run`."""
        command = self.command(keys, arguments)
        try:
            return await connection.execute_command(*command)  # type: ignore[no-untyped-call]
        except Exception as error:
            if not is_unknown(error):
                raise
        return await connection.execute_command(*with_text(command))  # type: ignore[no-untyped-call]

    def add(self, pipeline: Pipeline, keys: Sequence[Any], arguments: Sequence[Any]) -> None:
        """Add the script to a pipeline without a transaction, which `execute` is to send."""
        pipeline.execute_command(*self.command(keys, arguments))  # type: ignore[no-untyped-call]

    def add_to_transaction(self, pipeline: Pipeline, keys: Sequence[Any], arguments: Sequence[Any]) -> None:
        """Add the script with its text: in a transaction, a digest that Redis does not know could not be repeated."""
        pipeline.execute_command(*with_text(self.command(keys, arguments)))  # type: ignore[no-untyped-call]


def execute(pipeline: Pipeline) -> list[Any]:
    """Send a pipeline without a transaction; scripts that Redis does not know are sent once more, with their texts.

    What confirms that they have been written (WAIT, WAITAOF) is then sent once more after them.

    Returns:
        The replies in the order of the commands, errors among them.

    Raises:
        RedisError: Redis cannot be reached.
    """
    commands = [words for words, _ in pipeline.command_stack]
    replies: list[Any] = pipeline.execute(raise_on_error=False)
    again = to_repeat(commands, replies)
    if again:
        for words in again.values():
            pipeline.execute_command(*words)  # type: ignore[no-untyped-call]
        for at, reply in zip(again, pipeline.execute(raise_on_error=False), strict=True):
            replies[at] = reply
    return replies


def to_repeat(commands: Sequence[Sequence[Any]], replies: Sequence[Any]) -> dict[int, Sequence[Any]]:
    """Return the commands of a pipeline that are sent once more, by their places; see `execute`."""
    unknown = [at for at, reply in enumerate(replies) if is_unknown(reply)]
    if not unknown:
        return {}
    again: dict[int, Sequence[Any]] = {at: with_text(commands[at]) for at in unknown}
    for at in range(unknown[0], len(commands)):
        if commands[at][:1] in (("WAIT",), ("WAITAOF",)):
            again[at] = commands[at]
    return dict(sorted(again.items()))


def is_unknown(reply: Any) -> bool:
    """Tell whether a script was not run because Redis does not know its digest, or lets this user send texts only."""
    return isinstance(reply, NoScriptError) or (isinstance(reply, NoPermissionError) and "evalsha" in str(reply))


def with_text(command: Sequence[Any]) -> tuple[Any, ...]:
    """Return `Script.command` with the script's text in place of its digest."""
    _, digest, *others = command
    return "EVAL", _texts[digest], *others


def _read(path: Path) -> str:
    """Return the text of a file with its includes and constants filled in."""
    text = path.read_text("utf-8")
    for line, name in re.findall(r"^(-- include (\w+)\n)", text, re.M):
        beside = path.with_name(f"{name}.lua")
        text = text.replace(line, _read(beside if beside.exists() else Path(__file__).with_name(beside.name)))
    return re.sub(r"\$([A-Z][A-Z_]*)", lambda found: str(getattr(names, found[1])), text)
