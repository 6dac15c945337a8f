"""The strict base of every configuration section."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Immutable; unknown keys are refused; numbers are not guessed from strings."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, validate_default=True)
