"""Disks for tests that get full or read-only: a file system of a few megabytes, and a folder mounted read-only.

Mounting takes root; where it is not permitted the test is skipped with the reason.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

BLOCK, CHUNK = 4096, 2**20


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """`folder` as a file system of its own that holds so many MiB."""
    folder.mkdir(parents=True, exist_ok=True)
    _mount("-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(folder))
    try:
        yield folder
    finally:
        _unmount(folder)


@contextmanager
def read_only(folder: Path) -> Iterator[Path]:
    """`folder` where nobody can write: mounted so for root, else by its mode."""
    if os.geteuid() != 0:
        folder.chmod(0o555)
        try:
            yield folder
        finally:
            folder.chmod(0o755)
        return
    _mount("--bind", str(folder), str(folder))
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True, capture_output=True)
        yield folder
    finally:
        _unmount(folder)


def fill(folder: Path, leave: int = 0) -> Path:
    """Take all room but `leave` bytes of the file system `folder` is on; returns the file that took it: delete it."""
    ballast = folder / "ballast.tmp"
    with ballast.open("wb", buffering=0) as file:
        try:
            while (free := shutil.disk_usage(folder).free - leave) > 0:
                file.write(bytes(CHUNK if free > CHUNK else BLOCK))
        except OSError:
            pass  # that was the last of it
    return ballast


def _mount(*arguments: str) -> None:
    if shutil.which("mount") is None:
        pytest.skip("there is no `mount` here")
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")


def _unmount(folder: Path) -> None:
    """Lazily: a process of the run that has not ended yet may have a file open."""
    subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)
