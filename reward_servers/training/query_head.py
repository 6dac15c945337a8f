"""SoliReward's hierarchical query attention (HPQA, 2512.22170; lian700/SoliReward: models/attention_query.py) on CLIP.

    q_1 = MHA_1(q_0; H_l1),  q_i = MHA_i(q_(i-1); H_li),  o = MHA(q_res; H_L),  r = Head(q_n + o)

q_0 and q_res are learnt queries; H_l: hidden states of layer l. Here these are the image tower's tokens followed by
the prompt's from the text tower at the same share of its depth, each brought to the head's width by a linear map; the
prompt's padding is masked, so it never counts. SoliReward reads a video model of one stream: two towers are our choice.
Does not own: training, the anchor (model.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from contracts.errors import ConfigError
from reward_servers.scorers.parts.loading import load_exactly
from reward_servers.training.config import HeadConfig

HEAD = "query_head"


class QueryHead(torch.nn.Module):
    """pool: [N,width]; reward: [N]."""

    def __init__(self, layers: tuple[int, ...], last: int, width: int, heads: int, vision: int, text: int) -> None:
        """layers: of the image tower, counted from 1; last: its depth; vision, text: widths of the towers."""
        super().__init__()
        self.layers, self.last, self.width, self.heads = layers, last, width, heads
        number = len(layers) + 1
        self.query, self.residual = (torch.nn.Parameter(torch.randn(1, 1, width) * width**-0.5) for _ in range(2))
        self.of_vision = torch.nn.ModuleList(torch.nn.Linear(vision, width) for _ in range(number))
        self.of_text = torch.nn.ModuleList(torch.nn.Linear(text, width) for _ in range(number))
        self.attention = torch.nn.ModuleList(
            torch.nn.MultiheadAttention(width, heads, batch_first=True) for _ in range(number)
        )
        self.out = torch.nn.Linear(width, 1)

    @classmethod
    def new(cls, network: Any, config: HeadConfig, seed: int) -> QueryHead:
        """An untrained head of a CLIP. Raises ConfigError for layers it does not have."""
        depth = int(network.config.vision_config.num_hidden_layers)
        layers = config.layers or tuple(sorted({max(1, round(depth * share / 4)) for share in (1, 2, 3, 4)}))
        if layers[-1] > depth:
            raise ConfigError("head.layers", f"{network.name_or_path} has {depth} image layers, not {layers[-1]}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = cls(layers, depth, config.width, config.heads, network.config.vision_config.hidden_size,
                       network.config.text_config.hidden_size)  # fmt: skip
        return head.to(network.device)

    def pool(self, network: Any, pixels: Tensor, tokens: Mapping[str, Tensor]) -> Tensor:
        """q_n + o, float32 [N,width], of preprocessed pixels [N,3,h,w] and tokens [N,L] with their attention mask."""
        images = network.vision_model(pixel_values=pixels, output_hidden_states=True).hidden_states
        texts = network.text_model(**tokens, output_hidden_states=True).hidden_states
        mask = (
            tokens["attention_mask"].bool()
            if "attention_mask" in tokens
            else torch.ones_like(tokens["input_ids"]).bool()
        )
        return self.attend(images, texts, mask)

    def attend(self, images: tuple[Tensor, ...], texts: tuple[Tensor, ...], mask: Tensor) -> Tensor:
        """images, texts: hidden states [N,T,D], from the embeddings to the last layer; mask [N,L]: text that counts."""
        depth = len(texts) - 1
        visible = torch.ones(images[0].shape[:2], dtype=torch.bool, device=mask.device)
        hidden_from = ~torch.cat([visible, mask], dim=1)
        query = self.query.expand(len(mask), 1, -1)
        for index, layer in enumerate(self.layers):
            of_text = texts[max(1, round(depth * layer / self.last))]
            query = self._ask(index, query, images[layer], of_text, hidden_from)
        over = self._ask(len(self.layers), self.residual.expand(len(mask), 1, -1), images[-1], texts[-1], hidden_from)
        return (query + over)[:, 0]

    def _ask(self, index: int, query: Tensor, image: Tensor, text: Tensor, hidden_from: Tensor) -> Tensor:
        keys = torch.cat([self.of_vision[index](image.float()), self.of_text[index](text.float())], dim=1)
        return self.attention[index](query, keys, keys, key_padding_mask=hidden_from, need_weights=False)[0]

    def reward(self, features: Tensor) -> Tensor:
        return self.out(features)[:, 0]

    def save(self, folder: Path) -> None:
        """query_head.safetensors and query_head.json."""
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()},
                  folder / f"{HEAD}.safetensors")  # fmt: skip
        facts = {"layers": self.layers, "last": self.last, "width": self.width, "heads": self.heads,
                 "vision": self.of_vision[0].in_features, "text": self.of_text[0].in_features}  # fmt: skip
        (folder / f"{HEAD}.json").write_text(json.dumps(facts, indent=2) + "\n")


def load_head(source: str, network: Any) -> QueryHead | None:
    """The head of a trained folder in eval mode, None where it has none. Raises ConfigError."""
    folder = Path(source)
    if not (folder / f"{HEAD}.json").is_file():
        return None
    try:
        facts = json.loads((folder / f"{HEAD}.json").read_text())
        head = QueryHead(**{**facts, "layers": tuple(facts["layers"])})
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            "model", f"{folder / HEAD}.json describes no head: {error}", "train the model again"
        ) from error
    load_exactly(head, load_file(folder / f"{HEAD}.safetensors"), source)
    return head.eval().requires_grad_(False).to(network.device)
