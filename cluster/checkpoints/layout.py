"""What a checkpoint is, and whether it is whole.

    checkpoints/step-000010/
      state.json, *.safetensors    the learner: weights, moments, snapshots, by parameter name (learner/state.py)
      run.json                     the rest of the run: credit and guard state, cursor, times, evaluation (RunState)
      ledger.sqlite                the ledger, a consistent copy
      online/<scorer>/<version>/   reward models that learn beside the run: the version in use, its trainer's state
      groups/                      bytes of live groups and their prompt embeddings, as vaults keep them
      manifest.json                every file's size and SHA-256; written last

Invariant: a folder is a checkpoint only with a manifest that all its files agree with. It is written under another
name (.step-...) and renamed at the end; behind a URL, where nothing can be renamed, the manifest is what comes last.

The ledger may be a little ahead of the step: it is copied while the run goes on. A roll-back to the step
(`Ledger.rollback`) makes it fit, as it does after the loss of a learner rank.

Does not own: who writes it (assembly.py, the learner's rank 0), which are kept (keeper.py).
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from contracts.errors import SalonError

FORMAT = 1
MANIFEST, RUN, LEDGER, GROUPS = "manifest.json", "run.json", "ledger.sqlite", "groups"
_NAME = re.compile(r"^step-(\d{6,})$")


class TornCheckpoint(SalonError):
    """A folder that is no whole checkpoint; the message says what is wrong with it."""


@dataclass(frozen=True)
class RunState:
    """What no other file of the run holds. Every random number follows from seed and ids: there is no generator's."""

    step: int
    seed: int
    position: int  # of the prompt stream, where admission goes on
    train_seconds: float
    credit: dict[str, Any] = field(default_factory=dict)
    guard: dict[str, Any] = field(default_factory=dict)
    before: dict[str, Any] | None = None  # the evaluation before training
    score: float | None = None  # of the latest evaluation in mid-run
    scored_step: int | None = None
    online: dict[str, str] = field(default_factory=dict)  # scorer that learns beside the run -> version in use


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on this machine's disk."""

    path: Path
    step: int
    manifest: Mapping[str, Any]

    @property
    def score(self) -> float | None:
        return self.manifest.get("score")

    @property
    def groups(self) -> Path:
        return self.path / GROUPS

    def run_state(self) -> RunState:
        return RunState(**json_of(self.path / RUN))


def folder_name(step: int) -> str:
    return f"step-{step:06d}"


def step_of(name: str) -> int | None:
    """The step of a checkpoint's folder name; None for any other name."""
    found = _NAME.match(name)
    return int(found[1]) if found else None


def write_manifest(folder: Path, state: RunState, digests: Mapping[str, tuple[int, str]]) -> dict[str, Any]:
    """manifest.json from the files' sizes and digests; returns what it says."""
    files = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in sorted(digests.items())}
    manifest = {
        "format": FORMAT, "step": state.step, "written_at": time.time(), "score": state.score,
        "scored_step": state.scored_step, "files": files,
    }  # fmt: skip
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def write_run_state(folder: Path, state: RunState) -> None:
    (folder / RUN).write_text(json.dumps(asdict(state), indent=1) + "\n")


def json_of(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def digest_file(path: Path) -> tuple[int, str]:
    """(bytes, SHA-256 in hex) of a file."""
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


def inside(name: str) -> str:
    """A file name of a manifest. Raises ValueError for one that leads out of the checkpoint."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{name!r} is no file of a checkpoint")
    return name


def read(folder: Path, *, verify: bool = False) -> Checkpoint:
    """The checkpoint in a folder; verify: compare every file with its digest. Raises TornCheckpoint."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        step, files = int(manifest["step"]), manifest["files"].items()
        expected = {inside(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TornCheckpoint(f"{folder} has no readable {MANIFEST}: {error}") from error
    if manifest.get("format") != FORMAT:
        raise TornCheckpoint(f"{folder} has format {manifest.get('format')}, this version reads {FORMAT}")
    for name, (size, digest) in expected.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise TornCheckpoint(f"{folder}: {name} is missing or cut short")
        if verify and digest_file(path)[1] != digest:
            raise TornCheckpoint(f"{folder}: {name} is damaged (its SHA-256 is another)")
    return Checkpoint(folder, step, manifest)


def list_whole(checkpoints: Path) -> list[Checkpoint]:
    """Checkpoints whose files are all there at their full sizes, oldest first."""
    found = []
    for folder in sorted(checkpoints.iterdir()) if checkpoints.is_dir() else []:
        if step_of(folder.name) is not None:
            try:
                found.append(read(folder))
            except TornCheckpoint:
                continue
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def newest_whole(checkpoints: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that its digests prove, and what was wrong with the newer ones."""
    steps = {step: folder for folder in checkpoints.glob("step-*") if (step := step_of(folder.name)) is not None}
    problems: list[str] = []
    for _, folder in sorted(steps.items(), reverse=True):
        try:
            return read(folder, verify=True), problems
        except TornCheckpoint as torn:
            problems.append(str(torn))
    return None, problems
