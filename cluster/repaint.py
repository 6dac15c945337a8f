"""A group of a run painted again from its seeds, with the weights of its version or those nearest to it.

A group is a pure function of (weights, run seed, group id, task), so with its own weights, the same micro-batches, one
number of threads and one kind of device the bytes are equal; whatever differs is said, never glossed over.
Does not own: painting (actors.painter), which checkpoints a run keeps (checkpoint.* of its configuration).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cluster.export import read_weights, weights_in
from cluster.ledger.reader import GroupRow
from cluster.ledger_cli import existing, opened, read_stored
from cluster.run_folder import RunFolder
from contracts.config import RunConfig, load_config
from contracts.digests import digest_images
from contracts.errors import ConfigError
from contracts.wire import PromptSpec, PromptTask, Source

_STATE = re.compile(r"^step-(\d+)$")


@dataclass(frozen=True)
class Repainted:
    """images: uint8 [G,H,W,3]; version, used: the group's weight version and that of the weights at hand;
    equal: whether every byte is that of the painting, None where nothing of it was kept to compare with.
    """

    images: np.ndarray
    version: int
    used: int
    equal: bool | None

    @property
    def words(self) -> str:
        """What was painted with what, and how it compares."""
        weights = (
            f"painted again with the weights of version {self.version}"
            if self.used == self.version
            else f"painted again with version {self.used}, the nearest whose weights are kept: version {self.version}, "
            "which painted it, is gone"
        )
        compared = {
            True: "every byte is equal", False: "the bytes differ",
            None: "nothing of the first painting was kept to compare with",
        }[self.equal]  # fmt: skip
        if self.equal is False and self.used == self.version:
            compared += ": another device, library version or number of threads rounds otherwise"
        return f"{weights}; {compared}"


def repaint(folder: RunFolder, group_id: int) -> Repainted:
    """Paint a group of `folder` again, in this process.

    Raises ConfigError for an unknown group, one that no actor painted, or a run whose configuration cannot be read.
    """
    config = load_config(folder.config)
    with opened(folder) as ledger:
        row, prompt = existing(ledger, group_id), ledger.prompt(group_id)
        fingerprint = ledger.fingerprint(group_id, row.paint_attempt)
    if row.weight_version is None:
        raise ConfigError("ID", f"group {group_id} was not painted yet", "name one that was")
    if row.source is not Source.ACTORS:
        raise ConfigError("ID", f"group {group_id} came from {row.source.value}, not from an actor", "name another")
    if fingerprint is None:
        stored = read_stored(folder, row)
        fingerprint = digest_images(stored[1]["images"]) if stored and "images" in stored[1] else None
    used, file = nearest_weights(folder, config, row.weight_version)
    images = _paint(config, file, used, row, prompt)
    equal = None if fingerprint is None else digest_images(images) == fingerprint
    return Repainted(images, row.weight_version, used, equal)


def nearest_weights(folder: RunFolder, config: RunConfig, version: int) -> tuple[int, Path | None]:
    """(version, file) of the weights that stand nearest to `version`; file None: the model folder's own, version 0.

    Version v is what was published after step v, so it stands in the checkpoint of that step.
    """
    steps = {
        int(found[1]): path.parent
        for path in (folder.root / "checkpoints").glob("step-*/state.json")
        if (found := _STATE.match(path.parent.name))
    }
    near = min([0, *steps], key=lambda step: (abs(step - version), -step))
    return near, weights_in(steps[near], config, "sampling") if near in steps and near > 0 else None


def _paint(config: RunConfig, file: Path | None, version: int, row: GroupRow, prompt: PromptSpec) -> np.ndarray:
    import torch

    from actors.painter import Painter

    torch.set_num_threads(config.rollout.threads)
    painter = Painter(config)
    if file is not None:
        read_weights(painter.policy, file)
    painter.version = version
    task = PromptTask(
        group_id=row.group_id, attempt=row.paint_attempt or 0, prompt=prompt, group_size=row.group_size, min_version=0,
        deadline_s=config.rollout.lease_s, source=row.source,
    )  # fmt: skip
    return painter.finish(painter.denoise(task)).arrays["images"]
