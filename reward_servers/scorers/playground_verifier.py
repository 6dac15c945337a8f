"""The playground's exact verifier as a scorer: strict, dense and their mean, with what is wrong in words.

Does not own: the verdict (playground.world.verify). No torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from contracts.scores import ScoreTable
from playground.world.captions import Spec, parse_caption
from playground.world.render import render
from playground.world.scenes import Placed, Scene
from playground.world.verify import verify
from reward_servers.scorers.base import ScoreBatch, Scorer, declared


class PlaygroundVerifier(Scorer):
    """reward = 0.5 strict + 0.5 dense; metadata["playground"] holds the caption as `Spec.to_metadata` wrote it."""

    declares = declared("playground_verifier")
    name = "playground_verifier"
    paper = "Salon"
    value_range = (0.0, 1.0)

    def canary(self) -> ScoreBatch:
        return playground_canary()

    def score(self, batch: ScoreBatch) -> ScoreTable:
        verdicts = [verify(image, spec_of(meta)) for image, meta in zip(batch.images, batch.metadata, strict=True)]
        strict = np.array([verdict.strict for verdict in verdicts], np.float32)
        dense = np.array([verdict.dense for verdict in verdicts], np.float32)
        reasons = tuple("; ".join(verdict.reasons) for verdict in verdicts)
        return self.table(np.stack([0.5 * strict + 0.5 * dense, strict, dense], axis=1), reasons)


def spec_of(metadata: dict[str, Any]) -> Spec:
    """The caption in a prompt's metadata. Raises ValueError that says what is missing."""
    if "playground" not in metadata:
        raise ValueError("metadata has no key 'playground'; use the playground's prompts")
    try:
        return Spec.from_metadata(metadata["playground"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"metadata['playground'] is not a caption: {type(error).__name__} {error}") from error


def playground_canary() -> ScoreBatch:
    """A picture that is right for its caption."""
    spec = parse_caption("a red circle")
    picture = render(Scene((Placed("circle", "red", 16.0, 16.0, 6.0),)))
    return ScoreBatch(picture[None], (spec.text,), ({"playground": spec.to_metadata()},))
