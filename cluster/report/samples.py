"""Images of evaluations as a run keeps them: one file an image with its prompt, seed and scores, and a contact sheet.

    samples/<tag>.json     tag, step, split, sampling, images: [{file, prompt, seed, scores}]
    samples/<tag>/000.png  lossless, as painted
    samples/<tag>.png      all of them in one picture

Prompts and seeds are the same at every evaluation of a run, so that the files of two tags pair up (`same_images`).
Does not own: what is painted and judged (cluster/evaluate.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cluster.evaluate import EvalPlan, image_grid
from cluster.run_folder import RunFolder
from cluster.telemetry import Telemetry
from contracts.errors import StorageError
from contracts.scores import ScoreTable


@dataclass(frozen=True)
class Sample:
    """One image of an evaluation. scores: by 'scorer/column', valid ones only."""

    path: Path
    prompt: str
    seed: int
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, int]:
        """What is the same for this image in every evaluation."""
        return self.prompt, self.seed


@dataclass(frozen=True)
class SampleSet:
    """The images of one evaluation. sampling: steps, shift, guidance_scale."""

    tag: str
    step: int
    split: str
    sampling: dict[str, Any]
    samples: tuple[Sample, ...]


def keep_samples(
    folder: RunFolder,
    tag: str,
    step: int,
    split: str,
    plan: EvalPlan,
    images: np.ndarray,
    tables: Mapping[str, ScoreTable],
) -> np.ndarray:
    """Write the first N = len(images) images of a plan, uint8 [N,H,W,3]; returns the contact sheet, uint8 [H',W',3].

    Raises StorageError; read_samples() does not see what was written until then.
    """
    name = tag.replace(" ", "-")
    grid = image_grid(images)
    folder.save_image(f"{name}.png", grid)
    rows = []
    for index, image in enumerate(images):
        file = f"{name}/{index:03d}.png"
        folder.save_image(file, image)
        scores = {key: round(value, 6) for key, value in _scores_of(tables, index).items()}
        rows.append({"file": file, "prompt": plan.prompts[index].text, "seed": plan.seeds[index], "scores": scores})
    sampling = plan.sampling.model_dump()
    folder.write_json(
        f"samples/{name}.json", {"tag": tag, "step": step, "split": split, "sampling": sampling, "images": rows}
    )
    return grid


def show_samples(
    folder: RunFolder,
    telemetry: Telemetry,
    tag: str,
    step: int,
    split: str,
    plan: EvalPlan,
    images: np.ndarray,
    tables: Mapping[str, ScoreTable],
) -> None:
    """keep_samples, and the contact sheet in every tracker. A folder without room costs the files and an event."""
    try:
        grid = keep_samples(folder, tag, step, split, plan, images, tables)
    except StorageError as error:
        telemetry.event("samples_not_kept", tag=tag, error=str(error))
        grid = image_grid(images)
    telemetry.image(f"samples/{split}", grid, step)


def _scores_of(tables: Mapping[str, ScoreTable], index: int) -> dict[str, float]:
    found = {}
    for name, table in tables.items():
        for column in table.columns if table.kind == "point" else ():
            values, valid = table.column(column)
            if index < len(values) and valid[index]:
                found[f"{name}/{column}"] = float(values[index])
    return found


def read_samples(folder: Path) -> list[SampleSet]:
    """Every readable sample set under `folder` (samples/), by step; `before` first, `after` last of its step."""
    sets = [found for path in sorted(folder.glob("*.json")) if (found := _read_set(path)) is not None]
    order = {"before": 0, "after": 2}
    return sorted(sets, key=lambda each: (each.step, order.get(each.tag, 1), each.tag))


def _read_set(path: Path) -> SampleSet | None:
    """A sample set, or None where the file is torn or of another kind. Images that are gone are left out."""
    try:
        text = json.loads(path.read_text())
        samples = tuple(
            Sample(path.parent / row["file"], str(row["prompt"]), int(row["seed"]), dict(row["scores"]))
            for row in text["images"]
            if _is_inside(path.parent, row["file"])
        )
        return SampleSet(str(text["tag"]), int(text["step"]), str(text["split"]), dict(text["sampling"]), samples)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_inside(folder: Path, name: str) -> bool:
    path = (folder / name).resolve()
    return path.is_relative_to(folder.resolve()) and path.is_file()


def same_images(sets: list[SampleSet]) -> list[tuple[tuple[str, int], list[Sample | None]]]:
    """Rows of one prompt and seed: its image in each set, None where a set lacks it; rows in the first set's order.

    An image that only one of several sets has is left out: there is nothing to compare it with.
    """
    by_key: dict[tuple[str, int], list[Sample | None]] = {}
    for index, each in enumerate(sets):
        for sample in each.samples:
            by_key.setdefault(sample.key, [None] * len(sets))[index] = sample
    wanted = min(2, len(sets))
    return [(key, row) for key, row in by_key.items() if sum(one is not None for one in row) >= wanted]
