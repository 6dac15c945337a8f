"""What the plug-ins of a run declare, looked up once. Built-in ones are not imported; a user's own module is.

Does not own: what follows from the declarations (the other files of this folder).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from contracts import registry
from contracts.config import RunConfig
from contracts.declarations import AggregationNeeds, ObjectiveNeeds, PromptsGive, SamplerGives, ScorerGives
from contracts.errors import ConfigError, RegistryError

Kind = TypeVar("Kind", ObjectiveNeeds, SamplerGives, PromptsGive, ScorerGives, AggregationNeeds)


@dataclass(frozen=True)
class Declared:
    """None where a plug-in is unknown, does not load, or (a scorer by URL) says nothing before it is asked."""

    objective: ObjectiveNeeds | None
    sampler: SamplerGives | None
    prompts: PromptsGive | None
    scorers: Mapping[str, ScorerGives | None]
    errors: list[ConfigError] = field(default_factory=list)
    aggregation: AggregationNeeds | None = None


def look_up(config: RunConfig) -> Declared:
    """The declarations of a run's plug-ins, with an error for each that cannot be found or declares nothing."""
    errors: list[ConfigError] = []
    errors += _family(config)
    return Declared(
        objective=_declares("objective", config.objective.name, "objective.name", ObjectiveNeeds, errors),
        sampler=_declares("sampler", config.sampler.name, "sampler.name", SamplerGives, errors),
        prompts=_declares("prompts", config.prompts.source, "prompts.source", PromptsGive, errors),
        scorers={scorer.name: _scorer(config, index, errors) for index, scorer in enumerate(config.scorers)},
        errors=errors,
        aggregation=_aggregation(config, errors),
    )


def _aggregation(config: RunConfig, errors: list[ConfigError]) -> AggregationNeeds | None:
    return _declares("aggregation", config.credit.aggregation.name, "credit.aggregation.name", AggregationNeeds, errors)


def _family(config: RunConfig) -> Iterator[ConfigError]:
    try:
        registry.resolve("family", config.model.family)
    except Exception as error:
        yield not_loaded("model.family", config.model.family, error)


def _scorer(config: RunConfig, index: int, errors: list[ConfigError]) -> ScorerGives | None:
    scorer = config.scorers[index]
    if scorer.serve is not None:
        return _declares("scorer", scorer.serve, f"scorers.{index}.serve", ScorerGives, errors)
    if scorer.function is not None:
        errors += _function(scorer.function, f"scorers.{index}.function")
        return ScorerGives()
    return None


def _declares(
    kind: registry.Kind, name: str, where: str, wanted: type[Kind], errors: list[ConfigError]
) -> Kind | None:  # fmt: skip
    try:
        declares = registry.resolve(kind, name).declares
    except Exception as error:
        errors.append(not_loaded(where, name, error))
        return None
    if not isinstance(declares, wanted):
        way_out = f"set the class attribute `declares = {wanted.__name__}(...)` (contracts/declarations.py)"
        errors.append(ConfigError(where, f"{name} declares nothing", way_out))
        return None
    return declares


def _function(target: str, where: str) -> Iterator[ConfigError]:
    if ":" not in target:
        yield ConfigError(where, f"{target!r} names no function", "write module:function")
        return
    try:
        function = registry.import_target(target)
    except Exception as error:
        yield not_loaded(where, target, error)
        return
    if not callable(function):
        yield ConfigError(where, f"{target} is a {type(function).__name__}, not a function")


def not_loaded(where: str, name: str, error: Exception) -> ConfigError:
    """Whatever a user's module raises on import is told, not thrown: the way out is in that module."""
    if isinstance(error, RegistryError):
        return ConfigError(where, str(error))
    return ConfigError(where, f"{name} fails on import: {type(error).__name__}: {error}", "mend that module")
