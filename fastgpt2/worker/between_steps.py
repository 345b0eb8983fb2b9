"""What a worker with running jobs tells and asks Redis between two steps, in one round trip."""

from __future__ import annotations

import logging
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from redis.exceptions import RedisError

from fastgpt2.protocol.keys import registry_key, stream_key
from fastgpt2.protocol.messages import RUNNING_TTL_SECONDS, Piece, piece_to_entry
from fastgpt2.protocol.scripts import Script, execute
from fastgpt2.protocol.untrusted import check_replies, is_of_entry
from fastgpt2.worker.batch import ActiveJob, Batch
from fastgpt2.worker.claims import Claim, Claims
from fastgpt2.worker.outbox import Outbox
from fastgpt2.worker.unfit import tell

if TYPE_CHECKING:
    from redis import Redis
    from redis.client import Pipeline

log = logging.getLogger("fastgpt2.worker")

# A bound for a stream that many attempts write to; one has at most an entry for each token of each text.
ENTRIES_A_POSITION = 4
_ADD_PIECE = Script(__file__, "add_piece")


class BetweenSteps:
    """The round trip of one worker between two steps.

    Args:
        n_positions: of the model: how many tokens a text may have.
    """

    def __init__(
        self, connection: Redis, batch: Batch, claims: Claims, outbox: Outbox, worker_name: str, n_positions: int
    ) -> None:
        self._connection = connection
        self._batch, self._claims, self._outbox = batch, claims, outbox
        self._name = worker_name
        self._most_entries = ENTRIES_A_POSITION * n_positions

    def exchange(self, wanted: int) -> list[Claim]:
        """Send new text, note which jobs are cancelled, and claim as many new ones as are wanted. Return these."""
        claimed: list[Claim] = []
        with self._connection.pipeline(transaction=False) as pipeline:
            sent = self._add_pieces(pipeline)
            queries = self._add_cancellation_queries(pipeline)
            if wanted:
                self._claims.add_claim(pipeline, wanted, len(self._batch))
            replies = execute(pipeline)
        for at, reply in enumerate(replies):
            failed = isinstance(reply, RedisError)
            if failed and not is_of_entry(reply):
                raise reply
            if at in sent:
                job, piece = sent[at]
                job.position.advance(piece)
                if failed:
                    log.warning(
                        "%s: the text of job %s cannot be streamed (%s)",
                        self._name,
                        job.id,
                        reply,
                        extra=job.attempt.log_extra,
                    )
                    job.muted = True
        if wanted:
            claimed = self._claims.read(replies.pop())
        for jobs, scores in zip(queries, replies[len(replies) - len(queries) :], strict=True):
            for job, score in zip(jobs, self._check_scores(jobs, scores), strict=True):
                if score is not None:
                    self._outbox.cancel(job)
        return claimed

    def _add_pieces(self, pipeline: Pipeline) -> dict[int, tuple[ActiveJob, Piece]]:
        """Add the new pieces to a pipeline. Return each with its job, by the number of its command."""
        sent = {}
        for job in self._batch:
            key, most = stream_key(job.id), self._most_entries * job.request.texts
            for piece in job.next_pieces():
                sent[len(pipeline)] = job, piece
                words = [word for pair in piece_to_entry(piece).items() for word in pair]
                _ADD_PIECE.add(pipeline, [key], [most, RUNNING_TTL_SECONDS, *words])
        return sent

    def _add_cancellation_queries(self, pipeline: Pipeline) -> list[list[ActiveJob]]:
        """Add a query for each queue: which of its running jobs are among the cancelled. Return the jobs of each."""
        by_queue: dict[str, list[ActiveJob]] = defaultdict(list)
        for job in self._batch:
            by_queue[job.attempt.queue.name].append(job)
        for name, jobs in by_queue.items():
            pipeline.zmscore(registry_key("canceled", name), [job.id for job in jobs])
        return list(by_queue.values())

    def _check_scores(self, jobs: list[ActiveJob], scores: Any) -> list[Any]:
        """Return the scores of jobs among the cancelled; if that key is no sorted set, their own hashes tell."""
        if isinstance(scores, list):
            return scores
        tell(registry_key("canceled", jobs[0].attempt.queue.name), scores, "each job is asked whether it is cancelled")
        with self._connection.pipeline(transaction=False) as pipeline:
            for job in jobs:
                pipeline.hget(job.attempt.rq_job.key, "status")
            statuses = check_replies(pipeline.execute(raise_on_error=False))
        return [status if status == b"canceled" else None for status in statuses]
