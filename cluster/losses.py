"""How often something may be lost: again and again over a long run, but not without getting anywhere in between.

Does not own: what is lost, how it is replaced, what the run says when it ends.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Losses:
    """Losses in a row. allowed: so many without progress in between; in_a_row: since the run last came further."""

    allowed: int
    in_a_row: int = 0
    furthest: int = -1

    def one_more(self, step: int) -> bool:
        """Note a loss at a step; False when it is one too many since the run last got beyond where it was lost."""
        if step > self.furthest:
            self.in_a_row, self.furthest = 0, step
        self.in_a_row += 1
        return self.in_a_row <= self.allowed
