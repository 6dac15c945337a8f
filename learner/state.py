"""The learner's state on disk: canonical by parameter name, so that any engine, stage and number of ranks loads it.

    <folder>/state.json            format, counters, the objective's own state, what the tensors below are of
    <folder>/param.safetensors     fp32 master weights of all trained parameters ("critic." before the critic's)
    <folder>/exp_avg.safetensors, exp_avg_sq.safetensors        AdamW's moments
    <folder>/snapshot-<name>.safetensors                        each snapshot, fp32

Tensors are collected and written one at a time: no process ever holds a whole file of a partitioned model. A folder
appears whole or not at all (it is renamed into place once everything is on disk).

Does not own: when states are written and which is kept (cluster), the ledger, credit's state.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from contracts.errors import LearnerError
from learner.distributed import barrier
from learner.engines.base import TENSOR_KINDS, Engine, TensorKind
from learner.snapshots import Snapshots

FORMAT = 1
STATE_FILE = "state.json"


def save_state(
    folder: Path, engine: Engine, snapshots: Snapshots, extra: dict[str, Any], rank: int, world_size: int
) -> None:
    """Write the state; rank 0 writes, all take part. An existing folder of the name is replaced. Collective."""
    names = list(engine.named_trainable())
    shapes = {name: engine.shape(name) for name in names}
    with _new_folder(folder, rank) as new:
        for kind in TENSOR_KINDS:
            _write(new, f"{kind}.safetensors", shapes, partial(_tensor_of_engine, engine, kind))
        for held in snapshots.names:
            _write(new, f"snapshot-{held}.safetensors", shapes, partial(snapshots.full_tensor, held))
        if new is not None:
            described = {
                "format": FORMAT,
                "optimizer_steps": engine.optimizer_steps,
                "snapshots": list(snapshots.names),
                **extra,
            }
            (new / STATE_FILE).write_text(json.dumps(described, indent=1))
    barrier(world_size)


def _tensor_of_engine(engine: Engine, kind: TensorKind, name: str) -> Tensor:
    return engine.full_tensor(name, kind)


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


@contextmanager
def _new_folder(folder: Path, rank: int) -> Iterator[Path | None]:
    """On rank 0 a folder that is renamed to `folder` when all went well; None on the others."""
    if rank != 0:
        yield None
        return
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    for file in unfinished.iterdir():
        _to_disk(file)
    replaced = folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    unfinished.rename(folder)
    _to_disk(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(
    folder: Path | None, file_name: str, shapes: dict[str, tuple[int, ...]], tensor_of: Callable[[str], Tensor]
) -> None:
    """One safetensors file of fp32 tensors, written in turn as they come; every rank calls for every tensor.

    The format is a little-endian length, a JSON header with offsets, and the raw bytes: written here because the
    library's writer wants all tensors at once.
    """
    if folder is None:
        for name in shapes:
            tensor_of(name)
        return
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with (folder / file_name).open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in shapes:
            file.write(tensor_of(name).detach().to("cpu", torch.float32).contiguous().numpy().tobytes())


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
