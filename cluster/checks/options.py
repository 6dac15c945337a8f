"""Options of the prompt source and of the scorers that a run serves itself, before a server or a Ray is started.

Does not own: the sections of built-in ones (contracts/config), what a user's own prompt source reads from its options.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from contracts import registry
from contracts.config import RunConfig
from contracts.config.base import Section
from contracts.config.prompts import PROMPT_OPTIONS
from contracts.config.scorers import SCORER_OPTIONS
from contracts.config.scoring import ScorerConfig
from contracts.errors import ConfigError


def check_options(config: RunConfig) -> Iterator[ConfigError]:
    """One error a wrong, unknown or missing option, with the options that there are."""
    for index, scorer in enumerate(config.scorers):
        where = f"scorers.{index}.options"
        if scorer.serve in SCORER_OPTIONS:
            yield from _of_section(where, scorer.serve, SCORER_OPTIONS[scorer.serve], scorer.options)
        elif scorer.serve is not None and ":" in scorer.serve:
            yield from _of_own_class(where, scorer.serve, scorer)
    source = config.prompts.source
    if source in PROMPT_OPTIONS:
        yield from _of_section("prompts.options", source, PROMPT_OPTIONS[source], config.prompts.options)


def _of_section(
    where: str, name: str, section: type[Section], options: Mapping[str, Any]
) -> Iterator[ConfigError]:  # fmt: skip
    try:
        section.model_validate(dict(options))
    except ValidationError as error:
        known = ", ".join(section.model_fields) or "none"
        for item in error.errors():
            path = ".".join(str(part) for part in item["loc"] if part != "[key]")
            yield ConfigError(
                f"{where}.{path}", f"{name}: {item['msg'].removeprefix('Value error, ')}", f"its options are {known}"
            )


def _of_own_class(where: str, name: str, scorer: ScorerConfig) -> Iterator[ConfigError]:
    """Its options are its constructor's keyword arguments. One that cannot be imported is another check's to tell."""
    try:
        own: Callable[..., Any] = registry.import_target(name)
        signature = inspect.signature(own)
    except Exception:  # a user's module may raise anything while it is imported
        return
    try:
        signature.bind(**scorer.options)
    except TypeError as error:
        yield ConfigError(where, f"{name}: {error}", f"its options are {', '.join(signature.parameters) or 'none'}")
