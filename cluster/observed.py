"""Series that nobody reports unasked: the dispatcher's counters, bytes in vaults, memory and address of processes.

Asked for every few seconds, beside the run; an answer that does not come in time is left out until the next round. Also
what scorers say of themselves, for the manifest.
Does not own: series reported where things happen (the loops), the catalogue (contracts/metrics.py).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import psutil
import ray

from cluster.context import RunContext
from cluster.deployed.seen import ReplicaAddresses
from cluster.processes import describe_process
from cluster.telemetry.targets import TargetFile, reachable
from contracts.config import RunConfig
from contracts.config.scoring import ScorerConfig
from contracts.scores import ScorerInfo

ANSWER_S = 2.0
INFO_S = 1.5
"""Of a reward server, within the dispatcher's."""


async def export_observed(context: RunContext, dispatcher: Any, processes: Sequence[Mapping[str, Any]]) -> None:
    """One round over everything observed."""
    stats, *held = await asyncio.gather(
        _answer(dispatcher.stats.remote()), *(_answer(vault.bytes_held.remote()) for vault in context.vaults.values())
    )
    if stats is not None:
        _export_clients(context, stats)
    _export_vaults(context, [each for each in held if each is not None])
    _export_memory(context, processes)


class JuryRecord:
    """Keeps in manifest.json what each scorer says of itself: version, range, direction, digest of its weights.

    Asked until every scorer has answered, and again when the run has seen a score of another version.
    """

    def __init__(self, context: RunContext, dispatcher: Any) -> None:
        self._context, self._dispatcher = context, dispatcher
        self._seen: dict[str, str] | None = None  # versions of scores when all of them had last answered

    async def note(self) -> None:
        """Bring the manifest up to date, if there is reason to."""
        seen = dict(self._context.scorer_versions)
        if seen == self._seen:
            return
        infos = await _answer(self._dispatcher.infos.remote(INFO_S))
        if not infos:
            return
        self._context.folder.update_manifest(scorers={name: _recorded(info) for name, info in infos.items()})
        if infos.keys() == {scorer.name for scorer in self._context.config.scorers}:
            self._seen = seen


def _recorded(info: ScorerInfo) -> dict[str, Any]:
    return {
        "version": info.version, "value_range": list(info.value_range), "higher_is_better": info.higher_is_better,
        "weight_digest": info.weight_digest,
    }  # fmt: skip


class Finder:
    """Knows every process of the run and tells Prometheus where they are."""

    def __init__(self, config: RunConfig) -> None:
        self.targets = TargetFile(config)
        self.replicas = ReplicaAddresses()
        self._known: dict[str, dict[str, Any]] = {}

    async def find(
        self, context: RunContext, handles: Mapping[str, Any], scorers: Sequence[ScorerConfig]
    ) -> list[dict[str, Any]]:
        """What each process says of itself (describe_process, with its name); of a silent one what it said last."""
        names = list(handles)
        said = await asyncio.gather(
            *(_answer(handle.__ray_call__.remote(describe_process)) for handle in handles.values())
        )
        latest = {name: self._known.get(name) if one is None else one for name, one in zip(names, said, strict=True)}
        self._known = {name: {**one, "name": name} for name, one in latest.items() if one is not None}
        address = context.telemetry.address.removeprefix("http://").removesuffix("/metrics")
        found = {**describe_process(), "name": "controller"}
        found["metrics"] = reachable(address, ray.util.get_node_ip_address()) if address else None
        self._known["controller"] = found
        replicas = await self.replicas.of({name for scorer in scorers for name in scorer.deployments})
        self._tell(context, {scorer.name: _addresses(scorer, replicas) for scorer in scorers})
        return list(self._known.values())

    def _tell(self, context: RunContext, servers: Mapping[str, Sequence[str]]) -> None:
        try:
            self.targets.write(self._known.values(), servers)
        except OSError as error:
            context.telemetry.event("targets_not_written", path=str(self.targets.path), error=str(error))

    def close(self) -> None:
        """The run has ended: nothing of it is to be scraped."""
        with contextlib.suppress(OSError):  # of a folder that cannot be written any more
            self.targets.remove()


def _addresses(scorer: ScorerConfig, replicas: Mapping[str, Sequence[str]]) -> list[str]:
    """Where its servers tell their series: at their URLs, and each replica behind a deployment's name by itself."""
    alone = [url for url in scorer.urls if url not in scorer.deployments]
    return alone + [f"http://{address}" for name in scorer.deployments for address in replicas.get(name, ())]


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
    """Resident memory of the run's processes: as they say, or by their pid where they are on this node."""
    here = ray.get_runtime_context().get_node_id()
    for process in processes:
        if process.get("node") != here and "memory_bytes" not in process:
            continue
        try:
            memory = process.get("memory_bytes") or psutil.Process(process["pid"]).memory_info().rss
        except psutil.Error:
            continue  # it has ended; its successor is in the next list
        context.telemetry.gauge("salon_process_memory_bytes", memory, process=process["name"])
