"""The client for callers without an event loop: a learner rank that back-propagates a reward.

Does not own: anything but a thread with an event loop in it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from contracts.config.scoring import ScorerConfig
from contracts.declarations import ScorerGives
from contracts.scores import ScorerInfo, ScoreTable
from reward_servers.client.client import RewardClient
from reward_servers.client.function import FunctionScorer
from reward_servers.client.parts import Images
from reward_servers.client.stats import ClientStats

T = TypeVar("T")


class SyncRewardClient:
    """RewardClient (or a function's FunctionScorer) with blocking calls; the same arguments and the same promises."""

    def __init__(
        self, config: ScorerConfig, *, urls: Sequence[str] | None = None, gives: ScorerGives | None = None
    ) -> None:
        self.config = config
        self._client = FunctionScorer(config) if config.function else RewardClient(config, urls=urls, gives=gives)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name=f"reward-{config.name}")
        self._thread.start()

    @property
    def stats(self) -> ClientStats:
        return self._client.stats

    def info(self, deadline_s: float | None = None) -> ScorerInfo:
        return self._wait(self._client.info(deadline_s))

    def score(
        self,
        images: Images,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]],
        *,
        want_gradients: bool = False,
        deadline_s: float | None = None,
    ) -> ScoreTable:
        return self._wait(
            self._client.score(images, prompts, metadata, want_gradients=want_gradients, deadline_s=deadline_s)
        )

    def close(self) -> None:
        """Closes connections and ends the thread. Calling it again does nothing."""
        if self._loop.is_closed():
            return
        self._wait(self._client.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5)
        self._loop.close()

    def __enter__(self) -> SyncRewardClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()
