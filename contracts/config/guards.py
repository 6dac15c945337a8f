"""Guards: what they watch, how far it may go, and whether they warn or stop. Numbers, not what is made of them.

Does not own: the arithmetic (learner/guards), whether a run has what a guard watches (cluster/checks/guards.py).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from contracts.config.aggregation import ColumnName
from contracts.config.base import Section, variant


class GuardSection(Section):
    """What every guard has."""

    label: str | None = Field(
        default=None, pattern=r"^[\w./:-]+$",
        description="its name in events, metrics and checkpoints, one of its own; None: made of what it watches",
    )  # fmt: skip
    action: Literal["warn", "stop"] = Field(
        default="warn", description="warn: an event and a counter; stop: a checkpoint, then the run ends (exit code 3)"
    )

    @property
    def key(self) -> str:
        """The guard's name in its run."""
        return self.label or self._made_of()

    def _made_of(self) -> str:
        raise NotImplementedError


class LimitConfig(GuardSection):
    """A metric of the step that stays above `max` or below `min`."""

    name: Literal["limit"] = "limit"
    metric: str = Field(
        description="of the learner step: kl, grad_norm, reward_std, ..., or reward_mean/SCORER/COLUMN, reward_std/...",
    )
    max: float | None = Field(default=None, allow_inf_nan=False)
    min: float | None = Field(default=None, allow_inf_nan=False)
    patience: int = Field(default=3, gt=0, description="steps in a row with a value beyond the limit before it acts")

    def _made_of(self) -> str:
        return f"limit/{self.metric}"

    @model_validator(mode="after")
    def _some_limit(self) -> LimitConfig:
        if self.max is None and self.min is None:
            raise ValueError(f"a limit of {self.metric} needs a max or a min")
        if self.max is not None and self.min is not None and self.min > self.max:
            raise ValueError(f"no {self.metric} is at least {self.min:g} and at most {self.max:g}; swap min and max")
        return self


class HeldOutDivergenceConfig(GuardSection):
    """Reward hacking: what is trained on rises while a held-out scorer falls, over the same steps."""

    name: Literal["held_out_divergence"] = "held_out_divergence"
    held_out: ColumnName = Field(description="the held-out scorer (its first column), or scorer/column")
    reward: ColumnName | None = Field(
        default=None, description="a scorer that trains, or scorer/column; None: the run's reward, as aggregated"
    )
    window: int = Field(
        default=20, ge=4, multiple_of=2, description="steps, an even number: the newer half is compared with the older"
    )
    rise: float = Field(default=3.0, ge=0, description="standard errors by which the reward's mean must have risen")
    fall: float = Field(default=3.0, ge=0, description="standard errors by which the held-out mean must have fallen")

    def _made_of(self) -> str:
        return f"held_out_divergence/{self.held_out}"


class CustomGuard(GuardSection):
    """A guard of your own: `name: my_module:MyGuard`."""

    name: str = Field(pattern=r"^[\w.]+:\w+$")
    options: dict[str, Any] = Field(default_factory=dict)

    def _made_of(self) -> str:
        return self.name


GuardConfig = Annotated[
    Annotated[LimitConfig, Tag("limit")]
    | Annotated[HeldOutDivergenceConfig, Tag("held_out_divergence")]
    | Annotated[CustomGuard, Tag("custom")],
    Discriminator(variant),
]
