"""Options of the built-in prompt sources, checked before anything is started.

One section a source, found by its registry name in PROMPT_OPTIONS; a source of your own reads `config.options` as it
likes. Does not own: paths, columns and held-out shares (rollout.py), captions (playground/world).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from contracts.config.base import Section

CaptionKind = Literal["single", "colour", "two", "counting", "position", "attribute", "position_attribute"]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class NoPromptOptions(Section):
    """Of a source that has nothing to choose."""


class PlaygroundPromptOptions(Section):
    """Which of the playground's captions are trained on."""

    kinds: dict[CaptionKind, Weight] | None = Field(
        default=None, description="kinds of captions, as a list or with their weights; null: all, equally often"
    )

    @field_validator("kinds", mode="before")
    @classmethod
    def _list_is_equal_weights(cls, kinds: Any) -> Any:
        return {str(kind): 1.0 for kind in kinds} if isinstance(kinds, list | tuple) else kinds

    @field_validator("kinds")
    @classmethod
    def _some_kind(cls, kinds: dict[CaptionKind, Weight] | None) -> dict[CaptionKind, Weight] | None:
        if kinds is not None and not any(kinds.values()):
            raise ValueError("names no kind to train on: name one or more, or leave it out")
        return kinds


PROMPT_OPTIONS: dict[str, type[Section]] = {
    "playground": PlaygroundPromptOptions,
    "text": NoPromptOptions,
    "jsonl": NoPromptOptions,
    "parquet": NoPromptOptions,
    "pairs": NoPromptOptions,
}
"""Registry name of a prompt source -> the options it takes. Every built-in source has its row."""
