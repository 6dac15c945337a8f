"""Checkpoints behind a URL: uploaded file by file, the manifest last; fetched the same way, the manifest first.

Does not own: what a checkpoint holds (layout.py), the mirror of the rest of the run folder (run_folder.py).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import fsspec

from cluster.checkpoints.layout import MANIFEST, TornCheckpoint, folder_name, inside, read, step_of
from cluster.run_folder import location_of
from contracts.config import RunConfig
from contracts.errors import LearnerError


class RemoteCheckpoints:
    """<url>/checkpoints of a run."""

    def __init__(self, url: str) -> None:
        self._filesystem, path = fsspec.core.url_to_fs(url)
        self._path = f"{path.rstrip('/')}/checkpoints"

    def put(self, folder: Path, step: int, names: Iterable[str]) -> None:
        """Upload some files of a checkpoint."""
        for name in names:
            target = f"{self._path}/{folder_name(step)}/{name}"
            self._filesystem.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
            self._filesystem.put_file(str(folder / name), target)

    def complete(self, folder: Path, step: int) -> None:
        """Upload the manifest: from now on the checkpoint counts."""
        self.put(folder, step, [MANIFEST])

    def steps(self) -> list[int]:
        """Steps of the checkpoints that have a manifest."""
        self._filesystem.invalidate_cache()
        if not self._filesystem.exists(self._path):
            return []
        names = [str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in self._filesystem.ls(self._path, detail=False)]
        found = [step for name in names if (step := step_of(name)) is not None]
        return sorted(s for s in found if self._filesystem.exists(f"{self._path}/{folder_name(s)}/{MANIFEST}"))

    def fetch(self, step: int, folder: Path) -> None:
        """Bring one here, into a folder of that name. Raises TornCheckpoint when it is not whole."""
        source = f"{self._path}/{folder_name(step)}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            manifest: dict[str, Any] = json.loads(self._filesystem.cat_file(f"{source}/{MANIFEST}"))
            for name in map(inside, manifest["files"]):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                self._filesystem.get_file(f"{source}/{name}", str(folder / name))
        except (OSError, ValueError, KeyError) as error:
            raise TornCheckpoint(f"{source} cannot be fetched: {error}") from error
        (folder / MANIFEST).write_text(json.dumps(manifest))
        read(folder, verify=True)

    def remove(self, step: int) -> None:
        """Delete one, its manifest first: what is half deleted never counts."""
        source = f"{self._path}/{folder_name(step)}"
        if self._filesystem.exists(f"{source}/{MANIFEST}"):
            self._filesystem.rm_file(f"{source}/{MANIFEST}")
        if self._filesystem.exists(source):
            self._filesystem.rm(source, recursive=True)


def url_of(config: RunConfig) -> str | None:
    """Where a run's folder is mirrored; None for one on a file system."""
    return location_of(config) if "://" in config.runs_dir else None


def learner_files_here(folder: Path, config: RunConfig) -> Path:
    """A checkpoint's folder on this machine, fetched when the run lives at a URL. Raises LearnerError."""
    if (folder / "state.json").is_file():
        return folder
    url, step = url_of(config), step_of(folder.name)
    if url is None or step is None:
        raise LearnerError(
            f"{folder} is not on this machine: ranks on several machines need runs_dir on shared storage or at a URL"
        )
    RemoteCheckpoints(url).fetch(step, folder)
    return folder
