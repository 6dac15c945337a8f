"""GenEval (arXiv 2310.11513) as a reward: are the objects, counts, colours and positions of the prompt there?

A detector finds objects, CLIP names the colour of each cut-out, parts/geneval_rules judges. metadata: tag, include,
exclude as in GenEval's evaluation_metadata.jsonl (a JSONL prompt source hands them through as they are).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from contracts.config.scorers import GenevalOptions
from contracts.scores import ScoreTable
from reward_servers.scorers.base import ScoreBatch, declared
from reward_servers.scorers.parts.model_scorer import OptionScorer

if TYPE_CHECKING:
    from reward_servers.scorers.parts.detection import Detected
    from reward_servers.scorers.parts.geneval_rules import Verdict

G = TypeVar("G", bound=GenevalOptions)

PAPER = "GenEval: An Object-Focused Framework for Evaluating Text-to-Image Alignment (2310.11513)"
TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
GREY = (153, 153, 153)  # what lies around a cut-out


class GenevalModel(OptionScorer[G]):
    """Detection, colours and verdict, for GenEval's point and region tables."""

    paper = PAPER

    def load(self) -> None:
        from reward_servers.scorers.parts.detection import Detector
        from reward_servers.scorers.parts.towers import load_clip

        self.detector = Detector(self.options.detector, self.options)
        self.towers, self.preprocess = load_clip(self.options.colour_model, self.options)
        self.weighed(self.detector.network, self.towers.network)

    def canary(self) -> ScoreBatch:
        grey = np.full((1, 64, 64, 3), 128, np.uint8)
        name = self.detector.names[min(self.detector.names)]
        return ScoreBatch(grey, (f"a photo of a {name}",),
                          ({"tag": "single_object", "include": [{"class": name, "count": 1}]},))  # fmt: skip

    def verdict(self, image: np.ndarray, metadata: Mapping[str, Any]) -> Verdict:
        """Raises ValueError for metadata that is not GenEval's."""
        from reward_servers.scorers.parts import geneval_rules as rules

        rules.check_metadata(metadata, list(self.detector.names.values()))
        objects = rules.kept_objects(self.detector(image), metadata["tag"], self.options)

        def colours(found: Sequence[Detected], name: str) -> list[str]:
            return self.colours(image, found, name)

        return rules.judge(objects, metadata, colours, self.options.position_threshold)

    def colours(self, image: np.ndarray, found: Sequence[Detected], name: str) -> list[str]:
        """The colour of each object: its cut-out on grey against the mean text of every colour (zero-shot CLIP)."""
        import torch

        from reward_servers.scorers.parts.geneval_rules import COLOURS
        from reward_servers.scorers.parts.loading import device_of, dtype_of

        texts = [[t.format(colour=colour, name=name) for t in TEMPLATES] for colour in COLOURS]
        classes = torch.stack([self.towers.mean_text(row) for row in texts])
        pixels = torch.cat([self.preprocess.exact(cut_out(image, one)[None]) for one in found])
        with torch.no_grad():
            embeddings = self.towers.images(pixels.to(device_of(self.options), dtype_of(self.options)))
        return [COLOURS[index] for index in (embeddings @ classes.T).argmax(dim=1).tolist()]


class Geneval(GenevalModel[GenevalOptions]):
    """columns correct (0 or 1, GenEval's own) and fraction (share of its clauses that hold, ours)."""

    declares = declared("geneval")
    name = "geneval"
    value_range = (0.0, 1.0)

    def score(self, batch: ScoreBatch) -> ScoreTable:
        verdicts = [self.verdict(*row) for row in zip(batch.images, batch.metadata, strict=True)]
        values = np.array([[verdict.correct, verdict.fraction] for verdict in verdicts], np.float32)
        return self.table(values, reasons=["; ".join(verdict.reasons) for verdict in verdicts])


def cut_out(image: np.ndarray, one: Detected) -> np.ndarray:
    """uint8 [h,w,3]: the object's box, grey where its mask says that it is not the object."""
    height, width = image.shape[:2]
    shown = image if one.mask is None else np.where(one.mask[..., None], image, np.array(GREY, np.uint8))
    x0, y0, x1, y1 = (round(edge) for edge in one.box)
    x0, y0 = min(max(x0, 0), width - 1), min(max(y0, 0), height - 1)
    return shown[y0 : max(min(y1, height), y0 + 1), x0 : max(min(x1, width), x0 + 1)]
