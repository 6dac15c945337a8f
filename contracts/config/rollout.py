"""How groups are painted: prompts, sampler, guidance, group size, actors, evaluation."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from contracts.config.base import Section


class PromptsConfig(Section):
    """Where prompts come from."""

    source: str = Field(default="playground", description="a prompt source of `methods`, or module:Class")
    path: str | None = Field(default=None, description="file for text, jsonl, parquet and pairs (path or fsspec URL)")
    column: str | None = Field(default=None, description="prompt column or key; None: 'prompt', else 'text'")
    shuffle: bool = True
    held_out_fraction: float = Field(default=0.0, ge=0, lt=1, description="share of a file kept for evaluation")
    options: dict[str, Any] = Field(
        default_factory=dict, description="what a module:Class source reads there; playground: {kinds: [...]}"
    )


class WindowConfig(Section):
    """A contiguous run of stochastic steps; the others are ODE steps. One window a group, seeded."""

    size: int = Field(gt=0)
    lo: int = Field(default=0, ge=0, description="first step a window may start at")
    hi: int | None = Field(default=None, description="first step no window may reach; None: steps - 1")


class SamplerConfig(Section):
    """A transition kernel over a shifted, linear schedule from s=1 to s=0."""

    name: str = Field(default="flow_sde", description="a sampler of `methods`")
    steps: int = Field(default=10, gt=0)
    shift: float = Field(default=3.0, gt=0, description="s -> shift*s / (1 + (shift-1)*s)")
    noise_level: float = Field(default=0.7, ge=0, description="a (flow_sde, cps) or eta (dance_sde)")
    density: Literal["gaussian", "published"] = Field(
        default="gaussian", description="cps only: true density, or the paper's unnormalised -(x'-mu)^2"
    )
    window: WindowConfig | None = Field(default=None, description="None: every step but the last is stochastic")
    guidance_scale: float = Field(default=1.0, ge=0, description="classifier-free guidance; 1 is none")
    order: Literal[1, 2] = Field(
        default=1, description="of deterministic steps: 1 Euler, 2 Adams-Bashforth (fewer steps for the same picture)"
    )

    @model_validator(mode="after")
    def _window_fits(self) -> SamplerConfig:
        if self.window is not None:
            hi = self.window.hi if self.window.hi is not None else self.steps - 1
            if hi > self.steps or self.window.lo + self.window.size > hi:
                raise ValueError(
                    f"a window of {self.window.size} steps does not fit into steps [{self.window.lo}, {hi}) of "
                    f"{self.steps}; make window.size smaller or steps larger"
                )
        return self


class RolloutConfig(Section):
    """Who paints how much."""

    actors: int = Field(default=1, gt=0)
    gpus_per_actor: float = Field(default=0.0, ge=0)
    cpus_per_actor: float = Field(default=1.0, gt=0)
    threads: int = Field(default=1, gt=0, description="torch threads of an actor")
    groups_per_step: int = Field(default=8, gt=0, description="P: prompts claimed by one learner step")
    group_size: int = Field(default=8, gt=0, description="G: images a prompt")
    micro_batch: int = Field(default=8, gt=0, description="images painted together, at most group_size")
    storage_dtype: Literal["fp32", "bf16"] = Field(default="fp32", description="dtype of recorded states")
    lease_s: float = Field(default=600.0, gt=0, description="seconds a painting may take before its lease ends")
    max_attempts: int = Field(default=3, gt=0)
    prefetch: int = Field(default=2, gt=0, description="tasks handed to an actor at once, so that it never waits")

    @model_validator(mode="after")
    def _micro_batch_fits(self) -> RolloutConfig:
        if self.micro_batch > self.group_size:
            raise ValueError(f"micro_batch {self.micro_batch} exceeds group_size {self.group_size}; lower it")
        return self


class EvalSampling(Section):
    """Deterministic sampling for an evaluation."""

    steps: int = Field(gt=0)
    shift: float = Field(gt=0)
    guidance_scale: float = Field(default=1.0, ge=0)
    order: Literal[1, 2] = Field(default=1, description="1 Euler, 2 Adams-Bashforth")


class EvalConfig(Section):
    """Held-out evaluation."""

    every_steps: int | None = Field(default=None, gt=0, description="None: only before and after")
    before: bool = Field(default=True, description="evaluate the base at its own best setting (its salon.json)")
    split: Literal["validation", "test"] = "test"
    num_prompts: int = Field(default=200, gt=0)
    images_per_prompt: int = Field(default=1, gt=0)
    during_prompts: int = Field(default=64, gt=0, description="prompts of an evaluation in mid-run")
    sampling: EvalSampling | None = Field(
        default=None, description="None: the rollout's steps, shift and guidance, ODE"
    )
    scorer: str | None = Field(
        default=None, description="scorer that judges; None: the first held_out one, else the first"
    )
    column: str | None = Field(default=None, description="its column read as accuracy; None: 'strict', else the first")
    samples_to_save: int = Field(default=16, ge=0, description="images kept under samples/ at each evaluation")
