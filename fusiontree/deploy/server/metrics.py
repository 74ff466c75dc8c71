"""Figures for Prometheus: what was asked over HTTP, and each engine as it stands."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fusiontree.deploy.requests import Usage
from fusiontree.deploy.server.models import Models

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
# name in `Stats` → what it means
_COUNTERS = {
    "submitted": "Requests taken",
    "prompt_tokens": "Prompt tokens read or found in the prefix cache",
    "cached_tokens": "Prompt tokens found in the prefix cache",
    "completion_tokens": "Tokens generated",
    "steps": "Decoding steps",
    "prefix_hits": "Prompts that began like one before",
}
_GAUGES = {
    "slots": "Answers that can be written at a time",
    "active": "Slots that decode",
    "prefilling": "Slots whose prompt is being read",
    "waiting": "Requests in the queue",
    "tokens_per_second": "Tokens generated per second lately",
    "state_bytes": "Bytes of state in the slots in use",
    "prefix_bytes": "Bytes of the prefix cache",
    "prefix_entries": "Entries of the prefix cache",
}


class Metrics:
    """All figures of one application."""

    def __init__(self, models: Models) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Engines(models))
        self.requests = Counter(
            "fusiontree_http_requests", "HTTP requests by route and status", ["route", "status"], registry=self.registry
        )
        self.open = Gauge("fusiontree_http_requests_open", "HTTP requests being answered", registry=self.registry)
        self.first = self._seconds("fusiontree_first_token_seconds", "From request to first token")
        self.queued = self._seconds("fusiontree_queue_seconds", "From request to the reading of its prompt")
        self.total = self._seconds("fusiontree_request_seconds", "From request to last token")

    def _seconds(self, name: str, about: str) -> Histogram:
        return Histogram(name, about, ["model"], registry=self.registry, buckets=_SECONDS)

    def note(self, model: str, usage: Usage) -> None:
        """One request of an engine has ended."""
        self.queued.labels(model).observe(usage.queue_seconds)
        self.total.labels(model).observe(usage.total_seconds)
        if usage.first_token_seconds is not None:
            self.first.labels(model).observe(usage.first_token_seconds)

    def text(self) -> bytes:
        """Everything as Prometheus reads it."""
        return generate_latest(self.registry)


class CountRequests:
    """Middleware that counts answers by route and status; what is no route of ours is `other`."""

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: frozenset[str]) -> None:
        self.app = app
        self.metrics = metrics
        self.routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        route = scope["path"] if scope["path"] in self.routes else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.requests.labels(route, str(message["status"])).inc()
            await send(message)

        with self.metrics.open.track_inprogress():
            await self.app(scope, receive, counted)


class _Engines(Collector):
    def __init__(self, models: Models) -> None:
        self.models = models
        self.started = time.time()

    def collect(self) -> Iterator[Metric]:
        """Each engine's `Stats` at this moment."""
        stats = {name: asdict(model.engine.stats()) for name, model in self.models.by_name.items()}
        for key, about in _COUNTERS.items():
            counter = CounterMetricFamily(f"fusiontree_{key}", about, labels=["model"])
            for name, found in stats.items():
                counter.add_metric([name], found[key])
            yield counter
        for key, about in _GAUGES.items():
            gauge = GaugeMetricFamily(f"fusiontree_{key}", about, labels=["model"])
            for name, found in stats.items():
                gauge.add_metric([name], found[key])
            yield gauge
        finished = CounterMetricFamily("fusiontree_finished", "Answers by how they ended", labels=["model", "reason"])
        for name, found in stats.items():
            for reason, count in found["finished"].items():
                finished.add_metric([name, reason], count)
        yield finished
        yield GaugeMetricFamily("fusiontree_start_time_seconds", "When the server started", self.started)
