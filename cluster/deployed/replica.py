"""What runs in one replica: the same service and the same application that `python -m reward_servers serve` runs.

Ray Serve's proxy hands every request to some replica, which checks token and limits, batches and answers as it does
behind uvicorn. This package alone, of all cluster, imports the inside of the reward servers, since Ray is imported in
cluster alone (docs/decisions/0012).
Does not own: protocol, limits, batching (reward_servers), the number of replicas (scaling, Ray Serve).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from cluster.deployed.scaling import HELD
from cluster.telemetry import process
from contracts.errors import ScoringError
from reward_servers.app import Service, build_app
from reward_servers.construct import make_scorer
from reward_servers.settings import ServerSettings


class ScorerReplica:
    """One scorer in a process of its own. Ray Serve builds, probes, drains and replaces it."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, name: str, options: Sequence[str], settings: ServerSettings, token: str | None
    ) -> None:
        self.service = Service(make_scorer(name, options), settings, token)
        process.listen(settings.host, self.service.telemetry.registry)  # behind the proxy each scrape is another's
        self._batching = asyncio.create_task(self.service.batcher.run())
        await self.service.load()

    def __serve_build_asgi_app__(self) -> Any:
        return build_app(self.service)

    async def check_health(self) -> None:
        """Raises when one call of the scorer hangs, or nothing serves the queue: Serve then replaces the replica."""
        if self.service.batcher.busy_seconds > self.service.settings.stall_seconds:
            raise ScoringError("the scorer hangs")
        if self._batching.done():
            raise ScoringError("nothing serves the queue")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Images this replica holds; asked every Scaling.report_s."""
        return {HELD: float(self.service.batcher.held)}

    async def __del__(self) -> None:
        """Serve has waited for the answers that were due."""
        if hasattr(self, "_batching"):
            self._batching.cancel()
            self.service.batcher.close()
