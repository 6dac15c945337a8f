"""`python -m cluster ledger RUN`: where each group is or went and why, and one group with all that is known of it.

Reads the run folder alone, beside a running run too. Does not own: the ledger (ledger/), painting again (repaint.py),
how it looks on a terminal (ledger_view.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import ValidationError

from cluster.ledger.facts import LedgerFacts
from cluster.ledger.reader import Event, GroupRow
from cluster.run_folder import RunFolder
from cluster.vault_files import group_file
from contracts import codec
from contracts.errors import ConfigError, LedgerError, PayloadError
from contracts.scores import Outcome, ScoreTable
from contracts.seeds import Stream, derive_seed
from contracts.wire import GroupHeader, GroupState, Source

Json = dict[str, Any]

NOT_STORED = "its bytes were let go once a checkpoint covered its step, or when it was discarded"


@contextmanager
def opened(folder: RunFolder) -> Iterator[LedgerFacts]:
    """The run's ledger. Raises ConfigError where there is none, or none that this version reads."""
    try:
        ledger = LedgerFacts(folder.ledger)
    except LedgerError as error:
        raise ConfigError("RUN", str(error), "a run writes its ledger when it starts") from error
    with closing(ledger):
        yield ledger


def list_groups(folder: RunFolder, **filters: Any) -> Json:
    """{name, books, groups}: filters and their meaning as LedgerReader.rows has them."""
    with opened(folder) as ledger:
        books = ledger.books()
        groups = [
            {**_row(row), "prompt": ledger.prompt(row.group_id).text, "reward": _mean_reward(ledger, row.group_id)}
            for row in ledger.rows(**filters)
        ]
    return {
        "name": folder.location.rstrip("/").rsplit("/", 1)[-1],
        "groups_by_state": books.groups,
        "groups_discarded_by_reason": books.groups_discarded_by_reason,
        "images": {
            "painted": books.painted, "trained": books.trained, "discarded": books.discarded_by_reason,
            "alive": books.alive, "refused": books.refused, "balanced": books.balanced,
        },
        "groups": groups,
    }  # fmt: skip


def show_group(folder: RunFolder, group_id: int, out: Path | None = None) -> Json:
    """All that is known of a group; its images are written as PNG files when a vault still holds them.

    out: folder for the images; None: samples/groups/<id> of the run. Raises ConfigError for an unknown group.
    """
    with opened(folder) as ledger:
        row = existing(ledger, group_id)
        prompt = ledger.prompt(group_id)
        tables, rewards = ledger.tables(group_id), ledger.rewards(group_id)
        journal = [_event(event) for event in ledger.journal(group_id)]
        fingerprint = ledger.fingerprint(group_id, row.paint_attempt)
    stored = read_stored(folder, row)
    header = stored[0] if stored else None
    target = out or folder.root / "samples" / "groups" / f"{group_id:08d}"
    images = write_images(target, stored[1]["images"]) if stored and "images" in stored[1] else []
    return {
        **_row(row),
        "where": _where(row),
        "prompt": prompt.model_dump(),
        "seeds": list(header.seeds) if header else _seeds(folder, row),
        "painted_with": _painted_with(header),
        "images_digest": fingerprint,
        "images": [str(path) for path in images],
        "images_missing": None if images else _why_no_images(folder, row, stored is not None),
        "scores": {name: _table(table) for name, table in tables.items()},
        "rewards": rewards,
        "journal": journal,
    }


def existing(ledger: LedgerFacts, group_id: int) -> GroupRow:
    """A group's row. Raises ConfigError with the range there is."""
    try:
        return ledger.row(group_id)
    except LedgerError as error:
        newest = ledger.rows(limit=1, newest_first=True)
        there = f"groups 0 to {newest[0].group_id} exist" if newest else "the ledger is empty"
        raise ConfigError("ID", str(error), there) from error


def read_stored(folder: RunFolder, row: GroupRow) -> tuple[GroupHeader, dict[str, np.ndarray]] | None:
    """Header and arrays of a group's painting as its vault's file has them; None where that is gone or elsewhere."""
    if row.vault is None or row.paint_attempt is None:
        return None
    index = row.vault.removeprefix("vault-")
    path = folder.root / "vaults" / index / group_file(row.group_id, row.paint_attempt)
    try:
        return codec.decode(path.read_bytes(), GroupHeader)
    except (OSError, PayloadError, ValidationError):
        return None


def write_images(folder: Path, images: np.ndarray, prefix: str = "") -> list[Path]:
    """uint8 [G,H,W,3] as PNG files; returns their paths. Raises ConfigError where they cannot be written."""
    from PIL import Image

    paths = [folder / f"{prefix}{index:02d}.png" for index in range(len(images))]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, image in zip(paths, images, strict=True):
            Image.fromarray(image).save(path)
    except OSError as error:
        raise ConfigError("--out", f"{folder} cannot be written: {error.strerror}", "name another folder") from error
    return paths


def _row(row: GroupRow) -> Json:
    """A group's row as JSON, with seconds between its times instead of most of them."""
    return {
        "group": row.group_id, "state": row.state.value, "reason": row.reason.value if row.reason else None,
        "source": row.source.value, "size": row.group_size, "position": row.position, "attempt": row.attempt,
        "version": row.weight_version, "step": row.step, "staleness": row.staleness, "actor": row.actor,
        "vault": row.vault, "stored": row.stored, "bytes": row.num_bytes, "failures": row.failures,
        "admitted_at": row.admitted_at, "lease_deadline": row.lease_deadline,
        "paint_seconds": row.paint_seconds, "store_seconds": row.store_seconds,
        "wait_weights_seconds": row.wait_weights_seconds,
        "until_painted_seconds": _between(row.admitted_at, row.generated_at),
        "until_scored_seconds": _between(row.generated_at, row.ready_at),
        "until_trained_seconds": _between(row.ready_at, row.trained_at),
    }  # fmt: skip


def _where(row: GroupRow) -> str:
    """One sentence: where the group is or went, and why."""
    if row.state is GroupState.DISCARDED:
        return f"discarded: {row.reason.value if row.reason else 'no reason kept'}"
    if row.state is GroupState.TRAINED:
        return f"trained in step {row.step}, {row.staleness} steps after its weights"
    if row.worker is not None:
        return f"{row.state.value}, leased to {row.worker}"
    return {
        GroupState.ADMITTED: "waits to be painted",
        GroupState.GENERATED: "waits for the jury",
        GroupState.SCORING: "is with the jury",
        GroupState.READY: "waits for the learner",
        GroupState.CLAIMED: "is being trained",
    }.get(row.state, row.state.value)


def _seeds(folder: RunFolder, row: GroupRow) -> list[int] | None:
    """Initial-noise seeds as actors derive them from the run's seed; None where that cannot be read."""
    try:
        seed = yaml.safe_load(folder.config.read_text())["seed"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return None
    if row.source is not Source.ACTORS:
        return None
    return [derive_seed(int(seed), Stream.INIT_NOISE, row.group_id, index) for index in range(row.group_size)]


def _painted_with(header: GroupHeader | None) -> Json | None:
    if header is None:
        return None
    return {
        "sampler": header.sampler, "params": header.sampler_params, "guidance_scale": header.guidance_scale,
        "steps": max(0, len(header.sigmas) - 1), "stochastic_steps": list(header.step_indices),
        "micro_batches": list(header.micro_batches),
    }  # fmt: skip


def _why_no_images(folder: RunFolder, row: GroupRow, stored: bool) -> str:
    if stored:
        return "this painting has no images: its source needs none for the jury"
    if row.paint_attempt is None:
        return "it was not painted yet"
    if not row.stored:
        return NOT_STORED
    if folder.url is not None:
        return "vaults stay on the machines of the run and are not mirrored"
    return "its vault's file is not in this folder"


def _mean_reward(ledger: LedgerFacts, group_id: int) -> float | None:
    values = [value for value in ledger.rewards(group_id).get("values") or [] if value is not None]
    return float(np.mean(values)) if values else None


def _table(table: ScoreTable) -> Json:
    return {
        "kind": table.kind, "version": table.version, "columns": list(table.columns),
        "values": _finite(table.values.tolist()), "outcomes": _outcomes(table.outcomes),
        "reasons": list(table.reasons), "step_ids": list(table.step_ids),
    }  # fmt: skip


def _outcomes(outcomes: np.ndarray) -> Any:
    names = np.array([outcome.name.lower() for outcome in Outcome])
    return names[outcomes.astype(int)].tolist()


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value if math.isfinite(value) else None


def _event(event: Event) -> Json:
    return {"at": event.at, "event": event.event, "attempt": event.attempt, "detail": event.detail}


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else round(end - start, 4)
