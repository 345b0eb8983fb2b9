"""A master, its replicas and the Sentinels that watch them: real servers, which a test kills, stops and promotes."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Self

from redis import Redis
from redis.exceptions import RedisError

from fastgpt2.process import set_up_child
from fastgpt2.system.redis_server import find_server
from support.running import wait_until

HOST = "127.0.0.1"
MASTER = "mymaster"

# A server that is silent for so long is taken for dead. On a machine of two busy cores one is silent now and then.
DOWN_AFTER_MILLISECONDS = 2000


class Node:
    """One server process in a folder of its own, a Redis or a Sentinel.

    Args:
        options: lines of its configuration, which it keeps over restarts, as Sentinel rewrites it.
        told: the port that everybody is told instead of its own, on which a proxy listens.
    """

    def __init__(
        self,
        folder: Path,
        port: int,
        options: list[str],
        password: str = "",
        sentinel: bool = False,
        told: int | None = None,
    ) -> None:
        folder.mkdir(parents=True)
        self.folder, self.port, self.sentinel, self.told = folder, port, sentinel, told or port
        self._password = password or None
        self._configuration = folder / "redis.conf"
        own = [f"port {port}", f"bind {HOST}", f"dir {folder}", "protected-mode no"]
        if told is not None:
            own += [f"replica-announce-ip {HOST}", f"replica-announce-port {told}"]
        self._configuration.write_text("\n".join([*own, *options]) + "\n")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str) -> None:
        """Start the process; options on its command line come after the configuration."""
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [str(find_server()), str(self._configuration), *options, *(["--sentinel"] if self.sentinel else [])],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=set_up_child,
            )

    def connect(self) -> Redis:
        """Return a connection that waits for two seconds at most, and tries nothing twice."""
        return Redis(
            HOST, self.port, password=self._password, socket_timeout=2, socket_connect_timeout=2, decode_responses=True
        )

    def role(self) -> str:
        """Return "master" or "slave"; "" if the server does not answer."""
        with suppress(RedisError, OSError), self.connect() as connection:
            return str(connection.execute_command("ROLE")[0])
        return ""

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """Let it hang: its connections stay, and nobody answers."""
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGCONT)


class SentinelSystem:
    """A master on `nodes[0]` at first, its replicas, and Sentinels: half of them and one more agree.

    A context manager: when entered, everything knows of each other, and a failover would succeed.

    Args:
        options: lines for the configuration of each Redis, such as `appendonly yes`.
        password: of the master and its replicas.
        sentinel_password: of the Sentinels.
        proxied: a proxy is to listen before each Redis, on the port `told` of its node, when this is started.
    """

    def __init__(
        self,
        folder: Path,
        replicas: int = 1,
        sentinels: int = 1,
        options: tuple[str, ...] = (),
        password: str = "",
        sentinel_password: str = "",
        proxied: bool = False,
    ) -> None:
        redises = 1 + replicas
        ports = _free_ports(redises + sentinels + (redises if proxied else 0))
        told = ports[redises + sentinels :] if proxied else [None] * redises
        first = told[0] or ports[0]
        quick = ['save ""', "repl-diskless-sync-delay 0", "repl-timeout 5", *options]
        quick += [f"requirepass {password}", f"masterauth {password}"] if password else []
        self.nodes = [
            Node(
                folder / f"redis-{n}",
                port,
                [*quick, *([f"replicaof {HOST} {first}"] if n else [])],
                password,
                told=other,
            )
            for n, (port, other) in enumerate(zip(ports, told, strict=False))
        ]
        watch = [
            f"sentinel monitor {MASTER} {HOST} {first} {sentinels // 2 + 1}",
            f"sentinel down-after-milliseconds {MASTER} {DOWN_AFTER_MILLISECONDS}",
            f"sentinel failover-timeout {MASTER} {4 * DOWN_AFTER_MILLISECONDS}",
            *([f"sentinel auth-pass {MASTER} {password}"] if password else []),
            *([f"requirepass {sentinel_password}"] if sentinel_password else []),
        ]
        self.sentinels = [
            Node(folder / f"sentinel-{n}", port, watch, sentinel_password, sentinel=True)
            for n, port in enumerate(ports[redises : redises + sentinels])
        ]

    @property
    def url(self) -> str:
        """The URL that the programs are given."""
        return f"redis+sentinel://{','.join(f'{HOST}:{one.port}' for one in self.sentinels)}/{MASTER}/0"

    def master(self) -> Node:
        """Return the node that the first Sentinel to answer names."""
        for sentinel in self.sentinels:
            with suppress(RedisError, OSError), sentinel.connect() as connection:
                found = connection.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", MASTER)
                return next(node for node in self.nodes if node.told == int(found[1]))
        raise AssertionError("no Sentinel answers")

    def replicas(self) -> list[Node]:
        master = self.master()
        return [node for node in self.nodes if node is not master]

    def wait_for_promotion(self, old: Node, seconds: float = 60.0) -> Node:
        """Wait until the Sentinels name another master than `old`, and it says so itself."""
        wait_until(lambda: self.master() is not old and self.master().role() == "master", "a promotion", seconds)
        return self.master()

    def fail_over(self) -> Node:
        """Have a replica promoted while the master is well, and return it."""
        old = self.master()
        with self.sentinels[0].connect() as connection:
            connection.execute_command("SENTINEL", "FAILOVER", MASTER)
        return self.wait_for_promotion(old)

    def rejoin(self, old: Node) -> None:
        """Start a node again that was killed or hangs, at once as a replica: a Sentinel would see to it after 8 s."""
        old.kill()
        old.start("--replicaof", f"{HOST} {self.master().told}")
        self.wait_until_complete()

    def wait_until_complete(self, seconds: float = 60.0, linked: bool = True) -> None:
        """Wait until all replicas are in sync, and every Sentinel knows of all of them and of the other Sentinels.

        Args:
            linked: wait until every Sentinel has heard that they are in sync, too: it asks every ten seconds.
        """
        what = "the replicas and the Sentinels to know of each other"
        wait_until(lambda: self._is_complete(linked), what, seconds)

    def _is_complete(self, linked: bool) -> bool:
        replicas, sentinels = len(self.nodes) - 1, len(self.sentinels)
        with suppress(RedisError, OSError, AssertionError):
            if not self._is_followed(self.master()):
                return False
            for one in self.sentinels:
                with one.connect() as connection:
                    state = connection.sentinel_master(MASTER)
                    seen = connection.sentinel_slaves(MASTER)
                healthy = [replica for replica in seen if replica["flags"] in ("slave", {"slave"})]
                if linked:
                    healthy = [replica for replica in healthy if replica["master-link-status"] == "ok"]
                if state["num-other-sentinels"] != sentinels - 1 or len(healthy) != replicas:
                    return False
            return True
        return False

    def _is_followed(self, master: Node) -> bool:
        with suppress(RedisError, OSError), master.connect() as connection:
            info = connection.info("replication")
            followers = range(len(self.nodes) - 1)
            return all(info.get(f"slave{n}", {}).get("state") == "online" for n in followers)
        return False

    def start(self, linked: bool = True) -> Self:
        """Start everything, and wait as `wait_until_complete` does."""
        for node in self.nodes:
            node.start()
        # A Sentinel asks at once, and then every ten seconds.
        wait_until(lambda: self._is_followed(self.nodes[0]), "the replicas to follow")
        for sentinel in self.sentinels:
            sentinel.start()
        self.wait_until_complete(linked=linked)
        return self

    def close(self) -> None:
        for node in (*self.sentinels, *self.nodes):
            if node.process is not None:
                node.process.kill()
                node.process.wait()

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(self, *_: object) -> None:
        self.close()


def _free_ports(count: int) -> list[int]:
    """Return ports that are free now, each another: below those that the system gives to whoever asks for any."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.randrange(10_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind((HOST, port))
            ports += [port] if port not in ports else []
    return ports
