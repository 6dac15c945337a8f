"""The process of one online trainer: a Ray actor around reward_servers' OnlineLoop.

Copies of groups are taken from their vault here, so pixels pass neither the controller nor the dispatcher twice.
Does not own: learning (reward_servers/online, imported by name in this process alone), versions' use (online.py).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import ray

from contracts import registry
from contracts.config.online import TRAINERS
from contracts.errors import NotStored
from contracts.startup import collector_paused
from contracts.versions import Files, Version
from contracts.wire import GroupHeader

LABEL_THREADS = 4
"""Groups that a judge is asked about at once; within each, its scorer's `concurrency` holds."""


@ray.remote(num_cpus=0, max_restarts=0, max_concurrency=16)
class OnlineHost:
    """One trainer. `start` first; every other call may come at any time and from any thread."""

    def __init__(self, config: Any, options: Mapping[str, Any], seed: int, vaults: Mapping[str, Any]) -> None:
        """config: its section of the run's `online`; options: those of the scorer it trains."""
        from cluster.deployed.names import with_judge
        from cluster.processes import limit_threads, prepare_process

        prepare_process(f"online-{config.scorer}")
        with collector_paused():
            trainer = registry.import_target(TRAINERS[config.name])(with_judge(config), options, seed)
            loop = registry.import_target("reward_servers.online.loop:OnlineLoop")
        limit_threads(max(1, int(config.cpus)))
        self.loop: Any = loop(trainer, config.queue_groups, config.updates_per_step, LABEL_THREADS)
        self.vaults = dict(vaults)
        self.gone = 0

    def start(self, files: Files | None) -> tuple[Version, Files]:
        """Load, go on from a version if given; the version in force."""
        started: tuple[Version, Files] = self.loop.start(files)
        return started

    def roll_back(self, files: Files) -> None:
        self.loop.roll_back(files)

    def offer(self, vault: str, header: GroupHeader) -> None:
        """Take a copy of a group; one that its vault no longer has is counted as dropped."""
        group = registry.import_target("reward_servers.online.inbox:FedGroup")
        try:
            arrays = ray.get(self.vaults[vault].get.remote(header.group_id, ("images",)), timeout=30)
        except (ray.exceptions.RayError, NotStored):
            self.gone += 1
            return
        prompt = header.prompt
        self.loop.offer(
            group(header.group_id, prompt.text, arrays["images"].copy(), dict(prompt.metadata), header.weight_version)
        )

    def tick(self) -> None:
        """A learner step has ended."""
        self.loop.tick()

    def candidate(self, timeout_s: float) -> tuple[Version, Files] | None:
        """A version of what was learnt since the last one, None when nothing was."""
        found: tuple[Version, Files] | None = self.loop.candidate(timeout_s)
        return found

    def figures(self) -> dict[str, float]:
        found = dict(self.loop.figures())
        return {**found, "dropped": found["dropped"] + self.gone}

    def info(self) -> dict[str, Any]:
        return {"pid": os.getpid(), "node": ray.get_runtime_context().get_node_id()}

    def stop(self) -> None:
        self.loop.stop()
