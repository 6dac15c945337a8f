"""Says where every process stands when nothing moves.

Each of our processes writes its stacks into a file of its own on SIGUSR1 (contracts/stacks.py). When no step has ended
for `telemetry.watchdog_s`, the controller's Watchdog has every process of every node dump its threads' stacks and
collects the texts under <run>/stacks/.
Invariant: only a process that has registered is ever signalled (SIGUSR1 would kill any other): its file names host, pid
and start time, and all three must still hold.
Does not own: what is done about a stall (leases and hang timeouts elsewhere end it).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cluster import awake
from contracts.stacks import started

SETTLE_S = 1.0
"""Seconds a process gets to write its stacks."""

log = logging.getLogger("salon.watchdog")


def dump_folder(folder: str | Path, settle_s: float = SETTLE_S) -> dict[str, str]:
    """Have every process of this host that installed itself under `folder` dump its stacks; file name -> text."""
    signalled = {}
    for path in sorted(Path(folder).glob("*.txt")):
        pid = _registered_pid(path)
        if pid is not None:
            signalled[path] = path.stat().st_size
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)
    if signalled:
        time.sleep(settle_s)
    return {path.name: _after(path, size) for path, size in signalled.items()}


def dump_cluster(folder: str, timeout_s: float = 30.0) -> dict[str, str]:
    """The same on every living node of the Ray cluster; a node that does not answer in time is left out."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(dump_folder)
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    refs = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(folder)
        for node in nodes
    ]
    done, _ = ray.wait(refs, num_returns=len(refs), timeout=timeout_s)
    stacks: dict[str, str] = {}
    for ref in done:
        with contextlib.suppress(Exception):  # a node that died meanwhile has no stacks to show
            stacks.update(ray.get(ref))
    return stacks


class Watchdog:
    """Calls `dump` when `beat` was not heard for `limit_s`, once a stall, and writes what it yields to `folder`."""

    def __init__(
        self,
        limit_s: float,
        folder: str | Path,
        dump: Callable[[], Mapping[str, str]],
        on_stall: Callable[[Path, int], None] | None = None,
        poll_s: float | None = None,
    ) -> None:
        """on_stall(where the stacks are, number of processes) is told of each stall, from the watchdog's thread."""
        self.limit_s, self.folder, self._dump, self._on_stall = limit_s, Path(folder), dump, on_stall
        self._poll_s = poll_s if poll_s is not None else min(10.0, limit_s / 4)
        self._last = awake.clock()
        self._stalled = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.num_dumps = 0

    def start(self) -> None:
        self.beat()
        self._thread.start()

    def beat(self) -> None:
        """Something finished: the run moves."""
        self._last, self._stalled = awake.clock(), False

    def stop(self) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def _watch(self) -> None:
        while not self._ended.wait(self._poll_s):
            if not self._stalled and awake.clock() - self._last > self.limit_s:
                self._stalled = True
                try:
                    self._write(self._dump())
                except Exception as error:  # of Ray or the disk: the next stall is looked for all the same
                    log.warning("a stall's stacks were not written: %s", error)

    def _write(self, stacks: Mapping[str, str]) -> None:
        target = self.folder / time.strftime("%Y%m%d-%H%M%S")
        target.mkdir(parents=True, exist_ok=True)
        for name, text in stacks.items():
            (target / Path(name).name).write_text(text)
        self.num_dumps += 1
        if self._on_stall is not None:
            self._on_stall(target, len(stacks))


def _registered_pid(path: Path) -> int | None:
    """The living process of this host that wrote the file's first line, or None."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            header: Any = json.loads(file.readline())
        pid = int(header["pid"])
        same = header["host"] == socket.gethostname() and started(pid) == header["started"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return pid if same else None


def _after(path: Path, size: int) -> str:
    with path.open("rb") as file:
        file.seek(size)
        return file.read().decode(errors="replace")
