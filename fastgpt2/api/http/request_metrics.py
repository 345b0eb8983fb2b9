"""The metrics of the requests that one endpoint has answered: how many, how long they took, how many are served now.

They are this process's own, unlike the pool's figures, which stand in Redis: Prometheus is to ask each endpoint.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from starlette.routing import Match, Route

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric
    from starlette.types import Scope

# The label of what has none of its own: paths without a route and methods that nobody knows may be anything, and each
# label is kept for as long as the endpoint runs.
OTHER = "other"
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

# The bounds of the histogram, in seconds: from an answer at once to a stream that takes minutes.
BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class RequestMetrics:
    """The counts of one endpoint's requests.

    A request is counted when its answer has been sent, so a stream at its end.

    Attributes:
        routes: those of the application.
        in_flight: the requests that are being served.
    """

    def __init__(self) -> None:
        self.routes: list[Route] = []
        self.in_flight = 0
        # By method, route and status.
        self._counts: defaultdict[tuple[str, str, int], int] = defaultdict(int)
        # By method and route: a count for each bucket, and the sum of the seconds.
        self._buckets: defaultdict[tuple[str, str], list[int]] = defaultdict(lambda: [0] * (len(BOUNDS) + 1))
        self._seconds: defaultdict[tuple[str, str], float] = defaultdict(float)

    def begin(self) -> None:
        """Count a request that is being served from now on."""
        self.in_flight += 1

    def end(self, scope: Scope, route: str, status: int, seconds: float) -> None:
        """Count a request whose answer has been sent."""
        self.in_flight -= 1
        method = scope["method"] if scope["method"] in METHODS else OTHER
        self._counts[method, route, status] += 1
        self._buckets[method, route][bisect_left(BOUNDS, seconds)] += 1
        self._seconds[method, route] += seconds

    def count_refusal(self, status: int) -> None:
        """Count what could not be read as a request, and was refused: it has neither a method nor a route."""
        self._counts[OTHER, OTHER, status] += 1

    def find_route(self, scope: Scope) -> str:
        """Return the path of the route that a request is for, with names where an id or a model stands."""
        route = scope.get("route")
        if isinstance(route, Route):
            return route.path_format
        # It was refused before it came to its route, or this Starlette does not tell.
        return next((one.path_format for one in self.routes if one.matches(scope)[0] != Match.NONE), OTHER)

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics; for prometheus_client, whose registries call this."""
        from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        counts = CounterMetricFamily(
            "fastgpt2_http_requests",
            "Requests that this endpoint has answered, streams at their end; 499 where the client left before.",
            labels=["method", "route", "status"],
        )
        for (method, route, status), count in sorted(self._counts.items()):
            counts.add_metric([method, route, str(status)], count)
        yield counts
        durations = HistogramMetricFamily(
            "fastgpt2_http_request_duration_seconds",
            "Seconds from a request's head to the end of its answer, a stream's too.",
            labels=["method", "route"],
        )
        bounds = [*(str(float(bound)) for bound in BOUNDS), "+Inf"]
        for labels, buckets in sorted(self._buckets.items()):
            upto: list[Any] = list(zip(bounds, map(float, accumulate(buckets)), strict=True))
            durations.add_metric(labels, upto, self._seconds[labels])
        yield durations
        yield GaugeMetricFamily(
            "fastgpt2_http_requests_in_flight", "Requests that this endpoint serves now.", value=self.in_flight
        )
