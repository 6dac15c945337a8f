"""A scorer that runs in processes of its own, beside the server's (`serve --processes N`).

For scorers that are mostly Python: in the server's process they share the interpreter lock with its HTTP side, and can
use one core. A batch is cut into N parts, scored at once and joined; the next batch may be handed in meanwhile, so that
no process waits for its parent. One that dies (foreign code that crashes, the kernel short of memory) is started again;
its batches are then tried image by image, so that only the image that does it fails. Invariant: no process outlives the
server, however that ends.

Pickles go through pipes between this process and its children, never over a network.
Does not own: batches and failures of single images (batching, isolation).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from contracts import stacks
from contracts.errors import ConfigError, ScoringError
from contracts.scores import ScoreTable
from reward_servers.client.tables import join
from reward_servers.construct import make_scorer
from reward_servers.isolation import describe, score_isolated
from reward_servers.leash import die_with_parent
from reward_servers.memory import keep_freed_memory
from reward_servers.scorers.base import ScoreBatch, Scorer

Observation = tuple[str, float, dict[str, str]]
Answer = tuple[ScoreTable, list[Observation]]
_TRIES = 8
"""Of a batch, while processes die of others' images."""


@dataclass(frozen=True)
class Loaded:
    """What a scorer says of itself once its weights are there."""

    version: str
    weight_digest: str
    paper: str
    higher_is_better: bool
    value_range: tuple[float | None, float | None]
    canary: ScoreBatch


class ProcessScorer(Scorer):
    """Stands before the scorer `name` with `options`, which runs in `processes` processes.

    Raises ConfigError for scorers of whole groups in more than one process, and for those that change while they are
    served or depend on something else: their state would be in several places.
    """

    overlaps = True

    def __init__(self, name: str, options: Sequence[str], processes: int) -> None:
        plain = make_scorer(name, options)  # never loaded: what it declares, and every mistake in its options
        _check(plain, processes)
        self.declares = plain.declares  # type: ignore[misc]
        self._pairs_asked = plain.pairs_asked
        self.name = plain.name
        self._what, self._processes = (name, tuple(options)), processes
        self._children: list[_Child] = []
        self._canary: ScoreBatch | None = None

    def load(self) -> None:
        self._children = [_Child(*self._what) for _ in range(self._processes)]
        for found in [child.loaded() for child in self._children]:
            self.version, self.weight_digest, self.paper = found.version, found.weight_digest, found.paper
            self.higher_is_better, self.value_range = found.higher_is_better, found.value_range
            self._canary = found.canary

    @property
    def pairs_asked(self) -> int | Literal["all"] | None:
        return self._pairs_asked

    def canary(self) -> ScoreBatch:
        return super().canary() if self._canary is None else self._canary

    def score(self, batch: ScoreBatch) -> ScoreTable:
        """Raises ScoringError when a process died of it; a new one is there then."""
        asked = [(child, child.ask(part), part) for child, part in zip(self._children, self._cut(batch), strict=False)]
        answers = [child.answer(question, part) for child, question, part in asked]
        if None in answers:
            raise ScoringError("the scoring process died")
        found = [answer for answer in answers if answer is not None]
        for name, value, labels in (each for _, observations in found for each in observations):
            self.meter(name, value, **labels)
        return join([table for table, _ in found])

    def _cut(self, batch: ScoreBatch) -> list[ScoreBatch]:
        """A part of nearly equal size for each process, none empty."""
        number = min(self._processes, len(batch))
        ends = [len(batch) * part // number for part in range(number + 1)]
        return [batch.rows(slice(start, end)) for start, end in pairwise(ends)]

    def close(self) -> None:
        for child in self._children:
            child.kill()


@dataclass(frozen=True)
class _Asked:
    """A question to a pool. answer: None where the pool was broken already; before: the question that it waits for."""

    pool: ProcessPoolExecutor
    answer: Future[Answer] | None
    before: Future[Answer] | None

    def killed(self) -> bool:
        """Once its pool is broken: whether the process was at it, or could have been."""
        waited = self.before is not None and isinstance(self.before.exception(), BrokenExecutor)
        return self.answer is not None and not waited


class _Child:
    """A pool of one process with the scorer in it. Its pipe holds what is asked next while the process scores."""

    def __init__(self, name: str, options: tuple[str, ...]) -> None:
        self._scorer = (name, options)
        self._asking = threading.Lock()
        self._last: Future[Answer] | None = None
        self._pool, self._telling = self._started()

    def loaded(self) -> Loaded:
        """Waits for it. Raises ScoringError with the reason when it could not load."""
        try:
            found = self._telling.result()
        except BrokenExecutor:
            found = "its process died while it loaded"
        if isinstance(found, Loaded):
            return found
        raise ScoringError(f"scorer {self._scorer[0]!r} could not be loaded: {found}")

    def ask(self, batch: ScoreBatch) -> _Asked:
        with self._asking:
            pool, before = self._pool, self._last
            try:
                self._last = pool.submit(_score, batch)
            except BrokenExecutor:
                return _Asked(pool, None, None)
            return _Asked(pool, self._last, before)

    def answer(self, asked: _Asked, batch: ScoreBatch) -> Answer | None:
        """None when the process died of it; what only waited in a process that died is asked again."""
        for _ in range(_TRIES):
            try:
                if asked.answer is not None:
                    return asked.answer.result()
            except BrokenExecutor:
                pass
            self._replace(asked.pool)
            if asked.killed():
                break
            asked = self.ask(batch)
        return None

    def _replace(self, broken: ProcessPoolExecutor) -> None:
        """A new process in the place of one that died, unless another thread has seen to it."""
        with self._asking:
            if self._pool is broken:
                self.kill()
                self._last = None
                self._pool, self._telling = self._started()
                self.loaded()

    def kill(self) -> None:
        for process in list((self._pool._processes or {}).values()):
            process.kill()
        self._pool.shutdown(cancel_futures=True)

    def _started(self) -> tuple[ProcessPoolExecutor, Future[Loaded | str]]:
        """From a thread that lasts as long as the server: Linux ends the process with the thread that started it."""
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(1, spawn, initializer=_load, initargs=(os.getpid(), *self._scorer))
        return pool, pool.submit(_tell)


def _check(scorer: Scorer, processes: int) -> None:
    if scorer.follows or type(scorer).unready is not Scorer.unready:
        raise ConfigError(
            "processes", f"{scorer.name} changes while it is served, or asks others itself", "leave --processes out"
        )
    if processes > 1 and scorer.declares.needs_group:
        raise ConfigError("processes", f"{scorer.name} compares the images of a whole group", "use --processes 1")


# ---- in the child ------------------------------------------------------------------------------------------------

_loaded_here: Scorer | str
"""The scorer of this process, or why there is none."""
_observed: list[Observation] = []


def _load(parent_pid: int, name: str, options: tuple[str, ...]) -> None:
    global _loaded_here
    _depend_on(parent_pid)
    keep_freed_memory()
    stacks.register(f"scoring-{name}")
    try:
        scorer = make_scorer(name, options)
        scorer.meter = lambda name, value, **labels: _observed.append((name, value, labels))
        scorer.load()
        _loaded_here = scorer
    except (Exception, SystemExit) as error:  # as text: what foreign code raises may not survive its pickling
        _loaded_here = describe(error)


def _tell() -> Loaded | str:
    """What the parent must know of the scorer, or why it could not be loaded."""
    if isinstance(_loaded_here, str):
        return _loaded_here
    scorer = _loaded_here
    try:
        return Loaded(
            scorer.version, scorer.weight_digest, scorer.paper, scorer.higher_is_better, scorer.value_range,
            scorer.canary(),
        )  # fmt: skip
    except (Exception, SystemExit) as error:
        return describe(error)


def _score(batch: ScoreBatch) -> Answer:
    if isinstance(_loaded_here, str):
        os._exit(1)  # so that it is started again, and may find what it lacked
    _observed.clear()
    return score_isolated(_loaded_here, batch), list(_observed)


def _depend_on(parent_pid: int) -> None:
    """Signals to the group are the parent's business: it drains, and when it has ended this process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    die_with_parent(parent_pid, signal.SIGKILL)  # outside Linux its pipe ends, which it sees after the present batch
