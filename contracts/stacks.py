"""Lets a process be asked where it stands: on SIGUSR1 it writes the stacks of all its threads into a file of its own.

Every process of a run registers itself first of all, reward servers and their scoring processes too; SALON_STACKS,
which children inherit, names the folder. Invariant: the file says host, pid and start of its process, so that whoever
sends the signal (cluster/telemetry/watchdog.py) can tell that the process still is the one that registered.
Does not own: when stacks are dumped, and what becomes of them.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TextIO

STACKS_ENV = "SALON_STACKS"

_files: dict[str, TextIO] = {}  # kept open: faulthandler writes to the file descriptor from the signal handler


def register(name: str) -> None:
    """Dump this process's stacks into SALON_STACKS/<name>-<pid>.txt on request; nothing where the variable is unset."""
    folder = os.environ.get(STACKS_ENV)
    if folder:
        with contextlib.suppress(OSError):
            install(Path(folder, f"{name}-{os.getpid()}.txt"))


def install(path: str | Path) -> None:
    """Have this process dump the stacks of all its threads into `path` on SIGUSR1. Raises OSError."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("w", encoding="utf-8")
    file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": started(os.getpid())}) + "\n")
    file.flush()
    faulthandler.register(signal.SIGUSR1, file=file, all_threads=True, chain=False)
    previous = _files.pop("stacks", None)
    _files["stacks"] = file
    if previous is not None:
        previous.close()


def started(pid: int) -> str:
    """When a process began, in words that only it answers to: no other process of this boot has its pid and this.

    Raises OSError where there is no such process.
    """
    if sys.platform == "linux":
        stat = Path(f"/proc/{pid}/stat").read_text()
        return stat.rsplit(")", 1)[1].split()[19]  # starttime, in clock ticks since the machine booted
    told = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    if not told.stdout.strip():
        raise ProcessLookupError(f"no process {pid}")
    return told.stdout.strip()
