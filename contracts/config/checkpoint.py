"""Checkpoints of the whole run: how often, how many are kept, what a stop may take."""

from __future__ import annotations

from pydantic import Field

from contracts.config.base import Section


class CheckpointConfig(Section):
    """A checkpoint stands under checkpoints/ of the run folder, whose place is runs_dir: a path or an fsspec URL."""

    every_steps: int = Field(default=10, gt=0, description="learner steps between checkpoints")
    every_seconds: float | None = Field(
        default=None,
        gt=0,
        description="a checkpoint at the next step boundary after so long, too",
    )
    keep_last: int = Field(default=2, gt=0, description="newest ones kept; with 2 a torn one has one before it")
    keep_every: int | None = Field(default=None, gt=0, description="those at multiples of so many steps are kept too")
    keep_best: int = Field(
        default=0, ge=0, description="so many with the best held-out score are kept too; each evaluation in mid-run "
        "is then followed by a checkpoint"
    )  # fmt: skip
    stage_mb: int = Field(
        default=8192, ge=0, description="host memory of learner rank 0 for a checkpoint that is not on disk yet; what "
        "exceeds it is written within the step"
    )  # fmt: skip
    max_failures: int = Field(
        default=3, gt=0, description="checkpoints in a row that cannot be written (a full disk) before the run stops"
    )
    stop_grace_s: float = Field(
        default=20.0, ge=0, description="seconds paintings in flight get when the run is stopped; later ones are "
        "painted again after a resume"
    )  # fmt: skip
