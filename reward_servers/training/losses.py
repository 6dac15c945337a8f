"""The pair loss: Bradley-Terry with soft labels, margins and ties, as one formula.

L = -p log sigmoid(d - m) - (1 - p) log sigmoid(-d - m),  d = r_chosen - r_rejected.
p = 1, m = 0: Bradley-Terry. m > 0: a margin. 1/2 < p < 1: soft or smoothed labels. p = 1/2: a tie (SoliReward,
2512.22170), with m = 0 smallest at d = 0, where it is log 2.

Beside it, of Secrets of RLHF II (2401.06080): contrastive losses on features (SimCSE, SwAV) and MetaRM's J.
Does not own: p and m (data.py), when a loss counts (trainer.py).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def pair_loss(difference: Tensor, probability: Tensor, margin: Tensor) -> Tensor:
    """Loss of each pair [B] from differences, probabilities and margins [B]. Stable for any size of difference."""
    for_chosen = F.softplus(margin - difference)
    for_rejected = F.softplus(margin + difference)
    return torch.where(probability == 1, for_chosen, probability * for_chosen + (1 - probability) * for_rejected)


def simcse(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """-log softmax_j(cos(z_i, z'_j) / T)[i], mean over rows, of two dropout passes [N,D]: log N when all are alike."""
    similarity = F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).T / temperature
    return F.cross_entropy(similarity, torch.arange(len(first), device=first.device))


def swav(first: Tensor, second: Tensor, prototypes: Tensor, temperature: float) -> Tensor:
    """Each pass predicts the other's cluster: -1/2 sum q' log p + -1/2 sum q log p', mean over rows.

    p = softmax(cos(z, c) / T) over prototypes [K,D]; q: Sinkhorn's balanced assignment, without gradient.
    """
    centres = F.normalize(prototypes, dim=-1)
    scores = [F.normalize(each, dim=-1) @ centres.T for each in (first, second)]
    given = [sinkhorn(each.detach()) for each in scores]
    said = [F.log_softmax(each / temperature, dim=-1) for each in scores]
    return -0.5 * ((given[1] * said[0]).sum(dim=-1) + (given[0] * said[1]).sum(dim=-1)).mean()


def sinkhorn(scores: Tensor, epsilon: float = 0.05, rounds: int = 3) -> Tensor:
    """Assignment [N,K] of rows to clusters, each row a distribution, clusters (nearly) evenly filled (2006.09882)."""
    plan = torch.exp((scores - scores.max()) / epsilon)
    for _ in range(rounds):
        plan = plan / plan.sum(dim=0, keepdim=True).clamp_min(1e-12) / plan.shape[1]
        plan = plan / plan.sum(dim=1, keepdim=True).clamp_min(1e-12) / plan.shape[0]
    return plan * plan.shape[0]


def spread(rewards: Tensor) -> Tensor:
    """MetaRM's J = mean sigmoid(|r_i - r_j|) of pairs [B,2]: 1/2 when the model tells no pair apart, at most 1."""
    return torch.sigmoid((rewards[:, 0] - rewards[:, 1]).abs()).mean()
