"""The jury: reward servers, what of their tables counts, deadlines and retries."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from contracts.config.base import Section


class ScorerConfig(Section):
    """One member of the jury, reached in exactly one of three ways: url, serve or function."""

    name: str = Field(description="its name in tables, metrics and reports")
    urls: tuple[str, ...] = Field(
        default=(),
        description="running reward servers (replicas of one scorer), or names of deployed ones (`cluster jury`)",
    )
    serve: str | None = Field(
        default=None, description="a scorer of `reward_servers list` or module:Class that the run serves by itself"
    )
    function: str | None = Field(
        default=None, description="module:function(images, prompts, metadata) -> numbers, called in the dispatcher"
    )
    options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of a served scorer's class")
    gpus: float | None = Field(
        default=None, ge=0, description="GPUs one of its servers occupies; None: 1 behind a URL, 0 if the run serves it"
    )
    weights: dict[str, float] = Field(
        default_factory=dict, description="column -> weight in the reward; empty: the first column with weight 1"
    )
    required: bool = Field(default=True, description="a sample without its score is invalid; else it contributes 0")
    held_out: bool = Field(default=False, description="measured, never trained on")
    previews: Literal["recorded"] | tuple[int, ...] | None = Field(
        default=None,
        description="judge previews in place of the image, for a step table: of these denoising steps, ascending, or "
        "`recorded`: of every recorded step but the last",
    )
    version: str = Field(default="latest", description="'latest' or an exact version")
    max_batch: int = Field(default=64, gt=0, description="images a request")
    concurrency: int = Field(default=8, gt=0, description="requests in flight to this scorer")
    timeout_s: float = Field(default=30.0, gt=0, description="one request")
    deadline_s: float = Field(default=120.0, gt=0, description="all attempts of one group's scoring")
    max_retries: int = Field(default=3, ge=0, description="further attempts of one request")
    retry_budget: float = Field(default=0.2, ge=0, description="retries allowed as a share of requests, plus 10")
    breaker_failures: int = Field(default=5, gt=0, description="consecutive failures that open the circuit")
    breaker_reset_s: float = Field(
        default=5.0, gt=0,
        description="seconds an open circuit waits before a probe at the most; before the first an eighth of it, and "
        "twice as long after each that fails",
    )  # fmt: skip
    token_env: str = Field(default="SALON_REWARD_TOKEN", description="environment variable with the bearer token")

    @property
    def deployments(self) -> tuple[str, ...]:
        """Those of `urls` that are names of deployed scorers."""
        return tuple(entry for entry in self.urls if "://" not in entry)

    @model_validator(mode="after")
    def _one_way(self) -> ScorerConfig:
        for entry in self.deployments:
            if not re.fullmatch(r"[A-Za-z][\w.-]*", entry):
                raise ValueError(
                    f"{entry!r} of scorer {self.name!r} is neither a URL nor the name of a deployed scorer"
                )
        if sum([bool(self.urls), self.serve is not None, self.function is not None]) != 1:
            raise ValueError(f"scorer {self.name!r} needs exactly one of urls, serve or function")
        if self.held_out and self.weights:
            raise ValueError(f"scorer {self.name!r} is held_out and cannot have weights; remove one of them")
        return self

    @field_validator("previews")
    @classmethod
    def _ascending(cls, previews: Any) -> Any:
        if isinstance(previews, tuple) and (not previews or previews[0] < 0 or sorted({*previews}) != [*previews]):
            raise ValueError(f"{list(previews)} are not steps in ascending order; list some, or write 'recorded'")
        return previews


class RewardConfig(Section):
    """The jury's leases and limits, and which groups are never trained."""

    min_valid: int = Field(default=2, gt=0, description="valid samples a group needs to be trained")
    drop_zero_variance: bool = True
    lease_s: float = Field(default=300.0, gt=0, description="seconds the scoring of a group may take")
    max_unscored: int = Field(
        default=64, gt=0, description="groups in a row without enough valid scores after which the run stops"
    )
    max_fruitless: int = Field(
        default=512, gt=0,
        description="groups discarded for whatever reason since the last learner step, for each one that waits to be "
        "trained, after which the run stops",
    )  # fmt: skip
    on_version_change: Literal["continue", "stop"] = Field(
        default="continue",
        description="what to do when a scorer's version changes within a run: record it and go on, or stop, resumable",
    )
    optional_grace_s: float = Field(
        default=10.0, ge=0, description="seconds optional scorers get after the required ones have answered"
    )
