"""How every benchmark measures: interleaved pairs, wall and processor time, medians with their interval, one thread;
and a Ray of its own where one is needed without a whole run.

Does not own: what is measured (one file each), the report (report.py).
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from contracts.config import RunConfig


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


def rising(values: Sequence[float]) -> list[float]:
    """The rising sequence closest to `values` by least squares (isotonic regression, pool adjacent violators)."""
    pools: list[tuple[float, int]] = []
    for value in values:
        mean, number = float(value), 1
        while pools and pools[-1][0] > mean:
            before, of_before = pools.pop()
            mean, number = (before * of_before + mean * number) / (of_before + number), of_before + number
        pools.append((mean, number))
    return [mean for mean, number in pools for _ in range(number)]


def first_reached(times: Sequence[float], values: Sequence[float], level: float) -> float | None:
    """The time at which straight lines between points first reach `level`; None when they never do."""
    if values[0] >= level:
        return times[0]
    for (start, low), (end, high) in pairwise(zip(times, values, strict=True)):
        if high >= level:
            return start + (end - start) * (level - low) / (high - low)
    return None


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


def controller_run(
    config: RunConfig, parts: Mapping[str, str], environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The summary of a whole run on a Ray of its own, with other classes in the place of painter or learner.

    parts: targets by field of cluster.controller.Parts;
    environment: variables of every process of the run, beside those that any run has.
    """
    from cluster.driver import start_ray, worker_environment

    start_ray(config)  # before Ray is imported, as it sets the authentication that Ray reads then
    import ray

    from cluster.controller import ControllerActor, Parts

    try:
        variables = {**worker_environment(config), **(environment or {})}
        actor: Any = ControllerActor
        controller = actor.options(runtime_env={"env_vars": variables}).remote(config, Parts(**parts))
        summary: dict[str, Any] = ray.get(controller.run.remote())
        return summary
    finally:
        ray.shutdown()
