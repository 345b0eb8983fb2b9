"""A proxy before one Redis that can hang, cut everything, or hold the replicas back: what networks do."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress

_CHUNK = 65536


class _Link:
    """One connection through the proxy.

    Attributes:
        replicates: a replica reads the master's stream here.
    """

    def __init__(self, caller: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self.caller, self.server = caller, server
        self.replicates = False

    def abort(self) -> None:
        """Reset both sides; what was on the way is lost."""
        self.caller.transport.abort()
        self.server.transport.abort()


class HangingProxy:
    """Passes on what comes, once it is started, in a thread of its own.

    All traffic to a server goes through it if the server announces this port instead of its own.

    Args:
        port: where it listens, on 127.0.0.1.
        to: the server's port.
    """

    def __init__(self, port: int, to: int) -> None:
        self._port, self._to = port, to
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_cut = False
        self._loop = asyncio.new_event_loop()
        self._open = asyncio.Event()
        self._replicas_open = asyncio.Event()
        self._listening = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def hang(self) -> None:
        """Pass nothing on any more; connections stay, and new ones are taken and stay silent."""
        self._call(self._open.clear)

    def cut(self) -> None:
        """Reset every connection, and from now on each that comes."""
        self._call(self._cut)

    def heal(self) -> None:
        """Pass on again, what came meanwhile first."""
        self._call(self._heal)

    def hold_replicas(self) -> None:
        """Let the replicas fall behind: what the master tells them stays here."""
        self._call(self._replicas_open.clear)

    def drop_replicas(self) -> None:
        """Reset the replicas' connections with all that was held; later ones are passed on."""
        self._call(self._drop_replicas)

    def start(self) -> None:
        self._thread.start()
        if not self._listening.wait(60):
            raise OSError(f"the proxy cannot listen on port {self._port}")

    def close(self) -> None:
        """End it, and all its connections. Does nothing if it never began."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    def _call(self, what: Callable[[], object]) -> None:
        """Have the loop do something, and wait until it is done."""
        done = threading.Event()
        self._loop.call_soon_threadsafe(what)
        self._loop.call_soon_threadsafe(done.set)
        done.wait()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._heal()
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", self._port))
        self._listening.set()
        self._loop.run_forever()
        server.close()
        self._cut()
        for task in self._tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*self._tasks, return_exceptions=True))
        self._loop.close()

    def _heal(self) -> None:
        self._is_cut = False
        self._open.set()
        self._replicas_open.set()

    def _cut(self) -> None:
        self._is_cut = True
        for link in self._links:
            link.abort()

    def _drop_replicas(self) -> None:
        for link in self._links:
            if link.replicates:
                link.abort()
        self._replicas_open.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if self._is_cut:
            writer.transport.abort()
            return
        try:
            answers, server = await asyncio.open_connection("127.0.0.1", self._to)
        except OSError:
            writer.transport.abort()
            return
        link = _Link(writer, server)
        self._links.add(link)
        try:
            with suppress(asyncio.CancelledError):  # at the end
                await asyncio.gather(self._ask(link, reader), self._answer(link, answers))
        finally:
            self._links.discard(link)
            link.abort()

    async def _ask(self, link: _Link, reader: asyncio.StreamReader) -> None:
        with suppress(OSError):
            while data := await reader.read(_CHUNK):
                link.replicates = link.replicates or b"PSYNC" in data.upper()
                await self._open.wait()
                link.server.write(data)
                await link.server.drain()
        # What was said last is still to be delivered, here and below.
        with suppress(OSError):
            link.server.close()

    async def _answer(self, link: _Link, reader: asyncio.StreamReader) -> None:
        with suppress(OSError):
            while data := await reader.read(_CHUNK):
                await self._open.wait()
                if link.replicates:
                    await self._replicas_open.wait()
                link.caller.write(data)
                await link.caller.drain()
        with suppress(OSError):
            link.caller.close()
