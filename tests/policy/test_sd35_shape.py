"""SD3.5's architecture by the same code as the playground's: in miniature here, at medium's shape in bf16 on a GPU.

One pass through everything a policy does in a run: a group painted and recorded, its log-probs replayed (mismatch),
one LoRA update, the adapter published and proven in the painter, an image decoded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from sd35_kit import MEDIUM, MINIATURE, Shape, save_pipeline

from actors.painter import PaintedGroup, Painter
from contracts.config import RunConfig
from contracts.config.load import config_from_tree
from contracts.digests import digest_arrays
from contracts.wire import PromptSpec, PromptTask, WeightOffer
from policy.policy import Policy
from policy.replay import replay
from policy.types import EmbeddingBatch, PromptEmbedding
from policy.weights import canary, export_arrays

CLIP_RANGE = 1e-4


@dataclass(frozen=True)
class Smoke:
    """What the pass measured."""

    group: PaintedGroup
    mismatch: float  # mean |ratio - 1| under the mean reduction
    canary_to_current: float
    canary_to_previous: float
    adapter_bytes: int


def run_config(shape: Shape, folder: Path, dtype: str, device: str) -> RunConfig:
    save_pipeline(shape, folder, device)
    return config_from_tree(
        {
            "name": "sd35", "objective": {"name": "grpo"}, "stop": {"steps": 1},
            "model": {"path": str(folder), "tuning": "lora", "dtype": dtype, "device": device,
                      "gradient_checkpointing": True},
            "sampler": {"steps": 4, "window": {"size": 2}, "guidance_scale": 4.5},
            "rollout": {"group_size": 2, "micro_batch": 2, "storage_dtype": dtype},
            "scorers": [{"name": "size", "serve": "jpeg_size"}],
        }
    )  # fmt: skip


def smoke(config: RunConfig) -> Smoke:
    painter, learner = Painter(config), Policy.load(config.model, config.seed, trainable=True)
    task = PromptTask(
        group_id=0, attempt=0, prompt=PromptSpec(text="a red circle"), group_size=2, min_version=0, deadline_s=60
    )
    group = painter.finish(painter.denoise(task))
    header = group.header
    cond, uncond = (
        EmbeddingBatch.stack([PromptEmbedding.from_arrays(group.embeddings[digest])] * 2, learner.device, learner.dtype)
        for digest in (header.prompt_digest, header.negative_digest or "")
    )
    states = torch.from_numpy(group.arrays["states"].copy())
    if header.dtypes:
        states = states.view(torch.bfloat16)
    differences = []
    for k in range(len(header.step_indices)):
        result = replay(
            learner, states, header.step_indices, torch.tensor(header.sigmas), cond, uncond, config.sampler,
            slice(k, k + 1),
        )  # fmt: skip
        assert result.log_prob_sum is not None
        recorded = torch.from_numpy(group.arrays["log_prob_sum"][:, k]).to(learner.device)
        differences.append((result.log_prob_sum.detach() - recorded).double() / header.dims)
        (result.log_prob_sum / header.dims).sum().backward()
    mismatch = float(torch.expm1(torch.stack(differences)).abs().mean())
    before = canary(learner)
    torch.optim.AdamW(learner.trainable().values(), lr=1e-2).step()
    answer = canary(learner)
    arrays, dtypes = export_arrays(learner.trainable())
    num_bytes = sum(array.nbytes for array in arrays.values())
    offer = WeightOffer(
        version=1, step=1, snapshot="current", digest=digest_arrays(arrays, dtypes), num_bytes=num_bytes, dtypes=dtypes
    )
    proof = painter.load(offer, arrays, answer, before)
    assert proof.canary_to_previous is not None
    return Smoke(group, mismatch, proof.canary_to_current, proof.canary_to_previous, num_bytes)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_miniature(tmp_path: Path, dtype: str) -> None:
    torch.set_num_threads(1)
    seen = smoke(run_config(MINIATURE, tmp_path / "model", dtype, "cpu"))
    assert seen.group.arrays["images"].shape == (2, 64, 64, 3)
    assert seen.group.arrays["clean"].shape == (2, 16, 8, 8)
    assert all(np.isfinite(array).all() for name, array in seen.group.arrays.items() if name != "states")
    assert {arrays["text"].shape for arrays in seen.group.embeddings.values()} == {(12 + 64, 32)}
    assert seen.mismatch == 0.0
    assert seen.canary_to_current == 0.0
    assert seen.canary_to_previous > 0


def test_scaling_and_shift_of_a_true_vae(tmp_path: Path) -> None:
    """Latents are (z - shift) * scale, as diffusers' own pipeline undoes it."""
    from diffusers import AutoencoderKL

    folder = save_pipeline(MINIATURE, tmp_path / "model")
    config = run_config(MINIATURE, tmp_path / "model", "fp32", "cpu")
    policy = Policy.load(config.model, 0, trainable=False)
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", dtype=torch.float32)
    images = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        expected = (vae.encode(pixels).latent_dist.mode() - 0.0609) * 1.5305
        torch.testing.assert_close(policy.encode_images(images), expected)
        decoded = vae.decode(expected / 1.5305 + 0.0609).sample
        torch.testing.assert_close(policy.decode_differentiable(expected), (decoded / 2 + 0.5).clamp(0, 1))


@pytest.mark.gpu
def test_medium_in_bf16(tmp_path: Path) -> None:
    torch.cuda.reset_peak_memory_stats()
    seen = smoke(run_config(MEDIUM, tmp_path / "model", "bf16", "cuda"))
    peak = torch.cuda.max_memory_allocated() / 2**30
    print(
        f"log-prob mismatch {seen.mismatch:.2e} ({seen.mismatch / CLIP_RANGE:.2g} clip ranges), adapter "
        f"{seen.adapter_bytes / 2**20:.1f} MiB, canary {seen.canary_to_current:.2e} from this version and "
        f"{seen.canary_to_previous:.2e} from the last, peak memory {peak:.1f} GiB"
    )
    assert seen.group.arrays["images"].shape == (2, 1024, 1024, 3)
    assert np.isfinite(seen.mismatch)
    assert seen.canary_to_current < seen.canary_to_previous
    assert peak < 70
