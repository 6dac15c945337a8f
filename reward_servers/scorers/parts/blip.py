"""ImageReward's checkpoint as two encoders of transformers and a linear head. Pure translation: no number changes.

Does not own: the arithmetic of the score (imagereward.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from contracts.config.scorers import DeviceOptions
from contracts.errors import ConfigError
from reward_servers.scorers.parts import loading
from reward_servers.scorers.parts.linear_head import LinearHead

_HEAD_WIDTH = 64  # of every vision transformer BLIP was built on
_VISION = (
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding"),
    ("patch_embed.proj.", "embeddings.patch_embedding."),
    ("blocks.", "encoder.layers."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    (".attn.qkv.", ".self_attn.qkv."),
    (".attn.proj.", ".self_attn.projection."),
)


def load_blip(source: str, weights: str, options: DeviceOptions) -> tuple[Any, Any, LinearHead]:
    """(image encoder, text encoder, head). Raises ConfigError."""
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionModel

    described = json.loads(loading.find_file(source, "med_config.json", options.revision).read_text())
    tensors = loading.read_tensors(loading.find_file(source, weights, options.revision))
    vision_tensors = {vision_name(name): t for name, t in _under(tensors, "blip.visual_encoder.").items()}
    vision = BlipVisionModel(_vision_config(vision_tensors, source))
    loading.load_exactly(vision, vision_tensors, source)
    text = BlipTextModel(_text_config(BlipTextConfig, described, tensors), add_pooling_layer=False)
    loading.load_exactly(text, _under(tensors, "blip.text_encoder."), source)
    head = LinearHead(_under(tensors, "mlp."), int(described["hidden_size"]), source)
    return loading.freeze(vision, options), loading.freeze(text, options), head.to(loading.device_of(options))


def vision_name(name: str) -> str:
    """BLIP's name of a weight of the image encoder as transformers calls it."""
    if name.startswith("norm."):
        return f"post_layernorm.{name.removeprefix('norm.')}"
    for theirs, ours in _VISION:
        name = name.replace(theirs, ours)
    return name


def _under(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _vision_config(tensors: Mapping[str, torch.Tensor], source: str) -> Any:
    from transformers import BlipVisionConfig

    try:
        width, _, patch, _ = tensors["embeddings.patch_embedding.weight"].shape
        positions = tensors["embeddings.position_embedding"].shape[1]
        inner = len(tensors["encoder.layers.0.mlp.fc1.weight"])
    except (KeyError, ValueError) as error:
        raise ConfigError(
            "model", f"{source} is no ImageReward checkpoint: no {error}", "give its own format"
        ) from error
    return BlipVisionConfig(
        hidden_size=width, patch_size=patch, image_size=patch * round((positions - 1) ** 0.5), intermediate_size=inner,
        num_hidden_layers=sum(name.endswith("layer_norm1.weight") for name in tensors),
        num_attention_heads=max(1, width // _HEAD_WIDTH), layer_norm_eps=1e-6,
    )  # fmt: skip


def _text_config(kind: Any, described: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Any:
    """med_config.json is a BERT configuration; the vocabulary has BLIP's two extra tokens."""
    keys = ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size", "hidden_act",
            "layer_norm_eps", "max_position_embeddings", "encoder_width")  # fmt: skip
    given = {key: described[key] for key in keys if key in described}
    given["encoder_hidden_size"] = given.pop("encoder_width", given["hidden_size"])
    vocabulary = len(tensors["blip.text_encoder.embeddings.word_embeddings.weight"])
    return kind(**given, vocab_size=vocabulary)  # its is_decoder stays: in transformers that makes cross attention
