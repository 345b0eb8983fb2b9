"""A server that speaks Redis's protocol and says that it is another one than we have: an old version, a proxy."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_SMALL_TALK = {b"PING": b"+PONG\r\n"}

Answer = Callable[[list[bytes]], bytes]


@contextmanager
def fake_redis(answer: Answer) -> Iterator[str]:
    """Serve on loopback, and yield the URL.

    Args:
        answer: returns the reply to a command's words, as Redis's protocol has it.
    """

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while line := self.rfile.readline():
                words = []
                for _ in range(int(line[1:])):
                    size = int(self.rfile.readline()[1:])
                    words.append(self.rfile.read(size + 2)[:-2])
                self.wfile.write(answer(words))

    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address = daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Say nothing of a client that has gone."""

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield f"redis://127.0.0.1:{server.server_address[1]}/0"
        server.shutdown()
        thread.join()


def greeting_of(**said: str) -> Answer:
    """Return how a server answers whose greeting says this; everything else it takes."""

    def answer(words: list[bytes]) -> bytes:
        if words[0].upper() != b"HELLO":
            return _SMALL_TALK.get(words[0].upper(), b"+OK\r\n")
        fields = {"server": "redis", "version": "7.2.4", "mode": "standalone", "role": "master", **said}
        text = "".join(f"${len(word)}\r\n{word}\r\n" for pair in fields.items() for word in pair)
        if words[1] == b"2":
            return f"*{2 * len(fields)}\r\n{text}".encode()
        return f"%{len(fields) + 1}\r\n{text}+proto\r\n:3\r\n".encode()

    return answer


def answer_as_redis_5(words: list[bytes]) -> bytes:
    """Answer as a Redis that knows no HELLO, and quotes it with the password that it holds."""
    if words[0].upper() != b"HELLO":
        return _SMALL_TALK.get(words[0].upper(), b"+OK\r\n")
    quoted = ", ".join(f"`{word.decode()}`" for word in words[1:])
    return f"-ERR unknown command `HELLO`, with args beginning with: {quoted}, \r\n".encode()
