"""Text rendering (the OCR reward of Flow-GRPO, arXiv 2505.05470, section 5): edit distance to the text asked for.

Target: metadata['text'], else what the prompt holds between double quotes. Everything read in the image is joined; both
are lower-cased and freed of white space. 1 if the target stands in it, else 1 - min(distance, length) / length.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from contracts.config.scorers import OcrOptions
from contracts.errors import ConfigError
from contracts.registry import import_target
from contracts.scores import ScoreTable
from reward_servers.scorers.base import ScoreBatch, declared
from reward_servers.scorers.parts.model_scorer import OptionScorer

Reader = Callable[[np.ndarray], Sequence[str]]
_QUOTED = re.compile(r"[\"“](.+?)[\"”]", re.DOTALL)


class Ocr(OptionScorer[OcrOptions]):
    """Likeness in [0,1]; the reason is what was read. An image without text is 0: that is what it says."""

    declares = declared("ocr")
    name = "ocr"
    paper = "Flow-GRPO: Training Flow Matching Models via Online RL (2505.05470)"
    value_range = (0.0, 1.0)

    def load(self) -> None:
        engine = self.options.engine
        self._read: Reader = (
            rapidocr_reader(self.options.min_confidence) if engine == "rapidocr" else import_target(engine)
        )

    def canary(self) -> ScoreBatch:
        return ScoreBatch(np.full((1, 64, 64, 3), 128, np.uint8), ('a wall with the word "canary"',), ({},))

    def score(self, batch: ScoreBatch) -> ScoreTable:
        targets = [target_text(*row) for row in zip(batch.prompts, batch.metadata, strict=True)]
        readings = ["".join(self._read(image)) for image in batch.images]
        likeness = [text_likeness(*pair) for pair in zip(readings, targets, strict=True)]
        return self.table(np.array(likeness), reasons=[f"read: {reading[:200]}" for reading in readings])


def rapidocr_reader(min_confidence: float) -> Reader:
    """PP-OCR through the package rapidocr, whose models come with it; ONNX Runtime, CPU. Raises ConfigError."""
    try:
        from rapidocr import RapidOCR
    except ImportError as error:
        raise ConfigError(
            "engine", "rapidocr is not installed", "pip install rapidocr onnxruntime (extra `ocr`)"
        ) from error
    engine = RapidOCR(params={"Global.log_level": "error"})

    def read(image: np.ndarray) -> list[str]:
        found: Any = engine(np.ascontiguousarray(image[..., ::-1]))  # it reads BGR
        if found is None or found.txts is None:
            return []
        return [text for text, sure in zip(found.txts, found.scores, strict=True) if sure >= min_confidence]

    return read


def target_text(prompt: str, metadata: dict[str, Any]) -> str:
    """The text asked for. Raises ValueError when there is none."""
    given = metadata.get("text")
    if given is None:
        given = " ".join(_QUOTED.findall(prompt))
    if not isinstance(given, str) or not plain(given):
        raise ValueError("no text was asked for: neither metadata['text'] nor a part of the prompt in double quotes")
    return given


def plain(text: str) -> str:
    return "".join(text.split()).lower()


def text_likeness(reading: str, target: str) -> float:
    """The reward of one image."""
    read, asked = plain(reading), plain(target)
    if asked in read:
        return 1.0
    return 1.0 - min(edit_distance(read, asked), len(asked)) / len(asked)


def edit_distance(a: str, b: str) -> int:
    """Levenshtein: insertions, deletions and substitutions from a to b."""
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (letter != other))
    return row[-1]
