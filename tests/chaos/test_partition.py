"""What a master is worth that is parted from its replicas and the Sentinels, to who is parted with it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from support.running import wait_until

from chaos.sentinel_set import SentinelSet
from fastgpt2 import Client
from fastgpt2.errors import JobNotFound, NotDurable, QueueUnavailable
from fastgpt2.protocol.connection import connect

pytestmark = pytest.mark.processes


def test_a_parted_master_takes_what_will_be_lost_unless_it_is_asked_for_more(tmp_path: Path) -> None:
    with SentinelSet(tmp_path / "redis") as system:
        old = system.master()
        system.lose(old, "part")
        beside_it = f"redis://127.0.0.1:{old.port}/0"
        with Client(beside_it, "parted") as hasty, Client(beside_it, "parted", durability="replica") as careful:
            taken = hasty.enqueue("Hello")
            with pytest.raises(NotDurable) as raised:
                careful.enqueue("Hello")
            (doubtful,) = raised.value.job_ids
            system.wait_for_promotion(old)
            with Client(system.url, "parted") as others:
                for lost in (taken.id, doubtful):
                    wait_until(partial(_is_gone, others, lost), "the new master to answer, and to have no such job")
            # With this from the beginning it takes nothing once its replicas are silent for min-replicas-max-lag.
            connection = connect(beside_it)
            connection.config_set("min-replicas-to-write", 1)
            connection.close()
            wait_until(lambda: _refuses(hasty), "the parted master to refuse")


def _is_gone(client: Client, job_id: str) -> bool:
    try:
        client.status(job_id)
    except JobNotFound:
        return True
    except QueueUnavailable:  # the Sentinels may take the new master for dead for a moment
        return False
    pytest.fail(f"job {job_id} is not lost")


def _refuses(client: Client) -> bool:
    try:
        client.enqueue("Hello")
    except QueueUnavailable as reason:
        return "NOREPLICAS" in str(reason)
    return False
