"""How far a trained reward model has been near an image: PrefPaint's ||z||_{V^-1} (2410.21966).

V = ridge I + sum z z^T over the features z of every training image, those the reward is linear in; the true reward lies
within C ||z||_{V^-1} of the model's. It is ||z|| / sqrt(ridge) for a z that no training image resembles, and falls with
each that does. PrefPaint's code takes ||z V^-1||_2; this is the norm of its text.
State: V, `coverage.safetensors` in the model's folder. Does not own: what features are (model.py), what is made of the
number (credit.aggregation: uncertainty).
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from contracts.errors import ConfigError
from reward_servers.scorers.parts.loading import tensors_digest

COVERAGE_FILE = "coverage.safetensors"


class Coverage(torch.nn.Module):
    """precision: V, float64 [D,D] on the CPU; symmetric, its eigenvalues at least the ridge."""

    precision: Tensor

    def __init__(self, precision: Tensor) -> None:
        super().__init__()
        self.register_buffer("precision", precision)
        self._factor: Tensor | None = None

    @classmethod
    def new(cls, width: int, ridge: float) -> Coverage:
        """Of no data yet: features of `width` numbers."""
        return cls(ridge * torch.eye(width, dtype=torch.float64))

    def add(self, features: Tensor) -> None:
        """Take up features [N,D]: one rank-one update each."""
        rows = features.detach().double().cpu()
        self.precision += rows.T @ rows
        self._factor = None

    def uncertainty(self, features: Tensor) -> Tensor:
        """||z||_{V^-1}, float32 [N] on the CPU, of features [N,D]."""
        if self._factor is None:
            self._factor = torch.linalg.cholesky(self.precision)
        rows = features.detach().double().cpu()
        return torch.linalg.solve_triangular(self._factor, rows.T, upper=False).norm(dim=0).float()

    def digest(self) -> str:
        """Names V."""
        return tensors_digest(self)

    def save(self, folder: Path) -> None:
        """Write coverage.safetensors."""
        save_file({"precision": self.precision.contiguous()}, folder / COVERAGE_FILE)


def load_coverage(source: str) -> Coverage | None:
    """That of a trained folder; None for a plain CLIP. Raises ConfigError for a file that holds none."""
    path = Path(source) / COVERAGE_FILE
    if not path.is_file():
        return None
    try:
        return Coverage(load_file(path)["precision"])
    except (SafetensorError, KeyError) as error:
        raise ConfigError(str(path), "does not hold a coverage", "train the model again, or remove the file") from error
