"""The metrics of the tokens that have names: their requests to this endpoint, and what their jobs used of the pool."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastgpt2.protocol.keys import GENERATED_TOKENS, PROMPT_TOKENS, token_totals_field, token_totals_key
from fastgpt2.protocol.untrusted import whole

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric
    from redis.asyncio import Redis

_KINDS = {PROMPT_TOKENS: "prompt", GENERATED_TOKENS: "generated"}


@dataclass(eq=False, frozen=True, slots=True)
class TokenMetrics:
    """The figures of one moment, as a collector of prometheus_client.

    Attributes:
        requests: how many requests this endpoint has answered, by the token's name and the status.
        used: how many tokens jobs have read and generated, by the token's name and the field of the pool's totals.
    """

    requests: Mapping[tuple[str, int], int]
    used: Mapping[tuple[str, str], int]

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.metrics_core import CounterMetricFamily

        requests = CounterMetricFamily(
            "fastgpt2_token_requests",
            "Requests to this endpoint that were answered, by the name of the token that they bore.",
            labels=["token", "status"],
        )
        for (name, status), count in sorted(self.requests.items()):
            requests.add_metric([name, str(status)], count)
        yield requests
        used = CounterMetricFamily(
            "fastgpt2_token_tokens",
            "Tokens that jobs of the pool have read (prompt) and generated, by the name of the endpoint's token that "
            "enqueued them.",
            labels=["token", "kind"],
        )
        for (name, field), count in self.used.items():
            used.add_metric([name, _KINDS[field]], count)
        yield used


async def read_token_metrics(
    connection: Redis, queue: str, names: Sequence[str], requests: Mapping[tuple[str, int], int]
) -> TokenMetrics:
    """Return the figures of the tokens with these names."""
    pairs = [(name, field) for name in names for field in _KINDS]
    counts: list[Any] = []
    if pairs:
        fields = [token_totals_field(*pair) for pair in pairs]
        counts = await connection.hmget(token_totals_key(queue), fields)
    used = {pair: whole(count) or 0 for pair, count in zip(pairs, counts, strict=True)}
    return TokenMetrics(dict(requests), used)
