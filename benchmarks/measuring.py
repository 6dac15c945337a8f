"""How every benchmark measures: interleaved pairs, wall and processor time, medians with their interval, one thread;
and a Ray of its own where one is needed without a whole run.

Does not own: what is measured (one file each), the report (report.py).
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np


def median(values: list[float]) -> dict[str, float]:
    """Median and its 95 % interval: the order statistics that a fair coin tossed n times lies between."""
    ordered = sorted(values)
    rank = max(0, int(np.floor(len(ordered) / 2 - 0.98 * np.sqrt(len(ordered)))))
    return {"median": float(np.median(ordered)), "low": ordered[rank], "high": ordered[len(ordered) - 1 - rank]}


def interleaved(
    first: Callable[[], object], second: Callable[[], object], repeats: int
) -> dict[str, list[tuple[float, float]]]:
    """Seconds of (first, second) by 'wall' and 'cpu', the first of a pair in turn, after two calls of each.

    cpu: of this process alone, all its threads, which a busy machine disturbs less than the clock on the wall.
    """
    for _ in range(2):
        first()
        second()
    pairs: dict[str, list[tuple[float, float]]] = {"wall": [], "cpu": []}
    for repeat in range(repeats):
        timed = {which: _time(which) for which in ((first, second) if repeat % 2 == 0 else (second, first))}
        for index, kind in enumerate(("wall", "cpu")):
            pairs[kind].append((timed[first][index], timed[second][index]))
    return pairs


def ratios(pairs: list[tuple[float, float]]) -> list[float]:
    """first over second, pair by pair."""
    return [ours / theirs for ours, theirs in pairs]


def _time(work: Callable[[], object]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def local_ray(num_cpus: int, object_store_mb: int) -> Iterator[None]:
    """A Ray for this benchmark alone, with token authentication, whose workers find Salon."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # before Ray is imported: it reads the mode then
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    environment = {"PYTHONPATH": str(Path(__file__).resolve().parent.parent), "OMP_NUM_THREADS": "1"}
    ray.init(
        address="local", num_cpus=num_cpus, include_dashboard=False, log_to_driver=False, logging_level="WARNING",
        object_store_memory=object_store_mb * 2**20, runtime_env={"env_vars": environment},
    )  # fmt: skip
    try:
        yield
    finally:
        ray.shutdown()
