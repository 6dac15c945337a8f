"""Formats of the run folder: what an older one lacks is made up for, what cannot be is refused with the reason.

    1  no `format` in manifest.json: learner states only, no whole-run checkpoints
    2  checkpoints with a manifest (checkpoints/layout.py)

Does not own: the formats of ledger, learner state and checkpoint, which name their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.checkpoints.assembly import copy_ledger
from cluster.checkpoints.layout import (
    LEDGER,
    MANIFEST,
    RUN,
    RunState,
    digest_file,
    step_of,
    write_manifest,
    write_run_state,
)
from cluster.run_folder import RunFolder
from contracts.config import RunConfig
from contracts.errors import ConfigError

RUN_FORMAT = 2


def check_format(manifest: Mapping[str, Any], run: str) -> int:
    """The format of a run's manifest.json. Raises ConfigError for one that this version does not know."""
    found = manifest.get("format", 1)
    if not isinstance(found, int) or not 1 <= found <= RUN_FORMAT:
        raise ConfigError(
            "run", f"{run} has format {found}, this version of Salon reads formats 1 to {RUN_FORMAT}",
            f"resume it with the version that wrote it ({manifest.get('salon') or 'unknown'}) or a newer one",
        )  # fmt: skip
    return found


def migrate(folder: RunFolder, manifest: Mapping[str, Any], config: RunConfig) -> bool:
    """Bring a run folder to the present format; whether anything was done."""
    if check_format(manifest, folder.location) == RUN_FORMAT:
        return False
    for state in folder.checkpoints.iterdir():
        step = step_of(state.name)
        if step is not None and (state / "state.json").is_file() and not (state / MANIFEST).is_file():
            _adopt(state, folder.ledger, RunState(step, config.seed, 0, 0.0))
    folder.update_manifest(format=RUN_FORMAT)
    return True


def _adopt(state: Path, ledger: Path, run: RunState) -> None:
    """Make a learner state of format 1 a checkpoint: the ledger of now is rolled back to its step at the resume.

    Credit and guards had no state then, and its times were not kept.
    """
    if ledger.is_file():
        copy_ledger(ledger, state / LEDGER)
    write_run_state(state, run)
    files = [path for path in sorted(state.iterdir()) if path.is_file() and path.name != MANIFEST]
    assert any(path.name == RUN for path in files)
    write_manifest(state, run, {path.name: digest_file(path) for path in files})
