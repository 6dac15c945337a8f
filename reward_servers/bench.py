"""`python -m reward_servers bench URL`: how fast a running reward server answers at one concurrency after another.

Callers in a closed loop: each sends its next request when it has its answer, so throughput stops rising where the
server is saturated, and from there on more callers mean longer waits. One exchange is measured at a time, without
retries: what fails is counted by its cause. Batch sizes come from the server's own histogram on /metrics, before and
after.
Does not own: the exchange (client.endpoint), the server's figures (telemetry), the command line (__main__).
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from contracts.errors import ConfigError, ScoringError
from contracts.scores import Outcome, ScoreRequest, ScorerInfo
from reward_servers.client.breaker import CircuitBreaker
from reward_servers.client.client import headers_with_token
from reward_servers.client.endpoint import AttemptFailed, Endpoint
from reward_servers.client.parts import Part, make_part
from reward_servers.client.stats import outcome_counts

_INFO_S = 30.0
_BATCHES = "salon_reward_batch_images"


@dataclass(frozen=True)
class Load:
    """What every request holds: `images` random pictures (or latents) of one size, with one prompt and metadata.

    shape: of one image (H, W, 3), or of one latent (C, h, w); seconds: measured at each concurrency; timeout_s: of one
    request.
    """

    images: int = 16
    shape: tuple[int, int, int] = (512, 512, 3)
    prompt: str = "a red circle left of a blue square"
    metadata: Mapping[str, Any] = field(default_factory=dict)
    gradients: bool = False
    seconds: float = 5.0
    timeout_s: float = 60.0

    def part(self, info: ScorerInfo) -> Part:
        """The request's content. Raises ConfigError when the server would refuse it."""
        if self.images > info.max_images:
            raise ConfigError("images", f"{self.images} a request", f"the server takes {info.max_images} at most")
        if self.gradients and not info.offers_gradients:
            raise ConfigError("gradients", f"{info.name} offers none")
        rng = np.random.default_rng(0)
        shape = (self.images, *self.shape)
        latents = info.accepts == "latents"
        given = rng.standard_normal(shape, np.float32) if latents else rng.integers(0, 256, shape, np.uint8)
        return make_part(given, [self.prompt] * self.images, [self.metadata] * self.images)


@dataclass
class Level:
    """What one concurrency gave. Times in milliseconds, of answered requests; scores: images by outcome; failures:
    requests without an answer by cause; batches: calls of the scorer by upper bound of their size."""

    concurrency: int
    seconds: float = 0.0
    requests: int = 0
    p50_ms: float = float("nan")
    p90_ms: float = float("nan")
    p99_ms: float = float("nan")
    requests_per_s: float = 0.0
    images_per_s: float = 0.0
    mean_batch: float | None = None
    batches: dict[str, int] = field(default_factory=dict)
    scores: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)


async def sweep(url: str, levels: Sequence[int], load: Load, token_env: str) -> tuple[ScorerInfo, list[Level]]:
    """What the server is, and one Level a concurrency. Raises ScoringError when it cannot be asked at all."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=max(levels))
    async with httpx.AsyncClient(
        headers=headers_with_token(token_env), timeout=None, trust_env=False, limits=limits
    ) as http:
        endpoint = Endpoint(url, CircuitBreaker(failures=1, reset_s=1.0))  # never asked whether it is open
        try:
            info = await endpoint.info(http, _INFO_S)
        except AttemptFailed as error:
            raise ScoringError(error.reason) from error
        part = load.part(info)
        return info, [await _level(endpoint, http, number, load, part, info) for number in levels]


async def _level(
    endpoint: Endpoint, http: httpx.AsyncClient, concurrency: int, load: Load, part: Part, info: ScorerInfo
) -> Level:
    """One concurrency, after one unmeasured request a caller."""
    level, waited = Level(concurrency), []
    expected = part.expected(info, load.gradients)

    async def ask(measured: bool) -> None:
        request = ScoreRequest(
            request_id=uuid.uuid4().hex, prompts=part.prompts, metadata=part.metadata, want_gradients=load.gradients,
            deadline_s=load.timeout_s,
        )  # fmt: skip
        start = time.perf_counter()
        try:
            table = await endpoint.score(http, request, part, expected, load.timeout_s)
        except AttemptFailed as error:
            if measured:
                level.failures[error.cause] += 1
            await asyncio.sleep(0.01)  # a server that refuses at once is not to be flooded
            return
        if measured:
            waited.append(time.perf_counter() - start)
            level.scores.update(outcome_counts(table))

    await asyncio.gather(*(ask(measured=False) for _ in range(concurrency)))
    before = await _batches(endpoint, http)
    start = time.perf_counter()

    async def caller() -> None:
        while time.perf_counter() - start < load.seconds:
            await ask(measured=True)

    await asyncio.gather(*(caller() for _ in range(concurrency)))
    level.seconds = time.perf_counter() - start
    _add_times(level, waited, load.images)
    _add_batches(level, before, await _batches(endpoint, http))
    return level


def _add_times(level: Level, waited: Sequence[float], images: int) -> None:
    level.requests = len(waited)
    if waited:
        level.p50_ms, level.p90_ms, level.p99_ms = (1000 * np.percentile(waited, [50, 90, 99])).round(3).tolist()
    level.requests_per_s = round(len(waited) / level.seconds, 2)
    level.images_per_s = round(images * len(waited) / level.seconds, 2)


def _add_batches(level: Level, before: Mapping[str, float], after: Mapping[str, float]) -> None:
    """Calls of the scorer between two scrapes; none where they came from different replicas behind one address."""
    grown = {key: after[key] - before.get(key, 0.0) for key in after}
    if not grown or min(grown.values()) < 0 or not grown.get("count"):
        return
    level.mean_batch = round(grown["sum"] / grown["count"], 2)
    bounds = sorted((key for key in grown if key not in ("sum", "count")), key=float)
    smaller = 0.0
    for bound in bounds:
        if number := int(grown[bound] - smaller):
            level.batches[bound] = number
        smaller = grown[bound]


async def _batches(endpoint: Endpoint, http: httpx.AsyncClient) -> dict[str, float]:
    """The server's histogram of batch sizes: sum, count, and calls up to each bound. Empty where it tells none."""
    try:
        answer = await http.get(f"{endpoint.url}/metrics", timeout=_INFO_S)
        families = list(text_string_to_metric_families(answer.text)) if answer.status_code == 200 else []
    except (httpx.HTTPError, ValueError):
        return {}
    samples = [sample for family in families if family.name == _BATCHES for sample in family.samples]
    return {sample.labels.get("le") or sample.name.rpartition("_")[2]: sample.value for sample in samples}


def as_json(url: str, info: ScorerInfo, load: Load, levels: Sequence[Level]) -> dict[str, Any]:
    """Everything that was measured, as plain values; a time that nothing had is null."""
    rows = [
        {key: None if isinstance(value, float) and np.isnan(value) else value for key, value in vars(level).items()}
        for level in levels
    ]
    return {
        "url": url, "scorer": info.name, "version": info.version, "images_per_request": load.images,
        "shape": list(load.shape), "gradients": load.gradients, "levels": rows,
    }  # fmt: skip


def show(url: str, info: ScorerInfo, load: Load, levels: Sequence[Level]) -> None:
    """The table on the terminal."""
    from rich.console import Console
    from rich.table import Table

    shape = "x".join(map(str, load.shape))
    table = Table(
        title=f"{info.name} {info.version} at {url}: {load.images} of {shape} a request", title_justify="left"
    )
    names = ("callers", "asked", "p50 ms", "p90 ms", "p99 ms", "req/s", "img/s", "batch", "not ok")
    for name in names:
        table.add_column(name, justify="right")
    for level in levels:
        bad = Counter({name: number for name, number in level.scores.items() if name != Outcome.OK.name.lower()})
        bad.update(level.failures)
        table.add_row(
            str(level.concurrency), str(level.requests), f"{level.p50_ms:.1f}", f"{level.p90_ms:.1f}",
            f"{level.p99_ms:.1f}", f"{level.requests_per_s:.1f}", f"{level.images_per_s:.1f}",
            "" if level.mean_batch is None else f"{level.mean_batch:.1f}",
            ", ".join(f"{name} {number}" for name, number in bad.items()) or "0",
        )  # fmt: skip
    Console().print(table)
