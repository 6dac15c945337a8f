"""The learner: engine, ranks, optimizer, snapshots; and the pipeline between actors and learner."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from contracts.config.base import Section


class OptimizerConfig(Section):
    """AdamW."""

    lr: float = Field(default=3e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=1e-4, ge=0)
    clip_grad_norm: float | None = Field(default=1.0, gt=0)
    warmup_steps: int = Field(default=0, ge=0, description="optimizer steps of linear warm-up")
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    schedule_steps: int | None = Field(default=None, gt=0, description="optimizer steps to final_lr_scale")
    final_lr_scale: float = Field(default=0.1, ge=0, le=1)

    @model_validator(mode="after")
    def _schedule_has_length(self) -> OptimizerConfig:
        if self.schedule != "constant" and self.schedule_steps is None:
            raise ValueError(f"schedule {self.schedule!r} needs schedule_steps")
        return self


class EmaConfig(Section):
    """An average of the trained weights, evaluated at the end and exported. Its decay: min((1+t)/(10+t), decay)."""

    decay: float = Field(default=0.9, ge=0, lt=1)
    interval: int = Field(default=1, gt=0, description="optimizer steps between updates")


class LearnerConfig(Section):
    """Ranks and how they update."""

    engine: Literal["deepspeed", "plain"] = "deepspeed"
    zero_stage: Literal[0, 1, 2, 3] = 1
    ranks: int = Field(default=1, gt=0)
    gpus_per_rank: float = Field(default=0.0, ge=0)
    cpus_per_rank: float = Field(default=1.0, gt=0)
    threads: int = Field(default=1, gt=0)
    micro_batch: int | None = Field(default=None, gt=0, description="rows a forward; None: rollout.micro_batch")
    updates_per_step: int = Field(default=1, gt=0, description="optimizer steps that split one claimed batch")
    epochs: int = Field(default=1, gt=0, description="passes over one claimed batch")
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EmaConfig | None = None
    hang_timeout_s: float = Field(default=600.0, gt=0, description="a step longer than this means a hung rank")
    max_rebuilds: int = Field(
        default=5, ge=0, description="times lost ranks are rebuilt without a newer checkpoint in between"
    )


class PipelineConfig(Section):
    """How far actors may run ahead of the learner."""

    max_staleness: int = Field(default=1, ge=0, description="learner steps a group's weights may lie behind")
    claim_order: Literal["admission", "ready"] = Field(
        default="admission", description="'ready' is faster and its staleness is reported as unbounded"
    )
    late_s: float = Field(default=900.0, gt=0, description="age at which the head of the claim order is discarded")


class WeightsConfig(Section):
    """How weights travel and how their arrival is proven."""

    transport: Literal["object_store", "collective"] = Field(
        default="object_store", description="'collective': gloo or NCCL fills one host copy a node (full weights)"
    )
    backend: Literal["gloo", "nccl"] = Field(
        default="gloo", description="of 'collective': host to host, or GPU to GPU and then to the host"
    )
    timeout_s: float = Field(default=120.0, gt=0)
    verify: bool = Field(default=True, description="digest and canary after every load (law 5)")


class VaultConfig(Section):
    """Who keeps the bytes."""

    count: int = Field(default=1, gt=0)
    memory_mb: int = Field(default=512, gt=0, description="bytes a vault keeps in memory; all are on disk anyway")
    disk_mb: int | None = Field(
        default=None, gt=0, description="bytes a vault keeps on disk, beyond which actors wait; None: what is free"
    )
