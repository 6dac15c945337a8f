"""What stands beside the pair loss: contrastive features, MetaRM, the query head, D2-Align's direction."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file
from scorer_models import build_clip, pictures_of

from contracts.errors import ConfigError
from reward_servers.__main__ import cli
from reward_servers.construct import make_scorer
from reward_servers.scorers.base import ScoreBatch
from reward_servers.training.config import HeadConfig, TrainingConfig
from reward_servers.training.direction import DirectionConfig, learn, reward
from reward_servers.training.extras import Extras, shifted_pairs
from reward_servers.training.losses import simcse, sinkhorn, spread, swav
from reward_servers.training.model import RewardModel
from reward_servers.training.query_head import QueryHead
from reward_servers.training.trainer import train


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_clip(tmp_path_factory.mktemp("extras") / "clip")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of bright over dark images, and images of a prompt each twice."""
    root = tmp_path_factory.mktemp("extras_data")
    rng = np.random.default_rng(0)
    pairs, images = [], []
    for number in range(24):
        for kind, level in (("bright", 190), ("dark", 60)):
            picture = np.clip(rng.normal(level, 25, (32, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(picture).save(root / f"{kind}{number}.png")
            images.append({"prompt": f"prompt {number}", "image": f"{kind}{number}.png"})
        pairs.append({"prompt": f"prompt {number}", "chosen": f"bright{number}.png", "rejected": f"dark{number}.png"})
    (root / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (root / "images.jsonl").write_text("\n".join(map(json.dumps, images)))
    return root


def settings(clip: Path, data: Path, out: Path, **more: Any) -> TrainingConfig:
    base = {"model": str(clip), "pairs": str(data / "pairs.jsonl"), "out": str(out), "steps": 6, "batch_size": 6,
            "lr": 1e-4, "held_out_fraction": 0.3, "save_every": 3, "device": "cpu"}  # fmt: skip
    return TrainingConfig.model_validate({**base, **more})


# ---- contrastive ---------------------------------------------------------------------------------------------------


def test_simcse_is_log_n_without_structure_and_nothing_when_only_twins_are_alike() -> None:
    alike = torch.ones(5, 3)
    assert float(simcse(alike, alike, 0.05)) == pytest.approx(math.log(5))
    apart = torch.eye(4)
    assert float(simcse(apart, apart, 0.05)) < 1e-7
    assert float(simcse(apart, apart.roll(1, 0), 0.05)) == pytest.approx(1 / 0.05, rel=1e-3)


def test_swav_assigns_evenly_and_is_small_where_both_passes_choose_one_cluster() -> None:
    scores = 0.1 * torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    plan, greedy = sinkhorn(scores), torch.softmax(scores / 0.05, dim=1)
    torch.testing.assert_close(plan.sum(dim=1), torch.ones(12))
    assert (plan.sum(dim=0) - 3).abs().max() < 0.2 < (greedy.sum(dim=0) - 3).abs().max()
    same = torch.eye(4).repeat(3, 1)
    assert float(swav(same, same, torch.eye(4), 0.05)) < 1e-3
    assert float(swav(same, same.roll(1, 0), torch.eye(4), 0.05)) > 5


# ---- MetaRM --------------------------------------------------------------------------------------------------------


def test_the_meta_objective_is_a_half_without_spread_and_grows_with_it() -> None:
    assert float(spread(torch.zeros(3, 2))) == 0.5
    assert float(spread(torch.tensor([[0.0, 9.0], [9.0, 0.0]]))) == pytest.approx(1, abs=1e-3)


def test_metarm_looks_from_moved_weights_and_leaves_them_where_they_were(
    clip: Path, data: Path, tmp_path: Path
) -> None:
    config = settings(clip, data, tmp_path / "rm", meta={"path": str(data / "images.jsonl"), "lr": 1e-3})
    model = RewardModel(str(clip), "cpu")
    named = dict(model.train_only("all"))
    extras = Extras(config, model)
    before = {name: p.detach().clone() for name, p in named.items()}
    rng = np.random.default_rng([config.seed, 1, 2])
    pairs = shifted_pairs(config.meta.path)  # type: ignore[union-attr]
    chosen = [pairs[i] for i in rng.integers(len(pairs), size=16)]
    with torch.no_grad():
        apart = spread(extras._rewards(chosen))
    with extras.moved(named, 1), torch.no_grad():
        assert float(spread(extras._rewards(chosen))) > float(apart), "theta' tells shifted images further apart"
        assert any(not torch.equal(p.detach(), before[name]) for name, p in named.items())
    assert all(torch.equal(p.detach(), before[name]) for name, p in named.items())
    alone = tmp_path / "alone.jsonl"
    alone.write_text(json.dumps({"prompt": "once", "image": str(data / "dark0.png")}))
    with pytest.raises(ConfigError, match="no two images of one prompt"):
        shifted_pairs(str(alone))


def test_a_training_with_everything_goes_on_as_if_it_had_not_been_killed(
    clip: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"meta": {"path": str(data / "images.jsonl"), "batch_size": 4}, "head": {"width": 16, "heads": 2},
            "contrastive": {"kind": "swav", "prototypes": 4, "on": "features"}}  # fmt: skip
    whole = train(settings(clip, data, tmp_path / "whole", **more), lambda _: None)
    import reward_servers.training.trainer as trainer

    plain, calls = trainer._update, []

    def dies(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return plain(*args)

    monkeypatch.setattr(trainer, "_update", dies)
    with pytest.raises(KeyboardInterrupt):
        train(settings(clip, data, tmp_path / "killed", **more), lambda _: None)
    killed = train(settings(clip, data, tmp_path / "killed", **more), lambda _: None)
    for name in ("model.safetensors", "query_head.safetensors"):
        a, b = load_file(whole / name), load_file(killed / name)
        assert all(torch.equal(a[key], b[key]) for key in a)
    scorer = make_scorer("trained", [f"model={whole}"])
    scorer.load()
    images = pictures_of((32, 32), 3)
    prompts = ("prompt 1", "a much longer prompt than that", "p")
    model = RewardModel(str(whole), "cpu")
    with torch.no_grad():
        expected = model.rewards(list(images), prompts).numpy()
    table = scorer.score(ScoreBatch(images, prompts, ({},) * 3))
    np.testing.assert_allclose(table.values[:, 0], expected, rtol=1e-4, atol=1e-5)
    assert scorer.weight_digest == json.loads((whole / "card.json").read_text())["weight_digest"]


# ---- query head ----------------------------------------------------------------------------------------------------


def test_padding_never_counts_and_every_layer_named_does(clip: Path) -> None:
    head = QueryHead((1, 2), 2, 16, 2, 8, 8).eval()
    drawn = torch.Generator().manual_seed(0)
    images, texts = (tuple(torch.randn(2, n, 8, generator=drawn) for _ in range(3)) for n in (5, 4))
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    with torch.no_grad():
        first = head.reward(head.attend(images, texts, mask))
        noisy = tuple(torch.where(mask[..., None], text, 100.0) for text in texts)
        assert torch.equal(head.reward(head.attend(images, noisy, mask)), first)
        for layer in (1, 2):
            other = tuple(image + (index == layer) for index, image in enumerate(images))
            assert not torch.allclose(head.reward(head.attend(other, texts, mask)), first)
    with pytest.raises(ConfigError, match="2 image layers, not 3"):
        RewardModel(str(clip), "cpu", HeadConfig(layers=(3,), width=16, heads=2))
    with pytest.raises(ValueError, match="no multiple"):
        HeadConfig(width=10, heads=4)


# ---- direction -----------------------------------------------------------------------------------------------------


def test_the_direction_starts_along_the_images_and_gains_reward(clip: Path) -> None:
    drawn = torch.Generator().manual_seed(1)
    image = torch.nn.functional.normalize(torch.randn(40, 6, generator=drawn) + 1, dim=-1)
    text = torch.nn.functional.normalize(torch.randn(40, 6, generator=drawn), dim=-1)
    zero = torch.zeros(6, requires_grad=True)
    (slope,) = torch.autograd.grad(reward(image, text, zero, 1.5).mean(), zero)
    across = image - (image * text).sum(dim=-1, keepdim=True) * text
    torch.testing.assert_close(slope, 2 * across.mean(dim=0))  # (2w - 1) E[(I - e e^T) v]
    torch.testing.assert_close(reward(image, text, zero, 1.5), (image * text).sum(dim=-1))
    config = DirectionConfig(model="m", images="i", out="o", steps=200, lr=0.02)
    found = learn(image, text, config, lambda _: None)
    assert reward(image, text, found, 1.5).mean() > reward(image, text, zero.detach(), 1.5).mean() + 0.1


def test_a_direction_is_learnt_written_and_served(clip: Path, data: Path, tmp_path: Path) -> None:
    config = tmp_path / "direction.yaml"
    config.write_text(f"model: {clip}\nimages: {data / 'images.jsonl'}\nout: {tmp_path / 'b'}\nsteps: 60\nlr: 0.02\n"
                      "held_out_fraction: 0.3\ndevice: cpu\n")  # fmt: skip
    done = CliRunner().invoke(cli, ["direction", str(config)])
    assert done.exit_code == 0, done.output
    card = json.loads((tmp_path / "b" / "card.json").read_text())
    assert card["held_out_reward"]["after"] > card["held_out_reward"]["before"]
    path = tmp_path / "b" / "direction.safetensors"
    scorer, plain = (
        make_scorer("d2_align", [f"model={clip}", f"direction={path}"]),
        make_scorer("hpsv2", [f"model={clip}"]),
    )
    scorer.load()
    plain.load()
    batch = ScoreBatch(pictures_of((32, 32), 3), ("a red circle",) * 3, ({},) * 3)
    corrected, plus, minus = scorer.score(batch).values.T
    np.testing.assert_allclose(corrected, minus + 1.5 * (plus - minus), rtol=1e-4, atol=1e-6)
    assert not np.allclose(plus, minus)
    save_file({"direction": torch.zeros(24), "strength": torch.tensor([1.5])}, path)
    still = make_scorer("d2_align", [f"model={clip}", f"direction={path}"])
    still.load()
    np.testing.assert_allclose(still.score(batch).values, np.repeat(plain.score(batch).values, 3, axis=1), atol=1e-6)
    assert still.version != scorer.version
    wrong = CliRunner().invoke(cli, ["direction", str(config), "strength=0.2"])
    assert wrong.exit_code == 2
    assert "strength" in wrong.output
