"""Series that nobody reports unasked: the dispatcher's counters, bytes in vaults, memory of processes.

Asked for every few seconds, beside the run; an answer that does not come in time is left out until the next round.
Does not own: series reported where things happen (the loops), the catalogue (contracts/metrics.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import psutil
import ray

from cluster.context import RunContext

ANSWER_S = 2.0


async def export_observed(context: RunContext, dispatcher: Any, processes: Sequence[Mapping[str, Any]]) -> None:
    """One round over everything observed."""
    stats, *held = await asyncio.gather(
        _answer(dispatcher.stats.remote()), *(_answer(vault.bytes_held.remote()) for vault in context.vaults.values())
    )
    if stats is not None:
        _export_clients(context, stats)
    _export_vaults(context, [each for each in held if each is not None])
    _export_memory(context, processes)


async def _answer(ref: Any) -> Any:
    try:
        return await asyncio.wait_for(asyncio.wrap_future(ref.future()), ANSWER_S)
    except (TimeoutError, ray.exceptions.RayError):
        return None


def _export_clients(context: RunContext, stats: Mapping[str, Any]) -> None:
    for scorer, counted in stats.items():
        context.telemetry.count_to("salon_score_retries_total", counted.retries, scorer=scorer)
        is_open = any(state == "open" for state in counted.breakers.values())
        context.telemetry.gauge("salon_breaker_open", float(is_open), scorer=scorer)


def _export_vaults(context: RunContext, held: Sequence[Mapping[str, int]]) -> None:
    for where in ("disk", "memory"):
        context.telemetry.gauge("salon_vault_bytes", sum(each[where] for each in held), where=where)


def _export_memory(context: RunContext, processes: Sequence[Mapping[str, Any]]) -> None:
    """Resident memory of the run's processes on this node."""
    here = ray.get_runtime_context().get_node_id()
    for process in processes:
        if process.get("node") != here:
            continue
        try:
            memory = psutil.Process(process["pid"]).memory_info().rss
        except psutil.Error:
            continue  # it has ended; its successor is in the next list
        context.telemetry.gauge("salon_process_memory_bytes", memory, process=process["name"])
