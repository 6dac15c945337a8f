"""DINOv2 (and v3) image features: the unit CLS embedding. Does not own: what images are compared."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from contracts.config.scorers import DinoOptions
from reward_servers.scorers.parts import loading
from reward_servers.scorers.parts.preprocess import ProcessorPreprocess


def load_dino(options: DinoOptions, **processing: Any) -> tuple[Any, ProcessorPreprocess]:
    """The network and its preprocessing (BiT's: resize, crop, ImageNet mean). processing: in place of its settings."""
    from transformers import AutoImageProcessor, AutoModel

    network = loading.load_network(AutoModel, options.model, options)
    tool = loading.load_tool(AutoImageProcessor, options.model, options, backend="pil", **processing)
    return network, ProcessorPreprocess(tool)


def embed(network: Any, pixels: torch.Tensor) -> torch.Tensor:
    """float32 unit embeddings [N,D]: the last layer's normalised CLS token."""
    return F.normalize(network(pixel_values=pixels).last_hidden_state[:, 0].float(), dim=-1)
