"""The same accounts over containers: workers and Redis killed, the pool scaled and replaced, while jobs run."""

from __future__ import annotations

import os
import random
import signal
import time
import uuid
from collections.abc import Callable, Iterator

import pytest
from redis import Redis
from redis.exceptions import RedisError
from support.compose import Compose, docker, free_port, until, why_not

from chaos.cluster import QUEUE
from chaos.ledger import audit
from chaos.soak import OVER
from chaos.submission import Submission
from fastgpt2.protocol.connection import connect

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(bool(why_not()), reason=f"no containers here: {why_not()}"),
]

PASSWORD = "a-password-of-the-test"
JOBS_A_FAULT = 25


class Pool:
    """The composed pool, its Redis on a port of this machine, and what can happen to it."""

    def __init__(self, compose: Compose, redis_url: str) -> None:
        self.compose = compose
        self.url = redis_url
        self.chance = random.Random(7)

    def one_of(self, service: str) -> str:
        return self.chance.choice(self.compose.containers(service))

    def crash(self, service: str) -> None:
        """Kill a worker as the kernel does: Docker starts it again."""
        pid = self.compose.inspect(self.one_of(service))["State"]["Pid"]
        assert pid > 0, "it does not run"
        os.kill(pid, signal.SIGKILL)

    def kill(self, service: str) -> None:
        """Kill by `docker kill`, after which the container stays down until somebody starts it."""
        container = self.one_of(service)
        docker("kill", container)
        docker("start", container)

    def scale(self, workers: int) -> None:
        self.compose("up", "--detach", "--no-deps", "--no-recreate", "--scale", f"worker={workers}", "worker")

    def replace(self) -> None:
        """Update by rolling: stop each worker, with its grace, and start another in its place."""
        for container in self.compose.containers("worker"):
            docker("stop", "--time", "60", container)
            docker("rm", container)
            self.scale(3)

    def freeze(self) -> None:
        """Pause a worker: it says nothing for a while, and comes back."""
        container = self.one_of("worker")
        docker("pause", container)
        time.sleep(self.chance.uniform(1, 3))
        docker("unpause", container)


@pytest.fixture
def pool() -> Iterator[Pool]:
    port = free_port()
    compose = Compose(
        f"fastgpt2-chaos-{uuid.uuid4().hex[:6]}",
        "deploy/compose.redis-port.yml",
        MODEL="demo",
        FASTGPT2_QUEUE=QUEUE,
        REDIS_PASSWORD=PASSWORD,
        REDIS_PORT=str(port),
    )
    try:
        compose("up", "--build", "--detach", "--wait", "--scale", "worker=3")
        yield Pool(compose, f"redis://:{PASSWORD}@127.0.0.1:{port}/0")
    finally:
        compose.down()


def test_nothing_is_lost_whatever_happens_to_containers(pool: Pool) -> None:
    connection = connect(pool.url)
    submission = Submission(pool.url, connection, seed=11)
    faults: list[Callable[[], None]] = [
        lambda: pool.crash("worker"),
        lambda: pool.scale(4),
        lambda: pool.kill("worker"),
        lambda: pool.crash("redis"),
        pool.replace,
        pool.freeze,
        lambda: pool.scale(2),
        lambda: pool.kill("redis"),
        lambda: pool.scale(3),
        lambda: pool.crash("worker"),
    ]

    def tend() -> None:
        submission.tend(time.monotonic())

    for fault in faults:
        upto = len(submission.everything) + JOBS_A_FAULT
        while len(submission.everything) < upto:
            submission.submit(tend)
        tend()
        fault()

    def all_over() -> bool:
        tend()
        return _all_over(connection, submission)

    def only_the_living_are_listed() -> bool:
        return connection.scard(f"rq:workers:{QUEUE}") == len(pool.compose.containers("worker")) == 3

    until(all_over, "all jobs to be over", 120)
    submission.finish()
    until(only_the_living_are_listed, "those who died last to be taken off the lists", 60)
    pool.compose("stop", "worker")
    assert connection.scard(f"rq:workers:{QUEUE}") == 0, "all have signed off"
    ends, wrong = audit(connection, submission.everything)
    assert wrong == []
    assert sum(ends.values()) == len(submission.everything) >= len(faults) * JOBS_A_FAULT
    assert ends["finished"] > 150


def _all_over(connection: Redis, submission: Submission) -> bool:
    try:
        with connection.pipeline(transaction=False) as pipeline:
            for job in submission.everything:
                pipeline.hget(f"rq:job:{job.id}", "status")
            return all(status in OVER for status in pipeline.execute())
    except RedisError:
        return False
