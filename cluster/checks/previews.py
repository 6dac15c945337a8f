"""Scorers of previews against the sampler, the objective and the rule that reads their steps.

Decided by the configuration and the declarations; scorers by URL once they have been asked (jury.py). Does not own:
which steps a group has previews of (contracts.previews).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cluster.checks.declared import Declared
from cluster.checks.method import num_stochastic_steps
from contracts.config import RunConfig
from contracts.config.scoring import ScorerConfig
from contracts.declarations import ScorerGives
from contracts.errors import ConfigError
from contracts.previews import steps_of_group
from contracts.wire import Source

AGGREGATION = "credit.aggregation"


def num_previews(config: RunConfig, scorers: Sequence[ScorerConfig]) -> int:
    """S: previews of each sample that these scorers judge; with a window, of the group that has the most."""
    return max(len(steps_of_group(scorers, recorded)) for recorded in _recorded(config))


def check_previews(config: RunConfig, declared: Declared) -> Iterator[ConfigError]:
    """Scorers whose previews a run cannot have, and rules that would look for others."""
    for index, scorer in enumerate(config.scorers):
        if scorer.previews is not None:
            yield from _trajectory(config, declared, index)
            yield from _steps(config, declared, index)
            yield from _read_by_rule(config, index)
    for index, trainer in enumerate(config.online):
        if trainer.judge_config is not None and trainer.judge_config.previews is not None:
            yield ConfigError(f"online.{index}.judge.previews", "an online scorer learns from images", "remove it")


def preview_mismatch(scorer: ScorerConfig, index: int, gives: ScorerGives) -> Iterator[ConfigError]:
    """What keeps a scorer, as declared or as its server says, from judging previews."""
    if scorer.previews is None:
        return
    wrong = None
    if gives.accepts == "latents":
        wrong = "reads latents, and previews are images"
    elif gives.kind != "point":
        wrong = f"answers a {gives.kind} table, and previews are folded from one number an image"
    elif gives.whole_group:
        wrong = "judges a group as a whole, and previews one by one are none"
    if wrong is not None:
        yield ConfigError(f"scorers.{index}.previews", f"{scorer.name} {wrong}",
                          "remove it, or use a scorer of one number an image")  # fmt: skip


def _recorded(config: RunConfig) -> list[list[int]]:
    """Stochastic steps of every group there can be: one a start of the window (policy.schedule.stochastic_steps)."""
    size, window = num_stochastic_steps(config), config.sampler.window
    if window is None:
        return [list(range(size))]
    hi = window.hi if window.hi is not None else config.sampler.steps - 1
    return [list(range(start, start + size)) for start in range(window.lo, hi - size + 1)]


def _trajectory(config: RunConfig, declared: Declared, index: int) -> Iterator[ConfigError]:
    """Previews come of a group that an actor paints."""
    where, objective = f"scorers.{index}.previews", declared.objective
    if objective is not None and objective.sources == (Source.LEARNER,):
        yield ConfigError(f"{where}, objective.name",
                          f"{config.objective.name} paints inside its update, where no jury sees previews",
                          "remove it, or use an objective on painted groups (grpo, ppo, nft)")  # fmt: skip
    elif declared.prompts is not None and declared.prompts.source is Source.FILES:
        yield ConfigError(f"{where}, prompts.source", f"images of {config.prompts.source} have no denoising steps",
                          "remove it, or use a source of prompts")  # fmt: skip


def _steps(config: RunConfig, declared: Declared, index: int) -> Iterator[ConfigError]:
    where, previews, steps = f"scorers.{index}.previews", config.scorers[index].previews, config.sampler.steps
    if previews != "recorded":
        assert previews is not None
        if previews[-1] >= steps:
            missing = ", ".join(str(step) for step in previews if step >= steps)
            yield ConfigError(f"{where}, sampler.steps", f"there is no step {missing} of {steps}",
                              f"steps are 0 to {steps - 1}")  # fmt: skip
    elif declared.objective is not None and not declared.objective.states:
        yield ConfigError(f"{where}, objective.name", f"{config.objective.name} records no steps",
                          f"list the steps, 0 to {steps - 1}")  # fmt: skip
    elif num_stochastic_steps(config) < 2:
        yield ConfigError(f"{where}, sampler", "the last recorded step has no preview, and it is the only one",
                          "raise sampler.steps or sampler.window.size, or list the steps")  # fmt: skip


def _read_by_rule(config: RunConfig, index: int) -> Iterator[ConfigError]:
    """A rule that names a step table reads every recorded step but the last, whichever the group's window."""
    scorer, rule = config.scorers[index], config.credit.aggregation
    read = sorted({step for recorded in _recorded(config) for step in recorded[:-1]})
    for use in rule.columns():
        named = use.column.partition("/")[0] == scorer.name and use.kinds == ("step",)
        if named and scorer.previews != "recorded" and (missing := set(read) - set(scorer.previews or ())):
            listed = ", ".join(map(str, sorted(missing)))
            yield ConfigError(
                f"scorers.{index}.previews, {AGGREGATION}.{use.field}",
                f"{rule.name} reads every recorded step but the last, and {scorer.name} does not judge {listed}",
                "set previews: recorded",
            )
