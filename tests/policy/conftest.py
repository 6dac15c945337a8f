"""Fixtures of the policy's tests: the miniature model loaded as full and LoRA policies, with prompts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from contracts.config.model import LoraConfig, ModelConfig
from policy.policy import Policy

torch.set_num_threads(1)


def small_lora(**changes: object) -> LoraConfig:
    return LoraConfig.model_validate({"rank": 4, "alpha": 8, **changes})


@pytest.fixture(scope="session")
def load_policy(tiny_model_folder: Path):
    """load_policy(tuning="lora", seed=0, trainable=True, **model keys) -> Policy of the miniature model."""

    def load(tuning: str = "full", seed: int = 0, trainable: bool = True, **keys: object) -> Policy:
        settings = {"path": str(tiny_model_folder), "tuning": tuning, "lora": small_lora(), **keys}
        return Policy.load(ModelConfig.model_validate(settings), seed, trainable)

    return load


@pytest.fixture(scope="session")
def disturb():
    """disturb(policy, scale): move every trained parameter by seeded noise, so that no adapter is zero."""

    def apply(policy: Policy, scale: float = 0.05, seed: int = 0) -> Policy:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in policy.trainable().values():
                parameter.add_((torch.randn(parameter.shape, generator=generator) * scale).to(parameter.dtype))
        return policy

    return apply
