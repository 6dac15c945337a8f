"""Previews of a trajectory: of which steps a group has them, and whose they are.

The preview of step k is what the step's result points to: one Euler jump from x_{k+1} to s = 0, that is
x_{k+1} - s_{k+1} v(x_{k+1}, s_{k+1}), and the image itself for the last step (VGPO, catalogue B). So the score of step
k is known after its action, and costs no call of the network. Does not own: painting them (policy.rollout), asking
about them (reward_servers.client.steps), what is made of the scores (learner/credit).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from contracts.config.scoring import ScorerConfig
from contracts.errors import NotStored
from contracts.wire import GroupHeader


class Previews(NamedTuple):
    """images uint8 [N,S,H,W,3]; step_ids: the S steps."""

    images: np.ndarray
    step_ids: tuple[int, ...]


def steps_of_scorer(scorer: ScorerConfig, recorded: Sequence[int]) -> tuple[int, ...]:
    """Steps whose previews a scorer judges, ascending, in a group whose recorded stochastic steps are these.

    The last recorded step has none by `previews: recorded`: all after it is deterministic, so what it led to is the
    image.
    """
    if scorer.previews is None:
        return ()
    return tuple(recorded[:-1]) if scorer.previews == "recorded" else scorer.previews


def steps_of_group(scorers: Iterable[ScorerConfig], recorded: Sequence[int]) -> list[int]:
    """Steps whose previews a group stores: all that some scorer judges, ascending."""
    return sorted({step for scorer in scorers for step in steps_of_scorer(scorer, recorded)})


def by_scorer(
    scorers: Iterable[ScorerConfig], header: GroupHeader, arrays: Mapping[str, np.ndarray]
) -> dict[str, Previews]:
    """The previews that each scorer judges of a group with these arrays; scorers of images are left out.

    Raises NotStored when the group was painted without some of them: for another configuration, before a resume.
    """
    found = {}
    for scorer in scorers:
        steps = steps_of_scorer(scorer, header.step_indices)
        if missing := set(steps) - {*header.preview_steps}:
            raise NotStored(
                f"group {header.group_id} has no previews of steps {sorted(missing)}, which {scorer.name} judges"
            )
        if steps:
            places = [header.preview_steps.index(step) for step in steps]
            found[scorer.name] = Previews(arrays["previews"][:, places], steps)
    return found
