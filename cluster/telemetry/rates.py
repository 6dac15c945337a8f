"""Throughput: images trained a second, over all GPUs of the run (law 8).

Owns what counts as an accelerator and the sliding window. Does not own: the counters (telemetry.py).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from contracts.config import RunConfig
from contracts.config.judges import JUDGE_SCORER_OPTIONS
from contracts.config.scoring import ScorerConfig
from contracts.wire import Source

WINDOW_S = 60.0


@dataclass(frozen=True)
class Accelerators:
    """Devices a run occupies by role. unit: 'gpu', or 'cpu slot' for a run without any GPU.

    Example: 4 actors and 2 ranks with a GPU each and two replicas of a reward server on half a GPU: 4 + 2 + 1 = 7.
    """

    actors: float
    learner: float
    reward_servers: float
    unit: str

    @property
    def total(self) -> float:
        return self.actors + self.learner + self.reward_servers


def count_accelerators(config: RunConfig, source: Source = Source.ACTORS) -> Accelerators:
    """All GPUs of a run: actors, learner and reward servers, those reached by URL and online trainers included.

    A replica behind a URL counts as one whole GPU unless `gpus` says otherwise, and so does a judge that a scorer asks:
    what scores for the run is part of its cost, whoever started it. Without any GPU each process that works (actor,
    rank, reward server, judge) is one CPU slot.
    """
    painting = config.rollout.actors if source is not Source.LEARNER else 0
    gpus_painting, gpus_learning = painting * config.rollout.gpus_per_actor, _gpus_learning(config)
    judges = _gpus_by_judge(config)
    if gpus_painting + gpus_learning == 0:
        servers = sum(map(_replicas, config.jurors)) + len(config.online) + len(judges)
        return Accelerators(painting, config.learner.ranks, servers, "cpu slot")
    scoring = sum(_replicas(scorer) * gpus_a_replica(scorer) for scorer in config.jurors)
    scoring += sum(each.gpus for each in config.online) + sum(judges.values())
    return Accelerators(gpus_painting, gpus_learning, scoring, "gpu")


def _gpus_by_judge(config: RunConfig) -> dict[str, float]:
    """By URL: two scorers that ask the same judge do not make two of it."""
    found: dict[str, float] = {}
    for scorer in config.jurors:
        section = JUDGE_SCORER_OPTIONS.get(scorer.serve or "")
        if section is not None:
            options = section.model_validate(scorer.options)
            found |= {url: max(options.gpus, found.get(url, 0.0)) for url in options.urls}
    return found


def _gpus_learning(config: RunConfig) -> float:
    return config.learner.ranks * config.learner.gpus_per_rank


def _replicas(scorer: ScorerConfig) -> int:
    """Processes of this scorer; a function runs inside the dispatcher and occupies none."""
    return len(scorer.urls) if scorer.urls else int(scorer.serve is not None)


def gpus_a_replica(scorer: ScorerConfig) -> float:
    """GPUs of one process of this scorer."""
    return scorer.gpus if scorer.gpus is not None else float(bool(scorer.urls))


class Throughput:
    """Trained images a second over the last minute (or since the start, when that is shorter)."""

    def __init__(self, accelerators: Accelerators, clock: Callable[[], float] = time.monotonic) -> None:
        self.accelerators, self._clock = accelerators, clock
        self._started = clock()
        self._trained: deque[tuple[float, int]] = deque()

    def restart(self) -> None:
        """Forget what came before, at the start of training."""
        self._started = self._clock()
        self._trained.clear()

    def add(self, num_images: int) -> None:
        """A step that trained `num_images` has just ended."""
        self._trained.append((self._clock(), num_images))

    def images_per_second(self) -> float:
        """Images a second over the window."""
        now = self._clock()
        while self._trained and self._trained[0][0] < now - WINDOW_S:
            self._trained.popleft()
        seconds = min(WINDOW_S, now - self._started)
        return sum(images for _, images in self._trained) / seconds if seconds > 0 else 0.0

    def images_per_second_per_gpu(self) -> float:
        """The same over every accelerator of the run."""
        return self.images_per_second() / max(self.accelerators.total, 1e-9)
