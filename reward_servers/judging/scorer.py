"""The base of scorers that ask a judge: from options to a Judge, from verdicts and their failures to a typed table.

Invariant: an entry is OK only with a value the judge gave; refused and unparsable is UNDECIDED, unreachable is FAILED
or TIMED_OUT, each with its reason.
Does not own: asking (judge), wording (protocols), HTTP (app).
"""

from __future__ import annotations

import asyncio
import logging
from abc import abstractmethod
from collections.abc import Awaitable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar, cast

import numpy as np

from contracts.config.judges import JUDGE_SCORER_OPTIONS, JudgeOptions
from contracts.errors import ScoringError
from contracts.scores import Outcome, ScoreTable
from reward_servers.client.endpoint import AttemptFailed
from reward_servers.isolation import describe
from reward_servers.judging.judge import Judge
from reward_servers.judging.protocols.base import Protocol
from reward_servers.judging.question import Picture, Undecided
from reward_servers.scorers.base import ScoreBatch, Scorer

log = logging.getLogger(__name__)

O = TypeVar("O", bound=JudgeOptions)  # noqa: E741  (options)
T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """Verdict on one image or pair. values, deviations: K numbers; reason: why not OK, or the judge's own words."""

    values: Sequence[float]
    outcome: Outcome = Outcome.OK
    reason: str = ""
    deviations: Sequence[float] = ()


class JudgeScorer(Scorer, Generic[O]):
    """Keyword arguments are its section in contracts.config.judges, found by `name`. Raises ValidationError.

    Subclasses make a protocol and give verdicts.
    """

    options: O
    settles: ClassVar[tuple[str, ...]] = ()
    """Options that make another value of the same answers: part of the version beside the protocol's own settings."""

    def __init__(self, **options: Any) -> None:
        self.options = cast(O, JUDGE_SCORER_OPTIONS[self.name].model_validate(options))
        self._runner = asyncio.Runner()
        self._judge: Judge | None = None
        self.protocol = self.make_protocol()

    @abstractmethod
    def make_protocol(self) -> Protocol:
        """The protocol of self.options."""

    def load(self) -> None:
        """Ask every server for its models. Raises ScoringError or ConfigError."""
        self.version = f"{self.protocol.version}-{self.fingerprint()}"
        self._judge = Judge(self.options, self.count)
        try:
            self.wait(self._judge.check(self.options.timeout_s))
        except AttemptFailed as error:
            raise ScoringError(f"the judge cannot be asked: {error.reason}") from error

    def fingerprint(self) -> str:
        """Eight digits for what a value depends on: model, protocol, its settings, and those in `settles`."""
        settled = ",".join(f"{name}={getattr(self.options, name)!r}" for name in self.settles)
        model = self.options.model
        return self.protocol.fingerprint(f"{model}|{settled}" if settled else model)

    @property
    def judge(self) -> Judge:
        assert self._judge is not None, "load() first"
        return self._judge

    def unready(self) -> str | None:
        return self._judge.away() if self._judge is not None else None

    def canary(self) -> ScoreBatch:
        """A plain red image, so called."""
        image = np.zeros((1, 64, 64, 3), np.uint8)
        image[..., 0] = 220
        return ScoreBatch(image, ("a plain red square",), ({},))

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Run something in this scorer's event loop (always in the one thread that scores)."""
        return self._runner.run(work)

    async def settle(self, verdict: Awaitable[Row]) -> Row:
        """The verdict, or the row that says why there is none."""
        try:
            row = await verdict
        except Undecided as error:
            row = Row((), Outcome.UNDECIDED, f"undecided: {error}")
        except AttemptFailed as error:
            row = Row((), error.outcome, error.reason)
        except Exception as error:  # a defect in one verdict must not take the others along
            log.exception("verdict of %s", self.name)
            row = Row((), Outcome.FAILED, describe(error))
        outcome = row.outcome.name.lower()
        self.meter("salon_judge_questions_total", 1, protocol=self.protocol.name, outcome=outcome)
        return row

    def count(self, name: str, value: float, **labels: str) -> None:
        """To the meter of the server, which is handed over after construction."""
        self.meter(name, value, **labels)


class PointJudgeScorer(JudgeScorer[O]):
    """One verdict an image, all images of a batch at once."""

    @abstractmethod
    async def verdict(self, picture: Picture, prompt: str, metadata: dict[str, Any]) -> Row:
        """K values of one image. Raises Undecided or AttemptFailed."""

    def score(self, batch: ScoreBatch) -> ScoreTable:
        return table_of_rows(self, self.wait(self._all(batch)))

    async def _all(self, batch: ScoreBatch) -> list[Row]:
        rows = zip(batch.images, batch.prompts, batch.metadata, strict=True)
        return await asyncio.gather(
            *(self.settle(self.verdict(Picture(image), prompt, meta)) for image, prompt, meta in rows)
        )


def table_of_rows(scorer: Scorer, rows: Sequence[Row]) -> ScoreTable:
    """A point table [N,K] of rows; NaN where a row is not OK."""
    columns = scorer.declares.columns
    blank = (np.nan,) * len(columns)
    values = np.array([row.values if row.outcome is Outcome.OK else blank for row in rows], np.float32)
    deviations = np.array([row.deviations if row.deviations else blank for row in rows], np.float32)
    outcomes = np.array([[row.outcome] * len(columns) for row in rows], np.uint8)
    outcomes[(outcomes == Outcome.OK) & ~np.isfinite(values)] = Outcome.FAILED
    return ScoreTable(
        scorer.name, scorer.version, columns, values.reshape(len(rows), len(columns)), outcomes,
        uncertainty=deviations if any(row.deviations for row in rows) else None,
        reasons=tuple(row.reason for row in rows),
    )  # fmt: skip
