"""One call of a scorer that always ends in a table: a failing image does not take its neighbours along (law 4).

Owns the retry of a failing batch image by image and the check of what the scorer answered.
Does not own: which images make a batch (batching).
"""

from __future__ import annotations

import logging

from contracts.errors import PayloadError
from contracts.scores import Outcome, ScoreTable, to_message
from reward_servers.client.tables import Expected, blank_table, build_table, join
from reward_servers.scorers.base import ScoreBatch, Scorer

log = logging.getLogger(__name__)
_REASON_CHARS = 300


def score_isolated(scorer: Scorer, batch: ScoreBatch) -> ScoreTable:
    """The scorer's table of a batch, sealed. When the call fails each image is tried alone; who fails is FAILED.

    Scorers of whole groups compare the images of a batch, so theirs fails as a whole.
    """
    expected = expectation(scorer, batch)
    try:
        return _checked(scorer, batch, expected)
    except (Exception, SystemExit) as error:
        log.warning(
            "%s failed on a batch of %d: %s", scorer.name, len(batch), describe(error), exc_info=len(batch) == 1
        )
        if len(batch) == 1 or scorer.declares.needs_group:
            return blank_table(scorer.name, scorer.version, expected, Outcome.FAILED, describe(error))
    parts = [score_isolated(scorer, batch.one(index)) for index in range(len(batch))]
    try:
        return join(parts)
    except PayloadError as error:
        return blank_table(scorer.name, scorer.version, expected, Outcome.FAILED, describe(error))


def expectation(scorer: Scorer, batch: ScoreBatch) -> Expected:
    """What the scorer's table of this batch must look like."""
    shape = tuple(batch.inputs.shape[1:]) if batch.want_gradients else None
    return Expected(scorer.declares.kind, scorer.declares.columns, len(batch), shape)  # type: ignore[arg-type]


def _checked(scorer: Scorer, batch: ScoreBatch, expected: Expected) -> ScoreTable:
    table = scorer.score(batch)
    if not isinstance(table, ScoreTable):
        raise TypeError(f"score() returned {type(table).__name__}, not a ScoreTable")
    return build_table(*to_message(table), expected)


def describe(error: BaseException) -> str:
    """One short line for a reason: the type and the message."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= _REASON_CHARS else text[: _REASON_CHARS - 1] + "…"
