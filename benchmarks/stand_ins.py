"""Timers in the place of models: a painter, a learner, a scorer and prompts that only wait and hand on bytes.

Everything between them is the real thing: controller, ledger, vaults, dispatcher, weight store, Ray. No torch is
imported in their processes, so what a benchmark measures is the house, not a model.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from contracts.config import RunConfig
from contracts.config.rollout import EvalSampling, PromptsConfig
from contracts.declarations import PromptsGive
from contracts.digests import digest_arrays
from contracts.wire import GroupHeader, PromptSpec, PromptTask, StepReport, WeightOffer, WeightProof
from learner.state_writer import NothingToWrite
from learner.types import StepJob


@dataclass(frozen=True)
class StageTimes:
    """Seconds each stage takes; weight_mb: size of the weights that travel."""

    paint_s: float = 0.5
    jitter: float = 0.0
    load_s: float = 0.0
    score_s: float = 0.05
    update_s: float = 0.3
    weight_mb: float = 1.0

    @classmethod
    def of(cls, config: RunConfig) -> StageTimes:
        return cls(**config.prompts.options)


@dataclass(frozen=True)
class Group:
    header: GroupHeader
    arrays: dict[str, np.ndarray]
    embeddings: dict[str, dict[str, np.ndarray]]


class Prompts:
    """Numbered prompts."""

    declares = PromptsGive(has_held_out=True)

    def __init__(self, config: PromptsConfig, seed: int) -> None:
        del config, seed

    def at(self, position: int) -> PromptSpec:
        return PromptSpec(text=f"prompt {position}")

    def held_out(self, split: str, num: int) -> list[PromptSpec]:
        return [PromptSpec(text=f"{split} {index}") for index in range(num)]


class WaitingPainter:
    """Sleeps for paint_s a group, and for load_s a weight load."""

    def __init__(self, config: RunConfig) -> None:
        self.times, self.version = StageTimes.of(config), -1

    def load(self, offer: WeightOffer, arrays: Mapping[str, np.ndarray], current: Any, previous: Any) -> WeightProof:
        start = time.perf_counter()
        assert digest_arrays(arrays) == offer.digest
        time.sleep(self.times.load_s)
        self.version = offer.version
        return WeightProof(
            version=offer.version, digest=offer.digest, canary_to_current=0.0, canary_to_previous=None,
            load_seconds=time.perf_counter() - start,
        )  # fmt: skip

    def denoise(self, task: PromptTask) -> PromptTask:
        spread = np.random.default_rng(task.group_id).uniform(-1, 1) * self.times.jitter
        time.sleep(self.times.paint_s * (1 + spread))
        return task

    def finish(self, task: PromptTask) -> Group:
        header = GroupHeader(
            group_id=task.group_id, attempt=task.attempt, prompt=task.prompt, group_size=task.group_size,
            weight_version=self.version, prompt_digest="none",
        )  # fmt: skip
        size = task.group_size
        arrays = {"images": np.zeros((size, 32, 32, 3), np.uint8), "clean": np.zeros((size, 3, 32, 32), np.float32)}
        return Group(header, arrays, {})

    def paint_images(self, prompts: Sequence[PromptSpec], sampling: EvalSampling, seeds: Sequence[int]) -> np.ndarray:
        return np.zeros((len(prompts), 32, 32, 3), np.uint8)


@dataclass(frozen=True)
class Published:
    offer: WeightOffer
    arrays: dict[str, np.ndarray]
    canary_current: np.ndarray


class WaitingLearner:
    """Reads its groups' bytes and sleeps for update_s."""

    def __init__(self, config: RunConfig, rank: int, world_size: int, score_gradient: Any = None) -> None:
        self.times = StageTimes.of(config)
        self.weights = np.zeros(int(self.times.weight_mb * 2**18), np.float32)

    def update(self, job: StepJob, fetch: Any, fetch_embedding: Any) -> StepReport:
        start = time.perf_counter()
        for group_id in job.headers:
            fetch(group_id, ("clean",), slice(None))
        fetched = time.perf_counter() - start
        time.sleep(max(0.0, self.times.update_s - fetched))  # reading is part of the stage, as it is for a model
        return StepReport(step=job.step, num_updates=1, metrics={"loss": 0.0}, seconds={"fetch": fetched})

    def snapshot(self, version: int, step: int, average: bool = False) -> Published:
        self.weights[0] = version
        arrays = {"weight": self.weights}
        offer = WeightOffer(
            version=version, step=step, snapshot="current", digest=digest_arrays(arrays), num_bytes=self.weights.nbytes
        )
        return Published(offer, arrays, np.zeros(1, np.float32))

    def begin_save(self, folder: str | Path) -> NothingToWrite:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "state.json").write_text("{}")
        return NothingToWrite()

    def load_state(self, folder: Path) -> None:
        del folder


def score(images: np.ndarray, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> np.ndarray:
    """Different numbers for the samples of a group, after a wait."""
    time.sleep(0.02)
    return np.arange(len(images), dtype=np.float32)
