"""The series of one reward server, registered from the catalogue (law 9) in a registry of its own.

Does not own: names, types and help texts (contracts.metrics).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from contracts.metrics import CATALOGUE, Metric
from contracts.scores import ScoreTable
from reward_servers.client.stats import outcome_counts

_OWN = {metric.name: metric for metric in CATALOGUE if metric.role in ("reward_server", "judge")}
disable_created_metrics()  # they would be series that the catalogue does not name


class Telemetry:
    """Counts of one server. All series carry the scorer's name."""

    def __init__(self, scorer: str) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(namespace="salon", registry=self.registry)
        self._scorer = scorer
        ours = [metric for metric in CATALOGUE if metric.role == "reward_server"]
        self._series = {metric.name: _register(metric, self.registry) for metric in ours}

    def request(self, status: int, seconds: float) -> None:
        self._of("requests_total", status=str(status)).inc()
        self._of("request_seconds").observe(seconds)

    def answered(self, table: ScoreTable) -> None:
        """Counts each image once: as ok when all its columns are, else by its worst outcome."""
        for name, count in outcome_counts(table).items():
            self._of("images_total", outcome=name).inc(count)

    def scored(self, num_images: int, seconds: float) -> None:
        """One call of the scorer."""
        self._of("batch_images").observe(num_images)
        self._of("scorer_seconds").observe(seconds)

    def watch(self, depth: Callable[[], float], capacity: int, ready: Callable[[], bool]) -> None:
        """Gauges read at the moment of a scrape."""
        self._of("queue_depth").set_function(depth)
        self._of("queue_capacity").set(capacity)
        self._of("ready").set_function(lambda: float(ready()))

    def meter(self, name: str, value: float, **labels: str) -> None:
        """One observation of a catalogue series by its full name, for scorers that count things of their own.

        Counters grow by `value`, gauges are set to it, histograms observe it. A series appears with its first
        observation. Raises KeyError for a name that no reward server exports.
        """
        metric = _OWN[name]
        if name not in self._series:
            self._series[name] = _register(metric, self.registry)
        series = self._series[name].labels(scorer=self._scorer, **labels)
        record = {"counter": "inc", "gauge": "set", "histogram": "observe"}[metric.type]
        getattr(series, record)(value)

    def exposition(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)

    def _of(self, name: str, **labels: str) -> Any:
        return self._series[f"salon_reward_{name}"].labels(scorer=self._scorer, **labels)


def _register(metric: Metric, registry: CollectorRegistry) -> Any:
    if metric.type == "histogram":
        return Histogram(metric.name, metric.help, metric.labels, buckets=metric.buckets, registry=registry)
    kind = Counter if metric.type == "counter" else Gauge
    return kind(metric.name, metric.help, metric.labels, registry=registry)
