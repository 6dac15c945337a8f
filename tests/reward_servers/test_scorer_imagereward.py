"""ImageReward over HTTP from a tiny checkpoint under its official names, against a forward written out in torch."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scorer_models import PROMPTS, ask, assert_gradient, pictures_of, reference_pixels
from torch.nn import functional as F

from contracts.errors import ConfigError
from reward_servers.construct import make_scorer

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
WIDTH, DEPTH, PATCH, SIZE, VOCABULARY = 64, 2, 8, 32, 40
IMAGES = pictures_of((36, 50))

Tensors = dict[str, torch.Tensor]


def official_tensors() -> Tensors:
    """Random weights under the names of ImageReward.pt."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * (0.3 if len(shape) > 1 else 0.1)

    def linear(name: str, rows: int, columns: int) -> Tensors:
        return {f"{name}.weight": rand(rows, columns) / math.sqrt(columns) * 4, f"{name}.bias": rand(rows)}

    def norm(name: str) -> Tensors:
        return {f"{name}.weight": 1 + rand(WIDTH), f"{name}.bias": rand(WIDTH)}

    v, t = "blip.visual_encoder", "blip.text_encoder"
    named = {
        f"{v}.cls_token": rand(1, 1, WIDTH), f"{v}.pos_embed": rand(1, (SIZE // PATCH) ** 2 + 1, WIDTH),
        f"{v}.patch_embed.proj.weight": rand(WIDTH, 3, PATCH, PATCH), f"{v}.patch_embed.proj.bias": rand(WIDTH),
        f"{t}.embeddings.word_embeddings.weight": rand(VOCABULARY, WIDTH),
        f"{t}.embeddings.position_embeddings.weight": rand(64, WIDTH), **norm(f"{v}.norm"),
        f"{t}.embeddings.position_ids": torch.arange(64)[None], **norm(f"{t}.embeddings.LayerNorm"),
    }  # fmt: skip
    for i in range(DEPTH):
        block, layer = f"{v}.blocks.{i}", f"{t}.encoder.layer.{i}"
        named |= norm(f"{block}.norm1") | norm(f"{block}.norm2") | linear(f"{block}.attn.qkv", 3 * WIDTH, WIDTH)
        named |= linear(f"{block}.attn.proj", WIDTH, WIDTH) | linear(f"{block}.mlp.fc1", 96, WIDTH)
        named |= linear(f"{block}.mlp.fc2", WIDTH, 96)
        for kind in ("attention", "crossattention"):
            for part in ("self.query", "self.key", "self.value", "output.dense"):
                named |= linear(f"{layer}.{kind}.{part}", WIDTH, WIDTH)
            named |= norm(f"{layer}.{kind}.output.LayerNorm")
        named |= linear(f"{layer}.intermediate.dense", 96, WIDTH) | linear(f"{layer}.output.dense", WIDTH, 96)
        named |= norm(f"{layer}.output.LayerNorm")
    for place, rows, columns in ((0, 16, WIDTH), (2, 8, 16), (4, 6, 8), (6, 4, 6), (7, 1, 4)):
        named |= linear(f"mlp.layers.{place}", rows, columns)
    return named


def write_imagereward(folder: Path) -> Path:
    """A whole checkpoint in ImageReward's own format."""
    folder.mkdir(exist_ok=True)
    save_file(official_tensors(), folder / "ImageReward.safetensors")
    med = {"architectures": ["BertModel"], "hidden_size": WIDTH, "num_attention_heads": 2, "num_hidden_layers": DEPTH,
           "intermediate_size": 96, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "max_position_embeddings": 64,
           "encoder_width": WIDTH, "add_cross_attention": True, "vocab_size": VOCABULARY, "model_type": "bert",
           }  # fmt: skip
    (folder / "med_config.json").write_text(json.dumps(med))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *{word: 0 for prompt in PROMPTS for word in prompt.split()}]
    (folder / "vocab.txt").write_text("\n".join(words))
    described = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_imagereward(tmp_path_factory.mktemp("imagereward"))


def heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num: int) -> torch.Tensor:
    """Multi-head attention of [L,D] on [M,D]."""
    q, k, v = (x.reshape(len(x), num, -1).transpose(0, 1) for x in (q, k, v))
    weights = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    return (weights.softmax(dim=-1) @ v).transpose(0, 1).reshape(q.shape[1], -1)


def image_states(t: Tensors, pixels: torch.Tensor) -> torch.Tensor:
    """timm's vision transformer, pre-norm, eps 1e-6, GELU: states [P+1,D] of one image [3,H,W]."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, (WIDTH,), t[f"{name}.weight"], t[f"{name}.bias"], 1e-6)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, t[f"{name}.weight"], t[f"{name}.bias"])

    v = "blip.visual_encoder"
    patches = F.conv2d(pixels[None], t[f"{v}.patch_embed.proj.weight"], t[f"{v}.patch_embed.proj.bias"], stride=PATCH)
    x = torch.cat([t[f"{v}.cls_token"][0], patches[0].flatten(1).T]) + t[f"{v}.pos_embed"][0]
    for i in range(DEPTH):
        block = f"{v}.blocks.{i}"
        q, k, values = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").chunk(3, dim=-1)
        x = x + linear(heads(q, k, values, 1), f"{block}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
    return norm(x, f"{v}.norm")


def text_state(t: Tensors, ids: list[int], image: torch.Tensor) -> torch.Tensor:
    """BLIP's BERT, post-norm, not causal, with cross attention: state of [CLS]. ids: without padding."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, (WIDTH,), t[f"{name}.weight"], t[f"{name}.bias"], 1e-12)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, t[f"{name}.weight"], t[f"{name}.bias"])

    e = "blip.text_encoder"
    x = t[f"{e}.embeddings.word_embeddings.weight"][ids] + t[f"{e}.embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(x, f"{e}.embeddings.LayerNorm")
    for i in range(DEPTH):
        layer = f"{e}.encoder.layer.{i}"
        for kind, other in (("attention", None), ("crossattention", image)):
            a = f"{layer}.{kind}"
            source = x if other is None else other
            q, k, v = linear(x, f"{a}.self.query"), linear(source, f"{a}.self.key"), linear(source, f"{a}.self.value")
            x = norm(linear(heads(q, k, v, 2), f"{a}.output.dense") + x, f"{a}.output.LayerNorm")
        inner = linear(F.gelu(linear(x, f"{layer}.intermediate.dense")), f"{layer}.output.dense")
        x = norm(inner + x, f"{layer}.output.LayerNorm")
    return x[0]


def reference(folder: Path, images: np.ndarray, prompts: tuple[str, ...]) -> np.ndarray:
    t = load_file(folder / "ImageReward.safetensors")
    words = (folder / "vocab.txt").read_text().split("\n")
    values = []
    for pixels, prompt in zip(reference_pixels(images, SIZE, SIZE, MEAN, STD), prompts, strict=True):
        ids = [words.index(word) for word in ("[CLS]", *prompt.split(), "[SEP]")]
        x = text_state(t, ids, image_states(t, pixels))
        for place in (0, 2, 4, 6, 7):
            x = F.linear(x, t[f"mlp.layers.{place}.weight"], t[f"mlp.layers.{place}.bias"])
        values.append((float(x) - 0.16717362830052426) / 1.0333394966054072)
    return np.array(values)


def test_imagereward_is_the_published_forward(folder: Path) -> None:
    table = ask(make_scorer("imagereward", [f"model={folder}"]), IMAGES, PROMPTS)
    expected = reference(folder, IMAGES, PROMPTS)
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(table.values[:, 0], expected, rtol=2e-4, atol=2e-4)


def test_imagerewards_gradient_agrees_with_finite_differences(folder: Path) -> None:
    scorer = make_scorer("imagereward", [f"model={folder}"])
    images = pictures_of((36, 40), 2, seed=1) // 2 + 64  # where neither form cuts off what bicubic overshoots
    assert_gradient(scorer, images, PROMPTS[:2], ask(scorer, images, PROMPTS[:2], want_gradients=True))


def test_a_checkpoint_that_is_not_whole_is_refused(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "ImageReward.safetensors")
    for name in ("med_config.json", "vocab.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    del tensors["blip.text_encoder.encoder.layer.1.crossattention.self.key.bias"]
    save_file(tensors, tmp_path / "ImageReward.safetensors")
    with pytest.raises(ConfigError, match=r"lacks encoder.layer.1.crossattention.self.key.bias"):
        make_scorer("imagereward", [f"model={tmp_path}"]).load()
    (tmp_path / "ImageReward.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"holds no ImageReward\.safetensors"):
        make_scorer("imagereward", [f"model={tmp_path}"]).load()
