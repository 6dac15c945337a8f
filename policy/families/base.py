"""What a model family offers: loading, prompt encoding, velocity, decoding, LoRA targets, export.

A family is bound to one local diffusers folder. Text encoders and VAE are frozen and come into memory when first
used, so a learner rank that gets embeddings from a vault never holds them.

Does not own: guidance, precision and tuning (policy/policy.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from policy.types import EmbeddingBatch, PromptEmbedding


class Family(ABC):
    """One model folder. x_s = (1-s) x_0 + s eps; the network predicts v = eps - x_0."""

    lora_targets: ClassVar[tuple[str, ...]]  # suffixes of module names that LoRA adapts by default

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        """Reads configurations only. Raises ConfigError naming model.path when the folder is not of this family."""
        self.folder, self.dtype, self.device = folder, dtype, device

    merge_repeats: bool = False
    """Whether `forward` may compute context tokens that repeat once: the same velocity, up to rounding, sooner."""

    latent_shape: tuple[int, int, int]  # C, h, w
    image_size: tuple[int, int]  # H, W
    feature_dim: int  # F of `features`

    @abstractmethod
    def load_network(self, folder: Path | None = None) -> nn.Module:
        """The denoising network of `folder` (None: the family's own) in the compute dtype, on the CPU."""

    @abstractmethod
    def forward(self, module: nn.Module, x: Tensor, s: Tensor, cond: EmbeddingBatch) -> Tensor:
        """The network's velocity [N,C,h,w] for latents x in the compute dtype at levels s [N] (fp32)."""

    @abstractmethod
    def feature_layer(self, network: nn.Module) -> nn.Module:
        """The layer of the bare network whose output [N,tokens,F] a critic on the shared trunk pools."""

    @abstractmethod
    def dummy_embedding(self, generator: torch.Generator, tokens: int) -> PromptEmbedding:
        """Standard normal numbers in the shape of an embedding, for the canary."""

    @abstractmethod
    def encode_prompt(self, text: str) -> PromptEmbedding:
        """One prompt, encoded alone, so that nothing depends on what shared its batch."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Images [N,3,H,W] in [-1,1] (not clamped), fp32, with gradient when grad mode is on."""

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Latents fp32 [N,C,h,w] (the mode, nothing drawn) of images [N,3,H,W] in [-1,1]."""

    @abstractmethod
    def save_lora(self, folder: Path, tensors: dict[str, Tensor], adapter: dict[str, object]) -> None:
        """Write LoRA tensors, named as in the bare network, so that the family's pipeline loads the folder."""

    @abstractmethod
    def save_pipeline(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        """Write a whole pipeline folder whose network holds `tensors` (every parameter, named as in the network)."""
