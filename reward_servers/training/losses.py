"""The pair loss: Bradley-Terry with soft labels, margins and ties, as one formula.

L = -p log sigmoid(d - m) - (1 - p) log sigmoid(-d - m),  d = r_chosen - r_rejected.
p = 1, m = 0: Bradley-Terry. m > 0: a margin. 1/2 < p < 1: soft or smoothed labels. p = 1/2: a tie (SoliReward,
2512.22170), with m = 0 smallest at d = 0, where it is log 2. Does not own: p and m (data.py).
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
