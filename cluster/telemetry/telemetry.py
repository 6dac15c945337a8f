"""The controller's exporter: every series of contracts/metrics.py, and nothing else, as Prometheus, rows and events.

Invariant: a name, or a label, that the catalogue lacks cannot be exported (law 9). A row of metrics.jsonl holds the
catalogue's series by name without the prefix, label values appended: `reward_mean/playground/strict`; histograms give
`/mean` and `/count`. Throughput counts every GPU of the run (law 8).
Does not own: when a step ends (controller), trackers (sinks.py), reward servers' series (reward_servers/telemetry).
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, start_http_server
from prometheus_client.metrics import MetricWrapperBase

from cluster.telemetry import process
from cluster.telemetry.appending import AppendingFile
from cluster.telemetry.rates import Accelerators, Throughput, count_accelerators
from cluster.telemetry.sink_thread import SinkThread
from cluster.telemetry.sinks import Sink, for_sinks, make_sinks
from cluster.telemetry.trace import Trace
from contracts.config import RunConfig
from contracts.config.scoring import ScorerConfig
from contracts.errors import ConfigError
from contracts.metrics import BY_NAME, CATALOGUE, Metric
from contracts.wire import Source, Span

PREFIX = "salon_"
ADDRESS_FILE = "metrics_address"
ROWS_LOST = "salon_sink_rows_lost_total"
CLOSE_S = 20.0
"""What sinks get at the end to send what waits; one that hangs holds up the end of the run no longer."""

log = logging.getLogger("salon.telemetry")

disable_created_metrics()  # type: ignore[no-untyped-call]  # `_created` series are not in the catalogue


class Telemetry:
    """Metrics, events and pictures of one run. Safe to call from several threads."""

    def __init__(
        self,
        config: RunConfig,
        folder: str | Path,
        *,
        source: Source = Source.ACTORS,
        serve: bool = True,
        sinks: Mapping[str, Callable[[], Sink]] | None = None,
    ) -> None:
        """folder: local run folder. serve: listen on telemetry.metrics_host:metrics_port and write the address there.

        sinks: how to make them, by name; None: those that the configuration asks for.
        Raises ConfigError when a tracker is not installed or the port is taken.
        """
        self.config, self.folder = config, Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.registry = CollectorRegistry(auto_describe=True)
        self._series = {metric.name: _make_series(metric, self.registry) for metric in controller_metrics()}
        process.register(self.registry)
        self.throughput = Throughput(count_accelerators(config, source))
        self._latest: dict[str, float | None] = {"step": 0}
        self._lock = threading.Lock()
        self._rows, self._events = (AppendingFile(self.folder / f"{name}.jsonl") for name in ("metrics", "events"))
        self._losing: set[AppendingFile] = set()
        self._closed = False
        makers = make_sinks(config, self.folder) if sinks is None else sinks
        self.trace = Trace(self.folder if config.telemetry.trace_mb else None, config.telemetry.trace_mb)
        self._server: Any = None
        self.address = self._listen() if serve else ""
        self._sinks = [
            SinkThread(name, make, partial(self.count, ROWS_LOST, sink=name), self.event)
            for name, make in makers.items()
        ]
        self._declare()

    def _declare(self) -> None:
        """What is known before anything happens."""
        counted = self.throughput.accelerators
        for role in ("actors", "learner", "reward_servers"):
            self.gauge("salon_accelerators", getattr(counted, role), role=role)
        for scorer in self.config.scorers:
            self.gauge("salon_scorer_held_out", float(scorer.held_out), scorer=scorer.name)
        for guard in self.config.guards:
            self.count("salon_guard_warnings_total", 0, guard=guard.key)
        self.gauge("salon_staleness_limit_steps", self.config.pipeline.max_staleness)
        for name in (*(sink.name for sink in self._sinks), self._rows.path.name, self._events.path.name):
            self.count(ROWS_LOST, 0, sink=name)
        self.gauge("salon_step", 0)
        self.gauge("salon_training", 0)

    @property
    def accelerators(self) -> Accelerators:
        return self.throughput.accelerators

    def count(self, name: str, amount: float = 1.0, /, **labels: str) -> None:
        """Add to a counter."""
        self._child(name, "counter", labels).inc(amount)

    def count_to(self, name: str, total: float, /, **labels: str) -> None:
        """Bring a counter up to a total known elsewhere (the ledger's); it never falls, so less changes nothing."""
        child = self._child(name, "counter", labels)
        child.inc(max(0.0, total - child._value.get()))

    def gauge(self, name: str, value: float, /, **labels: str) -> None:
        """Set a gauge."""
        self._child(name, "gauge", labels).set(value)

    def observe(self, name: str, value: float, /, **labels: str) -> None:
        """Add one observation to a histogram."""
        self._child(name, "histogram", labels).observe(value)

    def phase(self, role: str, phase: str, seconds: float, lane: str | None = None) -> None:
        """Add wall time to a phase of a role ('learner', 'update'). lane: show it in the trace, as ended just now."""
        self.count("salon_phase_seconds_total", seconds, role=role, phase=phase)
        if lane is not None:
            self.trace.ended(lane, phase, seconds)

    @contextlib.contextmanager
    def timed(self, role: str, phase: str, lane: str | None = None) -> Iterator[None]:
        """Count the block's wall time as a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.phase(role, phase, time.perf_counter() - start, lane)

    def spans(self, spans: Iterable[Span], **args: Any) -> None:
        """Spans that other processes measured, for the trace; args are shown with each."""
        self.trace.add(spans, **args)

    def event(self, kind: str, /, **fields: Any) -> None:
        """Append one line to events.jsonl, and a mark to the trace."""
        self._append(self._events, {"time": time.time(), "event": kind, **fields})
        self.trace.instant("controller", kind, fields)

    def training_begins(self) -> None:
        """Start the clock of throughput: what evaluations painted before does not dilute it."""
        self.throughput.restart()
        self.event("phase", phase="training")
        self.gauge("salon_training", 1)

    def training_ended(self) -> None:
        """What comes after is no training: no step is to be expected."""
        self.gauge("salon_training", 0)

    def step(
        self,
        *,
        step: int,
        images: int,
        seconds: float,
        staleness: Sequence[int],
        rewards: Mapping[str, Mapping[str, float]],
        metrics: Mapping[str, float],
        phases: Mapping[str, float],
        books: Any = None,
    ) -> dict[str, float]:
        """A learner step has ended: set its gauges, write its row to metrics.jsonl and the sinks, return the row.

        images: trained by the step; rewards: 'scorer/column' -> mean and std; metrics: the objective's, by name;
        phases: seconds of the ranks' own phases; books: the ledger's, whose groups alive by state become a gauge.
        """
        self.throughput.add(images)
        self.gauge("salon_step", step)
        self.gauge("salon_staleness_largest_steps", max(staleness, default=0))
        self._latest = {"step": step, "step_seconds": seconds, "staleness": max(staleness, default=0)}
        self._latest["reward"] = _training_reward(self.config, rewards)
        for key, stats in rewards.items():
            scorer, _, column = key.partition("/")
            self.gauge("salon_reward_mean", stats["mean"], scorer=scorer, column=column)
            self.gauge("salon_reward_std", stats["std"], scorer=scorer, column=column)
        for name, value in metrics.items():
            self._objective_metric(name, value)
        for phase, took in phases.items():
            self.phase("rank", phase, took)
        for state, number in _alive(books).items():
            self.gauge("salon_groups", number, state=state)
        self.refresh_rates()
        return self._write_row(step)

    def _objective_metric(self, name: str, value: float) -> None:
        """A metric that has a series of its own goes there, any other becomes train_metric{name}."""
        own = BY_NAME.get(PREFIX + name)
        if own is not None and own.type == "gauge" and own.labels == ("run",):
            self.gauge(own.name, value)
        else:
            self.gauge("salon_train_metric", value, name=name)

    def _write_row(self, step: int) -> dict[str, float]:
        row = self.snapshot()
        self._append(self._rows, {"time": time.time(), **row})
        if self._sinks:
            shown = for_sinks(row, _OF_PROCESSES)
            for sink in self._sinks:
                sink.scalars(shown, step)
        return row

    def status(self) -> dict[str, float | None]:
        """What the display shows of the last step: step, step_seconds, staleness, reward, images_per_second."""
        return {**self._latest, "images_per_second": self.throughput.images_per_second()}

    def refresh_rates(self) -> None:
        """Write throughput into its gauges; call it now and then, so that a stalled run shows as one."""
        self.gauge("salon_images_per_second", self.throughput.images_per_second())
        self.gauge("salon_images_per_second_per_gpu", self.throughput.images_per_second_per_gpu())

    def image(self, tag: str, image: np.ndarray, step: int) -> None:
        """Show a picture, uint8 [H,W,3], in every sink; it must not change afterwards."""
        for sink in self._sinks:
            sink.image(tag, image, step)

    def rows_waiting(self) -> int:
        """Rows and pictures that a sink has not taken yet."""
        return sum(sink.waiting for sink in self._sinks)

    def snapshot(self) -> dict[str, float]:
        """Every series that has a value, by its key in metrics.jsonl."""
        row: dict[str, float] = {}
        for metric in controller_metrics():
            row.update(_rows_of(metric, self._series[metric.name]))
        return row

    def close(self) -> None:
        """End sinks, which have CLOSE_S for it together, and files; stop listening."""
        deadline = time.monotonic() + CLOSE_S
        for sink in self._sinks:
            sink.end()
        for sink in self._sinks:
            sink.join(deadline)
        with self._lock:
            self._closed = True
            self._rows.close()
            self._events.close()
        self.trace.close()
        if self._server is not None:
            server, thread = self._server
            server.shutdown()
            server.server_close()
            thread.join(timeout=5)

    def _child(self, name: str, type_: str, labels: dict[str, str]) -> Any:
        metric = BY_NAME.get(name)
        if metric is None or metric.role != "controller":
            raise ValueError(f"{name!r} is no series of the controller in contracts/metrics.py: add it there first")
        if metric.type != type_:
            raise ValueError(f"{name} is a {metric.type}, not a {type_}")
        return self._series[name].labels(run=self.config.name, **labels)

    def _listen(self) -> str:
        host, port = self.config.telemetry.metrics_host, self.config.telemetry.metrics_port
        try:
            self._server = start_http_server(port, addr=host, registry=self.registry)
        except OSError as error:
            way_out = "choose another port, or 0 for any free one"
            raise ConfigError(
                "telemetry.metrics_port", f"cannot listen on {host}:{port} ({error.strerror})", way_out
            ) from error
        address = f"http://{host}:{self._server[0].server_port}/metrics"
        try:
            (self.folder / ADDRESS_FILE).write_text(address + "\n")
        except OSError as error:  # Prometheus is told elsewhere (targets.py)
            log.warning("%s could not be written: %s", ADDRESS_FILE, error)
        return address

    def _append(self, file: AppendingFile, row: dict[str, Any]) -> None:
        """A full disk costs the row, not the run; the first of a spell is told, and all are counted."""
        line = (json.dumps(_finite(row), default=str) + "\n").encode()
        with self._lock:
            if self._closed:
                return
            try:
                file.append(line)
                self._losing.discard(file)
            except OSError as error:
                if file not in self._losing:
                    log.warning("%s loses rows: %s", file.path, error)
                self._losing.add(file)
                self.count(ROWS_LOST, sink=file.path.name)


def controller_metrics() -> list[Metric]:
    """The catalogue's series that the controller exports."""
    return [metric for metric in CATALOGUE if metric.role == "controller"]


_OF_PROCESSES = frozenset(
    metric.name.removeprefix(PREFIX)
    for metric in controller_metrics()
    if metric.labels[1:2] in (("actor",), ("process",))
)
"""Series whose first label is a process of the run."""


def _make_series(metric: Metric, registry: CollectorRegistry) -> MetricWrapperBase:
    if metric.type == "histogram":
        return Histogram(metric.name, metric.help, metric.labels, buckets=metric.buckets, registry=registry)
    kind = Counter if metric.type == "counter" else Gauge
    return kind(metric.name, metric.help, metric.labels, registry=registry)


def _rows_of(metric: Metric, series: MetricWrapperBase) -> Iterator[tuple[str, float]]:
    values: dict[tuple[str, ...], dict[str, float]] = {}
    for family in series.collect():
        for sample in family.samples:
            labels = tuple(sample.labels[label] for label in metric.labels if label != "run")
            values.setdefault(labels, {})[sample.name] = sample.value
    for labels, by_sample in values.items():
        key = "/".join([metric.name.removeprefix(PREFIX), *labels])
        if metric.type == "histogram":
            number = by_sample[f"{metric.name}_count"]
            yield f"{key}/count", number
            if number:
                yield f"{key}/mean", by_sample[f"{metric.name}_sum"] / number
        else:
            yield key, by_sample[metric.name]


def _training_reward(config: RunConfig, rewards: Mapping[str, Mapping[str, float]]) -> float | None:
    """The weighted sum of column means over the scorers that train; None while none has answered."""
    total, known = 0.0, False
    for scorer in config.scorers:
        means = {
            key.partition("/")[2]: row["mean"] for key, row in rewards.items() if key.partition("/")[0] == scorer.name
        }
        if scorer.held_out or not means:
            continue
        known = True
        total += sum(weight * means.get(column, 0.0) for column, weight in _weights(scorer, means).items())
    return total if known else None


def _weights(scorer: ScorerConfig, columns: Mapping[str, float]) -> Mapping[str, float]:
    return scorer.weights or {next(iter(columns)): 1.0}


def _alive(books: Any) -> dict[str, int]:
    """Groups alive by state, of the ledger's books."""
    states = getattr(books, "alive_by_state", None)
    return {str(state): int(number) for state, number in (states or {}).items()}


def _finite(value: Any) -> Any:
    """NaN and infinities as null: JSON has no word for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
