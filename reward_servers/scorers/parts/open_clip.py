"""open_clip's own format: safetensors of a CLIP, their names and sizes translated to transformers' CLIPModel.

Reads a folder with open_clip_config.json and open_clip_model.safetensors (the hub's form) or a lone safetensors file,
whose sizes are read off its tensors. Pure translation: no number changes. Does not own: the network (transformers).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from contracts.config.scorers import DeviceOptions
from contracts.errors import ConfigError
from reward_servers.scorers.parts import loading

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
_HEAD_WIDTH = {"vision": {1280: 80, 1408: 88, 1664: 104}, "text": {}}  # H, g and bigG; elsewhere 64

_LAYER = re.compile(r"^(visual\.)?transformer\.resblocks\.(\d+)\.(.+)$")
_IN_LAYER = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}  # fmt: skip
_PLAIN = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}


def is_open_clip(source: str) -> bool:
    """A lone safetensors file, or a local folder in open_clip's format that is not in transformers' as well."""
    path = Path(source)
    return path.is_file() or ((path / CONFIG).is_file() and not (path / "config.json").is_file())


def load_open_clip(source: str, options: DeviceOptions) -> Any:
    """A CLIPModel with the weights of an open_clip checkpoint. Raises ConfigError."""
    from transformers import CLIPModel

    path = Path(source)
    tensors = loading.read_tensors(path if path.is_file() else loading.find_file(source, WEIGHTS))
    described = json.loads((path / CONFIG).read_text())["model_cfg"] if path.is_dir() else {}
    network = CLIPModel(clip_config(tensors, described))
    loading.load_exactly(network, dict(translated(tensors)), source)
    return loading.freeze(network, options)


def open_clip_size(network: Any) -> int:
    """Pixels of the edge its image tower reads."""
    return int(network.config.vision_config.image_size)


def clip_config(tensors: Mapping[str, torch.Tensor], described: Mapping[str, Any]) -> Any:
    """The CLIPConfig of an open_clip checkpoint: sizes from its tensors, heads and activation from `described`.

    described: model_cfg of open_clip_config.json; empty: heads of open_clip's standard widths, exact GELU.
    """
    from transformers import CLIPConfig

    try:
        width, _, patch, _ = tensors["visual.conv1.weight"].shape
        positions, vocabulary = tensors["visual.positional_embedding"], tensors["token_embedding.weight"]
        context, text_width = tensors["positional_embedding"].shape
        projection = int(tensors["text_projection"].shape[1])
    except (KeyError, ValueError) as error:
        raise ConfigError(
            "model", f"this is no open_clip checkpoint: {error}", "give an open_clip or CLIP model"
        ) from error
    vision, text = described.get("vision_cfg", {}), described.get("text_cfg", {})
    activation = "quick_gelu" if described.get("quick_gelu") else "gelu"
    return CLIPConfig(
        projection_dim=projection,
        vision_config={
            "hidden_size": width, "patch_size": patch, "image_size": patch * round((len(positions) - 1) ** 0.5),
            "num_hidden_layers": _depth(tensors, "visual."), "intermediate_size": _mlp(tensors, "visual."),
            "num_attention_heads": width // vision.get("head_width", _HEAD_WIDTH["vision"].get(width, 64)),
            "hidden_act": activation, "layer_norm_eps": 1e-5, "projection_dim": projection,
        },
        text_config={
            "hidden_size": text_width, "vocab_size": len(vocabulary), "max_position_embeddings": context,
            "num_hidden_layers": _depth(tensors, ""), "intermediate_size": _mlp(tensors, ""),
            "num_attention_heads": text.get("heads", text_width // 64), "hidden_act": activation,
            "layer_norm_eps": 1e-5, "projection_dim": projection,
            "eos_token_id": len(vocabulary) - 1, "bos_token_id": len(vocabulary) - 2,
        },
    )  # fmt: skip


def translated(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name in CLIPModel, tensor) of every weight; the joint q, k, v projections are split."""
    for name, tensor in tensors.items():
        if name in ("visual.proj", "text_projection"):
            yield name.replace("visual.proj", "visual_projection") + ".weight", tensor.T.contiguous()
        elif layer := _LAYER.match(name):
            tower = "vision_model" if layer[1] else "text_model"
            yield from _in_layer(f"{tower}.encoder.layers.{layer[2]}", layer[3], tensor)
        elif name not in ("attn_mask",):
            yield _PLAIN.get(name, name), tensor


def _in_layer(prefix: str, rest: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    if rest.startswith("attn.in_proj_"):
        kind = rest.removeprefix("attn.in_proj_")
        for letter, part in zip("qkv", tensor.chunk(3), strict=True):
            yield f"{prefix}.self_attn.{letter}_proj.{kind}", part.contiguous()
        return
    stem, _, kind = rest.rpartition(".")
    yield f"{prefix}.{_IN_LAYER.get(stem, stem)}.{kind}", tensor


def _depth(tensors: Mapping[str, torch.Tensor], tower: str) -> int:
    return sum(name.startswith(f"{tower}transformer.") and name.endswith("ln_1.weight") for name in tensors)


def _mlp(tensors: Mapping[str, torch.Tensor], tower: str) -> int:
    return len(tensors[f"{tower}transformer.resblocks.0.mlp.c_fc.weight"])
