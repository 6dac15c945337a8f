"""Exports that diffusers loads without Salon and that paint the live policy's pictures; warm starts from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from contracts.config.model import LoraConfig, ModelConfig
from contracts.config.rollout import SamplerConfig
from contracts.errors import ConfigError
from policy.export import export_lora, export_pipeline
from policy.policy import Policy
from policy.rollout import paint, seeded_noise
from policy.types import EmbeddingBatch
from policy.weights import live_digest

Load = Callable[..., Policy]
Disturb = Callable[..., Policy]
STEPS = 3


@pytest.fixture(scope="module", params=["tiny", "base"])
def model_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from playground.train.pipeline import build_pipeline

    folder = tmp_path_factory.mktemp("model") / request.param
    build_pipeline(size=request.param, seed=3).save_pretrained(folder)
    return folder


def policy_of(folder: Path, tuning: str, **keys: Any) -> Policy:
    settings = {"path": str(folder), "tuning": tuning, "lora": LoraConfig(rank=4, alpha=16), **keys}
    return Policy.load(ModelConfig.model_validate(settings), 0, True)


def live_images(policy: Policy) -> np.ndarray:
    cond, uncond = (
        EmbeddingBatch.stack([policy.encode_prompt(text)] * 2, policy.device, policy.dtype)
        for text in ("a red circle", "")
    )
    config = SamplerConfig(name="ode", steps=STEPS, shift=3.0, guidance_scale=2.0)
    return policy.decode(paint(policy, cond, uncond, config, [], [1, 2], [[], []], record=False).clean)


def pipeline_images(pipeline: Any, policy: Policy) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        "a red circle", guidance_scale=2.0, sigmas=np.linspace(1, 0, STEPS + 1)[:-1].tolist(),
        num_inference_steps=STEPS, num_images_per_prompt=2, latents=seeded_noise([1, 2], policy),
        max_sequence_length=12, output_type="np",
    ).images  # fmt: skip
    return (images * 255).round().astype(np.uint8)


def assert_same_pictures(ours: np.ndarray, theirs: np.ndarray) -> None:
    difference = np.abs(ours.astype(int) - theirs.astype(int))
    assert difference.max() <= 1
    assert difference.mean() < 0.01


def test_a_full_export_is_a_pipeline(model_folder: Path, tmp_path: Path, disturb: Disturb) -> None:
    from diffusers import DiffusionPipeline

    policy = policy_of(model_folder, "full")
    before = live_images(policy)
    live = live_images(disturb(policy, 0.02))
    assert np.abs(live.astype(int) - before.astype(int)).mean() > 1
    folder = export_pipeline(policy, tmp_path / "export")
    assert_same_pictures(live, pipeline_images(DiffusionPipeline.from_pretrained(folder), policy))
    assert live_digest(policy_of(folder, "full")) == live_digest(policy)
    assert live_digest(policy_of(model_folder, "full", warm_start=str(folder))) == live_digest(policy)


def test_a_lora_export_is_a_lora(model_folder: Path, tmp_path: Path, disturb: Disturb) -> None:
    from diffusers import DiffusionPipeline

    policy = policy_of(model_folder, "lora")
    before = live_images(policy)
    live = live_images(disturb(policy, 0.1))
    assert np.abs(live.astype(int) - before.astype(int)).mean() > 1
    folder = export_lora(policy, tmp_path / "lora")
    assert [file.name for file in folder.iterdir()] == ["pytorch_lora_weights.safetensors"]
    pipeline = DiffusionPipeline.from_pretrained(model_folder)
    pipeline.load_lora_weights(folder)
    assert_same_pictures(live, pipeline_images(pipeline, policy))
    merged = export_pipeline(policy, tmp_path / "merged")
    assert_same_pictures(live, pipeline_images(DiffusionPipeline.from_pretrained(merged), policy))


def test_warm_starts_from_a_lora(model_folder: Path, tmp_path: Path, disturb: Disturb) -> None:
    trained = disturb(policy_of(model_folder, "lora"), 0.1)
    live = live_images(trained)
    folder = export_lora(trained, tmp_path / "lora")
    continued = policy_of(model_folder, "lora", warm_start=str(folder))
    assert live_digest(continued) == live_digest(trained)
    assert_same_pictures(live, live_images(continued))
    other_alpha = LoraConfig(rank=4, alpha=5)
    assert_same_pictures(live, live_images(policy_of(model_folder, "lora", lora=other_alpha, warm_start=str(folder))))
    file = folder / "pytorch_lora_weights.safetensors"
    assert_same_pictures(live, live_images(policy_of(model_folder, "full", warm_start=str(file))))


def test_warm_start_from_pefts_own_format(load_policy: Load, disturb: Disturb, tmp_path: Path) -> None:
    from diffusers import SD3Transformer2DModel
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    base = load_policy()
    network = SD3Transformer2DModel.from_pretrained(base.family.folder, subfolder="transformer")
    model = get_peft_model(network, PeftConfig(r=4, lora_alpha=12, target_modules=["to_q", "to_k"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path / "peft")
    policy = load_policy(
        "lora", lora={"rank": 4, "alpha": 12, "targets": ("to_q", "to_k")}, warm_start=str(tmp_path / "peft")
    )
    x = torch.randn(1, *policy.latent_shape)
    cond = EmbeddingBatch.stack([policy.encode_prompt("a red circle")], "cpu", torch.float32)
    s = torch.tensor([0.5])
    with torch.no_grad():
        theirs = model(
            hidden_states=x, timestep=s * 1000, encoder_hidden_states=cond.text, pooled_projections=cond.pooled
        )
        torch.testing.assert_close(policy.velocity(x, s, cond), theirs.sample, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "fault", ["rank", "targets", "no lora", "empty folder", "garbage", "half a pair", "other model"]
)
def test_warm_starts_that_do_not_fit_are_told(load_policy: Load, disturb: Disturb, tmp_path: Path, fault: str) -> None:
    source = load_policy("lora", lora={"rank": 8, "alpha": 8} if fault == "rank" else {"rank": 4, "alpha": 8})
    folder = export_lora(disturb(source), tmp_path / "lora")
    file = folder / "pytorch_lora_weights.safetensors"
    keys: dict[str, Any] = {"tuning": "lora", "warm_start": str(folder)}
    if fault == "targets":
        keys["lora"] = {"rank": 4, "alpha": 8, "targets": ("to_q",)}
    elif fault == "no lora":
        save_file({"transformer.proj_out.weight": torch.zeros(2)}, file)
    elif fault == "empty folder":
        file.unlink()
    elif fault == "garbage":
        file.write_bytes(b"\x80\x04garbage")
    elif fault == "half a pair":
        tensors = load_file(file)
        del tensors[sorted(tensors)[1]]
        save_file(tensors, file)
    elif fault == "other model":
        renamed = {name.replace("blocks.0", "blocks.7"): tensor for name, tensor in load_file(file).items()}
        save_file(renamed, file)
        keys["tuning"] = "full"
    with pytest.raises(ConfigError) as caught:
        load_policy(**keys)
    assert caught.value.field == "model.warm_start"


def test_exports_refuse_what_they_cannot_do(load_policy: Load, tmp_path: Path) -> None:
    policy = load_policy()
    with pytest.raises(ValueError, match="no LoRA"):
        export_lora(policy, tmp_path / "lora")
    with pytest.raises(FileExistsError):
        export_pipeline(policy, tmp_path)
