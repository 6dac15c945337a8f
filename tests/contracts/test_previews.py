"""Which previews a group has, and which of them each scorer is shown."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from contracts.config.scoring import ScorerConfig
from contracts.errors import NotStored
from contracts.previews import by_scorer, steps_of_group, steps_of_scorer
from contracts.wire import GroupHeader, PromptSpec


def scorer(name: str, previews: Any = None) -> ScorerConfig:
    return ScorerConfig(name=name, serve="colourfulness", previews=previews)


def header(recorded: list[int], previews: list[int]) -> GroupHeader:
    return GroupHeader(
        group_id=1, attempt=0, prompt=PromptSpec(text="a"), group_size=2, weight_version=0, prompt_digest="d",
        step_indices=recorded, preview_steps=previews,
    )  # fmt: skip


def test_recorded_follows_the_window_and_leaves_out_its_last_step() -> None:
    assert steps_of_scorer(scorer("a", "recorded"), [3, 4, 5]) == (3, 4)
    assert steps_of_scorer(scorer("a", "recorded"), []) == ()
    assert steps_of_scorer(scorer("a", [0, 7]), [3, 4, 5]) == (0, 7)
    assert steps_of_scorer(scorer("a"), [3, 4, 5]) == ()


def test_each_scorer_is_shown_its_own_steps_of_what_is_stored_once() -> None:
    scorers = [scorer("r", "recorded"), scorer("image"), scorer("list", [4, 9])]
    steps = steps_of_group(scorers, [3, 4, 5])
    assert steps == [3, 4, 9]
    stored = np.zeros((2, 3, 4, 4, 3), np.uint8) + np.array(steps, np.uint8)[:, None, None, None]
    found = by_scorer(scorers, header([3, 4, 5], steps), {"previews": stored})
    assert {name: previews.step_ids for name, previews in found.items()} == {"r": (3, 4), "list": (4, 9)}
    for previews in found.values():
        assert previews.images.shape == (2, 2, 4, 4, 3)
        np.testing.assert_array_equal(previews.images[0, :, 0, 0, 0], previews.step_ids)


def test_a_group_of_images_alone_needs_no_previews_and_one_painted_for_others_is_not_taken() -> None:
    assert by_scorer([scorer("image")], header([0, 1], []), {}) == {}
    with pytest.raises(NotStored, match=r"no previews of steps \[2\], which list judges"):
        by_scorer([scorer("list", [1, 2])], header([0, 1], [1]), {"previews": np.zeros((2, 1, 4, 4, 3), np.uint8)})


@pytest.mark.parametrize("previews", [[], [2, 1], [1, 1], [-1, 0]])
def test_steps_are_listed_in_order(previews: list[int]) -> None:
    with pytest.raises(ValidationError, match="ascending order"):
        scorer("a", previews)
