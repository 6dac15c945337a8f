"""How often ranks and controllers may be lost."""

from __future__ import annotations

import pytest

from cluster.losses import Losses


def test_losses_with_progress_in_between_never_end_a_run() -> None:
    losses = Losses(allowed=1)
    assert all(losses.one_more(step) for step in range(0, 1000, 10))


@pytest.mark.parametrize("allowed", [0, 1, 5])
def test_losses_at_one_place_do(allowed: int) -> None:
    losses = Losses(allowed)
    assert [losses.one_more(7) for _ in range(allowed + 1)] == [True] * allowed + [False]


def test_what_was_trained_again_is_no_progress() -> None:
    """A roll-back to step 4 and the way back to 6 come no further than where it was lost first."""
    losses = Losses(allowed=2)
    assert [losses.one_more(step) for step in (6, 4, 6)] == [True, True, False]
    assert losses.one_more(7)
