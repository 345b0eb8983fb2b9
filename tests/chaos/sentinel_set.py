"""A master, its replicas and the sentinels that watch them, each Redis behind a proxy that can hang."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

from redis import Redis
from redis.exceptions import RedisError
from support.redis_process import OpenRedis

from chaos.hanging_proxy import HangingProxy
from fastgpt2.process import set_up_child
from fastgpt2.protocol.connection import connect
from fastgpt2.system.redis_server import find_server

MASTER_NAME = "pool"
# A master that is silent for so long is taken for dead. On a machine of two busy cores it is silent now and then.
DOWN_AFTER_SECONDS = 2.0
# Sentinels that could not agree on who promotes try again after twice this time.
FAILOVER_SECONDS = 2.0
_START_SECONDS = 60.0


class Node(OpenRedis):
    """One Redis of the set. It tells everybody its proxy's port, and keeps its role in its file of settings.

    Args:
        folder: where its file is.
        more: lines of settings beside the usual.
    """

    def __init__(self, folder: Path, more: list[str]) -> None:
        super().__init__(folder=folder)
        self.proxy = HangingProxy(self.port)
        self._more_lines = more

    @property
    def announced(self) -> int:
        return self.proxy.port

    def write_settings(self, master: int | None) -> None:
        """Begin anew as the master, or as a replica of who is found at this port."""
        lines = [
            f"port {self.port}",
            "bind 127.0.0.1",
            f"dir {self.folder}",
            'save ""',
            "appendonly yes",
            "appendfsync everysec",
            "maxmemory-policy noeviction",
            "replica-announce-ip 127.0.0.1",
            f"replica-announce-port {self.announced}",
            "repl-diskless-sync-delay 0",
            "repl-timeout 10",
            *self._more_lines,
            *([] if master is None else [f"replicaof 127.0.0.1 {master}"]),
        ]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.settings.write_text("\n".join(lines) + "\n")

    @property
    def settings(self) -> Path:
        return self.folder / "redis.conf"

    def _options(self) -> list[str]:
        return [str(self.settings)]

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        assert self._process is not None
        self._process.wait()

    def hang(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def wake(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGCONT)

    def directly(self) -> Redis:
        """Connect past the proxy, as who is on this server's side of a partition does."""
        return connect(self.url)

    def replication(self) -> dict[str, Any]:
        """Return what it says of its role; empty if it does not answer."""
        connection = self.directly()
        try:
            return dict(connection.info("replication"))
        except RedisError:
            return {}
        finally:
            connection.close()


class SentinelSet:
    """Three of each. Use as a context manager; `url` is what clients and workers are given.

    Args:
        folder: for all files.
        min_replicas: the master takes no writes while it has fewer replicas that keep up.
        down_after: seconds of silence after which a master is taken for dead.
    """

    def __init__(self, folder: Path, min_replicas: int = 0, down_after: float = DOWN_AFTER_SECONDS) -> None:
        self.folder, self._down_after = folder, down_after
        more = [f"min-replicas-to-write {min_replicas}", "min-replicas-max-lag 3"]
        self.nodes = [Node(folder / f"redis-{n}", more) for n in range(3)]
        self._sentinels: list[subprocess.Popen[bytes]] = []
        self._ports: list[int] = []
        self._stack = ExitStack()

    @property
    def url(self) -> str:
        places = ",".join(f"127.0.0.1:{port}" for port in self._ports)
        return f"redis+sentinel://{places}/{MASTER_NAME}/0"

    def __enter__(self) -> Self:
        with self._stack as stack:
            for node in self.nodes:
                stack.enter_context(node.proxy)
            for node in self.nodes:
                node.write_settings(None if node is self.nodes[0] else self.nodes[0].announced)
                stack.callback(node.stop)
                stack.callback(self._wake, node)
                node.start()
            for number in range(3):
                stack.callback(self._start_sentinel(number).wait)
                stack.callback(self._sentinels[-1].kill)
            self.wait_until_whole()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _wake(self, node: Node) -> None:
        """Let a server that was stopped hear that it is to end."""
        node.proxy.heal()
        if node.poll() is None:
            node.wake()

    def _start_sentinel(self, number: int) -> subprocess.Popen[bytes]:
        sentinel = OpenRedis(folder=self.folder / f"sentinel-{number}")
        sentinel.folder.mkdir(parents=True, exist_ok=True)
        settings = sentinel.folder / "sentinel.conf"
        settings.write_text(
            f"port {sentinel.port}\n"
            "bind 127.0.0.1\n"
            f"dir {sentinel.folder}\n"
            f"sentinel monitor {MASTER_NAME} 127.0.0.1 {self.nodes[0].announced} 2\n"
            f"sentinel down-after-milliseconds {MASTER_NAME} {int(1000 * self._down_after)}\n"
            f"sentinel failover-timeout {MASTER_NAME} {int(1000 * FAILOVER_SECONDS)}\n"
            f"sentinel parallel-syncs {MASTER_NAME} 1\n"
        )
        with (sentinel.folder / "sentinel.log").open("ab") as log:
            process = subprocess.Popen(
                [str(find_server()), str(settings), "--sentinel"],
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=set_up_child,
            )
        self._sentinels.append(process)
        self._ports.append(sentinel.port)
        return process

    def master(self) -> Node | None:
        """Return who is the master by what most sentinels say; None while they do not agree."""
        said: list[int] = []
        for port in self._ports:
            with suppress(RedisError):
                sentinel = Redis(port=port, socket_timeout=2)
                found: Any = sentinel.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", MASTER_NAME)  # type: ignore[no-untyped-call]
                sentinel.close()
                said.append(int(found[1]))
        for node in self.nodes:
            if said.count(node.announced) >= 2:
                return node
        return None

    def is_whole(self) -> bool:
        """Tell whether there is one master, both others follow it, and all sentinels know them and each other."""
        master = self.master()
        if master is None:
            return False
        told = master.replication()
        if told.get("role") != "master" or told.get("connected_slaves") != 2:
            return False
        if any(told[f"slave{n}"]["state"] != "online" for n in range(2)):
            return False
        return all(self._is_content(port) for port in self._ports)

    def _is_content(self, port: int) -> bool:
        try:
            sentinel = Redis(port=port, socket_timeout=2, decode_responses=True)
            masters: Any = sentinel.sentinel_masters()
            (state,) = masters.values()
            replicas: Any = sentinel.sentinel_slaves(MASTER_NAME)
            sentinel.close()
        except (RedisError, ValueError):
            return False
        down = any({"s_down", "o_down", "disconnected"} & set(str(each["flags"]).split(",")) for each in replicas)
        is_down = "down" in str(state["flags"])
        return state["num-other-sentinels"] == 2 and len(replicas) == 2 and not down and not is_down

    def wait_until_whole(self, seconds: float = _START_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not self.is_whole():
            if time.monotonic() > deadline:
                raise TimeoutError(f"the set is not whole after {seconds:.0f} s; logs in {self.folder}")
            time.sleep(0.05)

    def wait_for_promotion(self, old: Node, seconds: float = _START_SECONDS) -> Node:
        """Wait until the sentinels name another master, and return it."""
        deadline = time.monotonic() + seconds
        while True:
            master = self.master()
            if master not in (None, old) and master is not None and master.replication().get("role") == "master":
                return master
            if time.monotonic() > deadline:
                raise TimeoutError(f"nobody was promoted within {seconds:.0f} s; logs in {self.folder}")
            time.sleep(0.02)
