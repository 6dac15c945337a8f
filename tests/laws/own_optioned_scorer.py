"""A user's own scorer with an option, for law 10."""

from __future__ import annotations

from contracts.declarations import ScorerGives


class Optioned:
    """Never served: only its declaration and its constructor are looked at."""

    declares = ScorerGives(columns=("score",))

    def __init__(self, limit: float = 1.0) -> None:
        self.limit = limit
