"""Bases of scorers with options and weights: what they load is told in version and weight digest; dR/d image.

Torch is imported by what a scorer's load() imports, never by its module, so options are checked at once.
Does not own: the networks (loading), the arithmetic of a score (each scorer's file).
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, cast

import numpy as np

from contracts.config.base import Section
from contracts.config.scorers import SCORER_OPTIONS, DeviceOptions
from contracts.scores import ScoreTable
from reward_servers.scorers.base import ScoreBatch, Scorer

if TYPE_CHECKING:
    import torch

    from reward_servers.scorers.parts.preprocess import Preprocess

S = TypeVar("S", bound=Section)
D = TypeVar("D", bound=DeviceOptions)

_NOT_IN_THE_SCORE = {"device", "revision", "model", "processor", "head", "tokenizer", "detector", "colour_model",
                     "versions", "direction"}  # fmt: skip


class OptionScorer(Scorer, Generic[S]):
    """Keyword arguments are its section in contracts.config.scorers, found by `name`. Raises ValidationError."""

    options: S

    def __init__(self, **options: Any) -> None:
        self.options = cast(S, SCORER_OPTIONS[self.name].model_validate(options))
        self.version = "-".join(filter(None, [self.version, self._settings()]))

    def _settings(self) -> str:
        """A short digest of the options that change scores and are not their defaults; '' when all are."""
        fields = type(self.options).model_fields
        changed = {
            name: value
            for name, value in sorted(self.options.model_dump(mode="json").items())
            if name not in _NOT_IN_THE_SCORE and value != fields[name].get_default(call_default_factory=True)
        }
        return hashlib.blake2b(repr(changed).encode(), digest_size=3).hexdigest() if changed else ""

    def weighed(self, *networks: torch.nn.Module) -> None:
        """Name the loaded weights in `weight_digest` and in `version`. Called once, at the end of load()."""
        from reward_servers.scorers.parts.loading import tensors_digest

        self.weight_digest = tensors_digest(*networks)
        self.version = f"{self.version}-{self.weight_digest[:8]}"


class TorchScorer(OptionScorer[D]):
    """A score that torch computes from preprocessed pixels: the subclass loads, and gives `forward`.

    gradients (if asked for): d of the first column / d image, float32 [N,H,W,3], the image in [0,1]. The value beside a
    gradient comes from the same differentiable preprocessing, within PIL's rounding of the plain one.
    """

    preprocess: Preprocess
    columns_bounded: ClassVar[bool] = False  # values are cut to value_range: rounding can leave it by 1e-7

    @abstractmethod
    def forward(self, pixels: torch.Tensor, batch: ScoreBatch) -> torch.Tensor:
        """float32 [N,K] from float [N,3,h,w] on the device, in the options' dtype."""

    def judged(self, pixels: torch.Tensor, batch: ScoreBatch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`forward`, and how unsure each value is, float32 [N,K]; None of a scorer that cannot say."""
        return self.forward(pixels, batch), None

    def score(self, batch: ScoreBatch) -> ScoreTable:
        import torch

        from reward_servers.scorers.parts.loading import device_of

        if not batch.want_gradients:
            with torch.no_grad():
                return self._told(*self.judged(self._pixels(self.preprocess.exact(batch.images)), batch))
        images = torch.from_numpy(batch.images.astype(np.float32) / 255).permute(0, 3, 1, 2)
        images = images.to(device_of(self.options)).requires_grad_()
        values, unsure = self.judged(self._pixels(self.preprocess.differentiable(images)), batch)
        # Each value depends on its own image only, so the gradient of the sum holds every image's own.
        (gradient,) = torch.autograd.grad(values[:, 0].sum(), images)
        gradients = gradient.float().permute(0, 2, 3, 1).contiguous().cpu().numpy()
        return self._told(values.detach(), unsure, gradients=gradients)

    def _told(
        self, values: torch.Tensor, unsure: torch.Tensor | None, gradients: np.ndarray | None = None
    ) -> ScoreTable:  # fmt: skip
        uncertainty = None if unsure is None else unsure.float().cpu().numpy()
        return self.table(self._host(values), uncertainty=uncertainty, gradients=gradients)

    def _pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        from reward_servers.scorers.parts.loading import device_of, dtype_of

        return pixels.to(device_of(self.options), dtype_of(self.options))

    def _host(self, values: torch.Tensor) -> np.ndarray:
        array = values.float().cpu().numpy()
        return np.clip(array, *self.value_range) if self.columns_bounded else array
