"""Which model is trained and what of it: family, folder, full weights or LoRA, precision."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from contracts.config.base import Section


class LoraConfig(Section):
    """Low-rank adapters (peft)."""

    rank: int = Field(default=32, gt=0)
    alpha: float = Field(default=64, gt=0)
    targets: tuple[str, ...] | None = Field(default=None, description="module names; None: the family's own list")
    init: Literal["gaussian", "default"] = Field(default="gaussian", description="initialisation of A; B starts at 0")


class ModelConfig(Section):
    """The policy."""

    family: str = Field(default="sd3", description="a family of `methods`, or module:Class")
    path: str = Field(description="a diffusers pipeline folder (local path)")
    tuning: Literal["full", "lora"] = "full"
    lora: LoraConfig = LoraConfig()
    warm_start: str | None = Field(
        default=None, description="a LoRA safetensors file or folder, or a diffusers folder whose transformer is taken"
    )
    dtype: Literal["fp32", "bf16"] = Field(default="fp32", description="compute dtype; transitions stay in fp32")
    autocast: bool = Field(
        default=False, description="bf16 matrix products on fp32 weights (torch.autocast); dtype must be fp32"
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    gradient_checkpointing: bool = False

    @property
    def arithmetic(self) -> Literal["fp32", "bf16"]:
        """Precision of the network's products: what replay and rollout may differ by."""
        return "bf16" if self.autocast else self.dtype

    @model_validator(mode="after")
    def _one_precision(self) -> ModelConfig:
        if self.autocast and self.dtype != "fp32":
            raise ValueError("autocast keeps fp32 weights: set dtype to fp32, or autocast to false")
        return self
