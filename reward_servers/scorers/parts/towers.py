"""Image and text towers of CLIP and SigLIP: unit embeddings, the logit scale, texts encoded once.

Does not own: what is made of the embeddings (each scorer), open_clip's own format (open_clip.py).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from contracts.config.scorers import DeviceOptions
from reward_servers.scorers.parts import loading
from reward_servers.scorers.parts.open_clip import is_open_clip, load_open_clip, open_clip_size
from reward_servers.scorers.parts.preprocess import Preprocess, ProcessorPreprocess

_CACHED_TEXTS = 4096
CLIP_TOKENIZING = {"padding": True, "truncation": True, "max_length": 77}
# It was trained on padded texts that attend to their padding: no mask.
_SIGLIP_TOKENIZING = {"padding": "max_length", "truncation": True, "return_attention_mask": False}


class Towers:
    """network: a transformers model with get_image_features and get_text_features. Embeddings are float32 [N,D]."""

    def __init__(self, network: Any, tokenizer: Any, tokenizing: dict[str, Any]) -> None:
        self.network, self._tokenizer, self._tokenizing = network, tokenizer, tokenizing
        self._texts: OrderedDict[str, torch.Tensor] = OrderedDict()

    @property
    def scale(self) -> torch.Tensor:
        """exp(logit_scale), a scalar."""
        return self.network.logit_scale.float().exp().reshape(())

    def images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Unit embeddings of preprocessed pixels, with gradient if these have one."""
        return F.normalize(_features(self.network.get_image_features(pixel_values=pixels)).float(), dim=-1)

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Unit embeddings of texts, in their order. Each text is encoded alone and kept: a group has one prompt."""
        for text in dict.fromkeys(texts):
            if text in self._texts:
                self._texts.move_to_end(text)
            else:
                self._texts[text] = self._encode(text)
        found = torch.stack([self._texts[text] for text in texts])
        while len(self._texts) > _CACHED_TEXTS:
            self._texts.popitem(last=False)
        return found

    def mean_text(self, texts: Sequence[str]) -> torch.Tensor:
        """Unit mean [D] of the unit embeddings of several texts."""
        return F.normalize(self.texts(texts).mean(dim=0), dim=-1)

    def _encode(self, text: str) -> torch.Tensor:
        tokens = self._tokenizer([text], return_tensors="pt", **self._tokenizing).to(self.network.device)
        arguments = {key: tokens[key] for key in ("input_ids", "attention_mask") if key in tokens}
        with torch.no_grad():
            return F.normalize(_features(self.network.get_text_features(**arguments)).float(), dim=-1)[0]


def load_clip(source: str, options: DeviceOptions, processor: str | None = None) -> tuple[Towers, Preprocess]:
    """A CLIP in transformers' format, or in open_clip's (a folder with open_clip_config.json, or a lone file)."""
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

    if is_open_clip(source):
        network = load_open_clip(source, options)
        preprocess: Any = _clip_processor(open_clip_size(network))
    else:
        network = loading.load_network(CLIPModel, source, options)
        preprocess = loading.load_tool(CLIPImageProcessorPil, processor or source, options)
    tokenizer = loading.load_tool(AutoTokenizer, processor or _folder(source), options)
    return Towers(network, tokenizer, CLIP_TOKENIZING), ProcessorPreprocess(preprocess)


def load_siglip(source: str, options: DeviceOptions) -> tuple[Towers, Preprocess]:
    """A SigLIP, or a SigLIP 2 of fixed resolution."""
    from transformers import AutoTokenizer, SiglipImageProcessorPil, SiglipModel

    network = loading.load_network(SiglipModel, source, options)
    processor = loading.load_tool(SiglipImageProcessorPil, source, options)
    tokenizer = loading.load_tool(AutoTokenizer, source, options)
    length = network.config.text_config.max_position_embeddings
    return Towers(network, tokenizer, {**_SIGLIP_TOKENIZING, "max_length": length}), ProcessorPreprocess(processor)


def _clip_processor(size: int) -> Any:
    from transformers import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def _folder(source: str) -> str:
    path = Path(source)
    return str(path.parent) if path.is_file() else source


def _features(output: Any) -> torch.Tensor:
    """The projected embedding: transformers answers a tensor or an output that holds it as pooler_output."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output
