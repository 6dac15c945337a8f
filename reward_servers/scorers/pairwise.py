"""Base of scorers that compare two images at a time, and what is made of their answers: a pair table of a group.

Each pair is asked in both orders and averaged, so that a liking for the first place cancels (pref-grpo). With
`pairs: k` only k pairs of the G(G-1)/2 are asked (2k calls); the others follow from a Bradley-Terry fit. Win rates are
the credit's affair (learner/credit). Does not own: a comparison itself (pickscore_pairs, judges in judging/).
"""

from __future__ import annotations

import hashlib
import itertools
from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

import numpy as np

from contracts.scores import Outcome, ScoreTable
from reward_servers.scorers.base import ScoreBatch, Scorer

_PRIOR = 0.01  # inverse variance of a strength: keeps a Bradley-Terry fit finite when someone wins every time


class PairwiseScorer(Scorer):
    """values[i,j,0] = P(image i is better than image j), P_ij + P_ji = 1; NaN and undecided where nobody could say.

    pairs: how many unordered pairs are asked, None for all.
    """

    pairs: int | None = None

    @property
    def pairs_asked(self) -> int | Literal["all"]:
        return "all" if self.pairs is None else self.pairs

    @abstractmethod
    def compare(self, batch: ScoreBatch, ordered: Sequence[tuple[int, int]]) -> np.ndarray:
        """P(first is better) in [0,1] for ordered pairs of rows, float [len(ordered)]; NaN: undecided."""

    def canary(self) -> ScoreBatch:
        images = np.stack([np.full((32, 32, 3), level, np.uint8) for level in (64, 192)])
        return ScoreBatch(images, ("a grey square",) * 2, ({}, {}))

    def score(self, batch: ScoreBatch) -> ScoreTable:
        if len(batch) < 2:
            raise ValueError("a comparison needs a group of at least two images")
        chosen = choose_pairs(len(batch), self.pairs, seed="|".join(batch.prompts))
        both = [pair for i, j in chosen for pair in ((i, j), (j, i))]
        answers = np.asarray(self.compare(batch, both), np.float64).reshape(-1, 2)
        answers[:, 1] = 1 - answers[:, 1]  # now both columns say P(i better than j)
        wins, flips = np.full((len(batch), len(batch)), np.nan), np.zeros(len(batch), int)
        for (i, j), pair in zip(chosen, answers, strict=True):
            said = pair[np.isfinite(pair)]
            if len(said):
                wins[i, j], wins[j, i] = said.mean(), 1 - said.mean()
            if len(said) == 2 and (said[0] - 0.5) * (said[1] - 0.5) < 0:
                flips[[i, j]] += 1
        uncertainty = None
        if len(chosen) < len(batch) * (len(batch) - 1) // 2:
            wins, uncertainty = bradley_terry(wins)
        outcomes = np.where(np.isfinite(wins), Outcome.OK, Outcome.UNDECIDED).astype(np.uint8)
        reasons = tuple(f"the order decided {count} of its comparisons" if count else "" for count in flips)
        return ScoreTable(
            self.name, self.version, self.declares.columns, wins[..., None].astype(np.float32), outcomes[..., None],
            "pair", None if uncertainty is None else uncertainty[..., None].astype(np.float32), reasons,
        )  # fmt: skip


def choose_pairs(num: int, pairs: int | None, seed: str) -> list[tuple[int, int]]:
    """Unordered pairs (i < j) to ask about: all, or `pairs` of them that connect everyone, the same for the same seed.

    Raises ValueError when `pairs` are too few to connect num images (num - 1 are needed).
    """
    every = list(itertools.combinations(range(num), 2))
    if pairs is None or pairs >= len(every):
        return every
    if pairs < num - 1:
        raise ValueError(f"pairs: {pairs} cannot connect a group of {num}; at least {num - 1} are needed")
    rng = np.random.default_rng(list(hashlib.blake2b(seed.encode(), digest_size=8).digest()))
    order = rng.permutation(num).tolist()
    ring = [*itertools.pairwise(order), (order[-1], order[0])][: min(pairs, num)]
    chosen = list(dict.fromkeys((min(pair), max(pair)) for pair in ring))
    rest = [every[i] for i in rng.permutation(len(every)) if every[i] not in chosen]
    return sorted(chosen + rest[: pairs - len(chosen)])


def bradley_terry(wins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(P [N,N], its standard deviation [N,N]) of a Bradley-Terry fit to observed win shares [N,N], NaN where unasked.

    P_ij = sigmoid(theta_i - theta_j); theta maximises sum over asked pairs of w log P + (1 - w) log(1 - P) minus
    _PRIOR |theta|^2 / 2, by Newton's method; deviations by the delta method from the inverse Hessian. Images that no
    answer connects stay undecided against each other. The diagonal is NaN.
    """
    num = len(wins)
    asked = np.isfinite(wins) & ~np.eye(num, dtype=bool)
    share = np.where(asked, wins, 0.0)
    theta = np.zeros(num)
    hessian = _PRIOR * np.eye(num)
    for _ in range(100):
        chance = _sigmoid(theta[:, None] - theta[None, :])
        gradient = np.where(asked, share - chance, 0).sum(axis=1) - _PRIOR * theta
        curve = np.where(asked, chance * (1 - chance), 0)
        hessian = np.diag(curve.sum(axis=1) + _PRIOR) - curve
        step = np.linalg.solve(hessian, gradient)
        theta = theta + np.clip(step, -2, 2)
        if np.abs(step).max() < 1e-10:
            break
    chance = _sigmoid(theta[:, None] - theta[None, :])
    inverse = np.linalg.inv(hessian)
    spread = np.sqrt(np.maximum(np.diag(inverse)[:, None] + np.diag(inverse)[None, :] - 2 * inverse, 0))
    unknown = ~_connected(asked) | np.eye(num, dtype=bool)
    deviation = spread * chance * (1 - chance)
    return np.where(unknown, np.nan, chance), np.where(unknown, np.nan, deviation)


def _connected(asked: np.ndarray) -> np.ndarray:
    """bool [N,N]: whether a chain of answers leads from one image to the other."""
    reach = asked | np.eye(len(asked), dtype=bool)
    for _ in range(len(asked).bit_length()):
        reach = (reach.astype(int) @ reach.astype(int)) > 0
    return reach


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -60, 60)))
