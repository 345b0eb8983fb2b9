"""A Redis that has forgotten everything when it is started again, and the jobs that come back to it."""

from __future__ import annotations

from support.finishing import finish, queued
from support.redis_process import OpenRedis
from support.running import wait_until


class ForgetfulRedis(OpenRedis):
    def __init__(self) -> None:
        super().__init__("--appendonly", "no")


def wait_for_queue(server: ForgetfulRedis, queue: str, ids: list[str] | int) -> list[str]:
    """Wait until so many jobs, or these, are in the queue; return their ids."""
    with server.administered() as connection:
        if isinstance(ids, int):
            wait_until(lambda: len(queued(connection, queue)) >= ids, f"{ids} jobs to be in the queue")
        else:
            wait_until(
                lambda: sorted(queued(connection, queue)) == sorted(ids), "the same jobs to be in the queue again"
            )
        return queued(connection, queue)


def finish_all(server: ForgetfulRedis, queue: str) -> None:
    with server.administered() as connection:
        for job_id in queued(connection, queue):
            finish(connection, job_id, f"text of {job_id}")
