"""Pipeline folders of SD3.5's architecture with random weights: dual attention, a VAE of factor 8, no T5."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Shape:
    """What of SD3.5-medium is scaled down for a test on a CPU."""

    sample_size: int
    num_layers: int
    num_heads: int
    head_dim: int
    joint_dim: int
    pooled: tuple[int, int]  # of the two CLIP encoders
    dual_layers: int
    vae_channels: tuple[int, ...]


MEDIUM = Shape(128, 24, 24, 64, 4096, (768, 1280), 13, (128, 256, 512, 512))
"""stabilityai/stable-diffusion-3.5-medium's transformer and VAE; its text encoders' widths, not their depth."""
MINIATURE = Shape(8, 2, 2, 8, 32, (8, 12), 1, (8, 8, 8, 8))


def save_pipeline(shape: Shape, folder: Path, device: str = "cpu") -> Path:
    """Write the folder, in bf16 as such models are shipped."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    from playground.train.pipeline import build_tokenizer

    tokenizer = build_tokenizer()

    def text_encoder(width: int) -> CLIPTextModelWithProjection:
        return CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(tokenizer), hidden_size=8, intermediate_size=16, num_hidden_layers=2,
                num_attention_heads=1, projection_dim=width, max_position_embeddings=16,
                pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )  # fmt: skip

    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        transformer = SD3Transformer2DModel(
            sample_size=shape.sample_size, patch_size=2, in_channels=16, out_channels=16, num_layers=shape.num_layers,
            attention_head_dim=shape.head_dim, num_attention_heads=shape.num_heads,
            joint_attention_dim=shape.joint_dim, caption_projection_dim=shape.num_heads * shape.head_dim,
            pooled_projection_dim=sum(shape.pooled), pos_embed_max_size=3 * shape.sample_size,
            dual_attention_layers=tuple(range(shape.dual_layers)), qk_norm="rms_norm",
        )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=shape.vae_channels, latent_channels=16, norm_num_groups=4, sample_size=8 * shape.sample_size,
        scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae,
        text_encoder=text_encoder(shape.pooled[0]), tokenizer=tokenizer, text_encoder_2=text_encoder(shape.pooled[1]),
        tokenizer_2=tokenizer, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    pipeline.to("cpu", torch.bfloat16).save_pretrained(folder)
    (folder / "salon.json").write_text(json.dumps({"max_sequence_length": 64}))
    return folder
