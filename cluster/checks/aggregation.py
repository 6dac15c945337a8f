"""Scorers against credit.aggregation: can this rule be worked out from these tables, and is its signal of use here?

Decided by the rule's AggregationNeeds, the columns it names, and what scorers declare; scorers by URL are compared once
they have been asked (jury.py). Does not own: what a rule does (learner/credit/aggregation).
"""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import ValidationError

from cluster.checks.declared import Declared
from contracts.config import RunConfig
from contracts.config.aggregation import ConstrainedConfig, GDPOConfig, LogTameConfig, NamedColumn
from contracts.config.scorers import checked_options
from contracts.config.scoring import ScorerConfig
from contracts.declarations import AggregationNeeds, ScorerGives
from contracts.errors import ConfigError
from contracts.wire import Source

FIELD = "credit.aggregation"


def check_aggregation(config: RunConfig, declared: Declared) -> Iterator[ConfigError]:
    """Every mismatch between the rule, the scorers and the objective."""
    needs = declared.aggregation
    if needs is None:
        return
    yield from _named(config, declared)
    if needs.columns == "named":
        yield from _left_over(config)
    if needs.uncertainty:
        yield from _uncertainty(config, declared)
    yield from _credit(config, declared, needs)


def scorer_mismatch(
    config: RunConfig, index: int, gives: ScorerGives, needs: AggregationNeeds | None
) -> Iterator[ConfigError]:  # fmt: skip
    """What one scorer's table, as declared or as its server says, lacks for the rule."""
    scorer = config.scorers[index]
    if scorer.held_out or needs is None:
        return
    rule, kind = config.credit.aggregation, gives.kind if scorer.previews is None else "step"
    if kind not in needs.kinds:
        yield ConfigError(
            f"scorers.{index}, {FIELD}.name",
            f"{scorer.name} answers a {kind} table and {rule.name} reads {' and '.join(needs.kinds)} tables",
            _rule_for(kind),
        )
    for use in rule.columns():
        name, _, column = use.column.partition("/")
        if name != scorer.name:
            continue
        if kind not in use.kinds:
            from_previews = ", or set previews: recorded on it" if use.kinds == ("step",) else ""
            yield ConfigError(
                f"{FIELD}.{use.field}", f"{name} answers a {kind} table",
                f"name a scorer of a {' or '.join(use.kinds)} table{from_previews}",
            )  # fmt: skip
        if column and not scorer.function and column not in gives.columns:
            yield ConfigError(
                f"{FIELD}.{use.field}", f"{scorer.name} has no column {column}", f"it has {', '.join(gives.columns)}"
            )


def _rule_for(kind: str) -> str:
    ways = {"pair": f"set {FIELD}.name=win_rate or gdpo", "step": f"set {FIELD}.name=ppr_renorm with a critic"}
    return f"{ways.get(kind, 'use a scorer of one number an image')}, or held_out: true on the scorer"


def _named(config: RunConfig, declared: Declared) -> Iterator[ConfigError]:
    """Columns that the rule names: of a scorer that exists, trains, and is required where it must be."""
    scorers = {scorer.name: scorer for scorer in config.scorers}
    for use in (*config.credit.aggregation.columns(), *_settings(config)):
        field, name = f"{FIELD}.{use.field}", use.column.split("/")[0]
        scorer = scorers.get(name)
        if scorer is None:
            yield ConfigError(field, f"no scorer is called {name!r}", f"one of {', '.join(scorers)}")
        elif scorer.held_out:
            yield ConfigError(
                field, f"{name} is held out, so nothing is trained on it", "name another, or let it train"
            )
        elif use.required and not scorer.required:
            yield ConfigError(
                f"{field}, scorers.{config.scorers.index(scorer)}.required",
                f"{name} is optional, and without its score this rule says nothing of a sample", "set required: true",
            )  # fmt: skip


def _settings(config: RunConfig) -> Iterator[NamedColumn]:
    """Columns that settings of a weighted rule name."""
    rule = config.credit.aggregation
    if isinstance(rule, GDPOConfig):
        for index, condition in enumerate(rule.conditions):
            yield NamedColumn(f"conditions.{index}.column", condition.column)
            yield NamedColumn(f"conditions.{index}.on", condition.on)
    if isinstance(rule, LogTameConfig):
        yield from (NamedColumn("offsets", column) for column in rule.offsets)


def _left_over(config: RunConfig) -> Iterator[ConfigError]:
    """Scorers that a rule with named columns does not read, and weights that it does not take."""
    rule = config.credit.aggregation
    named = {use.column.split("/")[0] for use in rule.columns()}
    if not named:
        return  # a rule of the user's own: only it knows what it reads
    for index, scorer in enumerate(config.scorers):
        if scorer.held_out:
            continue
        if scorer.name not in named:
            yield ConfigError(
                f"scorers.{index}, {FIELD}", f"{rule.name} does not name {scorer.name}, so it counts for nothing",
                "set held_out: true, or name it",
            )  # fmt: skip
        elif scorer.weights:
            yield ConfigError(
                f"scorers.{index}.weights", f"{rule.name} takes columns by name and no weights of scorers",
                f"remove them; shares and weights stand in {FIELD}",
            )  # fmt: skip


def _uncertainty(config: RunConfig, declared: Declared) -> Iterator[ConfigError]:
    training: list[ScorerConfig] = [scorer for scorer in config.scorers if not scorer.held_out]
    if not any(_may_say_how_sure(scorer, declared.scorers[scorer.name]) for scorer in training):
        yield ConfigError(
            f"{FIELD}.name", f"no scorer says how sure it is ({', '.join(scorer.name for scorer in training)})",
            "use a scorer that declares uncertainty (a judge of several samples: options.samples above 1), or "
            "credit.aggregation.name=weighted_sum",
        )  # fmt: skip


def _may_say_how_sure(scorer: ScorerConfig, gives: ScorerGives | None) -> bool:
    """As declared, unless its options rule it out; a scorer by URL may until it has been asked."""
    if gives is None or not gives.uncertainty or scorer.serve is None:
        return gives is None or gives.uncertainty
    try:
        options = checked_options(scorer.serve, scorer.options)
    except ValidationError:
        return True  # told by options.py
    return bool(getattr(options, "says_how_sure", True))


def _credit(config: RunConfig, declared: Declared, needs: AggregationNeeds) -> Iterator[ConfigError]:
    """The rule's signal against the advantages and the objective."""
    name, objective = config.credit.aggregation.name, declared.objective
    if config.credit.std not in needs.std:
        yield ConfigError(
            f"credit.std, {FIELD}.name", f"{name} normalises by itself; credit.std={config.credit.std} would undo it",
            f"set credit.std={' or '.join(needs.std)}",
        )  # fmt: skip
    if objective is None:
        return
    where, trained = f"{FIELD}.name, objective.name", config.objective.name
    judged = objective.sources != (Source.LEARNER,) and (
        declared.prompts is None or declared.prompts.source is Source.ACTORS
    )
    if not judged and name != "weighted_sum":
        yield ConfigError(
            f"{FIELD}.name", "no jury scores this run's groups before the update: there is nothing to aggregate",
            "remove it",
        )  # fmt: skip
        return
    if objective.critic and needs.critic == "never":
        yield ConfigError(where, f"{name} is relative to a group, and the critic of {trained} cannot learn its value",
                          "use an objective without a critic (grpo), or another rule")  # fmt: skip
    if needs.critic == "always" and not objective.critic:
        yield ConfigError(where, f"{name} rewards each step, which {trained} cannot use",
                          "use an objective with a critic (ppo), or another rule")  # fmt: skip
    if objective.unit == "pair" and needs.scales:
        yield ConfigError(where, f"{name} weighs samples, and {trained} takes pairs, which have no weight",
                          "use an objective on samples (grpo, nft), or another rule")  # fmt: skip
    yield from _pull(config)


def _pull(config: RunConfig) -> Iterator[ConfigError]:
    """Multipliers without anything that pulls back circle for ever."""
    rule = config.credit.aggregation
    if isinstance(rule, ConstrainedConfig) and rule.anchor is None and not getattr(config.objective, "kl_beta", 0.0):
        yield ConfigError(
            f"{FIELD}.anchor, objective.kl_beta",
            "nothing pulls back: without a KL term scores and multipliers circle each other for ever",
            "set objective.kl_beta above 0, or name a column as anchor",
        )
