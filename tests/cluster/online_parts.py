"""A tiny DINO, and stand-ins for runs with an online reward model: a painter of noise, a learner that awaits versions.

Timers as in benchmarks/stand_ins.py, so that of four processes with a model two are left: the scorer and its trainer.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.stand_ins import Group, WaitingLearner, WaitingPainter
from contracts import versions
from contracts.config import RunConfig
from contracts.wire import PromptTask, StepReport
from learner.types import StepJob

PATIENCE_S = 20.0


def build_dino(folder: Path) -> dict[str, Any]:
    """A tiny DINOv2 in the official format, 28 pixels and four patches; options of a scorer that reads it."""
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    BitImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_mean=[0.5] * 3, image_std=[0.3] * 3
    ).save_pretrained(folder)
    return {"model": str(folder), "size": None, "patches": 2}


def slow_red_judge(images: np.ndarray, prompts: Any, metadata: Any) -> np.ndarray:
    """What a distilled scorer learns from: 1 where an image is more red than blue, after a wait."""
    time.sleep(0.3)
    return (images[..., 0].mean(axis=(1, 2)) > images[..., 2].mean(axis=(1, 2))).astype(np.float64)


class NoisePainter(WaitingPainter):
    """Other pictures for every sample, so that a group has something to compare."""

    def finish(self, task: PromptTask) -> Group:
        group = super().finish(task)
        noise = np.random.default_rng(task.group_id).integers(0, 256, (task.group_size, 32, 32, 3), dtype=np.uint8)
        return replace(group, arrays={**group.arrays, "images": noise})


class PatientLearner(WaitingLearner):
    """A step lasts until the trainer of the first online scorer has brought a version that is not yet in use."""

    def __init__(self, config: RunConfig, rank: int, world_size: int, score_gradient: Any = None) -> None:
        super().__init__(config, rank, world_size, score_gradient)
        self.versions = Path(config.runs_dir) / config.name / "online" / config.online[0].scorer

    def update(self, job: StepJob, fetch: Any, fetch_embedding: Any) -> StepReport:
        report = super().update(job, fetch, fetch_embedding)
        end = time.monotonic() + PATIENCE_S
        while not self._there_is_a_newer_one() and time.monotonic() < end:
            time.sleep(0.02)
        return report

    def _there_is_a_newer_one(self) -> bool:
        in_use = versions.current(self.versions) or ""
        return any(folder.name > in_use for folder in self.versions.glob("v*-*"))
