"""A replica takes over that lacks what was enqueued last: who waits for it enqueues it again."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.finishing import finish
from support.running import in_thread, wait_until
from support.sentinel import SentinelSystem

from fastgpt2 import Client
from fastgpt2.errors import JobLost, NotDurable

pytestmark = pytest.mark.processes

PASSWORD = "x"


def cut_off(system: SentinelSystem) -> None:
    """Have the replica follow no longer, as if its network were slow: it holds what it has."""
    master, (replica,) = system.master(), system.replicas()
    with replica.connect() as connection:
        connection.config_set("masterauth", "wrong")
    with master.connect() as connection:
        connection.execute_command("CLIENT", "KILL", "TYPE", "replica")
        wait_until(lambda: connection.info("replication")["connected_slaves"] == 0, "the replica to be cut off")


def test_what_was_in_the_lag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgpt2.api.client.durability.DURABILITY_SECONDS", 0.2)
    with SentinelSystem(tmp_path / "system", password=PASSWORD) as system:
        url = system.url.replace("://", f"://:{PASSWORD}@")
        with Client(url, "q") as client, Client(url, "q", durability="replica") as careful:
            kept = careful.enqueue("kept")
            cut_off(system)
            with pytest.raises(NotDurable) as caught:
                careful.enqueue("in the lag")
            lost = client.enqueue("in the lag")
            waiting = [in_thread(job.result) for job in (kept, lost)]
            by_id = in_thread(lambda: client.result(caught.value.job_ids[0]))
            mapped = in_thread(lambda: [result.text for result in client.map(["a", "b"])])
            master = system.master()
            with master.connect() as connection:
                wait_until(lambda: connection.info("clients")["blocked_clients"] == 4, "all to wait")
                ids = [str(job_id) for job_id in connection.lrange("rq:queue:q", 0, -1)]
            master.kill()
            with system.wait_for_promotion(master).connect() as connection:
                wait_until(lambda: connection.llen("rq:queue:q") == 4, "all to be in the queue again")
                assert set(connection.lrange("rq:queue:q", 0, -1)) == {*ids} - {*caught.value.job_ids}
                for job_id in ids:
                    if job_id not in caught.value.job_ids:
                        finish(connection, job_id, f"text of {job_id}")
            assert [one.result(60).text for one in waiting] == [f"text of {job.id}" for job in (kept, lost)]
            assert mapped.result(60) == [f"text of {job_id}" for job_id in ids[-2:]]
            with pytest.raises(JobLost, match="Redis was started again, or another took over, without it"):
                by_id.result(60)
