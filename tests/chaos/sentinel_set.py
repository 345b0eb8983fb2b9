"""A master, two replicas and three Sentinels, each Redis behind a proxy that can hang."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from redis import Redis
from support.sentinel import HOST, Node, SentinelSystem

from chaos.hanging_proxy import HangingProxy
from fastgpt2.protocol.connection import connect


class SentinelSet(SentinelSystem):
    """A set whose master can be lost in four ways; `url` is what clients and workers are given.

    Args:
        folder: for all files; it need not be there.
        min_replicas: the master takes no writes while it has fewer replicas that keep up.
    """

    def __init__(self, folder: Path, min_replicas: int = 0) -> None:
        super().__init__(
            folder,
            replicas=2,
            sentinels=3,
            options=("appendonly yes", f"min-replicas-to-write {min_replicas}", "min-replicas-max-lag 3"),
            proxied=True,
        )
        self._proxies = {node: HangingProxy(node.told, node.port) for node in self.nodes}

    def start(self, linked: bool = False) -> Self:
        for proxy in self._proxies.values():
            proxy.start()
        return super().start(linked)

    def close(self) -> None:
        super().close()
        for proxy in self._proxies.values():
            proxy.close()

    def hold_replicas(self, master: Node) -> None:
        """Let the replicas fall behind this master."""
        self._proxies[master].hold_replicas()

    def lose(self, master: Node, how: str) -> None:
        """Lose a master: it is killed, stopped (hang), parted from everybody by a proxy that hangs, or cut off."""
        if how == "kill":
            master.kill()
            self._proxies[master].drop_replicas()
        elif how == "hang":
            master.stop()
        elif how == "part":
            self._proxies[master].hang()
        else:
            self._proxies[master].cut()

    def bring_back(self, old: Node, how: str, asks_first: bool) -> None:
        """Undo a loss.

        Args:
            asks_first: one that was killed begins as a replica of the new master, as by a start script that asks the
                Sentinels. Otherwise it still takes itself for the master.
        """
        if how != "kill":
            old.resume()
            self._proxies[old].heal()
        elif asks_first:
            old.start("--replicaof", f"{HOST} {self.master().told}")
        else:
            old.start()

    def connect(self) -> Redis:
        """Connect to the master, past its proxy."""
        return connect(f"redis://{HOST}:{self.master().port}/0")
