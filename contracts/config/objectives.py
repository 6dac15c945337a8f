"""One variant per objective; defaults are those of the method catalogue unless the description says otherwise."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from contracts.config.aggregation import AggregationConfig, WeightedSumConfig
from contracts.config.base import Section, variant


class TrajectoryFields(Section):
    """What the clipped policy gradients share."""

    reduction: Literal["mean", "sum"] = Field(
        default="mean", description="reduction of the log-prob over dimensions; clip_range is calibrated for it"
    )
    clip_range: float = Field(default=1e-4, gt=0)
    advantage_clip: float = Field(default=5.0, gt=0)
    kl_beta: float = Field(default=0.0, ge=0, description="weight of the KL to the reference policy")
    kl_form: Literal["sd", "gaussian"] = Field(
        default="sd", description="'sd': Flow-GRPO's, which is -ds times the true Gaussian KL; 'gaussian': the true one"
    )
    old_log_prob: Literal["auto", "rollout", "recompute"] = Field(
        default="auto", description="'auto': recompute in bf16 and in steps with stale groups, else rollout"
    )
    drift_limit_nats: float = Field(
        default=0.1, gt=0, description="steps whose behaviour-to-proximal KL exceeds it are masked (stale groups)"
    )
    steps_per_forward: int = Field(default=1, gt=0, description="recorded steps replayed in one forward")


class GRPOConfig(TrajectoryFields):
    name: Literal["grpo"] = "grpo"


class PPOConfig(TrajectoryFields):
    name: Literal["ppo"] = "ppo"
    gamma: float = Field(default=1.0, ge=0, le=1)
    lam: float = Field(default=0.95, ge=0, le=1)
    value_coef: float = Field(default=0.5, ge=0)
    value_clip: float | None = Field(default=0.2, gt=0)
    value_lr_scale: float = Field(default=10.0, gt=0, description="learning rate of the critic over the policy's")
    trunk: Literal["shared", "separate"] = Field(
        default="shared", description="value head on the policy's pooled features, or a small network of its own"
    )
    trunk_gradient: bool = Field(default=False, description="let the value loss reach the shared trunk")


class NFTConfig(Section):
    name: Literal["nft"] = "nft"
    beta: float = Field(default=1.0, gt=0, description="b: how far the implicit policies reach from the old one")
    advantage_clip: float = Field(default=5.0, gt=0)
    push_limit: float | None = Field(
        default=None, gt=1, description="k: the push away from a bad sample fades as the old policy's velocity error "
        "at it grows from the reference's to k times that, and is gone beyond. None: without bound, as published",
    )  # fmt: skip
    kl_beta: float = Field(default=1e-4, ge=0)
    draws: int | None = Field(default=None, gt=0, description="times a sample; None: every rollout step but the last")
    time_grid: Literal["rollout", "interpolated", "uniform"] = Field(
        default="rollout", description="times: the rollout's levels but the last, or all that lie between its levels "
        "(down to 0, stratified over the draws), or uniform",
    )  # fmt: skip
    noise_per: Literal["sample", "group"] = Field(
        default="sample", description="group: the samples of a group share times and noise, which cancels what is "
        "common to them, as centred advantages sum to 0",
    )  # fmt: skip
    decay_flat: int = Field(default=0, ge=0, description="old-policy EMA: decay 0 up to this optimizer step")
    decay_rate: float = Field(default=0.001, ge=0)
    decay_hold: float = Field(default=0.5, ge=0, lt=1)


class DPOConfig(Section):
    name: Literal["dpo"] = "dpo"
    beta: float = Field(default=2000.0, gt=0)
    draws: int = Field(default=1, gt=0, description="(time, noise) draws a pair")
    time_distribution: Literal["logit_normal", "uniform"] = "logit_normal"
    min_margin: float = Field(default=0.0, ge=0, description="reward gap a pair needs; ties are always skipped")
    pairs_per_group: int = Field(
        default=1, gt=0, description="best against worst, second best against second worst, ..."
    )


class AlignPropConfig(Section):
    name: Literal["alignprop"] = "alignprop"
    loss_coeff: float = Field(default=0.01, gt=0)
    truncation: Literal["fixed", "uniform", "rand"] = Field(
        default="rand", description="how the truncation step is drawn"
    )
    truncation_mean: float = Field(default=0.84, gt=0, lt=1, description="rand: mean as a share of the steps")
    truncation_std: float = Field(default=0.1, ge=0, description="rand: standard deviation as a share of the steps")
    checkpoint: bool = Field(default=True, description="recompute activations of each denoising call in backward")


class CustomObjective(Section):
    """An objective of your own: `name: my_module:MyObjective`."""

    name: str = Field(pattern=r"^[\w.]+:\w+$")
    options: dict[str, Any] = Field(default_factory=dict)


ObjectiveConfig = Annotated[
    Annotated[GRPOConfig, Tag("grpo")]
    | Annotated[PPOConfig, Tag("ppo")]
    | Annotated[NFTConfig, Tag("nft")]
    | Annotated[DPOConfig, Tag("dpo")]
    | Annotated[AlignPropConfig, Tag("alignprop")]
    | Annotated[CustomObjective, Tag("custom")],
    Discriminator(variant),
]


class CreditConfig(Section):
    """From rewards to advantages. `gae` is taken by objectives with a critic, `group` by the others."""

    std: Literal["global", "group", "none"] = Field(default="global", description="denominator's scope")
    eps: float = Field(default=1e-4, gt=0)
    aggregation: AggregationConfig = WeightedSumConfig()
    normalise: bool = Field(default=True, description="gae: whiten advantages over the batch, once")
