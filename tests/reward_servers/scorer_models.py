"""Tiny random models in the official formats, for the tests of scorers. Each is built once a session, seeded.

Networks are a thousandth of the real ones; folders, file names, weight names and processor files are the real ones'.
"""

from __future__ import annotations

import asyncio
import json
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)

from contracts.scores import ScoreTable
from reward_servers.client import RewardClient
from reward_servers.scorers.base import ScoreBatch, Scorer
from tests.reward_servers.reward_helpers import config_for, served

PROMPTS = ("a red circle", "two blue squares", "a red circle", "a star left of a green cat")
SIZE = 32


def pictures_of(shape: tuple[int, int], num: int = 4, seed: int = 0) -> np.ndarray:
    """uint8 [num,*shape,3]: smooth colours with noise, so that resizing matters and does not overshoot everywhere."""
    rng = np.random.default_rng(seed)
    low = torch.from_numpy(rng.uniform(0, 255, (num, 3, 5, 5)))
    smooth = torch.nn.functional.interpolate(low, shape, mode="bilinear").numpy()
    return np.clip(smooth + rng.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8).transpose(0, 2, 3, 1).copy()


def ask(
    scorer: Scorer, images: Any, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] = (), **more: Any
) -> ScoreTable:
    """The scorer's table over real HTTP, through the client that a run uses."""

    async def go() -> ScoreTable:
        async with RewardClient(config_for(server.url, deadline_s=120.0, timeout_s=60.0)) as client:
            return await client.score(images, prompts, metadata, **more)

    with served(scorer) as server:
        return asyncio.run(go())


def assert_gradient(scorer: Any, images: np.ndarray, prompts: Sequence[str], table: ScoreTable) -> None:
    """table.gradients against (R(x + h d) - R(x - h d)) / 2h along themselves, in float, without autograd.

    R goes through the scorer's differentiable preprocessing, which is held to the exact one: PIL rounds to 8 bits after
    each of its two passes, so a pixel may differ by little more than one level.
    """
    assert table.gradients is not None
    assert table.gradients.shape == images.shape
    batch = ScoreBatch(images, tuple(prompts), ({},) * len(images))

    def pixels_of(floats: np.ndarray) -> torch.Tensor:
        return scorer.preprocess.differentiable(torch.from_numpy(floats.astype(np.float32)).permute(0, 3, 1, 2))

    def value(floats: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return scorer.forward(pixels_of(floats), batch)[:, 0].double().numpy()

    base = images.astype(np.float64) / 255
    apart = (scorer.preprocess.exact(images) - pixels_of(base)).abs().amax(dim=(0, 2, 3))
    level = (pixels_of(np.ones_like(base)) - pixels_of(np.zeros_like(base))).abs().amax(dim=(0, 2, 3)) / 255
    assert (apart / level).max() < 1.6
    np.testing.assert_allclose(table.values[:, 0], value(base), rtol=1e-4, atol=1e-5)
    direction = table.gradients.astype(np.float64)
    direction /= np.abs(direction).max(axis=(1, 2, 3), keepdims=True)
    slope = (table.gradients * direction).sum(axis=(1, 2, 3))
    step = (1e-3 / slope)[:, None, None, None]  # the same small change of R each: random networks bend sharply
    measured = (value(base + step * direction) - value(base - step * direction)) / (2 * step[:, 0, 0, 0])
    np.testing.assert_allclose(slope, measured, rtol=0.03)


def save_clip_tokenizer(folder: Path) -> int:
    """CLIP's byte-pair tokenizer of single letters; returns the size of its vocabulary."""
    letters = string.ascii_lowercase + string.digits + string.punctuation
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[]).save_pretrained(folder)
    return len(vocabulary)


def build_clip(folder: Path, *, seed: int = 0, channels: int = 3, size: int = SIZE) -> Path:
    """A CLIP folder as on the hub: config, model.safetensors, tokenizer, preprocessor_config.json."""
    torch.manual_seed(seed)
    vocabulary = save_clip_tokenizer(folder)
    both = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 1}
    config = CLIPConfig(
        projection_dim=24,
        text_config={**both, "vocab_size": vocabulary, "max_position_embeddings": 77, "eos_token_id": vocabulary - 1,
                     "bos_token_id": vocabulary - 2, "pad_token_id": vocabulary - 1, "projection_dim": 24},
        vision_config={**both, "image_size": size, "patch_size": 8, "num_channels": channels, "projection_dim": 24},
    )  # fmt: skip
    _spread(CLIPModel(config)).save_pretrained(folder)
    size_config = {"height": size, "width": size}
    CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=size_config).save_pretrained(folder)
    return folder


def build_siglip(folder: Path) -> Path:
    torch.manual_seed(1)
    tokens = ["<pad>", "</s>", "<unk>", *string.ascii_lowercase, " "]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    both = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = SiglipConfig(
        text_config={**both, "vocab_size": len(tokens), "max_position_embeddings": 64, "projection_size": 64},
        vision_config={**both, "image_size": SIZE, "patch_size": 8},
    )
    network = _spread(SiglipModel(config))
    network.logit_bias.data.fill_(-0.7)
    network.logit_scale.data.fill_(1.3)
    network.save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    return folder


def build_dino(folder: Path) -> Path:
    torch.manual_seed(2)
    config = Dinov2Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14, mlp_ratio=2
    )
    _spread(Dinov2Model(config)).save_pretrained(folder)
    BitImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}, image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(folder)  # fmt: skip
    return folder


def open_clip_tensors(network: CLIPModel) -> dict[str, torch.Tensor]:
    """The weights of a CLIPModel under open_clip's names: what its authors publish."""
    own = network.state_dict()
    named = {
        "visual.class_embedding": own["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": own["vision_model.embeddings.position_embedding.weight"],
        "visual.conv1.weight": own["vision_model.embeddings.patch_embedding.weight"],
        "visual.proj": own["visual_projection.weight"].T,
        "token_embedding.weight": own["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": own["text_model.embeddings.position_embedding.weight"],
        "text_projection": own["text_projection.weight"].T,
        "logit_scale": own["logit_scale"],
    }
    for theirs, ours in (
        ("visual.ln_pre", "vision_model.pre_layrnorm"), ("visual.ln_post", "vision_model.post_layernorm"),
        ("ln_final", "text_model.final_layer_norm"),
    ):  # fmt: skip
        named |= {f"{theirs}.{kind}": own[f"{ours}.{kind}"] for kind in ("weight", "bias")}
    for theirs, ours, config in (
        ("visual.", "vision_model", network.config.vision_config), ("", "text_model", network.config.text_config),
    ):  # fmt: skip
        for index in range(config.num_hidden_layers):
            block, layer = f"{theirs}transformer.resblocks.{index}", f"{ours}.encoder.layers.{index}"
            for kind in ("weight", "bias"):
                parts = [own[f"{layer}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
                named[f"{block}.attn.in_proj_{kind}"] = torch.cat(parts)
                for a, b in (
                    ("attn.out_proj", "self_attn.out_proj"), ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"),
                    ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2"),
                ):  # fmt: skip
                    named[f"{block}.{a}.{kind}"] = own[f"{layer}.{b}.{kind}"]
    return {name: tensor.contiguous().clone() for name, tensor in named.items()}


def build_open_clip(folder: Path) -> Path:
    """The hub's open_clip form: open_clip_model.safetensors, open_clip_config.json, CLIP's tokenizer."""
    from safetensors.torch import save_file

    source = build_clip(folder / "as_transformers", seed=3)
    save_clip_tokenizer(folder)
    save_file(open_clip_tensors(CLIPModel.from_pretrained(source)), folder / "open_clip_model.safetensors")
    described = {"model_cfg": {"vision_cfg": {"head_width": 64}, "text_cfg": {"heads": 1}, "quick_gelu": True}}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    return folder


def build_head(path: Path, width: int, seed: int = 4) -> Path:
    """LAION's MLP: five linear layers at places 0, 2, 4, 6, 7 of a Sequential, dropout between."""
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    sizes = (width, 12, 10, 8, 6, 1)
    tensors = {}
    for place, rows, columns in zip((0, 2, 4, 6, 7), sizes[1:], sizes, strict=False):
        layer = torch.nn.Linear(columns, rows)
        tensors |= {f"layers.{place}.weight": layer.weight.data, f"layers.{place}.bias": layer.bias.data}
    save_file(tensors, path)
    return path


def _spread(network: torch.nn.Module) -> Any:
    """Larger random weights than at the start of training, so that scores differ by more than rounding."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return network.eval()


def reference_pixels(
    images: np.ndarray, edge: int, crop: int, mean: Sequence[float], std: Sequence[float], square: bool = False
) -> torch.Tensor:
    """float32 [N,3,crop,crop] by PIL and numpy alone: bicubic resize, centre crop, (x / 255 - mean) / std."""
    from PIL import Image

    rows = []
    for image in images:
        height, width = image.shape[:2]
        if square:
            size = (edge, edge)
        else:
            size = (edge, int(edge * height / width)) if width <= height else (int(edge * width / height), edge)
        resized = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC), np.float64)
        top, left = (resized.shape[0] - crop) // 2, (resized.shape[1] - crop) // 2
        cut = resized[top : top + crop, left : left + crop] / 255
        rows.append(((cut - np.array(mean)) / np.array(std)).transpose(2, 0, 1))
    return torch.from_numpy(np.stack(rows)).float()


def build_mask2former(folder: Path, names: Sequence[str]) -> Path:
    """An instance-segmentation model with a Swin backbone, as facebook/mask2former-swin-small-coco-instance."""
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessorPil,
        SwinConfig,
    )

    torch.manual_seed(5)
    labels = dict(enumerate(names))
    backbone = SwinConfig(
        image_size=64, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=32, num_queries=12, id2label=labels,
        label2id={name: i for i, name in labels.items()},
    )  # fmt: skip
    _spread(Mask2FormerForUniversalSegmentation(config)).save_pretrained(folder)
    Mask2FormerImageProcessorPil(
        size={"height": 64, "width": 64}, ignore_index=255, do_reduce_labels=False
    ).save_pretrained(folder)
    return folder


def build_yolos(folder: Path, names: Sequence[str]) -> Path:
    """A detector of boxes whose classes end with one for nothing, as DETR's do."""
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessorPil

    torch.manual_seed(6)
    labels = dict(enumerate(names))
    config = YolosConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=[48, 48],
        patch_size=16, num_detection_tokens=10, id2label=labels, label2id={name: i for i, name in labels.items()},
    )  # fmt: skip
    _spread(YolosForObjectDetection(config)).save_pretrained(folder)
    YolosImageProcessorPil(size={"height": 48, "width": 48}, do_pad=False).save_pretrained(folder)
    return folder


def build_vlm(folder: Path) -> Path:
    """An Idefics3 (SmolVLM's architecture) that reads one image and says one of a few hundred tokens."""
    from tokenizers import AddedToken, decoders, trainers
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3ImageProcessorPil,
        Idefics3Processor,
    )

    torch.manual_seed(7)
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<image>", "<fake_token_around_image>"]
    special += ["<end_of_utterance>", "<global-img>", *(f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7))]
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480, special_tokens=[AddedToken(token, special=True) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    inner.train_from_iterator(["yes no Yes No YES NO does the image contain artifacts"] * 40, trainer)
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'image' %}"
        "<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|pad|>", bos_token="<|endoftext|>",
        model_max_length=2048, chat_template=template,
    )  # fmt: skip
    both = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = tokenizer.convert_tokens_to_ids
    config = Idefics3Config(
        vision_config={"model_type": "idefics3_vision", **both, "image_size": 56, "patch_size": 14},
        text_config={"model_type": "llama", **both, "num_key_value_heads": 1, "vocab_size": 512,
                     "max_position_embeddings": 2048, "bos_token_id": ids("<|endoftext|>"),
                     "eos_token_id": ids("<|im_end|>"), "pad_token_id": ids("<|pad|>")},
        image_token_id=ids("<image>"), scale_factor=2, pad_token_id=ids("<|pad|>"),
    )  # fmt: skip
    _spread(Idefics3ForConditionalGeneration(config)).save_pretrained(folder)
    edge = {"longest_edge": 56}
    processor = Idefics3ImageProcessorPil(size=edge, max_image_size=edge, do_image_splitting=False)
    Idefics3Processor(
        image_processor=processor, tokenizer=tokenizer, image_seq_len=4, chat_template=template
    ).save_pretrained(folder)
    return folder
