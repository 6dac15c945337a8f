"""Options of the scorers that a run serves itself, against their sections, before a server is started.

Does not own: the sections (contracts/config/scorers), options of a user's own class (its constructor, in the server).
"""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import ValidationError

from contracts.config import RunConfig
from contracts.config.scorers import SCORER_OPTIONS, checked_options
from contracts.errors import ConfigError


def check_options(config: RunConfig) -> Iterator[ConfigError]:
    """One error a wrong, unknown or missing option, with the options that there are."""
    for index, scorer in enumerate(config.scorers):
        if scorer.serve not in SCORER_OPTIONS:
            continue
        try:
            checked_options(scorer.serve, scorer.options)
        except ValidationError as error:
            known = ", ".join(SCORER_OPTIONS[scorer.serve].model_fields) or "none"
            for item in error.errors():
                path = ".".join(map(str, item["loc"]))
                yield ConfigError(f"scorers.{index}.options.{path}", f"{scorer.serve}: {item['msg']}",
                                  f"its options are {known}")  # fmt: skip
