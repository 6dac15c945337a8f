"""ImageReward (arXiv 2304.05977): BLIP's image and text encoders and a linear head, standardised to mean 0 and std 1.

Own format: med_config.json of the text encoder, one safetensors file with the official names (blip.visual_encoder.*,
blip.text_encoder.*, mlp.layers.*). Text and image meet in cross attention; the first token's state is scored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from contracts.config.scorers import ImageRewardOptions
from reward_servers.scorers.base import ScoreBatch, declared
from reward_servers.scorers.parts.model_scorer import TorchScorer

if TYPE_CHECKING:
    import torch

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the training set, published with the model
TEXT_TOKENS = 35


class ImageReward(TorchScorer[ImageRewardOptions]):
    """(head - mean) / std, about -2 to 2, with its gradient."""

    declares = declared("imagereward")
    name = "imagereward"
    paper = "ImageReward: Learning and Evaluating Human Preferences (2304.05977)"

    def load(self) -> None:
        from transformers import AutoTokenizer, CLIPImageProcessorPil

        from reward_servers.scorers.parts.blip import load_blip
        from reward_servers.scorers.parts.loading import load_tool
        from reward_servers.scorers.parts.preprocess import ProcessorPreprocess

        self.vision, self.text, self.head = load_blip(self.options.model, self.options.weights, self.options)
        self.tokenizer = load_tool(AutoTokenizer, self.options.tokenizer or self.options.model, self.options)
        size = int(self.vision.config.image_size)
        self.preprocess = ProcessorPreprocess(
            CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
        )
        self.weighed(self.vision, self.text, self.head)

    def forward(self, pixels: torch.Tensor, batch: ScoreBatch) -> torch.Tensor:
        tokens = self.tokenizer(
            list(batch.prompts), padding="max_length", truncation=True, max_length=TEXT_TOKENS, return_tensors="pt"
        ).to(pixels.device)
        image = self.vision(pixel_values=pixels).last_hidden_state
        state = self.text(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], encoder_hidden_states=image,
            encoder_attention_mask=image.new_ones(image.shape[:2]), return_dict=True,
        ).last_hidden_state[:, 0]  # fmt: skip
        return ((self.head(state.float()) - MEAN) / STD)[:, None]
