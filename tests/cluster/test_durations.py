"""How long something took, as people read it."""

from __future__ import annotations

import pytest

from cluster.durations import MISSING, duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, MISSING), (0, "0:00"), (59.6, "1:00"), (419, "6:59"), (5400, "1:30:00"), (90061, "1 d 1:01:01")],
)
def test_hours_and_days_are_not_lost(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text
