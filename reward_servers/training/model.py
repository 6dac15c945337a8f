"""The network that is trained: a CLIP of transformers, scored as PickScore does, and its folder on disk.

r(image, prompt) = exp(logit scale) cos(image, prompt) - anchor. The folder is a CLIP folder as on the hub, so whatever
reads PickScore's format reads it; `reward.json` beside it holds the anchor. Does not own: which weights train.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from contracts.config.scorers import DeviceOptions
from contracts.errors import ConfigError
from reward_servers.scorers.parts import loading
from reward_servers.scorers.parts.preprocess import ProcessorPreprocess
from reward_servers.scorers.parts.towers import CLIP_TOKENIZING

REWARD_FILE = "reward.json"
PROJECTIONS = ("visual_projection", "text_projection", "logit_scale")


class RewardModel:
    """A CLIP with its tokenizer and image processor. anchor: subtracted from every reward."""

    def __init__(self, source: str, device: str = "auto") -> None:
        from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

        options = DeviceOptions(device=device)
        self.network = loading.load_network(CLIPModel, source, options)
        self.tokenizer = loading.load_tool(AutoTokenizer, source, options)
        self.processor = loading.load_tool(CLIPImageProcessorPil, source, options)
        self.preprocess = ProcessorPreprocess(self.processor)
        self.anchor = read_anchor(source)

    def train_only(self, which: str) -> list[tuple[str, torch.nn.Parameter]]:
        """Let all weights train, or the projections alone; returns them by name, sorted."""
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(which == "all" or name.startswith(PROJECTIONS))
        return sorted((n, p) for n, p in self.network.named_parameters() if p.requires_grad)

    def rewards(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> Tensor:
        """float32 [N] of N uint8 images of any sizes and their prompts, with gradient where weights train.

        Each distinct prompt is encoded once, padded with the others of the call, which its attention mask hides.
        """
        device = self.network.device
        distinct = list(dict.fromkeys(prompts))
        tokens = self.tokenizer(distinct, return_tensors="pt", **CLIP_TOKENIZING).to(device)
        arguments = {key: tokens[key] for key in ("input_ids", "attention_mask") if key in tokens}
        texts = F.normalize(_features(self.network.get_text_features(**arguments)).float(), dim=-1)
        pixels = self.preprocess.exact(images).to(device)  # type: ignore[arg-type]  # one by one, so of any sizes
        vision = F.normalize(_features(self.network.get_image_features(pixel_values=pixels)).float(), dim=-1)
        rows = torch.tensor([distinct.index(prompt) for prompt in prompts], device=device)
        scale = self.network.logit_scale.float().exp().reshape(())
        return scale * (vision * texts[rows]).sum(dim=1) - self.anchor

    def save(self, folder: Path) -> None:
        """Model, tokenizer, processor and anchor, as safetensors and JSON."""
        self.network.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        (folder / REWARD_FILE).write_text(json.dumps({"anchor": self.anchor}, indent=2) + "\n")

    def digest(self) -> str:
        """Names the weights."""
        return loading.tensors_digest(self.network)


def read_anchor(source: str) -> float:
    """The anchor of a trained folder; 0 for a plain CLIP. Raises ConfigError for a reward.json that is none."""
    path = Path(source) / REWARD_FILE
    if not path.is_file():
        return 0.0
    try:
        return float(json.loads(path.read_text())["anchor"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(str(path), "does not hold an anchor", "train the model again, or remove the file") from error


def _features(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.pooler_output
