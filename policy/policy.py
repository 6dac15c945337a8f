"""The policy: one denoising network with its family, precision, guidance and tuning.

`module` is the bare network (with peft layers injected when LoRA is tuned). Engines wrap it; whoever holds a wrapper
passes it as `module=`. Canonical parameter names are those of the bare network, so an export, a checkpoint and a live
network always agree, whoever wrapped it.

Does not own: how a family's network is called or its images decoded (families/), warm starts (warm_start.py),
sampling (rollout.py).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from contracts.config.model import ModelConfig
from contracts.errors import ConfigError
from contracts.registry import resolve
from policy.adapters import ADAPTER, adapters_disabled, canonical_name, inject_lora
from policy.families.base import Family
from policy.precision import autocast_inside
from policy.types import EmbeddingBatch, PromptEmbedding
from policy.warm_start import apply_warm_start

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Policy:
    """One network and what it takes to paint with it. Make it with `load`."""

    config: ModelConfig
    family: Family
    module: nn.Module
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def load(cls, config: ModelConfig, seed: int, trainable: bool) -> Policy:
        """The policy at version 0, equal in every process that loads it with the same run seed.

        trainable: parameters of `trainable()` require gradients (the learner); else none does (actors). Raises
        ConfigError naming model.path, model.warm_start, model.lora.targets or model.device.
        """
        device, dtype = _device(config), _DTYPES[config.dtype]
        folder = Path(config.path)
        if not folder.is_dir():
            raise ConfigError("model.path", f"{config.path} is not a folder", "give a local diffusers pipeline folder")
        family: Family = resolve("family", config.family).load()(folder, dtype, device)
        # A GPU's flash attention takes no mask; a recomputation runs outside the forward that counts the repeats.
        family.merge_repeats = device.type == "cpu" and not config.gradient_checkpointing
        try:
            network = family.load_network()
        except OSError as error:
            raise ConfigError("model.path", f"its network cannot be loaded ({_brief(error)})") from error
        if config.tuning == "lora":
            inject_lora(network, config.lora, family.lora_targets, seed)
        if config.warm_start is not None:
            apply_warm_start(network, config, family)
        if config.autocast:
            autocast_inside(network, device, config.gradient_checkpointing)
        policy = cls(config, family, network.to(device), device, dtype)
        policy._set_mode(trainable)
        return policy

    def _set_mode(self, trainable: bool) -> None:
        self.module.requires_grad_(False)
        self.module.train(trainable)  # the families have no dropout; training mode only enables checkpointing
        if trainable:
            for parameter in self.trainable().values():
                parameter.requires_grad_(True)
            if self.config.gradient_checkpointing:
                self.module.enable_gradient_checkpointing()  # type: ignore[operator]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        return self.family.latent_shape

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return self.family.image_size

    @property
    def feature_dim(self) -> int:
        """F of `features`."""
        return self.family.feature_dim

    @property
    def identity(self) -> str:
        """What a prompt embedding depends on besides the text: part of its digest."""
        return f"{self.config.family}|{self.config.path}|{self.config.dtype}"

    def trainable(self) -> dict[str, nn.Parameter]:
        """Trained parameters by canonical name, sorted: every parameter, or the adapter's tensors for LoRA."""
        named = dict(self.module.named_parameters())
        if self.config.tuning == "lora":
            named = {canonical_name(name): p for name, p in named.items() if f".{ADAPTER}." in name}
        return dict(sorted(named.items()))

    def encode_prompt(self, text: str) -> PromptEmbedding:
        """One prompt, encoded alone."""
        return self.family.encode_prompt(text)

    def velocity(
        self,
        x: Tensor,
        s: Tensor,
        cond: EmbeddingBatch,
        uncond: EmbeddingBatch | None = None,
        guidance_scale: float = 1.0,
        *,
        module: nn.Module | None = None,
    ) -> Tensor:
        """fp32 [N,C,h,w] for latents x [N,C,h,w] at levels s [N].

        guidance_scale 1 is one plain forward; otherwise cond and uncond share one forward of 2N rows and
        v = v_uncond + g (v_cond - v_uncond) (classifier-free guidance, 2207.12598). module: an engine's wrapper.
        """
        module = self.module if module is None else module
        x = x.to(self.dtype)
        if guidance_scale == 1.0:
            return self.family.forward(module, x, s, cond).float()
        if uncond is None:
            raise ValueError(f"guidance_scale {guidance_scale} needs uncond")
        both = self.family.forward(module, torch.cat([x, x]), torch.cat([s, s]), cond.join(uncond)).float()
        v_cond, v_uncond = both.chunk(2)
        return v_uncond + guidance_scale * (v_cond - v_uncond)

    def features(
        self,
        x: Tensor,
        s: Tensor,
        cond: EmbeddingBatch,
        uncond: EmbeddingBatch | None = None,
        guidance_scale: float = 1.0,
        *,
        module: nn.Module | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(velocity, hidden [N,F] fp32): the same forward, and the conditional rows' last hidden states, pooled."""
        caught: list[Tensor] = []
        layer = self.family.feature_layer(self.module)
        handle = layer.register_forward_hook(lambda _module, _inputs, output: caught.append(output))
        try:
            v = self.velocity(x, s, cond, uncond, guidance_scale, module=module)
        finally:
            handle.remove()
        return v, caught[-1][: len(x)].float().mean(1)

    def reference(self) -> AbstractContextManager[None]:
        """Context in which a LoRA policy is its base: adapters off. Raises ValueError for full fine-tuning."""
        if self.config.tuning != "lora":
            raise ValueError("only a LoRA policy holds its own reference; full fine-tuning needs a copy")
        return adapters_disabled(self.module)

    def decode(self, latents: Tensor) -> np.ndarray:
        """uint8 [N,H,W,3] of clean latents [N,C,h,w], rounded as diffusers rounds."""
        with torch.no_grad():
            images = (self.decode_differentiable(latents) * 255.0).round().to(torch.uint8)
        return images.permute(0, 2, 3, 1).contiguous().cpu().numpy()

    def decode_differentiable(self, latents: Tensor) -> Tensor:
        """fp32 [N,3,H,W] in [0,1] with gradient (none where a value is clamped)."""
        return (self.family.decode(latents.to(self.device)) / 2.0 + 0.5).clamp(0.0, 1.0)

    def encode_images(self, images: np.ndarray) -> Tensor:
        """Latents fp32 [N,C,h,w] of uint8 [N,H,W,3]."""
        pixels = torch.from_numpy(np.array(images)).to(self.device).permute(0, 3, 1, 2).float()
        with torch.no_grad():
            return self.family.encode(pixels / 127.5 - 1.0)


def _device(config: ModelConfig) -> torch.device:
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("model.device", "is cuda, but this process sees no GPU", "give the role GPUs, or use auto")
    return torch.device("cuda", torch.cuda.current_device())


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
