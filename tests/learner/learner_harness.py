"""What the learner's tests share: a miniature run's configuration, painted groups, and ranks as processes.

Groups are painted by the real painter with the miniature model; rewards are given by the test. Ranks are spawned
processes that meet on the loopback. Does not own: the assertions.
"""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing

from contracts.config import RunConfig
from contracts.config.load import config_from_tree
from contracts.wire import GroupHeader, PromptSpec, PromptTask, StepReport
from learner.engines.deepspeed import deepspeed_usable
from learner.types import Rewards, StepJob

CAPTIONS = ("a red circle", "a blue square", "two green circles", "a circle", "a square")


def make_config(
    folder: Path | str,
    objective: Mapping[str, Any],
    *,
    learner: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
    sampler: Mapping[str, Any] | None = None,
    rollout: Mapping[str, Any] | None = None,
    max_staleness: int = 0,
) -> RunConfig:
    """A run on the model folder: 4 steps, groups of 4 painted in twos, one plain rank unless said otherwise."""
    tree = {
        "name": "test",
        "model": {"path": str(folder), "device": "cpu", **(model or {})},
        "objective": dict(objective),
        "scorers": [{"name": "given", "urls": ["http://127.0.0.1:1"]}],
        "stop": {"steps": 1},
        "rollout": {"groups_per_step": 3, "group_size": 4, "micro_batch": 2, **(rollout or {})},
        "sampler": {"steps": 4, **(sampler or {})},
        "learner": {"engine": "plain", "optimizer": {"lr": 1e-3}, "hang_timeout_s": 120.0, **(learner or {})},
        "pipeline": {"max_staleness": max_staleness},
    }
    return config_from_tree(tree)


@dataclass
class Painted:
    """Groups as a vault would hold them, with the fetch functions a learner calls."""

    headers: dict[int, GroupHeader]
    arrays: dict[int, dict[str, np.ndarray]]
    embeddings: dict[str, dict[str, np.ndarray]]

    def fetch(self, group_id: int, names: tuple[str, ...], samples: slice) -> dict[str, np.ndarray]:
        return {name: self.arrays[group_id][name][samples] for name in names}

    def fetch_embedding(self, digest: str) -> dict[str, np.ndarray]:
        return self.embeddings[digest]

    def train(self, learner: Any, job: StepJob) -> StepReport:
        """One learner step on these groups."""
        report: StepReport = learner.update(job, self.fetch, self.fetch_embedding)
        return report


def paint_groups(painter: Any, num_groups: int, first_id: int = 0, captions: Sequence[str] = CAPTIONS) -> Painted:
    """Groups first_id, first_id + 1, ..., painted with the weights the painter holds."""
    painted = Painted({}, {}, {})
    for group_id in range(first_id, first_id + num_groups):
        task = PromptTask(
            group_id=group_id, attempt=0, prompt=PromptSpec(text=captions[group_id % len(captions)]),
            group_size=painter.config.rollout.group_size, min_version=0, deadline_s=60.0,
        )  # fmt: skip
        group = painter.finish(painter.denoise(task))
        painted.headers[group_id], painted.arrays[group_id] = group.header, group.arrays
        painted.embeddings.update(group.embeddings)
    return painted


def paint_with(config: RunConfig, num_groups: int) -> Painted:
    """Groups painted here by a painter of `config`, on one thread."""
    from actors.painter import Painter

    torch.set_num_threads(1)
    return paint_groups(Painter(config), num_groups)


def engine_section(stage: int | None) -> dict[str, Any]:
    """`learner` settings of DeepSpeed at a ZeRO stage; None: the plain engine."""
    return {"engine": "plain"} if stage is None else {"engine": "deepspeed", "zero_stage": stage}


def seeded_rewards(painted: Painted, invalid: Mapping[int, Sequence[int]] | None = None) -> dict[int, Rewards]:
    """Standard normal rewards by group id; `invalid` names samples without a score."""
    rewards = {}
    for group_id, header in painted.headers.items():
        values = np.random.default_rng(group_id).normal(size=header.group_size)
        valid = np.ones(header.group_size, bool)
        valid[list((invalid or {}).get(group_id, []))] = False
        values[~valid] = np.nan
        rewards[group_id] = Rewards(values, valid, np.zeros(header.group_size))
    return rewards


def job_of(
    config: RunConfig, painted: Painted, rewards: Mapping[int, Rewards], learner: Any = None, *, step: int = 1,
    version: int = 0,
) -> StepJob:  # fmt: skip
    """The step's job through the real credit and plan; `learner` gives the critic's values where there is one."""
    from cluster.step import draft_job, make_credit, make_job
    from contracts.needs import objective_needs

    values = None
    if objective_needs(config).critic:
        draft = draft_job(step, version, painted.headers, config)
        values = learner.values(draft, painted.fetch, painted.fetch_embedding)
    return make_job(step, version, painted.headers, rewards, config, make_credit(config), values)


def with_advantages(job: StepJob, change: Callable[[int, np.ndarray], np.ndarray]) -> StepJob:
    """The job with each group's advantages replaced by change(group_id, advantages)."""
    changed = {group_id: change(group_id, values) for group_id, values in job.credit.advantages.items()}
    return replace(job, credit=replace(job.credit, advantages=changed))


def weights_of(learner: Any, kind: str = "param") -> dict[str, np.ndarray]:
    """Whole fp32 tensors by name. Collective."""
    names = learner.engine.named_trainable()
    return {name: learner.engine.full_tensor(name, kind).float().cpu().numpy().copy() for name in names}


# -- ranks as processes

needs_deepspeed = pytest.mark.skipif(not deepspeed_usable()[0], reason=deepspeed_usable()[1])


def run_ranks(world_size: int, work: Callable[..., Any], *args: Any, timeout_s: float = 240.0) -> list[Any]:
    """work(rank, world_size, *args) in a process each, with a rendezvous on the loopback; their results by rank.

    `work` must be importable. Raises RuntimeError with the traceback of the first rank that failed.
    """
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    port = free_port()
    processes = [
        context.Process(target=_rank_main, args=(rank, world_size, port, results, work, args))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    by_rank: dict[int, Any] = {}
    try:
        while len(by_rank) < world_size:
            rank, failure, result = results.get(timeout=timeout_s)
            if failure is not None:
                raise RuntimeError(f"rank {rank} failed:\n{failure}")
            by_rank[rank] = result
    finally:
        for process in processes:
            process.join(timeout=20 if len(by_rank) == world_size else 0.1)
            if process.is_alive():
                process.kill()
                process.join()
    return [by_rank[rank] for rank in range(world_size)]


def _rank_main(rank: int, world_size: int, port: int, results: Any, work: Callable[..., Any], args: Any) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank), PYTHONWARNINGS="ignore",
    )  # fmt: skip
    torch.set_num_threads(1)
    try:
        results.put((rank, None, work(rank, world_size, *args)))
    except BaseException:
        results.put((rank, traceback.format_exc(), None))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def free_port() -> int:
    """A TCP port that nobody on this machine listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
