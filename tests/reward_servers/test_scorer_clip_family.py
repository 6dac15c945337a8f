"""Scorers on CLIP and SigLIP over real HTTP, each number against PIL, numpy and the bare network of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from scorer_models import (
    PROMPTS,
    SIZE,
    ask,
    assert_gradient,
    build_clip,
    build_head,
    build_open_clip,
    build_siglip,
    pictures_of,
    reference_pixels,
)
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPModel, SiglipModel

from contracts.errors import ConfigError
from contracts.scores import Outcome
from reward_servers.construct import make_scorer
from reward_servers.scorers.base import ScoreBatch
from reward_servers.scorers.clip import Clip
from reward_servers.scorers.clip_goal import goal_baseline_reward
from reward_servers.scorers.parts.preprocess import PaddedPreprocess

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGES = pictures_of((40, 56))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_siglip(tmp_path_factory.mktemp("siglip"))


@pytest.fixture(scope="module")
def open_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_open_clip(tmp_path_factory.mktemp("open_clip"))


def unit(features: Any) -> torch.Tensor:
    features = features if isinstance(features, torch.Tensor) else features.pooler_output
    return features / features.norm(dim=-1, keepdim=True)


@torch.no_grad()
def clip_embeddings(folder: Path, pixels: torch.Tensor, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(image [N,D], text [M,D], exp(logit scale)) by the bare network."""
    network = CLIPModel.from_pretrained(folder).eval()
    tokens = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    images = unit(network.get_image_features(pixel_values=pixels))
    return images, unit(network.get_text_features(**tokens)), float(network.logit_scale.exp())


def clip_pixels(images: np.ndarray) -> torch.Tensor:
    return reference_pixels(images, SIZE, SIZE, MEAN, STD)


def test_clip_is_the_cosine_of_image_and_prompt(clip: Path) -> None:
    scorer = make_scorer("clip", [f"model={clip}"])
    table = ask(scorer, IMAGES, PROMPTS)
    images, texts, _ = clip_embeddings(clip, clip_pixels(IMAGES), list(PROMPTS))
    expected = (images * texts).sum(dim=1).numpy()
    assert np.ptp(expected) > 0.01, "the images must differ for this to mean anything"
    np.testing.assert_allclose(table.values[:, 0], expected, atol=2e-6)
    assert table.valid().all()
    assert table.version == f"1-{scorer.weight_digest[:8]}"


def test_clip_reads_images_of_mixed_sizes(clip: Path) -> None:
    mixed = [IMAGES[0], pictures_of((64, 48), 1, seed=5)[0], IMAGES[1]]
    table = ask(make_scorer("clip", [f"model={clip}"]), mixed, PROMPTS[:3])
    for row, image in enumerate(mixed):
        images, texts, _ = clip_embeddings(clip, clip_pixels(image[None]), [PROMPTS[row]])
        assert table.values[row, 0] == pytest.approx(float((images * texts).sum()), abs=2e-6)


@pytest.mark.parametrize("name", ["clip", "pickscore", "hpsv2", "siglip", "aesthetic", "attrictrl_clip", "clip_goal"])
def test_gradients_over_http_agree_with_finite_differences(name: str, clip: Path, siglip: Path, tmp_path: Path) -> None:
    options = [f"model={siglip if name == 'siglip' else clip}"]
    options += [f"head={build_head(tmp_path / 'head.safetensors', 24)}"] if name == "aesthetic" else []
    scorer: Any = make_scorer(name, options)
    images = pictures_of((40, 48), 2, seed=3) // 2 + 64  # where neither form cuts off what bicubic overshoots
    assert_gradient(scorer, images, PROMPTS[:2], ask(scorer, images, PROMPTS[:2], want_gradients=True))


@torch.no_grad()
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_clip_goal_is_the_projected_distance(clip: Path, alpha: float) -> None:
    scorer = make_scorer("clip_goal", [f"model={clip}", "baseline=[a photo, an image]", f"alpha={alpha}"])
    metadata: list[dict[str, Any]] = [{}, {"goal": ["a cat", "one cat"]}, {"goal": "a dog"}, {}]
    table = ask(scorer, IMAGES, PROMPTS, metadata)
    asked = [[PROMPTS[0]], ["a cat", "one cat"], ["a dog"], [PROMPTS[3]]]
    images, base, _ = clip_embeddings(clip, clip_pixels(IMAGES), ["a photo", "an image"])
    b = base.mean(dim=0) / base.mean(dim=0).norm()
    for row, texts in enumerate(asked):
        _, goals, _ = clip_embeddings(clip, clip_pixels(IMAGES[:1]), texts)
        g = goals.mean(dim=0) / goals.mean(dim=0).norm()
        d = g - b
        projection = alpha * torch.outer(d, d) / d.dot(d) + (1 - alpha) * torch.eye(len(d))
        expected = 1 - 0.5 * float(((images[row] - g) @ projection).square().sum())
        assert table.values[row, 0] == pytest.approx(expected, abs=3e-6)
        if alpha == 0:
            assert expected == pytest.approx(float(images[row] @ g), abs=3e-6), "alpha 0 is the cosine"


def test_goal_baseline_identities() -> None:
    rng = np.random.default_rng(0)
    x, g, b, other = (F.normalize(torch.from_numpy(rng.normal(size=(3, 8))), dim=1) for _ in range(4))
    np.testing.assert_allclose(goal_baseline_reward(g, g, b[0], 0.7), 1.0)
    np.testing.assert_allclose(goal_baseline_reward(x, g, b[0], 0.0), (x * g).sum(dim=1))
    np.testing.assert_allclose(goal_baseline_reward(x, g, b[0], 0.0), goal_baseline_reward(x, g, other[0], 0.0))
    d = g - b[0]
    away = torch.from_numpy(rng.normal(size=(3, 8)))
    away -= (away * d).sum(dim=1, keepdim=True) / d.square().sum(dim=1, keepdim=True) * d
    np.testing.assert_allclose(goal_baseline_reward(x + away, g, b[0], 1.0), goal_baseline_reward(x, g, b[0], 1.0))
    same = goal_baseline_reward(x[:1], g[:1], g[0], 0.9)
    np.testing.assert_allclose(same, (x[:1] * g[:1]).sum(dim=1), err_msg="goal = baseline counts as alpha 0")


def test_a_bad_goal_fails_its_image_alone(clip: Path) -> None:
    table = ask(make_scorer("clip_goal", [f"model={clip}"]), IMAGES[:3], PROMPTS[:3], [{}, {"goal": [1]}, {}])
    assert table.outcomes[:, 0].tolist() == [Outcome.OK, Outcome.FAILED, Outcome.OK]
    assert np.isnan(table.values[1, 0])
    assert "goal" in table.reasons[1]


def test_pickscore_is_the_scaled_cosine_and_its_pairs_their_softmax(clip: Path) -> None:
    table = ask(make_scorer("pickscore", [f"model={clip}"]), IMAGES, PROMPTS)
    images, texts, scale = clip_embeddings(clip, clip_pixels(IMAGES), list(PROMPTS))
    np.testing.assert_allclose(table.values[:, 0], (scale * (images * texts).sum(dim=1)).numpy(), atol=5e-5)
    pairs = ask(make_scorer("pickscore_pairs", [f"model={clip}"]), IMAGES, [PROMPTS[0]] * 4)
    scores = (scale * images @ texts[0]).double()
    expected = torch.stack([scores[:, None].expand(4, 4), scores[None, :].expand(4, 4)]).softmax(dim=0)[0].numpy()
    off = ~np.eye(4, dtype=bool)
    np.testing.assert_allclose(pairs.values[..., 0][off], expected[off], atol=2e-5)
    assert pairs.kind == "pair"
    assert pairs.valid()[..., 0][off].all()
    assert not pairs.valid()[..., 0][~off].any()


def padded(images: np.ndarray) -> torch.Tensor:
    """HPSv2's transform by PIL and numpy: longest edge to SIZE, black around it."""
    rows = []
    for image in images:
        scale = SIZE / max(image.shape[:2])
        height, width = round(image.shape[0] * scale), round(image.shape[1] * scale)
        inner = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC), np.float64)
        top, left = (SIZE - height) // 2, (SIZE - width) // 2
        margins = ((top, SIZE - height - top), (left, SIZE - width - left), (0, 0))
        rows.append(((np.pad(inner, margins) / 255 - MEAN) / STD).transpose(2, 0, 1))
    return torch.from_numpy(np.stack(rows)).float()


def test_hpsv2_is_the_plain_cosine_of_the_padded_image(clip: Path) -> None:
    table = ask(make_scorer("hpsv2", [f"model={clip}", "release=v2"]), IMAGES, PROMPTS)
    images, texts, _ = clip_embeddings(clip, padded(IMAGES), list(PROMPTS))
    np.testing.assert_allclose(table.values[:, 0], (images * texts).sum(dim=1).numpy(), atol=2e-6)
    assert table.version.startswith("v2-1")
    tall = pictures_of((57, 30), 2)
    np.testing.assert_allclose(PaddedPreprocess(SIZE).exact(tall), padded(tall), atol=1e-5)


def attend(x: torch.Tensor, tensors: dict[str, torch.Tensor], block: str, mask: torch.Tensor | None) -> torch.Tensor:
    """One residual block of open_clip (one head) from its tensors: pre-norm attention, then a quick-GELU MLP."""

    def norm(y: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(y, y.shape[-1:], tensors[f"{block}.{name}.weight"], tensors[f"{block}.{name}.bias"])

    def linear(y: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(y, tensors[f"{block}.{name}.weight"], tensors[f"{block}.{name}.bias"])

    joint = F.linear(norm(x, "ln_1"), tensors[f"{block}.attn.in_proj_weight"], tensors[f"{block}.attn.in_proj_bias"])
    q, k, v = joint.chunk(3, dim=-1)
    weights = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    weights = (weights if mask is None else weights + mask).softmax(dim=-1)
    x = x + linear(weights @ v, "attn.out_proj")
    inner = linear(norm(x, "ln_2"), "mlp.c_fc")
    return x + linear(inner * torch.sigmoid(1.702 * inner), "mlp.c_proj")


@torch.no_grad()
def test_hpsv2_reads_open_clips_own_format(open_clip: Path) -> None:
    """A forward of open_clip written out from the published tensors, without transformers' network."""
    table = ask(make_scorer("hpsv2", [f"model={open_clip}"]), IMAGES, PROMPTS)
    t = load_file(open_clip / "open_clip_model.safetensors")
    patches = F.conv2d(padded(IMAGES), t["visual.conv1.weight"], stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([t["visual.class_embedding"].expand(4, 1, -1), patches], dim=1) + t["visual.positional_embedding"]
    x = F.layer_norm(x, x.shape[-1:], t["visual.ln_pre.weight"], t["visual.ln_pre.bias"])
    for block in range(2):
        x = attend(x, t, f"visual.transformer.resblocks.{block}", None)
    x = F.layer_norm(x[:, 0], x.shape[-1:], t["visual.ln_post.weight"], t["visual.ln_post.bias"])
    images = F.normalize(x @ t["visual.proj"], dim=1)
    tokenizer = AutoTokenizer.from_pretrained(open_clip)
    for row, prompt in enumerate(PROMPTS):
        ids = torch.tensor(tokenizer(prompt)["input_ids"])
        y = (t["token_embedding.weight"][ids] + t["positional_embedding"][: len(ids)])[None]
        causal = torch.full((len(ids), len(ids)), -torch.inf).triu(1)
        for block in range(2):
            y = attend(y, t, f"transformer.resblocks.{block}", causal)
        y = F.layer_norm(y[0, -1], y.shape[-1:], t["ln_final.weight"], t["ln_final.bias"])  # the end token is the last
        text = F.normalize(y @ t["text_projection"], dim=0)
        assert table.values[row, 0] == pytest.approx(float(images[row] @ text), abs=3e-6)


def test_hpsv2_reads_a_lone_file_and_refuses_pickles(open_clip: Path, clip: Path, tmp_path: Path) -> None:
    lone = open_clip / "open_clip_model.safetensors"
    pickled = tmp_path / "HPS_v2.1_compressed.pt"
    pickled.write_bytes(b"\x80\x04.")
    with pytest.raises(ConfigError, match="not a safetensors file"):
        make_scorer("hpsv2", [f"model={pickled}", f"processor={clip}"]).load()
    scorer: Any = make_scorer("hpsv2", [f"model={lone}", f"processor={open_clip}"])
    scorer.load()
    assert scorer.towers.network.config.vision_config.hidden_act == "gelu", "nothing says quick_gelu beside a lone file"


def test_aesthetic_is_the_linear_chain_on_the_unit_embedding(clip: Path, tmp_path: Path) -> None:
    head = build_head(tmp_path / "head.safetensors", 24)
    table = ask(make_scorer("aesthetic", [f"model={clip}", f"head={head}"]), IMAGES, PROMPTS)
    images, _, _ = clip_embeddings(clip, clip_pixels(IMAGES), ["x"])
    values, tensors = images.double().numpy(), load_file(head)
    for place in (0, 2, 4, 6, 7):
        weight, bias = (tensors[f"layers.{place}.{kind}"].double().numpy() for kind in ("weight", "bias"))
        values = values @ weight.T + bias
    np.testing.assert_allclose(table.values, values, atol=2e-6)
    with pytest.raises(ConfigError, match="reads 30 numbers, not 24"):
        make_scorer("aesthetic", [f"model={clip}", f"head={build_head(tmp_path / 'b.safetensors', 30)}"]).load()


def test_siglip_is_cosine_and_sigmoid(siglip: Path) -> None:
    table = ask(make_scorer("siglip", [f"model={siglip}"]), IMAGES, PROMPTS)
    network = SiglipModel.from_pretrained(siglip).eval()
    tokens = AutoTokenizer.from_pretrained(siglip)(
        list(PROMPTS), padding="max_length", max_length=64, return_tensors="pt"
    )
    pixels = reference_pixels(IMAGES, SIZE, SIZE, (0.5,) * 3, (0.5,) * 3, square=True)
    with torch.no_grad():
        output = network(input_ids=tokens["input_ids"], pixel_values=pixels)
    images, texts = unit(output.image_embeds), unit(output.text_embeds)
    np.testing.assert_allclose(table.column("cosine")[0], (images * texts).sum(dim=1).numpy(), atol=2e-6)
    logits = output.logits_per_image.diagonal()
    np.testing.assert_allclose(table.column("probability")[0], logits.sigmoid().numpy(), atol=5e-6)


def test_attrictrl_clip_is_realism_and_safety(clip: Path) -> None:
    table = ask(make_scorer("attrictrl_clip", [f"model={clip}", "unsafe=blood"]), IMAGES, PROMPTS)
    images, texts, _ = clip_embeddings(clip, clip_pixels(IMAGES), ["photo", "cartoon", "blood"])
    photo, cartoon, unsafe = (images @ texts.T).T.numpy()
    np.testing.assert_allclose(table.column("realism")[0], photo - cartoon, atol=3e-6)
    np.testing.assert_allclose(table.column("safety")[0], -(unsafe - 0.19), atol=3e-6)


def test_latent_scores_latents_and_gives_their_gradient(tmp_path: Path) -> None:
    folder = build_clip(tmp_path, channels=4, size=16)
    latents = np.random.default_rng(0).normal(size=(4, 4, 16, 16)).astype(np.float32)
    options = [f"model={folder}", "scale=0.5", "shift=0.1"]
    table = ask(make_scorer("latent", options), latents, PROMPTS, want_gradients=True)
    leaf = torch.from_numpy(latents).requires_grad_()
    network = CLIPModel.from_pretrained(folder).eval()
    tokens = AutoTokenizer.from_pretrained(folder)(list(PROMPTS), padding=True, return_tensors="pt")
    images = unit(network.get_image_features(pixel_values=(leaf - 0.1) * 0.5))
    expected = network.logit_scale.exp() * (images * unit(network.get_text_features(**tokens))).sum(dim=1)
    expected.sum().backward()
    np.testing.assert_allclose(table.values[:, 0], expected.detach().numpy(), atol=5e-5)
    assert table.gradients is not None
    np.testing.assert_allclose(table.gradients, leaf.grad.numpy(), rtol=1e-3, atol=1e-6)
    wrong = ask(make_scorer("latent", options), latents[:, :3], PROMPTS)
    assert (wrong.outcomes == Outcome.FAILED).all()
    assert "3 channels" in wrong.reasons[0]
    larger = ask(make_scorer("latent", options), np.repeat(np.repeat(latents, 2, 2), 2, 3), PROMPTS)
    assert larger.valid().all()


def test_what_changes_a_score_changes_the_version(clip: Path) -> None:
    """Same weights in another folder: same version; another option or other weights: another version."""

    def version(name: str, *options: str) -> str:
        scorer = make_scorer(name, list(options))
        scorer.load()
        return scorer.version

    plain = version("clip_goal", f"model={clip}")
    assert version("clip_goal", f"model={clip}", "device=cpu") == plain
    assert version("clip_goal", f"model={clip}", "alpha=0.25") != plain
    assert version("clip_goal", f"model={clip}", "dtype=bfloat16") != plain


def test_incomplete_and_missing_models_are_refused_with_the_way_out(clip: Path, tmp_path: Path) -> None:
    torn = build_clip(tmp_path / "torn")
    tensors = load_file(torn / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, torn / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks visual_projection\.weight"):
        make_scorer("clip", [f"model={torn}"]).load()
    pickled = build_clip(tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="safetensors"):
        make_scorer("clip", [f"model={pickled}"]).load()
    with pytest.raises(ConfigError, match=r"modle.*options of clip: .*model"):
        make_scorer("clip", [f"modle={clip}"])
    with pytest.raises(ConfigError, match="model: Field required"):
        make_scorer("hpsv2")


def test_a_group_has_its_prompt_encoded_once(clip: Path) -> None:
    scorer = Clip(model=str(clip))
    scorer.load()
    calls = []
    network = scorer.towers.network
    encode = network.get_text_features
    network.get_text_features = lambda **given: calls.append(given["input_ids"].shape) or encode(**given)
    for _ in range(2):
        scorer.score(ScoreBatch(IMAGES, PROMPTS, ({},) * 4))
    assert len(calls) == 3, "three different texts, twice asked"


@pytest.mark.gpu
def test_a_gpu_in_bf16_says_what_the_cpu_says(clip: Path) -> None:
    batch = ScoreBatch(IMAGES, PROMPTS, ({},) * 4, want_gradients=True)
    tables = []
    for options in ({"device": "cpu"}, {"device": "cuda"}, {"device": "cuda", "dtype": "bfloat16"}):
        scorer = Clip(model=str(clip), **options)
        scorer.load()
        tables.append(scorer.score(batch))
    reference, exact, rounded = tables
    np.testing.assert_allclose(exact.values, reference.values, atol=1e-4)
    np.testing.assert_allclose(rounded.values, reference.values, atol=0.05)
    assert exact.gradients is not None
    assert reference.gradients is not None
    np.testing.assert_allclose(exact.gradients, reference.gradients, atol=1e-3)
