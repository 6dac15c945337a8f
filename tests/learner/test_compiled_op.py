"""A killed builder leaves torch's guard file behind; nobody may wait for it."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

from learner.engines.compiled_op import remove_dead_guards, sole_builder


def _hold(path: Path, ready: multiprocessing.synchronize.Event) -> None:
    with sole_builder(path):
        ready.set()
        signal.pause()


def test_the_lock_dies_with_its_holder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(tmp_path / "lock", ready))
    holder.start()
    assert ready.wait(20)
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with sole_builder(tmp_path / "lock"):
        pass


def test_guards_of_a_dead_build_are_removed_and_nothing_else(tmp_path: Path) -> None:
    build, other = tmp_path / "py311_cpu" / "op", tmp_path / "py311_cpu" / "other"
    for folder in (build, other):
        folder.mkdir(parents=True)
        (folder / "lock").touch()
    (build / "op.so").touch()
    assert remove_dead_guards(tmp_path, "op") == [build / "lock"]
    assert (build / "op.so").exists()
    assert (other / "lock").exists()
