"""A painter and a learner of 64 numbers, without torch: every bit of the weights depends on every group trained.

They stand in for the model so that law 6 can kill a whole cluster a dozen times within a test's time; everything
between them is the real thing. The same with the real model: test_law_06_real_model.py.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from benchmarks.stand_ins import Group, Prompts, Published
from contracts.config import RunConfig
from contracts.digests import digest_arrays
from contracts.seeds import Stream, derive_seed
from contracts.wire import GroupHeader, PromptTask, StepReport, WeightOffer, WeightProof
from learner.state_writer import PendingSave, StateWriter
from learner.types import StepJob

SIZE = 64

__all__ = ["ExactLearner", "ExactPainter", "Prompts"]


class ExactPainter:
    """Images that depend on seed, group and weights. options.paint_s: what a group takes."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.version = config, -1
        self.weights = np.zeros(SIZE, np.float32)

    def load(self, offer: WeightOffer, arrays: Mapping[str, np.ndarray], current: Any, previous: Any) -> WeightProof:
        self.weights, self.version = np.array(arrays["weight"]), offer.version
        digest = digest_arrays({"weight": self.weights})
        assert digest == offer.digest
        return WeightProof(
            version=offer.version, digest=digest, canary_to_current=0.0, canary_to_previous=None, load_seconds=0.0
        )

    def denoise(self, task: PromptTask) -> Group:
        time.sleep(self.config.prompts.options.get("paint_s", 0.0))
        rng = np.random.default_rng(derive_seed(self.config.seed, Stream.INIT_NOISE, task.group_id))
        clean = rng.normal(size=(task.group_size, SIZE)).astype(np.float32) + np.tanh(self.weights)
        pixels = np.clip(clean[:, :48] * 60 + 128, 0, 255).astype(np.uint8).reshape(-1, 4, 4, 3)
        header = GroupHeader(
            group_id=task.group_id, attempt=task.attempt, prompt=task.prompt, group_size=task.group_size,
            weight_version=self.version, prompt_digest="none",
        )  # fmt: skip
        return Group(header, {"images": pixels.repeat(8, 1).repeat(8, 2), "clean": clean}, {})

    def finish(self, group: Group) -> Group:
        return group

    def paint_images(self, prompts: Any, sampling: Any, seeds: Any) -> np.ndarray:
        return np.zeros((len(prompts), 32, 32, 3), np.uint8)


class ExactLearner:
    """weights += rate * sum of advantage * sample: order matters to the last bit, so does every group."""

    def __init__(self, config: RunConfig, rank: int, world_size: int, score_gradient: Any = None) -> None:
        self.config, self.weights, self.moment = config, np.zeros(SIZE, np.float32), np.zeros(SIZE, np.float32)

    def update(self, job: StepJob, fetch: Any, fetch_embedding: Any) -> StepReport:
        for group_id in sorted(job.headers):
            clean = fetch(group_id, ("clean",), slice(None))["clean"]
            gradient = (job.credit.advantages[group_id].astype(np.float32)[:, None] * clean).sum(0)
            self.moment = np.float32(0.9) * self.moment + np.float32(0.1) * gradient
            self.weights = self.weights + np.float32(0.01) * self.moment
        return StepReport(step=job.step, num_updates=1, metrics={"loss": float(np.abs(self.weights).sum())})

    def snapshot(self, version: int, step: int, average: bool = False) -> Published:
        arrays = {"weight": self.weights.copy()}
        offer = WeightOffer(
            version=version, step=step, snapshot="current", digest=digest_arrays(arrays), num_bytes=4 * SIZE
        )
        return Published(offer, arrays, np.zeros(1, np.float32))

    def begin_save(self, folder: str | Path) -> PendingSave:
        writer = StateWriter(Path(folder), 2**20)
        tensors = {"weight": self.weights.copy(), "moment": self.moment.copy()}
        writer.tensors("param.safetensors", dict.fromkeys(tensors, (SIZE,)), tensors.__getitem__)
        writer.text("state.json", json.dumps({"pid": os.getpid()}))
        return writer

    def load_state(self, folder: str | Path) -> None:
        tensors = load_file(Path(folder) / "param.safetensors")
        self.weights, self.moment = tensors["weight"], tensors["moment"]
