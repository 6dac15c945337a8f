"""Watches the processes that every group passes through, vaults and dispatcher: who hangs is replaced.

Each is asked who it is, again and again. One that is alive and leaves a question unanswered for
cluster.hang_timeout_s is killed by its process id (a stopped process obeys nothing else); Ray starts it again, a vault
from what it has written through to disk, and calls to a vault are repeated by Ray, those to the dispatcher by their
callers.
Invariant: nobody waits for a hung vault or dispatcher for longer than that limit and a restart.
Does not own: actors (rollout_loop.py), ranks (learner_group.py), reward servers (workers.ServerHost, the clients).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.awake import within
from cluster.context import RunContext
from cluster.processes import describe_process
from cluster.refs import value
from contracts.errors import SalonError

RESTART_S = 120.0
"""Time a process that was replaced has to answer for the first time."""

KILL_S = 30.0
"""Time a task that kills a process on another node may take."""

MAX_REPLACED = 5
"""Replacements in a row, without one answer in between, that end the run."""


class HangWatch:
    """One coroutine a process."""

    def __init__(self, context: RunContext, handles: Mapping[str, Any]) -> None:
        """handles: Ray actors by name, each with max_restarts."""
        self.context, self.handles = context, dict(handles)
        self.limit_s = context.config.cluster.hang_timeout_s
        self.pause_s = min(5.0, self.limit_s / 4)
        self.replaced: dict[str, int] = dict.fromkeys(self.handles, 0)

    async def run(self) -> None:
        """Until cancelled, or until a process cannot be brought back (context.stop)."""
        try:
            await asyncio.gather(*(self._watch(name, handle) for name, handle in self.handles.items()))
        except SalonError as error:
            self.context.stop(error)

    async def _watch(self, name: str, handle: Any) -> None:
        process: dict[str, Any] | None = None
        in_a_row, limit_s = 0, RESTART_S
        while True:
            try:
                question = handle.__ray_call__.remote(describe_process)
                process = await within(value(question), limit_s)
                in_a_row, limit_s = 0, self.limit_s
            except TimeoutError:
                in_a_row += 1
                if in_a_row > MAX_REPLACED:
                    raise SalonError(
                        f"{name} hangs, and so did the {MAX_REPLACED} processes that replaced it"
                    ) from None
                await self._replace(name, handle, process, limit_s, in_a_row)
                limit_s = RESTART_S
            except RayError:  # it died, and Ray starts it again
                limit_s = RESTART_S
            await asyncio.sleep(self.pause_s)

    async def _replace(
        self, name: str, handle: Any, process: Mapping[str, Any] | None, after_s: float, in_a_row: int
    ) -> None:
        if process is None or not await kill_on_its_node(process):
            if in_a_row == 1:
                return  # the process is gone, so Ray is starting another, which may take longer than the limit
            ray.kill(handle, no_restart=False)
        self.replaced[name] += 1
        who = {key: process[key] for key in ("pid", "node")} if process is not None else {}
        self.context.telemetry.event("hung_process_replaced", process=name, seconds=after_s, **who)


async def kill_on_its_node(process: Mapping[str, Any]) -> bool:
    """Kill a process by its id: at once, a stopped one too. False when it was not there (any more), or its node does
    not answer. process: as describe_process tells."""
    pid, started = int(process["pid"]), float(process["started"])
    if process["node"] == ray.get_runtime_context().get_node_id():
        return kill_process(pid, started)
    on_its_node = NodeAffinitySchedulingStrategy(process["node"], soft=False)
    task = ray.remote(num_cpus=0, max_retries=0)(kill_process).options(scheduling_strategy=on_its_node)
    try:
        return bool(await asyncio.wait_for(value(task.remote(pid, started)), KILL_S))
    except (TimeoutError, RayError):
        return False


def kill_process(pid: int, started: float) -> bool:
    """SIGKILL for the process `pid` of this node, if it is still the one that started then."""
    import psutil

    with contextlib.suppress(psutil.Error, ProcessLookupError):
        if abs(psutil.Process(pid).create_time() - started) < 1.0:
            os.kill(pid, signal.SIGKILL)
            return True
    return False
