"""Sums over a ledger for reports: staleness, how long groups stand in each stage, what moved lately.

Does not own: single groups and the books (reader.py). Everything is one pass of SQLite, however many groups there are.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.ledger.reader import LedgerReader

STAGES: dict[str, tuple[str, str]] = {
    "waiting to be painted, and painting": ("admitted_at", "generated_at"),
    "waiting for the jury": ("generated_at", "scoring_at"),
    "scoring": ("scoring_at", "ready_at"),
    "waiting for the learner, and update": ("ready_at", "trained_at"),
    "publication": ("trained_at", "published_at"),
}
"""Stages of a group's life: between which two times of its row."""


@dataclass(frozen=True)
class Moved:
    """Images that ended a stage in a stretch of time."""

    painted: int
    scored: int
    trained: int


class LedgerFacts(LedgerReader):
    """The read side with sums; beside a running writer too."""

    def staleness(self) -> dict[int, int]:
        """Trained groups by staleness in steps."""
        return self._counts("SELECT staleness, COUNT(*) FROM groups WHERE staleness IS NOT NULL GROUP BY staleness")

    def stage_seconds(self) -> dict[str, float]:
        """Mean seconds of groups in each stage that any group has passed, in order."""
        means = {}
        for name, (start, end) in STAGES.items():
            mean = self._value(
                f"SELECT AVG(MAX({end} - {start}, 0)) FROM groups WHERE {end} IS NOT NULL AND {start} IS NOT NULL"
            )
            if mean is not None:
                means[name] = float(mean)
        return means

    def moved(self, since: float, until: float) -> Moved:
        """Images painted, scored and trained in (since, until], seconds since the epoch."""

        def images(column: str) -> int:
            query = f"SELECT COALESCE(SUM(group_size), 0) FROM groups WHERE {column} > ? AND {column} <= ?"
            return int(self._value(query, (since, until)))

        return Moved(images("generated_at"), images("ready_at"), images("trained_at"))

    def last_change(self) -> float | None:
        """When the journal was last written, seconds since the epoch."""
        found = self._value("SELECT MAX(at) FROM journal WHERE seq >= (SELECT MAX(seq) - 100 FROM journal)")
        return None if found is None else float(found)

    def _counts(self, query: str) -> dict[int, int]:
        with self._lock:
            return {int(key): int(count) for key, count in self._db.execute(query)}
