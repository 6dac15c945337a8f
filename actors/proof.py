"""The proof that weights arrived (law 5): the digest of live tensors, and a canary through the live network.

The digest finds loads that did nothing or lost a key. The canary finds what tensors cannot show, such as adapters that
are off or scaled to nothing: its answer must be closer to the learner's at this version than at the one before.
"""

from __future__ import annotations

import numpy as np

from contracts.errors import WeightsNotProven
from contracts.wire import WeightOffer
from policy.policy import Policy
from policy.weights import canary, live_digest

TOLERANCE = 0.1
"""Largest distance to the learner's answer, as a share of its largest value: kernels differ, models do not."""


def check_digest(policy: Policy, offer: WeightOffer) -> str:
    """The live digest. Raises WeightsNotProven when it is not the published one."""
    digest = live_digest(policy)
    if digest != offer.digest:
        raise WeightsNotProven(f"version {offer.version}: live tensors have digest {digest}, published {offer.digest}")
    return digest


def check_canary(
    policy: Policy, version: int, current: np.ndarray, previous: np.ndarray | None
) -> tuple[float, float | None]:
    """(distance to the learner's answer at this version, at the one before). Raises WeightsNotProven."""
    answer = canary(policy)
    to_current = _distance(answer, current)
    to_previous = None if previous is None else _distance(answer, previous)
    if not to_current <= TOLERANCE * float(np.abs(current).max()):
        raise WeightsNotProven(f"version {version}: the canary is {to_current:.3g} away from the learner's answer")
    # Equal answers of both versions (a step that changed nothing) cannot tell them apart; the digest has to do.
    tells_apart = previous is not None and _distance(np.asarray(current), previous) > 0
    if tells_apart and to_previous is not None and to_current >= to_previous:
        raise WeightsNotProven(
            f"version {version}: the canary is {to_current:.3g} away from this version, {to_previous:.3g} from the last"
        )
    return to_current, to_previous


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max())
