"""The playground's differentiable scorer: a small CNN fitted to the verifier's dense score, with dR/d image.

Does not own: the network and its weights (playground.scorer). Torch, and with it the network, is imported by `load`, in
the process that serves it and nowhere else.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from contracts.scores import ScoreTable
from reward_servers.scorers.base import ScoreBatch, Scorer, declared, file_digest, weights_file
from reward_servers.scorers.playground_verifier import playground_canary, spec_of


class PlaygroundCNN(Scorer):
    """score in [0,1]; gradients float32 [N,H,W,3] are d score / d image with the image in [0,1]."""

    declares = declared("playground_cnn")
    name = "playground_cnn"
    paper = "Salon"
    value_range = (0.0, 1.0)

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self._network: Any = None

    def load(self) -> None:
        import torch

        from playground.scorer import network

        path = weights_file(network.WEIGHTS)
        self._network = network.score
        self.weight_digest = file_digest(path)
        self.version = f"1-{self.weight_digest[:8]}"
        if torch.device(self.device).type == "cpu":
            torch.set_num_threads(1)

    def canary(self) -> ScoreBatch:
        return playground_canary()

    def score(self, batch: ScoreBatch) -> ScoreTable:
        import torch

        specs = [spec_of(meta) for meta in batch.metadata]
        images = torch.from_numpy(batch.images.astype(np.float32) / 255).permute(0, 3, 1, 2).to(self.device)
        with torch.set_grad_enabled(batch.want_gradients):
            values = self._network(images.requires_grad_(batch.want_gradients), specs)
        gradients = None
        if batch.want_gradients:
            # Each value depends on its own image only, so the gradient of the sum holds every image's own.
            (gradient,) = torch.autograd.grad(values.sum(), images)
            gradients = gradient.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        return self.table(values.detach().cpu().numpy(), gradients=gradients)
