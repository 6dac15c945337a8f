"""Objective against sampler, group size, batches and ranks: can this method train on what these settings yield?"""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil

from cluster.checks.declared import Declared
from contracts import registry
from contracts.config import RunConfig
from contracts.declarations import ObjectiveNeeds, SamplerGives
from contracts.errors import ConfigError
from contracts.wire import Source


def check_method(config: RunConfig, declared: Declared) -> Iterator[ConfigError]:
    """Every mismatch between the objective and what it would be handed."""
    needs, gives = declared.objective, declared.sampler
    if needs is None:
        return
    if gives is not None:
        yield from _sampler(config, needs, gives)
    yield from _sources(config, declared, needs)
    yield from _guidance(config, needs)
    yield from _group(config, needs, group_size(config, declared))
    yield from _batches(config, needs)
    yield from _options(config)


def group_size(config: RunConfig, declared: Declared) -> int:
    """Samples of a group: a pair read from files is two, whatever rollout.group_size says."""
    from_files = declared.prompts is not None and declared.prompts.source is Source.FILES
    return 2 if from_files else config.rollout.group_size


def num_stochastic_steps(config: RunConfig) -> int:
    """K: steps of a group that are stochastic and recorded (policy.schedule.stochastic_steps gives which)."""
    return config.sampler.window.size if config.sampler.window is not None else config.sampler.steps - 1


def num_micro_batches(config: RunConfig, needs: ObjectiveNeeds) -> int:
    """Micro-batches of one pass over a full claimed batch (learner.plan), every sample valid."""
    groups, size, rows = config.rollout.groups_per_step, config.rollout.group_size, config.learner_micro_batch
    if needs.unit == "pair":
        return ceil(groups * getattr(config.objective, "pairs_per_group", 1) / max(1, rows // 2))
    return groups * ceil(size / rows) if needs.states else ceil(groups * size / rows)


def _sampler(config: RunConfig, needs: ObjectiveNeeds, gives: SamplerGives) -> Iterator[ConfigError]:
    name, objective = config.sampler.name, config.objective.name
    wants_states = needs.states or needs.log_probs
    if needs.log_probs and not gives.log_probs:
        yield ConfigError(
            "sampler.name, objective.name", f"{objective} needs log-probs of the sampler's steps and {name} has none",
            f"use sampler.name={' or '.join(_samplers(lambda g: g.log_probs))}",
        )  # fmt: skip
        return
    unnormalised = config.sampler.density == "published" and name == "cps"
    if needs.gaussian_density and (not gives.gaussian_density or unnormalised):
        way_out = "set sampler.density=gaussian" if unnormalised else "use " + " or ".join(_samplers(_has_density))
        yield ConfigError("sampler, objective.name", f"{objective} needs a true density of the steps", way_out)
    if config.sampler.density == "published" and name != "cps":
        yield ConfigError("sampler.density", f"'published' is a form of cps, not of {name}", "set it to gaussian")
    if config.sampler.window is not None and not gives.log_probs:
        yield ConfigError("sampler.window", f"{name} has no stochastic steps to choose from", "remove the window")
    if wants_states and gives.log_probs and config.sampler.noise_level == 0:
        yield ConfigError(
            "sampler.noise_level", "0 makes every step deterministic: no log-probs", "give a value above 0"
        )
    if wants_states and num_stochastic_steps(config) < 1:
        yield ConfigError("sampler.steps", "leaves no stochastic step (the last one is deterministic)", "use 2 or more")
    if wants_states and _window_takes_last_step(config) and name == "cps":
        yield ConfigError(
            "sampler.window.hi", "cps adds no noise in the last step, which then has no density",
            f"use at most {config.sampler.steps - 1}",
        )  # fmt: skip


def _window_takes_last_step(config: RunConfig) -> bool:
    window = config.sampler.window
    return window is not None and window.hi is not None and window.hi >= config.sampler.steps


def _has_density(gives: SamplerGives) -> bool:
    return gives.gaussian_density


def _samplers(condition: object) -> list[str]:
    assert callable(condition)
    return [
        e.name for e in registry.entries("sampler") if isinstance(e.declares, SamplerGives) and condition(e.declares)
    ]


def _sources(config: RunConfig, declared: Declared, needs: ObjectiveNeeds) -> Iterator[ConfigError]:
    if declared.prompts is None:
        return
    source, name = declared.prompts.source, config.prompts.source
    reads_files = source is Source.FILES
    if reads_files and Source.FILES not in needs.sources:
        able = [e.name for e in registry.entries("objective") if _takes_files(e.declares)]
        yield ConfigError(
            "prompts.source, objective.name",
            f"{name} yields samples from files, {config.objective.name} learns from its own",
            f"use a source of prompts ({', '.join(_prompt_sources())}), or objective {' or '.join(able)}",
        )  # fmt: skip


def _takes_files(declares: object) -> bool:
    return isinstance(declares, ObjectiveNeeds) and Source.FILES in declares.sources


def _prompt_sources() -> list[str]:
    return [e.name for e in registry.entries("prompts") if getattr(e.declares, "source", None) is Source.ACTORS]


def _guidance(config: RunConfig, needs: ObjectiveNeeds) -> Iterator[ConfigError]:
    scale = config.sampler.guidance_scale
    if needs.guidance == "none" and needs.paints_with == "sampling" and scale != 1.0:
        yield ConfigError(
            "sampler.guidance_scale, objective.name",
            f"{config.objective.name} trains the unguided velocity on its own samples, but they would be painted with "
            f"guidance {scale:g}", "set sampler.guidance_scale=1 (guidance is learnt into the weights)",
        )  # fmt: skip


def _group(config: RunConfig, needs: ObjectiveNeeds, size: int) -> Iterator[ConfigError]:
    relative = needs.unit == "sample" and not (needs.critic or needs.reward_gradient)
    if needs.unit == "pair" and size < 2:
        yield ConfigError("rollout.group_size", f"{config.objective.name} needs pairs: at least 2 samples a group")
    if relative and size < 2:
        yield ConfigError(
            "rollout.group_size", "advantages are relative to the group: a group of 1 has none",
            "use 2 or more, or objective.name=ppo",
        )  # fmt: skip
    if config.reward.min_valid > size:
        yield ConfigError(
            "reward.min_valid, rollout.group_size", f"groups of {size} never have {config.reward.min_valid} valid",
            f"set reward.min_valid to {size} or less",
        )  # fmt: skip
    pairs = getattr(config.objective, "pairs_per_group", 0)
    if needs.unit == "pair" and size >= 2 and 2 * pairs > size:
        yield ConfigError(
            "objective.pairs_per_group, rollout.group_size", f"{size} samples give at most {size // 2} pairs",
            f"set objective.pairs_per_group={size // 2} or less",
        )  # fmt: skip


def _batches(config: RunConfig, needs: ObjectiveNeeds) -> Iterator[ConfigError]:
    number, updates, ranks = num_micro_batches(config, needs), config.learner.updates_per_step, config.learner.ranks
    if needs.unit == "pair" and config.learner_micro_batch < 2:
        yield ConfigError("learner.micro_batch", "a pair is two rows of one forward", "use 2 or more")
    if updates > number:
        yield ConfigError(
            "learner.updates_per_step", f"{updates} updates, but a step has {number} micro-batches",
            "lower it, or learner.micro_batch, or raise rollout.groups_per_step",
        )  # fmt: skip
    elif ranks > number // updates:
        yield ConfigError(
            "learner.ranks", f"{ranks} ranks for {number // updates} micro-batches an update: some only see padding",
            "use fewer ranks, a smaller learner.micro_batch or more rollout.groups_per_step",
        )  # fmt: skip


def _options(config: RunConfig) -> Iterator[ConfigError]:
    objective = config.objective
    if getattr(objective, "trunk_gradient", False) and getattr(objective, "trunk", "shared") == "separate":
        yield ConfigError(
            "objective.trunk_gradient", "a separate critic has no shared trunk to pass a gradient to",
            "set objective.trunk=shared or remove trunk_gradient",
        )  # fmt: skip


def method_warnings(config: RunConfig, declared: Declared) -> Iterator[str]:
    """What works but is probably not meant."""
    needs = declared.objective
    size, micro_batch = config.rollout.group_size, config.rollout.micro_batch
    if size % micro_batch:
        yield f"rollout.micro_batch {micro_batch} does not divide group_size {size}: a group's last forward is small"
    if config.pipeline.claim_order == "ready":
        yield "pipeline.claim_order=ready: groups overtake each other, so staleness is reported as unbounded"
    unguided = needs is not None and needs.guidance == "none" and needs.paints_with == "current"
    if unguided and config.sampler.guidance_scale != 1.0:
        yield (
            f"{config.objective.name} trains without guidance on images painted with guidance "
            f"{config.sampler.guidance_scale:g}"
        )
    if config.pipeline.max_staleness == 0:
        yield "pipeline.max_staleness=0: actors wait for every update (exact on-policy, slower)"
