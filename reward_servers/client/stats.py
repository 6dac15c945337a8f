"""What a client counted, as plain values that cross process boundaries.

Does not own: metric names (contracts.metrics); the controller exports these under them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from contracts.scores import Outcome, ScoreTable


@dataclass
class ClientStats:
    """requests: sent, retries included; retries: requests repeated after a failure or an unreachable server;
    images: by outcome (ok, failed, timed_out, undecided); failures: failed attempts by cause; breakers: state by URL.
    """

    scorer: str
    requests: int = 0
    retries: int = 0
    images: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    breakers: dict[str, str] = field(default_factory=dict)

    def count(self, table: ScoreTable) -> ScoreTable:
        """Counts the images of a table and hands it on."""
        self.images.update(outcome_counts(table))
        return table

    def copy(self, breakers: Mapping[str, str] | None = None) -> ClientStats:
        """A snapshot that later counts leave alone."""
        return replace(
            self, images=Counter(self.images), failures=Counter(self.failures), breakers=dict(breakers or {})
        )


def outcome_counts(table: ScoreTable) -> dict[str, int]:
    """Images by outcome name: ok when all its entries are, else the highest code among them."""
    if table.num_images == 0:
        return {}
    flat = table.outcomes.reshape(table.num_images, -1)
    if table.kind == "pair":  # the diagonal says nothing
        diagonal = np.eye(table.num_images, dtype=bool).repeat(len(table.columns), axis=1)
        flat = np.where(diagonal, np.uint8(Outcome.OK), flat)
    worst = flat.max(axis=1, initial=int(Outcome.OK))
    return {outcome.name.lower(): int((worst == outcome).sum()) for outcome in Outcome if (worst == outcome).any()}
