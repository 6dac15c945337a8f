"""Captions of the playground world; its splits go by combination, so test prompts name things never seen together."""

from __future__ import annotations

from typing import ClassVar

from actors.prompts.base import PromptSource
from contracts.config.rollout import PromptsConfig
from contracts.declarations import PromptsGive
from contracts.errors import ConfigError
from contracts.wire import PromptSpec
from playground.world.captions import Spec
from playground.world.prompts import held_out_prompts, prompt_stream

_HELD_OUT_SEED = 0
"""Of the held-out list: the same prompts for every run, so that runs compare."""


class PlaygroundPrompts(PromptSource):
    """metadata: `playground` is what the verifier needs, `tag` the kind of task.

    options.kinds: the kinds of captions to train on, as a list or with their weights ({two: 2, counting: 0.5}); those
    that the base has learnt already teach nothing.
    """

    declares: ClassVar[PromptsGive] = PromptsGive(metadata_keys=("playground",), has_held_out=True)

    def __init__(self, config: PromptsConfig, seed: int) -> None:
        super().__init__(config, seed)
        try:
            self._stream = prompt_stream("train", seed, config.options.get("kinds"))
        except (ValueError, TypeError) as error:
            raise ConfigError("prompts.options.kinds", str(error)) from error

    def at(self, position: int) -> PromptSpec:
        return _to_prompt(self._stream.at(position))

    def held_out(self, split: str, num: int) -> list[PromptSpec]:
        return [_to_prompt(spec) for spec in held_out_prompts(split, num, _HELD_OUT_SEED)]


def _to_prompt(spec: Spec) -> PromptSpec:
    return PromptSpec(text=spec.text, metadata={"playground": spec.to_metadata(), "tag": spec.kind})
