"""What the tests of online reward models share: reference files, trainers and scorers of tiny models, fed groups."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from contracts import versions
from contracts.config.online import AdversarialDinoConfig, DistilledConfig, GuardedPickScoreConfig
from reward_servers.online.inbox import FedGroup

PROMPT = "a red circle"
DINO = {"size": None, "patches": 2}
"""Options of tiny DINOs: their own 28 pixels, four patches."""


def flat(colour: Sequence[int], number: int = 4, noise: float = 10.0, seed: int = 0) -> np.ndarray:
    """uint8 [number,32,32,3]: one colour with noise."""
    rng = np.random.default_rng(seed)
    return np.clip(np.array(colour) + rng.normal(0, noise, (number, 32, 32, 3)), 0, 255).astype(np.uint8)


def write_references(folder: Path, images: np.ndarray, prompt: str = PROMPT) -> str:
    """A JSONL of reference images; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index}.png")
        rows.append(json.dumps({"prompt": prompt, "image": f"{index}.png"}))
    (folder / "references.jsonl").write_text("\n".join(rows) + "\n")
    return str(folder / "references.jsonl")


def adversarial(references: str, dino: Path, **more: Any) -> Any:
    from reward_servers.online.adversarial import AdversarialDino

    config = AdversarialDinoConfig(scorer="d", references=references, **{"lr": 1e-2, "hidden": 8, **more})
    return AdversarialDino(config, {"model": str(dino), **DINO}, 0)


def guarded(references: str, clip: Path, **more: Any) -> Any:
    from reward_servers.online.guarded import GuardedPickScore

    config = GuardedPickScoreConfig(scorer="p", references=references, **{"lr": 1e-3, "layers": 1, **more})
    return GuardedPickScore(config, {"model": str(clip)}, 0)


def distilled(judge: str, clip: Path, **more: Any) -> Any:
    from reward_servers.online.distilled import Distilled

    config = DistilledConfig(scorer="o", judge={"name": "judge", "function": judge, "deadline_s": 20}, **more)
    return Distilled(config, {"model": str(clip)}, 0)


def publish(folder: Path, trainer: Any, number: int = 0) -> versions.Version:
    """Pack a trainer's present weights, put them in the folder and in use."""
    weights, state, facts = trainer.pack()
    version, files = versions.pack(number, weights, state, {**facts, "updates": trainer.updates})
    versions.place(folder, version, files)
    versions.flip(folder, version.name)
    return version


def fed(group_id: int, images: np.ndarray, prompt: str = PROMPT) -> FedGroup:
    return FedGroup(group_id, prompt, images)
