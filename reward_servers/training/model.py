"""The network that is trained: a CLIP of transformers, scored as PickScore does, and its folder on disk.

r(image, prompt) = exp(logit scale) cos(image, prompt) - anchor, or a head's output in place of the cosine
(query_head.py). The folder is a CLIP folder as on the hub, so whatever reads PickScore's format reads one without a
head; beside it `reward.json` holds the anchor, `coverage.safetensors` what it was trained on (coverage.py). Does not
own: which weights train.
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
from reward_servers.training.config import HeadConfig
from reward_servers.training.coverage import load_coverage
from reward_servers.training.query_head import HEAD, QueryHead, load_head

REWARD_FILE = "reward.json"
PROJECTIONS = ("visual_projection", "text_projection", "logit_scale")


class RewardModel:
    """A CLIP with tokenizer and image processor. anchor: subtracted from every reward; head: None for the cosine.

    coverage: of what it was trained on, None for a plain CLIP.
    """

    def __init__(self, source: str, device: str = "auto", head: HeadConfig | None = None, seed: int = 0) -> None:
        """head: give a CLIP this head, new; one that the folder holds already is loaded whatever is given."""
        from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

        options = DeviceOptions(device=device)
        self.network = loading.load_network(CLIPModel, source, options)
        self.tokenizer = loading.load_tool(AutoTokenizer, source, options)
        self.processor = loading.load_tool(CLIPImageProcessorPil, source, options)
        self.preprocess = ProcessorPreprocess(self.processor)
        self.anchor = read_anchor(source)
        self.coverage = load_coverage(source)
        self.head = load_head(source, self.network)
        if self.head is None and head is not None:
            self.head = QueryHead.new(self.network, head, seed)

    def train_only(self, which: str) -> list[tuple[str, torch.nn.Parameter]]:
        """Let all weights train, or the projections alone; returns them by name, sorted."""
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(which == "all" or name.startswith(PROJECTIONS))
        own = [(f"{HEAD}.{name}", p.requires_grad_()) for name, p in self.head.named_parameters()] if self.head else []
        if self.head is not None:  # the cosine's parameters are of no use to it
            for name, parameter in self.network.named_parameters():
                if name.startswith(PROJECTIONS):
                    parameter.requires_grad_(False)
        return sorted([*((n, p) for n, p in self.network.named_parameters() if p.requires_grad), *own])

    def rewards(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> Tensor:
        """float32 [N] of N uint8 images of any sizes and their prompts, with gradient where weights train."""
        return self.of_features(self.features(images, prompts))

    def of_features(self, features: Tensor) -> Tensor:
        """Rewards [N] of features [N,D]."""
        if self.head is not None:
            return self.head.reward(features) - self.anchor
        return self.network.logit_scale.float().exp().reshape(()) * features.sum(dim=1) - self.anchor

    def features(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> Tensor:
        """float32 [N,D]: the products v * t of unit embeddings, whose sum is the cosine; or what the head pools.

        Each distinct prompt is encoded once, padded with the others of the call, which its attention mask hides.
        """
        device = self.network.device
        distinct = list(dict.fromkeys(prompts))
        tokens = self.tokenizer(distinct, return_tensors="pt", **CLIP_TOKENIZING).to(device)
        arguments = {key: tokens[key] for key in ("input_ids", "attention_mask") if key in tokens}
        pixels = self.preprocess.exact(images).to(device)  # type: ignore[arg-type]  # one by one, so of any sizes
        rows = torch.tensor([distinct.index(prompt) for prompt in prompts], device=device)
        if self.head is not None:
            return self.head.pool(self.network, pixels, {name: each[rows] for name, each in arguments.items()})
        texts = F.normalize(_features(self.network.get_text_features(**arguments)).float(), dim=-1)
        vision = F.normalize(_features(self.network.get_image_features(pixel_values=pixels)).float(), dim=-1)
        return vision * texts[rows]

    def save(self, folder: Path) -> None:
        """Model, tokenizer, processor, anchor and coverage, as safetensors and JSON."""
        self.network.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        if self.head is not None:
            self.head.save(folder)
        if self.coverage is not None:
            self.coverage.save(folder)
        (folder / REWARD_FILE).write_text(json.dumps({"anchor": self.anchor}, indent=2) + "\n")

    def digest(self) -> str:
        """Names the weights."""
        return loading.tensors_digest(self.network, *([self.head] if self.head is not None else []))


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
