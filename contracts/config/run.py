"""The whole of a run's configuration and the checks that need no plug-in declarations."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from contracts.config.base import Section
from contracts.config.checkpoint import CheckpointConfig
from contracts.config.guards import GuardConfig
from contracts.config.learner import LearnerConfig, PipelineConfig, VaultConfig, WeightsConfig
from contracts.config.model import ModelConfig
from contracts.config.objectives import CreditConfig, ObjectiveConfig
from contracts.config.online import OnlineConfig
from contracts.config.rollout import EvalConfig, PromptsConfig, RolloutConfig, SamplerConfig
from contracts.config.scoring import RewardConfig, ScorerConfig


class StopConfig(Section):
    """When a run ends: at the first limit reached."""

    steps: int | None = Field(default=None, gt=0, description="learner steps")
    seconds: float | None = Field(default=None, gt=0, description="seconds of training, evaluations left out")

    @model_validator(mode="after")
    def _some_limit(self) -> StopConfig:
        if self.steps is None and self.seconds is None:
            raise ValueError("a run needs an end: set stop.steps or stop.seconds")
        return self


class TelemetryConfig(Section):
    """What is exported and where."""

    metrics_host: str = Field(default="127.0.0.1", description="address /metrics listens on")
    metrics_port: int = Field(default=0, ge=0, le=65535, description="0: any free port, written to the run folder")
    file_sd: str | None = Field(
        default=None, description="folder where Prometheus finds a run's processes; None: <runs_dir>/.prometheus"
    )
    tensorboard: bool = True
    sinks: tuple[Literal["wandb", "mlflow"], ...] = ()
    trace_mb: float = Field(
        default=32.0, ge=0, description="newest part of the trace kept, in trace.json and trace-older.json; 0: no trace"
    )
    report: bool = Field(default=True, description="write report.html when the run ends, however it ends")
    watchdog_s: float = Field(default=900.0, gt=0, description="without a finished step for so long, stacks are dumped")


class ClusterConfig(Section):
    """The Ray cluster the run lives in."""

    address: str | None = Field(default=None, description="None: RAY_ADDRESS, else a local Ray of the run's own")
    num_cpus: int | None = Field(default=None, gt=0, description="CPUs of a local Ray; None: as many as the plan needs")
    object_store_mb: int = Field(default=400, gt=75, description="object store of a local Ray")
    hang_timeout_s: float = Field(
        default=60.0, gt=0, description="a vault, dispatcher or controller silent for so long is replaced"
    )
    controller_restarts: int = Field(
        default=5,
        ge=0,
        description="times the driver replaces a controller that died or hangs, resuming the run, without a step "
        "beyond it in between",
    )


class RunConfig(Section):
    """One run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    seed: int = Field(default=0, ge=0)
    runs_dir: str = Field(default="runs", description="local path or fsspec URL under which runs/<name> is written")
    exist: Literal["fail", "replace", "resume"] = Field(
        default="fail", description="when the run folder exists: refuse, delete it, or go on with the run in it"
    )
    model: ModelConfig
    prompts: PromptsConfig = PromptsConfig()
    sampler: SamplerConfig = SamplerConfig()
    rollout: RolloutConfig = RolloutConfig()
    scorers: tuple[ScorerConfig, ...] = Field(min_length=1)
    reward: RewardConfig = RewardConfig()
    online: tuple[OnlineConfig, ...] = Field(default=(), description="scorers that learn beside the run")
    credit: CreditConfig = CreditConfig()
    objective: ObjectiveConfig
    guards: tuple[GuardConfig, ...] = Field(default=(), description="what is watched while nobody watches")
    learner: LearnerConfig = LearnerConfig()
    pipeline: PipelineConfig = PipelineConfig()
    weights: WeightsConfig = WeightsConfig()
    vault: VaultConfig = VaultConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    stop: StopConfig
    telemetry: TelemetryConfig = TelemetryConfig()
    cluster: ClusterConfig = ClusterConfig()

    @property
    def learner_micro_batch(self) -> int:
        return self.learner.micro_batch or self.rollout.micro_batch

    @property
    def jurors(self) -> tuple[ScorerConfig, ...]:
        """The scorers of the run, and those that online trainers learn from."""
        judges = (each.judge_config for each in self.online)
        return (*self.scorers, *(judge for judge in judges if judge is not None))

    @model_validator(mode="after")
    def _names_are_unique(self) -> RunConfig:
        names = [scorer.name for scorer in self.scorers]
        if len(set(names)) < len(names):
            raise ValueError(f"scorers have duplicate names: {', '.join(names)}; give each its own name")
        if all(scorer.held_out for scorer in self.scorers):
            raise ValueError("every scorer is held_out, so there is no reward; let one of them train")
        guards = [guard.key for guard in self.guards]
        if len(set(guards)) < len(guards):
            raise ValueError(f"guards have duplicate names: {', '.join(guards)}; give each a label of its own")
        return self
