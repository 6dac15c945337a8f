"""From a scorer's name and `key=value` options to an instance, with one clear message for every mistake.

Does not own: the list of scorers (contracts.registry), what they do (scorers/).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import yaml
from pydantic import ValidationError

from contracts.config.scorers import SCORER_OPTIONS
from contracts.declarations import ScorerGives
from contracts.errors import ConfigError, RegistryError, SalonError
from contracts.registry import Resolved, resolve
from reward_servers.isolation import describe
from reward_servers.scorers.base import Scorer


def make_scorer(name: str, options: Sequence[str] = ()) -> Scorer:
    """The scorer of a registry name or `module:Class`, not yet loaded. Raises RegistryError or ConfigError."""
    resolved, cls = _find(name)
    if not (isinstance(cls, type) and issubclass(cls, Scorer)):
        raise RegistryError(f"{name} is not a subclass of reward_servers.scorers.base.Scorer")
    if not isinstance(getattr(cls, "declares", None), ScorerGives):
        raise RegistryError(f"{name} lacks the class attribute `declares = ScorerGives(...)`")
    arguments = parse_options(options)
    try:
        inspect.signature(cls).bind(**arguments)
    except TypeError as error:
        known = ", ".join(inspect.signature(cls).parameters) or "none"
        raise ConfigError("option", f"{name}: {error}", f"options of {name}: {known}") from error
    try:
        scorer = cls(**arguments)
    except SalonError:
        raise
    except ValidationError as error:  # of its section in contracts.config.scorers
        known = ", ".join(SCORER_OPTIONS[name].model_fields) if name in SCORER_OPTIONS else "see its class"
        problems = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise ConfigError("option", f"{name}: {problems}", f"options of {name}: {known}") from error
    except Exception as error:
        raise ConfigError("option", f"{name} refused its options: {describe(error)}") from error
    scorer.name = scorer.name or resolved.name
    return scorer


def _find(name: str) -> tuple[Resolved, Any]:
    try:
        resolved = resolve("scorer", name)
        return resolved, resolved.load()
    except SalonError:
        raise
    except Exception as error:  # a user's module may raise anything while it is imported
        raise RegistryError(f"{name}: importing it raised {describe(error)}") from error


def parse_options(options: Sequence[str]) -> dict[str, Any]:
    """['quality=80'] -> {'quality': 80}; values are read as YAML, which JSON is as well."""
    parsed: dict[str, Any] = {}
    for text in options:
        key, separator, value = text.partition("=")
        if not separator or not key.strip():
            raise ConfigError("option", f"{text!r} is not key=value")
        try:
            parsed[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"option {key}", f"value {value!r} is not readable as YAML", "quote it") from error
    return parsed
