"""A scorer that runs in processes of its own, beside the server's (`serve --processes N`).

For scorers that are mostly Python: in the server's process they share the interpreter lock with its HTTP side, and can
use one core. A batch is cut into N parts, scored at once and joined. A process that dies (foreign code that crashes,
the kernel short of memory) is started again; the batch is then tried image by image, so that only the image that does
it fails. Invariant: no process outlives the server, however that ends.

Pickles go through pipes between this process and its children, never over a network.
Does not own: batches and failures of single images (batching, isolation).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

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

    def __init__(self, name: str, options: Sequence[str], processes: int) -> None:
        plain = make_scorer(name, options)  # never loaded: what it declares, and every mistake in its options
        _check(plain, processes)
        self.declares = plain.declares  # type: ignore[misc]
        self.name = plain.name
        self._children = [_Child(name, tuple(options)) for _ in range(processes)]
        self._canary: ScoreBatch | None = None

    def load(self) -> None:
        for child in self._children:
            child.start()
        for found in [child.loaded() for child in self._children]:
            self.version, self.weight_digest, self.paper = found.version, found.weight_digest, found.paper
            self.higher_is_better, self.value_range = found.higher_is_better, found.value_range
            self._canary = found.canary

    def canary(self) -> ScoreBatch:
        return super().canary() if self._canary is None else self._canary

    def score(self, batch: ScoreBatch) -> ScoreTable:
        """Raises ScoringError when a process died of it; a new one is there then."""
        parts = _cut(batch, len(self._children))
        busy = [(child, child.ask(part)) for child, part in zip(self._children, parts, strict=False)]
        answers = [child.answer() if asked else None for child, asked in busy]
        dead = [child for (child, _), answer in zip(busy, answers, strict=True) if answer is None]
        for child in dead:
            child.start()
        for child in dead:
            child.loaded()
        if dead:
            raise ScoringError("the scoring process died")
        found = [answer for answer in answers if answer is not None]
        for name, value, labels in (each for _, observations in found for each in observations):
            self.meter(name, value, **labels)
        return join([table for table, _ in found])

    def close(self) -> None:
        for child in self._children:
            child.kill()


class _Child:
    """One process with the scorer in it. `start` again replaces it."""

    def __init__(self, name: str, options: tuple[str, ...]) -> None:
        self._scorer = (name, options)
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None

    def start(self) -> None:
        """From a thread that lasts as long as the server: Linux ends the process with the thread that started it."""
        self.kill()
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_work, args=(theirs, os.getpid(), *self._scorer), daemon=True)
        self._process.start()
        theirs.close()  # so that its end is seen here

    def loaded(self) -> Loaded:
        """Waits for it. Raises ScoringError with the reason when it could not load."""
        found = self._receive()
        if isinstance(found, Loaded):
            return found
        reason = found or "its process died while it loaded"
        raise ScoringError(f"scorer {self._scorer[0]!r} could not be loaded: {reason}")

    def ask(self, batch: ScoreBatch) -> bool:
        """False when it is dead, or cannot be told."""
        assert self._pipe is not None
        try:
            self._pipe.send(batch)
        except Exception:  # also of pickling: whatever is raised here would leave the others' answers in their pipes
            return False
        return True

    def answer(self) -> Answer | None:
        """None when it died of it."""
        found: Answer | None = self._receive()
        return found

    def kill(self) -> None:
        if self._process is not None and self._pipe is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()

    def _receive(self) -> Any:
        assert self._pipe is not None
        try:
            return self._pipe.recv()
        except Exception:  # also an answer that cannot be read: a new process has an empty pipe
            return None


def _check(scorer: Scorer, processes: int) -> None:
    if scorer.follows or type(scorer).unready is not Scorer.unready:
        raise ConfigError(
            "processes", f"{scorer.name} changes while it is served, or asks others itself", "leave --processes out"
        )
    if processes > 1 and scorer.declares.needs_group:
        raise ConfigError("processes", f"{scorer.name} compares the images of a whole group", "use --processes 1")


def _cut(batch: ScoreBatch, number: int) -> list[ScoreBatch]:
    """At most `number` parts of nearly equal size, none empty."""
    number = min(number, len(batch))
    ends = [len(batch) * part // number for part in range(number + 1)]
    return [batch.rows(slice(start, end)) for start, end in pairwise(ends)]


# ---- in the child ------------------------------------------------------------------------------------------------


def _work(pipe: Connection, parent_pid: int, name: str, options: tuple[str, ...]) -> None:
    """Load, then score what comes, until the parent has gone."""
    _depend_on(parent_pid)
    keep_freed_memory()
    observed: list[Observation] = []
    try:
        scorer = make_scorer(name, options)
        scorer.meter = lambda name, value, **labels: observed.append((name, value, labels))
        scorer.load()
        loaded = Loaded(
            scorer.version, scorer.weight_digest, scorer.paper, scorer.higher_is_better, scorer.value_range,
            scorer.canary(),
        )  # fmt: skip
    except (Exception, SystemExit) as error:  # as text: what foreign code raises may not survive its pickling
        pipe.send(describe(error))
        return
    try:
        pipe.send(loaded)
        while True:
            batch = pipe.recv()
            observed.clear()
            pipe.send((score_isolated(scorer, batch), observed))
    except (EOFError, OSError):
        return


def _depend_on(parent_pid: int) -> None:
    """Signals to the group are the parent's business: it drains, and when it has ended this process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    die_with_parent(parent_pid, signal.SIGKILL)  # outside Linux its pipe ends, which it sees after the present batch
