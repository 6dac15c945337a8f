"""Where the replicas of deployed scorers tell their series: each at an address of its own, not behind Serve's proxies.

Invariant: whoever asks waits ANSWER_S at most; a round without an answer keeps what was known. A replica's address
never changes, so each is asked once.
Does not own: the exporter (telemetry/process.py), who reads the addresses (telemetry/targets.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

from cluster.deployed.names import serve_details
from contracts.errors import ConfigError

ANSWER_S = 2.0
_NAMESPACE = "serve"


class ReplicaAddresses:
    """Of the deployments that a run asks, as they come and go. Lives in one event loop."""

    def __init__(self) -> None:
        self._of_replica: dict[str, str] = {}  # by the name of its actor
        self._known: dict[str, list[str]] = {}
        self._asking: asyncio.Task[dict[str, list[str]]] | None = None

    async def of(self, names: Collection[str]) -> Mapping[str, list[str]]:
        """host:port of each replica that runs, by the name of its deployment."""
        from ray.exceptions import RayError

        if not names:
            return {}
        if self._asking is None:
            self._asking = asyncio.create_task(asyncio.to_thread(self._ask, frozenset(names)))
        done, _ = await asyncio.wait([self._asking], timeout=2 * ANSWER_S)
        if done:
            asked, self._asking = self._asking, None
            with suppress(ConfigError, RayError):  # Ray Serve is away for the moment
                self._known = asked.result()
        return self._known

    def _ask(self, names: Collection[str]) -> dict[str, list[str]]:
        """In a thread: Ray Serve's own call waits for its controller."""
        applications = serve_details("scorers")["applications"]
        running = {name: _running(applications[name]) for name in sorted(names) if name in applications}
        every = [replica for replicas in running.values() for replica in replicas]
        self._of_replica = {one: address for one, address in self._of_replica.items() if one in every}
        self._of_replica |= _said([one for one in every if one not in self._of_replica])
        return {
            name: [self._of_replica[one] for one in replicas if one in self._of_replica]
            for name, replicas in running.items()
        }


def _running(application: Mapping[str, Any]) -> list[str]:
    """Names of the actors that are its replicas."""
    replicas = [replica for one in application["deployments"].values() for replica in one["replicas"]]
    return [replica["actor_name"] for replica in replicas if replica["state"] == "RUNNING"]


def _said(actors: Collection[str]) -> dict[str, str]:
    """What each replica says of its exporter; those that do not answer in time, or have none, are left out."""
    import ray
    from ray.exceptions import RayError

    from cluster.processes import describe_process

    asked = {}
    for name in actors:
        try:
            asked[ray.get_actor(name, namespace=_NAMESPACE).__ray_call__.remote(describe_process)] = name
        except ValueError:
            continue  # it has just ended
    ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S) if asked else ([], [])
    found = {}
    for ref in ready:
        try:
            said = ray.get(ref)
        except RayError:
            continue
        if said["metrics"]:
            found[asked[ref]] = str(said["metrics"])
    return found
