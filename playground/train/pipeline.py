"""Owns what the base is made of: a StableDiffusion3Pipeline small enough for a laptop's CPU.

Every part is a stock diffusers or transformers class, so `DiffusionPipeline.from_pretrained`
loads the folder without Salon's code. Owns no training (see `pretrain`).

The model works on pixels: its VAE is an `AutoencoderKL` that changes nothing (`identity_vae`),
with one latent pixel a picture pixel. SD3 allows an empty T5 slot, whose tokens are zeros, but
`from_pretrained` then asks for `text_encoder_3=None`; so the slot holds a T5 without layers that
answers zeros itself (`_empty_t5`), and both ways of loading agree. The base knows TEXT_TOKENS
of these tokens: generate with `max_sequence_length=TEXT_TOKENS` (the default of 256 adds more).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from playground.world.captions import WORDS
from playground.world.scenes import SIZE

TEXT_TOKENS = 12
"""Of the CLIP encoders, and as many zeros in T5's place."""
LATENT_SCALE = 0.6
LATENT_SHIFT = -0.45
"""Latents are (x - LATENT_SHIFT) / LATENT_SCALE with x in [-1, 1]: about unit variance."""
SHIFT = 3.0
"""Of the timesteps, in pretraining and in the scheduler's file."""

_SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "unk_token": "<unk>", "eos_token": "<eos>"}


@dataclass(frozen=True)
class Size:
    """The shape of a base; `text_width` is one CLIP encoder's, and there are two."""

    num_layers: int
    num_heads: int
    head_dim: int
    text_width: int
    text_layers: int
    text_heads: int


SIZES = {
    "tiny": Size(1, 2, 8, text_width=8, text_layers=2, text_heads=1),
    "base": Size(4, 4, 32, text_width=48, text_layers=3, text_heads=3),
}


def build_pipeline(size: str = "base", seed: int = 0) -> StableDiffusion3Pipeline:
    """A pipeline with random weights (the VAE excepted): "base", or "tiny" for unit tests."""
    if size not in SIZES:
        raise ValueError(f"no such size: {size!r}; there are {tuple(SIZES)}")
    shape = SIZES[size]
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusion3Pipeline(
            transformer=_transformer(shape),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
            vae=identity_vae(),
            text_encoder=_text_encoder(shape, tokenizer),
            tokenizer=tokenizer,
            text_encoder_2=_text_encoder(shape, tokenizer),
            tokenizer_2=tokenizer,
            text_encoder_3=_empty_t5(shape, tokenizer),
            tokenizer_3=tokenizer,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, with <bos> and <eos>, padded to TEXT_TOKENS."""
    # Ids follow this order: <eos> is 3, for CLIP takes an <eos> of 2 for a config from before 2023.
    vocabulary = {word: i for i, word in enumerate((*_SPECIAL.values(), *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>",
        special_tokens=[(token, vocabulary[token]) for token in ("<bos>", "<eos>")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=TEXT_TOKENS,
        model_input_names=["input_ids", "attention_mask"],
        **_SPECIAL,
    )


def identity_vae() -> AutoencoderKL:
    """An AutoencoderKL whose latent mode is the picture and whose decoder is the identity.

    A pixel value v travels as the pair (+v, -v): silu(v) - silu(-v) = v. Two constant channels
    +M and -M make up the group norm's variance almost alone, so it divides by a constant that
    its weight undoes. Residual blocks add zero.
    """
    vae = AutoencoderKL(
        block_out_channels=(8,),
        layers_per_block=1,
        latent_channels=3,
        norm_num_groups=1,
        sample_size=SIZE,
        scaling_factor=1 / LATENT_SCALE,
        shift_factor=LATENT_SHIFT,
        force_upcast=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    with torch.no_grad():
        for half in (vae.encoder, vae.decoder):
            for module in half.modules():
                if hasattr(module, "conv2"):
                    module.conv2.weight.zero_()
                    module.conv2.bias.zero_()
            _pair_in(half.conv_in)
            _undo_norm(half.conv_norm_out)
            _pair_out(half.conv_out)
        vae.encoder.conv_out.bias[3:] = -30.0  # log variance: samples are the mode
    return vae.requires_grad_(False)


_CONSTANT = 256.0
"""M: a power of two, far above pixel values and exact in fp16."""


def _pair_in(conv: nn.Conv2d) -> None:
    assert conv.bias is not None
    conv.weight.zero_()
    conv.bias.zero_()
    for channel in range(3):
        conv.weight[2 * channel, channel, 1, 1] = 1.0
        conv.weight[2 * channel + 1, channel, 1, 1] = -1.0
    conv.bias[6], conv.bias[7] = _CONSTANT, -_CONSTANT


def _undo_norm(norm: nn.GroupNorm) -> None:
    """Of 8 channels the two constants alone give a variance of M^2 / 4; the mean is zero."""
    norm.weight.fill_(_CONSTANT / 2)
    norm.bias.zero_()


def _pair_out(conv: nn.Conv2d) -> None:
    assert conv.bias is not None
    conv.weight.zero_()
    conv.bias.zero_()
    for channel in range(3):
        conv.weight[channel, 2 * channel, 1, 1] = 1.0
        conv.weight[channel, 2 * channel + 1, 1, 1] = -1.0


def _transformer(shape: Size) -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=SIZE,
        patch_size=4,
        in_channels=3,
        out_channels=3,
        num_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        attention_head_dim=shape.head_dim,
        caption_projection_dim=shape.num_heads * shape.head_dim,
        joint_attention_dim=2 * shape.text_width,
        pooled_projection_dim=2 * shape.text_width,
        pos_embed_max_size=SIZE // 4,
        qk_norm="rms_norm",
    )


def _text_encoder(shape: Size, tokenizer: PreTrainedTokenizerFast) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.text_width,
        intermediate_size=4 * shape.text_width,
        projection_dim=shape.text_width,
        num_hidden_layers=shape.text_layers,
        num_attention_heads=shape.text_heads,
        max_position_embeddings=TEXT_TOKENS,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return CLIPTextModelWithProjection(config)


def _empty_t5(shape: Size, tokenizer: PreTrainedTokenizerFast) -> T5EncoderModel:
    """Answers zeros for every token, as StableDiffusion3Pipeline does for a missing T5."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=2 * shape.text_width,
        d_kv=1,
        d_ff=1,
        num_layers=0,
        num_heads=1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    encoder = T5EncoderModel(config)
    nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return encoder.requires_grad_(False)
