"""From many score columns to one signal a sample: one variant per rule, with the columns each rule names.

Rules of two families. *Weighted* ones take every column that counts, with the weights of the scorers' sections. *Named*
ones give columns a part to play, as `scorer` (its first column) or `scorer/column`, and ignore those weights.
Does not own: the arithmetic (learner/credit/aggregation), what each rule needs (registry.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from contracts.config.base import Section, variant

ColumnName = Annotated[str, Field(pattern=r"^[^/\s]+(/[^/\s]+)?$")]
"""`scorer` or `scorer/column`."""

Kind = Literal["point", "step", "pair", "region"]


@dataclass(frozen=True)
class NamedColumn:
    """One column that a rule names. field: where in the section; required: its scorer must be required."""

    field: str
    column: str
    required: bool = False
    kinds: tuple[Kind, ...] = ("point", "pair")


class AggregationSection(Section):
    """What every rule offers."""

    def columns(self) -> tuple[NamedColumn, ...]:
        """The columns the rule names; none for the weighted family."""
        return ()


class WeightedSumConfig(AggregationSection):
    name: Literal["weighted_sum"] = "weighted_sum"


class Condition(Section):
    """A column that counts only where another one is high enough; elsewhere it is 0 (GDPO's conditional reward)."""

    column: ColumnName = Field(description="the column that is conditioned, one that has a weight")
    on: ColumnName = Field(description="the column that decides, one that has a weight")
    at_least: float


class GDPOConfig(AggregationSection):
    name: Literal["gdpo"] = "gdpo"
    eps: float = Field(default=1e-4, gt=0, description="added to each standard deviation")
    ddof: Literal[0, 1] = Field(default=1, description="1: unbiased standard deviation, as published")
    conditions: tuple[Condition, ...] = ()


class ParetoConfig(AggregationSection):
    name: Literal["pareto"] = "pareto"
    scope: Literal["group", "batch"] = Field(default="group", description="samples among which dominance is decided")
    eps: float = Field(default=1e-4, gt=0, description="added to each standard deviation")
    decay: float = Field(default=0.99, ge=0, lt=1, description="of the rewards' running statistics, a learner step")


class ConstrainedConfig(AggregationSection):
    name: Literal["constrained"] = "constrained"
    thresholds: dict[ColumnName, float] = Field(
        min_length=1, description="column -> the score beyond which it stops being useful (its proxy point)"
    )
    anchor: ColumnName | None = Field(
        default=None, description="column with the weight N - sum of multipliers; null: the objective's kl_beta pulls"
    )
    multiplier: Literal["sigmoid", "tanh", "clamp"] = Field(
        default="tanh", description="sigmoid: push up to the threshold; tanh: hold at it; clamp: at least 0, unsquashed"
    )
    initial: float = Field(default=0.0, description="lambda at the start")
    lr: float = Field(default=0.1, gt=0, description="step of the multipliers, a learner step")
    momentum: float = Field(default=0.1, ge=0, lt=1)
    smoothing: float = Field(default=0.0, ge=0, lt=1, description="EMA decay of each column's mean score")
    eps: float = Field(default=1e-8, gt=0, description="added to each standard deviation")

    def columns(self) -> tuple[NamedColumn, ...]:
        named = tuple(NamedColumn(f"thresholds.{column}", column) for column in self.thresholds)
        return (*named, NamedColumn("anchor", self.anchor)) if self.anchor else named


class BaseAndBonusConfig(AggregationSection):
    name: Literal["base_and_bonus"] = "base_and_bonus"
    base: ColumnName = Field(description="what must not fail: instruction following, or execution of an edit")
    bonus: tuple[ColumnName, ...] = Field(min_length=1, description="secondary qualities; the smallest counts")
    base_range: tuple[float, float] = Field(default=(1.0, 5.0), description="scores mapped to 0 and 1")
    bonus_range: tuple[float, float] = Field(default=(1.0, 5.0), description="scores mapped to 0 and 1")
    base_share: float = Field(default=0.4, ge=0, description="0.4 for generation; 0.6 for editing")
    bonus_share: float = Field(default=0.6, ge=0, description="0.6 for generation; 0.4 for editing")
    fail_at: float | None = Field(
        default=None, description="raw base score at or below which there is no bonus at all (FIRM: 3 or 2 of 5)"
    )

    def columns(self) -> tuple[NamedColumn, ...]:
        return (NamedColumn("base", self.base, required=True), *(NamedColumn("bonus", name) for name in self.bonus))

    @model_validator(mode="after")
    def _ranges_are_ranges(self) -> BaseAndBonusConfig:
        for name, (low, high) in (("base_range", self.base_range), ("bonus_range", self.bonus_range)):
            if not low < high:
                raise ValueError(f"{name} must go from a lower to a higher score, not {low} to {high}")
        if self.base_share + self.bonus_share == 0:
            raise ValueError("base_share and bonus_share are both 0; give one of them a share")
        return self


class LogTameConfig(AggregationSection):
    name: Literal["log_tame"] = "log_tame"
    threshold: Literal["mean", "median"] | float = Field(
        default="mean", description="variability std/mean above which a column is tamed; the paper also uses 0.2"
    )
    offsets: dict[ColumnName, float] = Field(
        default_factory=dict, description="column -> number added first, for columns that can be negative"
    )


class Gate(Section):
    """One reward in order of priority."""

    column: ColumnName
    weight: float = 1.0
    above: float | None = Field(default=None, description="the later ones count only above it; null: always")


class GatesConfig(AggregationSection):
    name: Literal["gates"] = "gates"
    order: tuple[Gate, ...] = Field(min_length=2, description="rewards, the most important first")
    temperature: float = Field(
        default=0.0, ge=0, description="0: open or shut; above: sigmoid((score - above) / temperature)"
    )

    def columns(self) -> tuple[NamedColumn, ...]:
        return tuple(NamedColumn(f"order.{i}.column", gate.column, i == 0) for i, gate in enumerate(self.order))

    @model_validator(mode="after")
    def _some_gate(self) -> GatesConfig:
        if all(gate.above is None for gate in self.order[:-1]):
            raise ValueError("no reward has `above`, so nothing is gated; set it on one, or use name: weighted_sum")
        return self


class TrustConfig(AggregationSection):
    name: Literal["trust"] = "trust"
    outcome: ColumnName = Field(description="the verifiable score, 0 to 1")
    judge: ColumnName = Field(description="the soft score whose trust is measured, 0 to 1")
    coef: float = Field(default=0.3, ge=0)
    anneal_steps: float = Field(default=12000.0, gt=0, description="learner steps in which the judge fades by 1/e")
    right_at: float = Field(default=0.5, description="outcomes at or above it are right")
    all_right_at: float = Field(default=0.9, description="a group wholly at or above it asks no judge")
    all_wrong_at: float = Field(default=0.1, description="a group wholly at or below it asks no judge")
    floor: float = Field(default=0.2, description="the judge adds nothing to outcomes below it")

    def columns(self) -> tuple[NamedColumn, ...]:
        return (NamedColumn("outcome", self.outcome, required=True), NamedColumn("judge", self.judge))


class ConfidenceMixConfig(AggregationSection):
    name: Literal["confidence_mix"] = "confidence_mix"
    rule: ColumnName = Field(description="a rule's score, 0 to 1; where a whole group lacks it no rule applies")
    confidence: ColumnName = Field(description="how far the rule is to be believed, 0 to 1")
    model: ColumnName = Field(description="the learned reward, any scale: squashed by its running mean and spread")
    instruction: ColumnName | None = Field(default=None, description="adherence to the instruction, 0 to 1")
    length: ColumnName | None = Field(default=None, description="what must not grow: file size, sharpness, length")
    length_max: float = Field(default=0.0, description="length up to which nothing is taken off")
    length_buffer: float = Field(default=1.0, gt=0, description="length beyond it at which the whole penalty is due")
    weights: tuple[float, float, float] = Field(
        default=(1.0, 0.5, 0.5), description="of accuracy, instruction and penalty (our choice, none published)"
    )
    decay: float = Field(default=0.99, ge=0, lt=1, description="of the running statistics, a learner step")

    def columns(self) -> tuple[NamedColumn, ...]:
        named = [NamedColumn("model", self.model, required=True), NamedColumn("rule", self.rule)]
        named.append(NamedColumn("confidence", self.confidence))
        optional = {"instruction": self.instruction, "length": self.length}
        return (*named, *(NamedColumn(field, column) for field, column in optional.items() if column))


class WinRateConfig(AggregationSection):
    name: Literal["win_rate"] = "win_rate"
    tie_margin: float = Field(
        default=0.0,
        ge=0,
        description="point scores no further apart than this are a tie; pair tables say it themselves",
    )


class UncertaintyConfig(AggregationSection):
    name: Literal["uncertainty"] = "uncertainty"
    form: Literal["variance", "bound"] = Field(
        default="variance", description="variance: exp(-var/spread) (Ctrl-U); bound: clip(exp(b - a std)) (PrefPaint)"
    )
    slope: float = Field(default=0.05, ge=0, description="bound: a")
    intercept: float = Field(default=0.7, description="bound: b")
    low: float = Field(default=1.0, gt=0, description="bound: smallest weight before normalisation")
    high: float = Field(default=2.21, gt=0, description="bound: largest weight before normalisation")
    normalise: bool = Field(default=True, description="weights of a group average to 1, so the learning rate keeps")


class DirectionalConfig(AggregationSection):
    name: Literal["directional"] = "directional"
    plus: ColumnName = Field(description="score against the prompt's embedding moved along the learned direction")
    minus: ColumnName = Field(description="score against the embedding moved the other way")
    strength: float = Field(default=1.5, description="omega: minus + omega (plus - minus)")

    def columns(self) -> tuple[NamedColumn, ...]:
        return NamedColumn("plus", self.plus, required=True), NamedColumn("minus", self.minus, required=True)


class PPRRenormConfig(AggregationSection):
    name: Literal["ppr_renorm"] = "ppr_renorm"
    outcome: ColumnName = Field(description="the final score, 0 to 1")
    process: ColumnName = Field(description="a column of a step table, 0 to 1, one number a recorded step")
    beta: float = Field(default=1.0, description="taken off every step but the last")

    def columns(self) -> tuple[NamedColumn, ...]:
        process = NamedColumn("process", self.process, kinds=("step",))
        return NamedColumn("outcome", self.outcome, required=True), process


class CustomAggregation(AggregationSection):
    """A rule of your own: `name: my_module:MyAggregation`."""

    name: str = Field(pattern=r"^[\w.]+:\w+$")
    options: dict[str, Any] = Field(default_factory=dict)


def _variant(value: Any) -> str:
    return variant(value, default="weighted_sum")


AggregationConfig = Annotated[
    Annotated[WeightedSumConfig, Tag("weighted_sum")]
    | Annotated[GDPOConfig, Tag("gdpo")]
    | Annotated[ParetoConfig, Tag("pareto")]
    | Annotated[ConstrainedConfig, Tag("constrained")]
    | Annotated[BaseAndBonusConfig, Tag("base_and_bonus")]
    | Annotated[LogTameConfig, Tag("log_tame")]
    | Annotated[GatesConfig, Tag("gates")]
    | Annotated[TrustConfig, Tag("trust")]
    | Annotated[ConfidenceMixConfig, Tag("confidence_mix")]
    | Annotated[WinRateConfig, Tag("win_rate")]
    | Annotated[UncertaintyConfig, Tag("uncertainty")]
    | Annotated[DirectionalConfig, Tag("directional")]
    | Annotated[PPRRenormConfig, Tag("ppr_renorm")]
    | Annotated[CustomAggregation, Tag("custom")],
    Discriminator(_variant),
]
