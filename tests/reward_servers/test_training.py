"""Training of reward models: the pair loss, data and splits, a whole training on a tiny CLIP, resume, the card."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from scorer_models import build_clip
from torch.nn import functional as F

from contracts.errors import ConfigError, ConfigErrors
from reward_servers.__main__ import cli
from reward_servers.construct import make_scorer
from reward_servers.scorers.base import ScoreBatch
from reward_servers.training.config import ItemsConfig, LabelConfig, TrainingConfig, load_training
from reward_servers.training.data import (
    Pair,
    Sample,
    Split,
    batches,
    cross_prompt_pairs,
    flip_weakest,
    is_held_out,
    read_splits,
    target_of,
    vote_strength,
)
from reward_servers.training.evaluation import auroc, evaluate
from reward_servers.training.losses import pair_loss
from reward_servers.training.model import RewardModel
from reward_servers.training.trainer import train

NUM_PAIRS = 48


def quiet(_: str) -> None:
    """No progress."""


# ---- loss ----------------------------------------------------------------------------------------------------------


def loss(d: float, p: float, m: float = 0.0) -> float:
    return float(pair_loss(*(torch.tensor([x], dtype=torch.float64) for x in (d, p, m))))


def test_hard_labels_without_margin_are_bradley_terry_and_ties_rest_at_zero() -> None:
    for d in (-3.0, 0.0, 2.5):
        assert loss(d, 1.0) == pytest.approx(math.log(1 + math.exp(-d)))
    assert loss(0.0, 0.5) == pytest.approx(math.log(2))
    assert loss(0.0, 0.5) < min(loss(-0.1, 0.5), loss(0.1, 0.5))
    assert loss(1.0, 1.0, 3.0) == pytest.approx(loss(-2.0, 1.0)), "a margin moves the pair that much closer"
    assert loss(1e4, 1.0) == 0
    assert loss(-1e4, 1.0) == pytest.approx(1e4)


@settings(max_examples=30, deadline=None)
@given(p=st.floats(0.05, 0.95))
def test_a_soft_label_is_met_where_the_model_gives_its_probability(p: float) -> None:
    d = torch.tensor([math.log(p / (1 - p))], dtype=torch.float64, requires_grad=True)
    pair_loss(d, torch.tensor([p], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)).backward()
    assert d.grad is not None
    assert abs(float(d.grad)) < 1e-9


# ---- labels and data -----------------------------------------------------------------------------------------------


def pair(strength: float | None = None, tie: bool = False, name: str = "p") -> Pair:
    return Pair(Sample(name, Path("good")), Sample(name, Path("bad")), strength, tie)


def test_targets_follow_the_label_settings() -> None:
    assert target_of(pair(2.0), LabelConfig()).probability == 1
    assert target_of(pair(2.0), LabelConfig(kind="smooth")).probability == 0.9
    assert target_of(pair(2.0), LabelConfig(kind="soft")).probability == pytest.approx(1 / (1 + math.exp(-2)))
    assert target_of(pair(None), LabelConfig(kind="soft")).probability == 1
    assert target_of(pair(2.0), LabelConfig(margin="strength", margin_size=0.5)).margin == 1
    assert target_of(pair(2.0), LabelConfig(margin="fixed", margin_size=3)).margin == 3
    tie = target_of(pair(2.0, tie=True), LabelConfig(margin="fixed", margin_size=3))
    assert (tie.probability, tie.margin) == (0.5, 0)
    assert vote_strength(3, 3) == 0
    assert vote_strength(10, 0) == -vote_strength(0, 10) > vote_strength(9, 1)


def test_only_labels_that_the_vote_contradicts_are_turned() -> None:
    pairs = [pair(-2.0), pair(-1.0), pair(0.5), pair(None), pair(-5.0, tie=True)]
    turned = flip_weakest(pairs, 0.34)
    assert turned[0].chosen == pairs[0].rejected
    assert turned[0].strength == 2.0
    assert turned[1:] == pairs[1:]
    assert flip_weakest(pairs, 0.0) == pairs
    assert flip_weakest([pair(0.5), pair(1.0)], 0.5) == [pair(0.5), pair(1.0)]


def test_with_wrong_labels_turned_and_softened_a_linear_reward_is_nearer_the_truth() -> None:
    """20 % of labels are wrong and the voters see it: measured on clean pairs, cosine with the true direction."""
    generator = torch.Generator().manual_seed(0)
    truth = F.normalize(torch.randn(20, generator=generator), dim=0)
    gaps = torch.randn(120, 20, generator=generator)
    gaps = gaps * torch.where(gaps @ truth > 0, 1.0, -1.0)[:, None]
    wrong = torch.rand(120, generator=generator) < 0.2
    given_gaps = torch.where(wrong[:, None], -gaps, gaps)
    votes = (given_gaps @ truth * 4).tolist()
    pairs = [pair(mu, name=str(i)) for i, mu in enumerate(votes)]

    def fitted(label: LabelConfig) -> float:
        kept = flip_weakest(pairs, label.flip_share)
        signs = torch.tensor([1.0 if a == b else -1.0 for a, b in zip(kept, pairs, strict=True)])
        targets = [target_of(one, label) for one in kept]
        p = torch.tensor([t.probability for t in targets])
        direction = torch.zeros(20, requires_grad=True)
        optimizer = torch.optim.SGD([direction], lr=0.5)
        for _ in range(60):
            optimizer.zero_grad()
            pair_loss(given_gaps * signs[:, None] @ direction, p, torch.zeros(120)).mean().backward()
            optimizer.step()
        return float(F.cosine_similarity(direction.detach(), truth, dim=0))

    assert fitted(LabelConfig(kind="soft", flip_share=0.25)) > fitted(LabelConfig()) + 0.05


def test_items_are_paired_across_prompts_and_two_failures_never() -> None:
    good, bad = (tuple(Sample(f"{kind} {i}", Path(f"{kind}{i}")) for i in range(5)) for kind in ("good", "bad"))
    split = Split((), good, bad)
    pairs = cross_prompt_pairs(split, ItemsConfig(path="-", wins_per_item=2, ties_per_item=2), 3, 0)
    assert pairs == cross_prompt_pairs(split, ItemsConfig(path="-", wins_per_item=2, ties_per_item=2), 3, 0)
    assert pairs != cross_prompt_pairs(split, ItemsConfig(path="-", wins_per_item=2, ties_per_item=2), 3, 1)
    assert len(pairs) == 5 * 4
    for one in pairs:
        assert one.chosen in good
        assert one.rejected in (good if one.tie else bad)
        assert one.chosen != one.rejected


def test_batches_go_on_where_they_stopped_and_an_epoch_sees_every_pair_once() -> None:
    split = Split(tuple(pair(name=str(i)) for i in range(7)))
    config = TrainingConfig(model="-", out="-", pairs="-", batch_size=3, steps=9)
    whole, later = batches(split, config, 0), batches(split, config, 4)
    first = [next(whole) for _ in range(9)]
    assert [next(later) for _ in range(5)] == first[4:]
    for epoch in range(3):
        names = [t.pair.chosen.prompt for batch in first[3 * epoch : 3 * epoch + 3] for t in batch]
        assert sorted(names) == [str(i) for i in range(7)]


# ---- evaluation ----------------------------------------------------------------------------------------------------


def test_figures_in_closed_form() -> None:
    nothing = np.zeros(0)
    got = evaluate(np.array([2.0, -1.0, 0.0]), np.array([0.5, -0.5]), nothing, nothing, np.array([1.0, 3.0]))
    assert got.accuracy == 0.5
    assert got.loss == pytest.approx(np.mean(np.log1p(np.exp([-2.0, 1.0, 0.0]))))
    assert got.brier == pytest.approx(np.mean((1 - 1 / (1 + np.exp([-2.0, 1.0, 0.0]))) ** 2))
    confidence = 1 / (1 + np.exp([-2.0, -1.0, 0.0]))
    assert got.calibration_error == pytest.approx(np.mean(np.abs(confidence - [1, 0, 0.5])))
    assert (got.tie_gap, got.auroc, got.reward_mean, got.reward_std) == (0.5, None, 2.0, 1.0)
    assert auroc(np.array([1.0, 3.0]), np.array([0.0, 3.0])) == pytest.approx((1 + 0 + 1 + 0.5) / 4)


def test_a_model_that_says_what_happens_is_calibrated() -> None:
    rng = np.random.default_rng(0)
    d = rng.normal(size=20000)
    truth = np.where(rng.random(20000) < 1 / (1 + np.exp(-d)), d, -d)  # the winner is drawn as the model says
    nothing = np.zeros(0)
    assert evaluate(truth, nothing, nothing, nothing, d).calibration_error == pytest.approx(0, abs=0.02)
    assert evaluate(3 * truth, nothing, nothing, nothing, d).calibration_error == pytest.approx(0.15, abs=0.05)


# ---- the whole -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs whose chosen image is the redder one, single images that are red or blue, and a tiny CLIP."""
    folder = tmp_path_factory.mktemp("preferences")
    rng = np.random.default_rng(0)

    def picture(name: str, red: bool) -> str:
        pixels = rng.integers(0, 90, (32, 32, 3))
        pixels[..., 0 if red else 2] += 120
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{name}.png")
        return f"{name}.png"

    rows = [
        {"prompt": f"scene {i}", "chosen": picture(f"a{i}", True), "rejected": picture(f"b{i}", False),
         "votes": [9, 1]} for i in range(NUM_PAIRS)
    ]  # fmt: skip
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    items = [
        {"prompt": f"item {i}", "image": picture(f"c{i}", i % 2 == 0), "passed": i % 2 == 0} for i in range(NUM_PAIRS)
    ]
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    (folder / "references.jsonl").write_text(json.dumps({"prompt": "scene", "image": "a0.png"}))
    build_clip(folder / "clip")
    return folder


def config_for(data: Path, out: Path, **changes: Any) -> TrainingConfig:
    base = {
        "model": str(data / "clip"), "out": str(out), "pairs": str(data / "pairs.jsonl"), "held_out_fraction": 0.25,
        "steps": 20, "batch_size": 6, "lr": 3e-3, "log_every": 5, "save_every": 5, "device": "cpu",
    }  # fmt: skip
    return TrainingConfig.model_validate({**base, **changes})


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    settings_file = folder / "training.yaml"
    settings_file.write_text(json.dumps(config_for(data, folder / "out").model_dump(mode="json")))
    result = CliRunner().invoke(cli, ["train", str(settings_file), "label.kind=soft"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "step 20/20" in result.output
    assert "s left" in result.output
    return folder / "out"


def test_held_out_accuracy_and_the_card(trained: Path) -> None:
    card = json.loads((trained / "card.json").read_text())
    assert card["after"]["accuracy"] >= 0.9 > card["before"]["accuracy"] - 0.1
    assert card["after"]["loss"] < card["before"]["loss"]
    assert card["after"]["pairs"] == sum(is_held_out(f"scene {i}", 0.25) for i in range(NUM_PAIRS))
    assert card["train_pairs"] == NUM_PAIRS - card["after"]["pairs"]
    assert card["settings"]["label"]["kind"] == "soft"
    text = (trained / "README.md").read_text()
    assert f"| accuracy | {card['before']['accuracy']:.4f} | {card['after']['accuracy']:.4f} |" in text
    assert card["weight_digest"] in text


def test_the_anchor_makes_the_mean_reward_zero(trained: Path, data: Path) -> None:
    card = json.loads((trained / "card.json").read_text())
    assert card["after"]["reward_mean"] == pytest.approx(0, abs=1e-4)
    assert card["before"]["reward_mean"] != pytest.approx(0, abs=1e-3)
    assert RewardModel(str(trained), "cpu").anchor == card["anchor"]


def test_the_folder_is_a_clip_that_scores_as_pickscore_does(trained: Path, data: Path) -> None:
    from transformers import CLIPModel

    network = CLIPModel.from_pretrained(trained).eval()
    model = RewardModel(str(trained), "cpu")
    images = [np.asarray(Image.open(data / name)) for name in ("a0.png", "b0.png")]
    prompts = ["scene 0", "a longer scene"]
    with torch.no_grad():
        got = model.rewards(images, prompts)
        for image, prompt, reward in zip(images, prompts, got, strict=True):
            tokens = model.tokenizer([prompt], return_tensors="pt")
            pixels = model.processor(images=Image.fromarray(image), return_tensors="pt")["pixel_values"]
            logits = network(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=pixels
            )
            assert float(reward) == pytest.approx(float(logits.logits_per_image) - model.anchor, abs=1e-4)
    assert model.digest() == json.loads((trained / "card.json").read_text())["weight_digest"]


def test_the_served_model_answers_the_trained_rewards(trained: Path, data: Path) -> None:
    scorer = make_scorer("trained", [f"model={trained}", "device=cpu"])
    scorer.load()
    images = np.stack([np.asarray(Image.open(data / name)) for name in ("a0.png", "b0.png")])
    table = scorer.score(ScoreBatch(images, ("scene 0", "a longer scene"), ({}, {})))
    with torch.no_grad():
        expected = RewardModel(str(trained), "cpu").rewards(list(images), ["scene 0", "a longer scene"])
    np.testing.assert_allclose(table.values[:, 0], expected.numpy(), atol=1e-4)
    assert json.loads((trained / "card.json").read_text())["weight_digest"] == scorer.weight_digest
    shifted = shutil.copytree(trained, data / "shifted", ignore=shutil.ignore_patterns("checkpoint"))
    (shifted / "reward.json").write_text(json.dumps({"anchor": 1000.0}))
    other = make_scorer("trained", [f"model={shifted}", "device=cpu"])
    other.load()
    assert other.version != scorer.version, "another anchor is another scorer"


def test_the_served_model_says_how_far_an_image_is_from_all_it_was_trained_on(trained: Path, data: Path) -> None:
    scorer = make_scorer("trained", [f"model={trained}", "device=cpu"])
    scorer.load()
    config = config_for(data, trained)
    samples = read_splits(config)[0].samples()
    model = RewardModel(str(trained), "cpu")
    images = [np.asarray(Image.open(sample.image)) for sample in samples]
    with torch.no_grad():
        z = model.features(images, [sample.prompt for sample in samples]).double()
    inverse = torch.linalg.inv(config.ridge * torch.eye(z.shape[1], dtype=torch.float64) + z.T @ z)
    table = scorer.score(ScoreBatch(np.stack(images[:3]), tuple(s.prompt for s in samples[:3]), ({},) * 3))
    assert table.uncertainty is not None
    np.testing.assert_allclose(table.uncertainty[:, 0], (z @ inverse * z).sum(1).sqrt()[:3], rtol=1e-3)
    (trained / "coverage.safetensors").rename(data / "kept")
    plain = make_scorer("trained", [f"model={trained}", "device=cpu"])
    plain.load()
    (data / "kept").rename(trained / "coverage.safetensors")
    assert plain.score(ScoreBatch(np.stack(images[:1]), ("p",), ({},))).uncertainty is None
    assert plain.version != scorer.version


def test_a_killed_training_goes_on_to_the_same_weights(data: Path, tmp_path: Path) -> None:
    short = {"steps": 6, "save_every": 2, "log_every": 2, "warmup_steps": 4}
    straight = train(config_for(data, tmp_path / "straight", **short), quiet)
    killed = config_for(data, tmp_path / "killed", **short)

    def kill(text: str) -> None:
        if text.startswith("step 4/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(killed, kill)
    assert not (tmp_path / "killed" / "card.json").exists()
    said: list[str] = []
    resumed = train(killed, said.append)
    assert "going on after step 2" in said, "step 4 was told before its state was written"
    one, two = (load_file(folder / "model.safetensors") for folder in (straight, resumed))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    with pytest.raises(ConfigError, match="finished model"):
        train(killed, quiet)


def test_a_checkpoint_of_other_settings_is_not_gone_on_from(data: Path, tmp_path: Path) -> None:
    short = {"steps": 4, "save_every": 2, "log_every": 2}

    def kill(text: str) -> None:
        if text.startswith("step 4/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config_for(data, tmp_path / "out", **short), kill)
    with pytest.raises(ConfigError, match="lr: differ from the training"):
        train(config_for(data, tmp_path / "out", **short, lr=1e-3), quiet)
    (tmp_path / "out" / "checkpoint" / "partial").mkdir()  # what a kill while writing leaves behind
    train(config_for(data, tmp_path / "out", **short), quiet)


def test_single_images_voters_and_projections_alone(trained: Path, data: Path, tmp_path: Path) -> None:
    items = {"path": str(data / "items.jsonl"), "ties_per_item": 1}
    config = config_for(
        data, tmp_path / "items", items=items, trainable="projections", steps=15, lr=2e-2, voters=[str(trained)],
        label={"margin": "strength", "margin_size": 0.1}, anchor=str(data / "references.jsonl"),
    )  # fmt: skip
    out = train(config, quiet)
    card = json.loads((out / "card.json").read_text())
    assert card["after"]["auroc"] >= 0.9
    assert card["anchored_on"].startswith("the mean reward of 1 images of")
    before, after = (load_file(folder / "model.safetensors") for folder in (data / "clip", out))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"visual_projection.weight", "text_projection.weight", "logit_scale"}


# ---- mistakes ------------------------------------------------------------------------------------------------------

GOOD = {"prompt": "p", "chosen": "a0.png", "rejected": "b0.png"}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "is no JSON"),
        ("[]", "no JSON object"),
        (json.dumps({**GOOD, "chosen": 3}), "prompt and chosen"),
        (json.dumps({**GOOD, "rejected": "nowhere.png"}), "is not there"),
        (json.dumps({**GOOD, "votes": [1]}), "for, against"),
        (json.dumps({**GOOD, "strength": "much"}), "must be a number"),
        (json.dumps({**GOOD, "tie": "yes"}), "true or false"),
        (json.dumps({**GOOD, "tie": True}), "no preference"),
    ],
)
def test_data_that_cannot_be_read_is_told_with_its_line(line: str, words: str, data: Path, tmp_path: Path) -> None:
    path = data / f"broken-{tmp_path.name}.jsonl"
    path.write_text("\n" + line)
    with pytest.raises(ConfigError, match=words) as caught:
        read_splits(config_for(data, tmp_path, pairs=str(path)))
    assert words == "no preference" or f"{path.name}:2" in str(caught.value)


def test_an_image_that_is_none_or_too_large_is_told(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="more than 100"):
        train(config_for(data, tmp_path / "out", max_pixels=100), quiet)
    (data / "text.png").write_text("no image")
    rows = [{**GOOD, "prompt": f"p{i}", "chosen": "text.png"} for i in range(20)]
    (data / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ConfigError, match="no readable image"):
        train(config_for(data, tmp_path / "out2", pairs=str(data / "texts.jsonl")), quiet)


def test_settings_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    file = tmp_path / "t.yaml"
    file.write_text("{model: m, out: o}")
    with pytest.raises(ConfigErrors, match="nothing to learn from"):
        load_training(file)
    with pytest.raises(ConfigErrors, match=r"label.kind.*\n?.*lrr"):
        load_training(file, ["pairs=x", "label.kind=odd", "lrr=1"])
    result = CliRunner().invoke(cli, ["train", str(tmp_path / "none.yaml")])
    assert result.exit_code == 2
    assert "cannot be read" in result.output
