"""Versions of a scorer that is trained while a run asks it: files, names, digests, and the pointer to the one in use.

    <folder>/
      current.json               names the version in use; replaced by one rename
      v000003-5be0cd19/
        version.json             number, digest of the weights, facts (Version)
        weights.safetensors      what a scorer loads
        state.safetensors        what its trainer goes on from (moments, labels); servers never read it

Invariants: a version's folder appears by one rename, whole, and is never changed; its name carries the digest of its
weights, so equal names hold equal weights on every machine. Whoever flips the pointer decides when: servers follow it.
Does not own: what the tensors are (reward_servers/online), when the pointer flips (cluster/online.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, save

from contracts.errors import PayloadError
from contracts.wire import Message

POINTER, FACTS, WEIGHTS, STATE = "current.json", "version.json", "weights.safetensors", "state.safetensors"
FOR_SERVERS = (FACTS, WEIGHTS)
MAX_BYTES = 4 * 2**30

Files = dict[str, bytes]
"""A version as the bytes of its files, by name: how it crosses processes and machines."""


class Version(Message):
    """What is known of a version beside its tensors. facts: JSON values of the trainer that made it."""

    number: int = Field(ge=0)
    digest: str = Field(pattern=r"^[0-9a-f]{32}$", description="BLAKE2b of weights.safetensors")
    facts: dict[str, Any] = Field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"v{self.number:06d}-{self.digest[:8]}"


def pack(
    number: int, weights: Mapping[str, np.ndarray], state: Mapping[str, np.ndarray], facts: Mapping[str, Any]
) -> tuple[Version, Files]:
    """A version from its tensors."""
    blob = _save(weights)
    version = Version(number=number, digest=_digest(blob), facts=dict(facts))
    return version, {FACTS: version.model_dump_json().encode(), WEIGHTS: blob, STATE: _save(state)}


def unpack(files: Mapping[str, bytes]) -> tuple[Version, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(version, weights, state; empty without one) of a version's files. Raises PayloadError when they do not agree."""
    try:
        version = Version.model_validate_json(files[FACTS])
        if _digest(files[WEIGHTS]) != version.digest:
            raise PayloadError(f"{version.name}: {WEIGHTS} is damaged (its digest is another)")
        return version, load(files[WEIGHTS]), load(files[STATE]) if STATE in files else {}
    except (KeyError, ValidationError, SafetensorError) as error:
        raise PayloadError(f"no readable version: {' '.join(str(error).split())[:200]}") from error


def place(folder: Path, version: Version, files: Mapping[str, bytes]) -> Path:
    """Write a version's files unless they are there; returns its folder. On disk when this returns."""
    target = folder / version.name
    if (target / FACTS).is_file():
        return target
    partial = folder / f".{version.name}.{uuid.uuid4().hex[:8]}"
    partial.mkdir(parents=True)
    for name, blob in files.items():
        with (partial / name).open("wb") as file:
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())
    try:
        partial.rename(target)
    except OSError:  # another process of this machine was quicker, with the same bytes
        shutil.rmtree(partial, ignore_errors=True)
    return target


def read(folder: Path, name: str, names: tuple[str, ...] = (*FOR_SERVERS, STATE)) -> Files:
    """The files of a version, those that are there. Raises PayloadError when it is not, or is too large."""
    root = folder / name
    try:
        files = {each: root / each for each in names if (root / each).is_file()}
        if sum(path.stat().st_size for path in files.values()) > MAX_BYTES:
            raise PayloadError(f"{root} exceeds {MAX_BYTES} bytes")
        return {each: path.read_bytes() for each, path in files.items()}
    except OSError as error:
        raise PayloadError(f"{root} cannot be read ({error.strerror})") from error


def flip(folder: Path, name: str) -> None:
    """Make a version the one in use. Raises PayloadError when it is not in the folder."""
    if not (folder / name / FACTS).is_file():
        raise PayloadError(f"{folder} holds no version {name}")
    partial = folder / f".{POINTER}.{uuid.uuid4().hex[:8]}"
    partial.write_text(json.dumps({"version": name}) + "\n")
    partial.replace(folder / POINTER)


def current(folder: Path) -> str | None:
    """Name of the version in use, None before the first flip. Raises PayloadError for a pointer that names none."""
    try:
        name = json.loads((folder / POINTER).read_text())["version"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PayloadError(f"{folder / POINTER} names no version: {error}") from error
    if not isinstance(name, str) or "/" in name or name.startswith("."):
        raise PayloadError(f"{folder / POINTER} names no version: {name!r}")
    return name


def prune(folder: Path, keep: set[str]) -> None:
    """Remove versions that nothing needs any more."""
    for path in folder.glob("v*-*"):
        if path.name not in keep:
            shutil.rmtree(path, ignore_errors=True)


def _save(arrays: Mapping[str, np.ndarray]) -> bytes:
    return save({name: np.ascontiguousarray(array) for name, array in sorted(arrays.items())})


def _digest(blob: bytes) -> str:
    return hashlib.blake2b(blob, digest_size=16).hexdigest()
