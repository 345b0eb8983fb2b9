"""A proxy before Redis that cuts connections: after a number of commands, or whenever a test wants it."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from typing import BinaryIO, Self
from urllib.parse import urlsplit


class CuttingProxy:
    """A proxy that hands bytes on, counts the commands in them, and cuts all connections at one of the commands.

    Args:
        url: of the Redis behind it.

    Attributes:
        count: how many commands have come since `arm`.
        cuts: how often connections were cut.
    """

    def __init__(self, url: str) -> None:
        self.lead_to(url)
        self._server = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._cut_at, self._holding, self._answered = 0, b"", True
        self.count = self.cuts = 0
        self.url = urlsplit(url)._replace(netloc=f"127.0.0.1:{self._server.getsockname()[1]}").geturl()

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()
        self.cut()

    def arm(self, at: int = 0, holding: bytes = b"", answered: bool = True) -> None:
        """Cut all connections at one command: once.

        Args:
            at: its number, counted from now on.
            holding: or what stands in it.
            answered: Redis has run the command, and its answer is lost; otherwise Redis never hears of it.
        """
        with self._lock:
            self.count = self.cuts = 0
            self._cut_at, self._holding, self._answered = at, holding, answered

    def lead_to(self, url: str) -> None:
        """Let new connections lead to another Redis; those that there are stay."""
        parts = urlsplit(url)
        self._target = parts.hostname or "", parts.port or 6379

    def cut(self) -> None:
        """Cut all connections that there are."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
            self.cuts += 1
        for sock in (sock for pair in pairs for sock in pair):
            _hang_up(sock)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._server.accept()
                try:
                    server = socket.create_connection(self._target)
                except OSError:
                    client.close()
                    continue
                with self._lock:
                    self._pairs.append((client, server))
                cutting = threading.Event()
                for talk in (self._talk, self._answer):
                    threading.Thread(target=talk, args=(client, server, cutting), daemon=True).start()

    def _talk(self, client: socket.socket, server: socket.socket, cutting: threading.Event) -> None:
        """Hand commands on, one by one."""
        with suppress(OSError, ValueError), client.makefile("rb") as stream:
            while command := _read_command(stream):
                with self._lock:
                    self.count += 1
                    last = self.count == self._cut_at or (self._holding != b"" and self._holding in command)
                    if last:
                        self._cut_at, self._holding = 0, b""
                if last and self._answered:
                    cutting.set()
                elif last:
                    self.cut()
                    return
                server.sendall(command)
        _hang_up(server)

    def _answer(self, client: socket.socket, server: socket.socket, cutting: threading.Event) -> None:
        """Hand answers on. The answer to the last command is a sign that it was run: cut then."""
        with suppress(OSError):
            while data := server.recv(1 << 16):
                if cutting.is_set():
                    self.cut()
                    return
                client.sendall(data)
        _hang_up(client)


def _hang_up(sock: socket.socket) -> None:
    """End a connection for both sides, also while a thread waits for what comes on it."""
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _read_command(stream: BinaryIO) -> bytes:
    """Return the bytes of the next command, an array of strings as all clients send it; nothing at the end."""
    head = stream.readline()
    if not head:
        return b""
    parts = [head]
    for _ in range(int(head[1:])):
        length = stream.readline()
        parts += length, stream.read(int(length[1:]) + 2)
    return b"".join(parts)
