"""The strict base of every configuration section, and which variant a section with a `name` is."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Immutable; unknown keys are refused; numbers are not guessed from strings."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, validate_default=True)


def variant(value: Any, default: str | None = None) -> str:
    """The tag of a section: its name, or `custom` for a module:Class of the user's own. default: where it has none."""
    name = value.get("name", default) if isinstance(value, dict) else getattr(value, "name", None)
    return "custom" if isinstance(name, str) and ":" in name else str(name)
