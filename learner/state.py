"""The learner's state on disk: canonical by parameter name, so that any engine, stage and number of ranks loads it.

    <folder>/state.json            format, counters, the objective's own state, what the tensors below are of
    <folder>/param.safetensors     fp32 master weights of all trained parameters ("critic." before the critic's)
    <folder>/exp_avg.safetensors, exp_avg_sq.safetensors        AdamW's moments
    <folder>/snapshot-<name>.safetensors                        each snapshot, fp32

Tensors are collected one at a time and handed to a thread that writes them (state_writer.py), so a step waits for the
copies to host memory, not for the disk. There is no state of a random number generator to keep: every random number
is derived from the run's seed and ids (contracts/seeds.py), which the run's configuration and ledger hold.

Does not own: the rest of a checkpoint, when it is written and which is kept (cluster/checkpoints).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from contracts.errors import LearnerError
from learner.distributed import barrier
from learner.engines.base import TENSOR_KINDS, Engine, TensorKind
from learner.snapshots import Snapshots
from learner.state_writer import NothingToWrite, PendingSave, StateWriter, folder_to_disk

FORMAT = 1
STATE_FILE = "state.json"


def begin_save(
    folder: Path, engine: Engine, snapshots: Snapshots, extra: dict[str, Any], rank: int, stage_bytes: int
) -> PendingSave:
    """Hand the state as it is now to the writer of `folder`, an empty or new one; the writing goes on beside training.

    Collective; rank 0 writes. At most stage_bytes wait in host memory for the disk: a larger state is written partly
    within this call. The folder is complete, and on disk, when finish() of what is returned has returned.
    """
    pending: PendingSave = StateWriter(folder, stage_bytes) if rank == 0 else NothingToWrite()
    names = list(engine.named_trainable())
    shapes = {name: engine.shape(name) for name in names}
    try:
        for kind in TENSOR_KINDS:
            pending.tensors(f"{kind}.safetensors", shapes, partial(_array_of_engine, engine, kind))
        for held in snapshots.names:
            pending.tensors(f"snapshot-{held}.safetensors", shapes, partial(_array_of_snapshot, snapshots, held))
    except BaseException:
        pending.abandon()
        raise
    described = {
        "format": FORMAT, "optimizer_steps": engine.optimizer_steps, "snapshots": list(snapshots.names), **extra,
    }  # fmt: skip
    pending.text(STATE_FILE, json.dumps(described, indent=1))
    return pending


def save_state(
    folder: Path, engine: Engine, snapshots: Snapshots, extra: dict[str, Any], rank: int, world_size: int
) -> None:
    """Write the state whole or not at all, and wait for it. An existing folder of the name is replaced. Collective."""
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    if rank == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
    try:
        begin_save(unfinished, engine, snapshots, extra, rank, stage_bytes=0).finish()
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    if rank == 0:
        _put_in_place(unfinished, folder)
    barrier(world_size)


def _put_in_place(unfinished: Path, folder: Path) -> None:
    replaced = folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    unfinished.rename(folder)
    folder_to_disk(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _array_of_engine(engine: Engine, kind: TensorKind, name: str) -> np.ndarray:
    return _host_copy(engine.full_tensor(name, kind))


def _array_of_snapshot(snapshots: Snapshots, held: str, name: str) -> np.ndarray:
    return _host_copy(snapshots.full_tensor(held, name))


def _host_copy(tensor: Tensor) -> np.ndarray:
    """fp32 on the host, and no memory that training goes on to change."""
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous().numpy()


def load_state(folder: Path, engine: Engine, snapshots: Snapshots) -> dict[str, Any]:
    """Load a state written by any engine at any number of ranks; returns state.json. Collective.

    A snapshot that the state lacks becomes a copy of its weights. Raises LearnerError for a folder that is no state,
    or one of another model.
    """
    described = read_description(folder)
    names = list(engine.named_trainable())
    for kind in TENSOR_KINDS:
        for name, tensor in _read(folder / f"{kind}.safetensors", names, engine):
            engine.load_full(name, kind, tensor)
    engine.set_optimizer_steps(int(described["optimizer_steps"]))
    for held in snapshots.names:
        if held not in described["snapshots"]:
            snapshots.reset(held)
            continue
        for name, tensor in _read(folder / f"snapshot-{held}.safetensors", names, engine):
            snapshots.load_full(held, name, tensor)
    return described


def read_description(folder: Path) -> dict[str, Any]:
    """state.json of a folder. Raises LearnerError where there is none that this version reads."""
    try:
        described: dict[str, Any] = json.loads((folder / STATE_FILE).read_text())
    except (OSError, ValueError) as error:
        raise LearnerError(f"{folder} is no learner state: {error}") from error
    if described.get("format") != FORMAT:
        raise LearnerError(f"{folder} has format {described.get('format')}, this version reads {FORMAT}")
    return described


def _read(path: Path, names: Iterable[str], engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file in the engine's order. Raises LearnerError unless names and shapes are the engine's."""
    wanted = list(names)
    try:
        with safe_open(path, framework="pt") as file:
            given = set(file.keys())
            missing, unknown = [n for n in wanted if n not in given], sorted(given - set(wanted))
            if missing or unknown:
                raise LearnerError(
                    f"{path} is of another model: it lacks {_few(missing)}, and has besides {_few(unknown)}"
                )
            for name in wanted:
                shape = tuple(file.get_slice(name).get_shape())
                if shape != engine.shape(name):
                    raise LearnerError(f"{path}: {name} has shape {shape}, this model's is {engine.shape(name)}")
                yield name, file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise LearnerError(f"{path} cannot be read: {error}") from error


def _few(names: list[str]) -> str:
    if not names:
        return "nothing"
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
