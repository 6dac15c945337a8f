"""Guards: does what they watch exist in this run? A guard of a metric that no step has would never speak.

Does not own: what a guard makes of it (learner/guards), names of metrics (contracts/metrics.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches

from cluster.checks.declared import Declared, not_loaded
from contracts import registry
from contracts.config import RunConfig
from contracts.config.guards import CustomGuard, HeldOutDivergenceConfig, LimitConfig
from contracts.errors import ConfigError
from contracts.metrics import STEP_METRICS
from contracts.needs import objective_field
from contracts.wire import Source

MEANS = ("reward_mean", "reward_std")


def check_guards(config: RunConfig, declared: Declared) -> Iterator[ConfigError]:
    """Every guard that could not be made, or could never speak."""
    for index, guard in enumerate(config.guards):
        where = f"guards.{index}"
        if isinstance(guard, LimitConfig):
            yield from _metric(config, declared, f"{where}.metric", guard.metric)
        elif isinstance(guard, HeldOutDivergenceConfig):
            yield from _divergence(config, declared, where, guard)
        else:
            yield from _own(where, guard)


def _own(where: str, guard: CustomGuard) -> Iterator[ConfigError]:
    from learner.guards.base import Guard

    try:
        found = registry.resolve("guard", guard.name).load()
    except Exception as error:
        yield not_loaded(f"{where}.name", guard.name, error)
        return
    if not (isinstance(found, type) and issubclass(found, Guard)):
        yield ConfigError(f"{where}.name", f"{guard.name} is no guard", "derive it from learner.guards.base.Guard")


def _metric(config: RunConfig, declared: Declared, where: str, name: str) -> Iterator[ConfigError]:
    kind, _, column = name.partition("/")
    if column and kind in MEANS:
        problem = _score(config, declared, column)
        if problem or "/" not in column:
            yield ConfigError(where, problem or f"{name} names no column", f"write {kind}/SCORER/COLUMN")
        return
    known = _step_metrics(config, declared)
    if known is None or any(name == each or (each.endswith("/") and name.startswith(each)) for each in known):
        return
    if name == "kl" and hasattr(config.objective, "kl_beta"):
        yield ConfigError(f"{where}, objective.kl_beta", "no KL is measured with objective.kl_beta=0",
                          "set it above 0, or watch another metric")  # fmt: skip
        return
    near = get_close_matches(name, known, n=3) or known
    yield ConfigError(where, f"no step of this run measures {name!r}", f"there is {', '.join(near)}, or {MEANS[0]}/...")


def _step_metrics(config: RunConfig, declared: Declared) -> list[str] | None:
    """Names a step of this run may measure; None where a plug-in of the user's own adds what only it knows."""
    credit = "gae" if declared.objective is not None and declared.objective.critic else "group"
    used = [
        ("objective", config.objective.name), ("aggregation", config.credit.aggregation.name), ("credit", credit),
        ("engine", "any"),
    ]  # fmt: skip
    if any(":" in name for _, name in used):
        return None
    names = dict.fromkeys(name for plugin in used for name in STEP_METRICS.get(plugin, ()))
    return [name for name in names if name not in _switched_off(config)]


def _switched_off(config: RunConfig) -> set[str]:
    """What settings of the objective or the sampler leave unmeasured."""
    off = set()
    if not objective_field(config, "kl_beta", 0):
        off.add("kl")
    if objective_field(config, "value_clip", None) is None:
        off.add("value_clip_fraction")
    if config.sampler.name == "cps" and config.sampler.density != "gaussian":
        off |= {"approx_kl", "effective_sample_size"}
    return off


def _divergence(
    config: RunConfig, declared: Declared, where: str, guard: HeldOutDivergenceConfig
) -> Iterator[ConfigError]:  # fmt: skip
    held_out = {scorer.name: scorer.held_out for scorer in config.scorers}
    kept = [name for name, is_held_out in held_out.items() if is_held_out]
    problem = _score(config, declared, guard.held_out)
    if not problem and not held_out[guard.held_out.split("/")[0]]:
        problem = f"{guard.held_out} is trained on, so it says nothing that the reward does not"
    if problem:
        way_out = f"one of {', '.join(kept)}" if kept else "give the run a scorer with held_out: true, and name it"
        yield ConfigError(f"{where}.held_out, scorers", problem, way_out)
    if guard.reward is not None:
        problem = _score(config, declared, guard.reward)
        if not problem and held_out[guard.reward.split("/")[0]]:
            problem = f"{guard.reward} is held out, so nothing pushes it up"
        if problem:
            yield ConfigError(f"{where}.reward", problem, "name a scorer that trains")
    elif declared.aggregation is not None and declared.aggregation.critic == "never":
        rule = config.credit.aggregation.name
        yield ConfigError(f"{where}.reward, credit.aggregation.name",
                          f"the reward of {rule} is relative to a group: its mean says nothing over steps",
                          "name the column that is trained on: reward: scorer/column")  # fmt: skip


def _score(config: RunConfig, declared: Declared, column: str) -> str:
    """Why no step has the mean of `scorer` or `scorer/column`; empty when it has, or only its server knows."""
    name, _, rest = column.partition("/")
    scorer = next((scorer for scorer in config.scorers if scorer.name == name), None)
    if scorer is None:
        return f"no scorer is called {name!r}"
    prompts, objective = declared.prompts, declared.objective
    painted_late = objective is not None and objective.sources == (Source.LEARNER,)
    if painted_late or (prompts is not None and prompts.source is not Source.ACTORS):
        return "no jury scores this run's groups"
    gives = declared.scorers[name]
    if gives is None or scorer.function:
        return ""
    if gives.kind != "point":
        return f"{name} answers a {gives.kind} table, of which no mean is kept"
    if rest and rest not in gives.columns:
        return f"{name} has no column {rest}, it has {', '.join(gives.columns)}"
    return ""
