"""The controller's parts of a checkpoint: ledger, bytes of live groups, run.json, manifest. Runs in a thread.

Order matters: the ledger first, then the bytes of the groups that this copy names. A group's bytes are deleted only
when a later checkpoint covers it, so what the copy names is still there.

Does not own: the learner's files (learner/state.py writes them into the same folder), renaming (keeper.py).
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from pathlib import Path

from cluster.checkpoints.layout import (
    GROUPS,
    LEDGER,
    RUN,
    RunState,
    digest_file,
    write_manifest,
    write_run_state,
)
from cluster.ledger.reader import GroupRow, LedgerReader
from cluster.vault_files import embedding_file, group_file, read_header
from contracts.errors import NotStored
from learner.state_writer import FileDigests, folder_to_disk

ReadFromVault = Callable[[str, str], bytes]
"""(vault, file name) -> the file's bytes; raises NotStored. For vaults on other machines."""


def assemble(
    folder: Path,
    state: RunState,
    ledger: Path,
    vault_folders: Mapping[str, Path],
    read_from_vault: ReadFromVault,
    of_learner: FileDigests,
    online: Mapping[str, Path] | None = None,
) -> None:
    """Add everything to the folder that holds the learner's files already, all of it on disk at the end.

    online: files of reward models that learn beside the run, by their names in the checkpoint.
    """
    copy_ledger(ledger, folder / LEDGER)
    with closing(LedgerReader(folder / LEDGER)) as copy:
        rows = copy.needed_after(state.step)
    (folder / GROUPS).mkdir(exist_ok=True)
    names = [name for row in rows for name in _copy_group(row, folder / GROUPS, vault_folders, read_from_vault)]
    write_run_state(folder, state)
    for name, source in (online or {}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / name)
    own = [LEDGER, RUN, *(online or {}), *(f"{GROUPS}/{name}" for name in sorted(set(names)))]
    for name in own:
        _file_to_disk(folder / name)
    write_manifest(folder, state, {**of_learner, **{name: digest_file(folder / name) for name in own}})
    _file_to_disk(folder / "manifest.json")
    for each in (folder / GROUPS, folder):
        folder_to_disk(each)


def copy_ledger(live: Path, target: Path) -> None:
    """A consistent copy of a ledger that is being written, by SQLite's backup."""
    with closing(sqlite3.connect(live)) as source, closing(sqlite3.connect(target)) as copy:
        source.backup(copy)
        copy.execute("PRAGMA journal_mode = DELETE")


def _copy_group(
    row: GroupRow, target: Path, vault_folders: Mapping[str, Path], read_from_vault: ReadFromVault
) -> Iterable[str]:
    """Bring a group's file and its embeddings; the names. What a vault has lost is left out: it is painted again."""
    assert row.vault is not None
    assert row.paint_attempt is not None
    name = group_file(row.group_id, row.paint_attempt)
    try:
        _bring(name, target, row.vault, vault_folders, read_from_vault)
        header = read_header(target / name)
        digests = dict.fromkeys([header.prompt_digest, *filter(None, [header.negative_digest])])
        names = [embedding_file(digest) for digest in digests]
    except NotStored:
        (target / name).unlink(missing_ok=True)
        return []
    brought = [name]
    for each in names:
        try:
            _bring(each, target, row.vault, vault_folders, read_from_vault)
            brought.append(each)
        except NotStored:
            continue  # a group painted by the learner itself has none
    return brought


def _bring(
    name: str, target: Path, vault: str, vault_folders: Mapping[str, Path], read_from_vault: ReadFromVault
) -> None:
    """A hard link where the vault is on this file system (files are never changed, only replaced), else a copy."""
    if (target / name).exists():
        return
    source = vault_folders[vault] / name
    try:
        os.link(source, target / name)
    except FileNotFoundError:
        (target / name).write_bytes(read_from_vault(vault, name))
    except OSError:
        shutil.copyfile(source, target / name)


def _file_to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
