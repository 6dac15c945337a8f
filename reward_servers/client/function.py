"""A plain Python function as a member of the jury, behind the same `score` as a reward server.

    def brightness(images, prompts, metadata):     # uint8 [N,H,W,3], N texts, N dictionaries
        return images.mean(axis=(1, 2, 3))         # N numbers, or {"column": N numbers, ...}; NaN or None: failed

It runs in a thread of this process, one call at a time: keep it quick, and serve anything heavy over HTTP instead. A
call that misses the deadline is TIMED_OUT; Python cannot end its thread, which is then left to itself.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from contracts.config.scoring import ScorerConfig
from contracts.errors import PayloadError, RegistryError
from contracts.registry import import_target
from contracts.scores import Outcome, ScorerInfo, ScoreTable, point_table
from reward_servers.client.parts import Images, Part, make_part
from reward_servers.client.stats import ClientStats
from reward_servers.client.tables import Expected, blank_table, join

RewardFunction = Callable[[Any, tuple[str, ...], tuple[dict[str, Any], ...]], Any]


class FunctionScorer:
    """The function named by config.function. Raises RegistryError when it cannot be imported or called."""

    def __init__(self, config: ScorerConfig) -> None:
        self.config = config
        assert config.function is not None
        self._function: RewardFunction = import_target(config.function)
        if not callable(self._function):
            raise RegistryError(f"{config.function} is not a function")
        self._columns: tuple[str, ...] = tuple(config.weights) or ("score",)
        self._stats = ClientStats(config.name)
        self._one_at_a_time = asyncio.Lock()

    @property
    def reads(self) -> Literal["images", "latents"]:
        return "images"

    @property
    def stats(self) -> ClientStats:
        return self._stats.copy()

    async def aclose(self) -> None:
        """Nothing to close."""

    async def info(self, deadline_s: float | None = None, *, fresh: bool = False) -> ScorerInfo:
        """As of a server; columns are those of the weights, or of the last answer."""
        return ScorerInfo(
            name=self.config.name, version="function", kind="point", columns=self._columns,
            max_images=self.config.max_batch, max_pixels=2**31, max_body_bytes=2**40, paper=self.config.function or "",
        )  # fmt: skip

    async def score(
        self,
        images: Images,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]],
        *,
        want_gradients: bool = False,
        deadline_s: float | None = None,
        latents: np.ndarray | None = None,
    ) -> ScoreTable:
        """As RewardClient.score; a function offers no gradients and reads images."""
        whole = make_part(images, prompts, metadata)
        if want_gradients:
            shape = whole.shape
            expected = Expected("point", self._columns, len(whole), shape)  # type: ignore[arg-type]
            table = blank_table(self.config.name, "function", expected, Outcome.FAILED, "a function has no gradients")
            return self._stats.count(table)
        deadline = time.monotonic() + (deadline_s or self.config.deadline_s)
        parts = list(whole.cut(self.config.max_batch, 2**40)) or [whole]
        tables = [await self._part(part, deadline) for part in parts]
        columns = next((table.columns for table in tables if table.valid().any()), self._columns)
        return self._stats.count(join([_with_columns(table, columns) for table in tables]))

    async def _part(self, part: Part, deadline: float) -> ScoreTable:
        if not len(part):
            return self._blank(part, Outcome.FAILED, "")
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())), self._one_at_a_time:
                self._stats.requests += 1
                return await _in_daemon_thread(lambda: self._isolated(part))
        except TimeoutError:
            return self._blank(part, Outcome.TIMED_OUT, "the function did not return before the deadline")

    def _isolated(self, part: Part) -> ScoreTable:
        """When the call fails each image is tried alone, so that one does not take its neighbours along (law 4)."""
        try:
            return self._table(part, self._function(part.inputs, part.prompts, part.metadata))
        except (Exception, SystemExit) as error:
            self._stats.failures[type(error).__name__] += 1
            if len(part) == 1:
                return self._blank(part, Outcome.FAILED, f"{type(error).__name__}: {error}"[:300])
        parts = [self._isolated(one) for one in part.cut(1, 2**40)]
        columns = next((table.columns for table in parts if table.valid().any()), self._columns)
        return join([_with_columns(table, columns) for table in parts])

    def _table(self, part: Part, answer: Any) -> ScoreTable:
        """Raises PayloadError for the wrong number of scores, TypeError or ValueError for what is no number."""
        if not isinstance(answer, Mapping):
            if len(self._columns) != 1:
                raise PayloadError(f"one number an image, but the weights name {', '.join(self._columns)}")
            answer = {self._columns[0]: answer}
        columns = {str(name): np.asarray(_numbers(values), np.float32) for name, values in answer.items()}
        for name, values in columns.items():
            if values.shape != (len(part),):
                raise PayloadError(f"{name} has shape {values.shape} for {len(part)} images")
        if missing := set(self.config.weights) - set(columns):
            raise PayloadError(f"the answer lacks {', '.join(sorted(missing))}, which the weights name")
        if not columns:
            raise PayloadError("the answer holds no column")
        self._columns = tuple(columns)
        return point_table(self.config.name, "function", self._columns, np.stack(list(columns.values()), axis=1))

    def _blank(self, part: Part, outcome: Outcome, reason: str) -> ScoreTable:
        return blank_table(self.config.name, "function", Expected("point", self._columns, len(part)), outcome, reason)


def _numbers(values: Any) -> Any:
    return [np.nan if value is None else value for value in values] if isinstance(values, list | tuple) else values


def _with_columns(table: ScoreTable, columns: tuple[str, ...]) -> ScoreTable:
    """A table without valid entries under the columns of the others; a valid one of other columns is FAILED."""
    if table.columns == columns:
        return table
    valid = bool(table.valid().any())
    reason = "the function changed its columns" if valid else (table.reasons[0] if table.reasons else "")
    outcome = Outcome.FAILED if valid else Outcome(int(table.outcomes.max(initial=int(Outcome.FAILED))))
    blank = blank_table(table.scorer, table.version, Expected("point", columns, table.num_images), outcome, reason)
    return blank if valid else replace(blank, reasons=table.reasons or blank.reasons)


async def _in_daemon_thread(work: Callable[[], ScoreTable]) -> ScoreTable:
    """Like asyncio.to_thread, but a thread that never returns does not keep the process from ending."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[ScoreTable] = loop.create_future()

    def settle(table: ScoreTable | None, error: BaseException | None) -> None:
        if result.done():
            return
        if error is not None:
            result.set_exception(error)
        else:
            assert table is not None
            result.set_result(table)

    def run() -> None:
        outcome: tuple[ScoreTable | None, BaseException | None]
        try:
            outcome = (work(), None)
        except BaseException as error:
            outcome = (None, error)
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=run, daemon=True, name="reward-function").start()
    return await result
