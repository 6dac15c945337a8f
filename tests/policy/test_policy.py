"""Velocity, guidance, features, prompts, images and loading of a policy, against the diffusers pipeline."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from contracts.config.model import ModelConfig
from contracts.errors import ConfigError
from policy.policy import Policy
from policy.types import EmbeddingBatch, PromptEmbedding

Load = Callable[..., Policy]


def inputs(policy: Policy, n: int = 3) -> tuple[Tensor, Tensor, EmbeddingBatch, EmbeddingBatch]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, *policy.latent_shape, generator=generator)
    texts = ["a red circle", "two squares", "a blue triangle"][:n]
    cond = EmbeddingBatch.stack([policy.encode_prompt(text) for text in texts], "cpu", policy.dtype)
    uncond = EmbeddingBatch.stack([policy.encode_prompt("")] * n, "cpu", policy.dtype)
    return x, torch.linspace(0.2, 1.0, n), cond, uncond


@torch.no_grad()
def test_velocity_is_the_networks_output_at_1000_s(load_policy: Load) -> None:
    policy = load_policy()
    x, s, cond, _ = inputs(policy)
    direct = policy.module(x, cond.text, cond.pooled, s * 1000, return_dict=False)[0]
    torch.testing.assert_close(policy.velocity(x, s, cond), direct)  # repeated context tokens are computed once


@torch.no_grad()
def test_guidance_is_one_forward_and_extrapolates(load_policy: Load) -> None:
    policy = load_policy()
    x, s, cond, uncond = inputs(policy)
    v_cond, v_uncond = policy.velocity(x, s, cond), policy.velocity(x, s, uncond)
    calls: list[int] = []
    handle = policy.module.register_forward_hook(lambda _m, _i, output: calls.append(len(output[0])))
    guided = policy.velocity(x, s, cond, uncond, 3.0)
    handle.remove()
    assert calls == [6]
    torch.testing.assert_close(guided, v_uncond + 3.0 * (v_cond - v_uncond), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(guided, v_cond, atol=1e-4)
    torch.testing.assert_close(policy.velocity(x, s, cond, uncond, 0.0), v_uncond, atol=1e-5, rtol=1e-5)
    assert torch.equal(policy.velocity(x, s, cond, uncond, 1.0), v_cond)
    with pytest.raises(ValueError, match="uncond"):
        policy.velocity(x, s, cond, None, 2.0)


@torch.no_grad()
def test_bf16_computes_in_bf16_and_answers_in_fp32(load_policy: Load) -> None:
    full, half = load_policy(), load_policy(dtype="bf16")
    assert {parameter.dtype for parameter in half.module.parameters()} == {torch.bfloat16}
    x, s, cond, _ = inputs(full)
    v = half.velocity(x, s, EmbeddingBatch(cond.text.bfloat16(), cond.pooled.bfloat16()))
    assert v.dtype == torch.float32
    reference = full.velocity(x, s, cond)
    assert (v - reference).abs().max() < 0.1 * reference.abs().max()


@torch.no_grad()
def test_features_belong_to_the_conditional_rows(load_policy: Load) -> None:
    policy = load_policy()
    x, s, cond, uncond = inputs(policy)
    v_plain, plain = policy.features(x, s, cond)
    v_guided, guided = policy.features(x, s, cond, uncond, 2.0)
    assert plain.shape == (3, policy.feature_dim)
    torch.testing.assert_close(guided, plain, atol=1e-5, rtol=1e-5)
    assert torch.equal(v_plain, policy.velocity(x, s, cond))
    assert torch.equal(v_guided, policy.velocity(x, s, cond, uncond, 2.0))


def test_prompts_are_encoded_as_the_pipeline_does(load_policy: Load, tiny_model_folder: Path) -> None:
    from diffusers import StableDiffusion3Pipeline

    policy = load_policy()
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_model_folder)
    text, negative, pooled, negative_pooled = pipeline.encode_prompt(
        "a red circle", None, None, negative_prompt="a square", max_sequence_length=12
    )
    ours, ours_negative = policy.encode_prompt("a red circle"), policy.encode_prompt("a square")
    assert torch.equal(ours.text, text[0])
    assert torch.equal(ours.pooled, pooled[0])
    assert torch.equal(ours_negative.text, negative[0])
    assert torch.equal(ours_negative.pooled, negative_pooled[0])


def test_embeddings_survive_the_wire_read_only(load_policy: Load) -> None:
    embedding = load_policy().encode_prompt("a red circle")
    arrays = embedding.to_arrays()
    for array in arrays.values():
        array.flags.writeable = False
    again = PromptEmbedding.from_arrays(arrays)
    assert torch.equal(again.text, embedding.text)
    assert torch.equal(again.pooled, embedding.pooled)


def test_stacking_one_prompt_equals_stacking_copies() -> None:
    one = PromptEmbedding(torch.randn(5, 4), torch.randn(3))
    copy = PromptEmbedding(one.text.clone(), one.pooled.clone())
    fast, slow = (EmbeddingBatch.stack(rows, "cpu", torch.float32) for rows in ([one, one], [one, copy]))
    assert torch.equal(fast.text, slow.text)
    assert torch.equal(fast.pooled, slow.pooled)
    assert torch.equal(fast.repeat_rows(2).pooled, torch.stack([one.pooled] * 4))


def test_a_folder_without_t5_pads_with_zeros(load_policy: Load, tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "no_t5"
    shutil.copytree(tiny_model_folder, folder, ignore=shutil.ignore_patterns("text_encoder_3", "tokenizer_3"))
    index = json.loads((folder / "model_index.json").read_text())
    index["text_encoder_3"] = index["tokenizer_3"] = [None, None]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "salon.json").write_text(json.dumps({"max_sequence_length": 12}))
    without, with_empty = load_policy(path=str(folder)), load_policy()
    assert torch.equal(without.encode_prompt("a red circle").text, with_empty.encode_prompt("a red circle").text)


def test_images_survive_encoding_and_decoding(load_policy: Load) -> None:
    policy = load_policy()
    images = np.random.default_rng(0).integers(0, 256, (2, *policy.image_size, 3), dtype=np.uint8)
    np.testing.assert_array_equal(policy.decode(policy.encode_images(images)), images)


def test_decoding_is_differentiable(load_policy: Load) -> None:
    policy = load_policy()
    latents = (0.1 * torch.randn(1, *policy.latent_shape)).requires_grad_()
    image = policy.decode_differentiable(latents)
    assert image.shape == (1, 3, *policy.image_size)
    image.sum().backward()
    assert latents.grad is not None
    assert latents.grad.abs().min() > 0


def test_what_is_trained(load_policy: Load) -> None:
    full, lora, actor = load_policy(), load_policy("lora"), load_policy("lora", trainable=False)
    assert set(full.trainable()) == set(dict(full.module.named_parameters()))
    assert all(parameter.requires_grad for parameter in full.trainable().values())
    names = list(lora.trainable())
    assert names == sorted(names)
    assert "transformer_blocks.0.attn.to_q.lora_A.weight" in names
    assert all(".lora_" in name and "default" not in name for name in names)
    assert sum(p.numel() for p in lora.module.parameters() if p.requires_grad) == sum(
        p.numel() for p in lora.trainable().values()
    )
    assert list(actor.trainable()) == names
    assert not any(parameter.requires_grad for parameter in actor.module.parameters())


@torch.no_grad()
def test_lora_starts_as_the_base_alike_in_every_process(load_policy: Load, disturb: Callable[..., Policy]) -> None:
    base, lora, twin, other = load_policy(), load_policy("lora"), load_policy("lora"), load_policy("lora", seed=1)
    x, s, cond, _ = inputs(base)
    torch.testing.assert_close(lora.velocity(x, s, cond), base.velocity(x, s, cond), atol=1e-6, rtol=0)
    name = "transformer_blocks.0.attn.to_q.lora_A.weight"
    assert torch.equal(lora.trainable()[name], twin.trainable()[name])
    assert not torch.equal(lora.trainable()[name], other.trainable()[name])
    disturb(lora)
    changed = lora.velocity(x, s, cond)
    assert not torch.allclose(changed, base.velocity(x, s, cond), atol=1e-4)
    with lora.reference():
        assert torch.equal(lora.velocity(x, s, cond), base.velocity(x, s, cond))
        assert all(parameter.requires_grad for parameter in lora.trainable().values())
    assert torch.equal(lora.velocity(x, s, cond), changed)
    with pytest.raises(ValueError, match="copy"):
        base.reference()


def test_loading_leaves_the_global_generator_alone(load_policy: Load) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_policy("lora")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("keys", "field"),
    [
        ({"path": "/nowhere/at/all"}, "model.path"),
        ({"device": "cuda"}, "model.device"),
        ({"tuning": "lora", "lora": {"targets": ("to_q", "no_such_layer")}}, "model.lora.targets"),
        ({"warm_start": "/nowhere/at/all"}, "model.warm_start"),
    ],
)
def test_mistakes_name_their_field(load_policy: Load, keys: dict[str, Any], field: str) -> None:
    if field == "model.device" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError) as caught:
        load_policy(**keys)
    assert caught.value.field == field


@pytest.mark.parametrize("damage", ["no index", "broken index", "other pipeline", "no weights", "pickled weights"])
def test_damaged_folders_are_told(load_policy: Load, tiny_model_folder: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    index, weights = folder / "model_index.json", folder / "transformer" / "diffusion_pytorch_model.safetensors"
    if damage == "no index":
        index.unlink()
    elif damage == "broken index":
        index.write_text("{")
    elif damage == "other pipeline":
        index.write_text(json.dumps({"_class_name": "FluxPipeline"}))
    elif damage == "no weights":
        weights.unlink()
    else:
        weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ConfigError, match=r"model\.path"):
        load_policy(path=str(folder))


def test_autocast_multiplies_in_bf16_and_keeps_fp32_weights(tiny_model_folder: Path) -> None:
    exact = Policy.load(ModelConfig(path=str(tiny_model_folder)), 0, trainable=True)
    quick = Policy.load(ModelConfig(path=str(tiny_model_folder), autocast=True), 0, trainable=True)
    cond = EmbeddingBatch.stack([exact.encode_prompt("a red circle")] * 2, exact.device, exact.dtype)
    x, s = torch.randn(2, *exact.latent_shape, generator=torch.Generator().manual_seed(0)), torch.tensor([0.9, 0.3])
    v, v_quick = exact.velocity(x, s, cond), quick.velocity(x, s, cond)
    assert v_quick.dtype == torch.float32
    assert not torch.equal(v, v_quick)
    assert torch.allclose(v, v_quick, atol=0.05 * float(v.abs().max()))
    v_quick.square().mean().backward()
    gradients = [parameter.grad for parameter in quick.trainable().values() if parameter.grad is not None]
    assert gradients
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
