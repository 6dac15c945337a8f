"""The trainers of online reward models against their equations: limits, closed forms, triggers, what is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import judges_of_tests
import numpy as np
import pytest
import torch
from online_kit import adversarial, distilled, fed, flat, guarded, publish, write_references
from scorer_models import build_clip, build_dino, pictures_of

from contracts import versions
from contracts.config.online import DistilledConfig
from contracts.errors import ConfigError, PayloadError
from contracts.scores import Outcome
from reward_servers.construct import make_scorer
from reward_servers.online.adversarial import hinge
from reward_servers.online.distilled import preferred
from reward_servers.online.guarded import hacked, preference_loss
from reward_servers.online.heads import make_head
from reward_servers.online.labels import Label, Labels, image_key
from reward_servers.scorers.base import ScoreBatch
from tests.learner.aggregation_kit import advantages, rewards, rule, scores

RED, BLUE = (220, 40, 40), (40, 40, 220)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("online")
    return {"dino": build_dino(root / "dino"), "clip": build_clip(root / "clip")}


def batch_of(images: np.ndarray, prompt: str = "a red circle") -> ScoreBatch:
    return ScoreBatch(images, (prompt,) * len(images), ({},) * len(images))


# ---- adversarial ---------------------------------------------------------------------------------------------------


def test_the_hinge_is_zero_beyond_its_margins_and_one_at_zero() -> None:
    assert float(hinge(torch.tensor([1.0, 3.0]), torch.tensor([-1.0, -2.0]))) == 0
    assert float(hinge(torch.zeros(3), torch.zeros(5))) == 1
    assert float(hinge(torch.tensor([0.5]), torch.tensor([-2.0, 1.0]))) == pytest.approx(0.5 * (0.5 + 1.0))


def test_an_update_on_frozen_samples_widens_the_margin(models: dict[str, Path], tmp_path: Path) -> None:
    trainer = adversarial(write_references(tmp_path, flat(RED)), models["dino"])
    trainer.load()
    group = fed(0, flat(BLUE, seed=1))
    margins = []
    for _ in range(6):
        metrics = trainer.learn(group)
        trainer.updates += 1
        margins.append(metrics["real"] - metrics["fake"])
    assert margins[-1] > margins[0]
    assert metrics["loss"] < 1.3
    assert trainer.learn(fed(1, flat(BLUE), prompt="without references")) is None


def test_the_toy_generator_stops_at_the_references_where_a_fixed_scorer_sends_it_away() -> None:
    """2-D Gaussians: the generator's mean climbs the discriminator trained against it, or a fixed linear one."""
    rng = np.random.default_rng(0)
    target = np.array([1.0, -1.0])
    head = make_head(2, 16, 0)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.02, betas=(0.5, 0.999))
    mean, fixed = np.zeros(2), np.zeros(2)
    trail = []
    for step in range(1200):
        real = torch.tensor(target + 0.3 * rng.normal(size=(64, 2)), dtype=torch.float32)
        fake = torch.tensor(mean + 0.3 * rng.normal(size=(64, 2)), dtype=torch.float32)
        optimizer.zero_grad()
        hinge(head(real), head(fake)).backward()
        optimizer.step()
        if step % 9 == 0:
            fake.requires_grad_()
            (slope,) = torch.autograd.grad(head(fake).mean(), fake)
            mean = mean + 0.1 * np.sign(slope.sum(dim=0).numpy())
            fixed = fixed + 0.1 * np.sign(target)
            trail.append(mean)
    assert np.linalg.norm(np.mean(trail[-40:], axis=0) - target) < 0.35
    assert np.linalg.norm(fixed - target) > 5


def test_a_policy_that_paints_the_references_leaves_nothing_to_learn_and_no_advantage(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """The hinge's two sides cancel where |h| < 1: the head's gradient is exactly 0, its loss 1, its accuracy 1/2."""
    trainer = adversarial(write_references(tmp_path / "refs", colours(8, 1)), models["dino"])
    trainer.load()
    references = trainer.references.draw("a red circle", 8, np.random.default_rng(0))
    elsewhere = list(flat((40, 220, 40), 8, noise=40))
    real, fake = trainer.features(references), trainer.features(elsewhere)
    patches = trainer.features.some_patches(2, trainer.rng())
    before = {name: p.detach().clone() for name, p in trainer.named.items()}
    with torch.no_grad():
        assert float(trainer.head(real).abs().max()) < 1
    for _ in range(3):
        still = trainer.update(real, real.clone(), patches)
    assert all(torch.equal(p.detach(), before[name]) for name, p in trainer.named.items())
    assert still["accuracy"] == 0.5
    assert still["loss"] == pytest.approx(1 + trainer.config.patch_weight, rel=1e-6)

    for _ in range(40):
        apart = trainer.update(real, fake, patches)
    assert apart["accuracy"] > 0.9
    publish(tmp_path, trainer)
    scorer = make_scorer("adversarial_dino", [f"model={models['dino']}", f"versions={tmp_path}", "size=null"])
    scorer.load()
    assert painted_advantage(scorer, references, elsewhere) < -0.5
    assert painted_advantage(scorer, references, references[::-1]) == pytest.approx(0, abs=1e-6)
    arrived = trainer.update(real, real.flip(0), patches)
    assert arrived["accuracy"] == 0.5, "it can no longer tell them apart"


def painted_advantage(scorer: Any, references: list[np.ndarray], painted: list[np.ndarray]) -> float:
    """Mean advantage of what was painted, in one group with the references."""
    table = scorer.score(batch_of(np.stack([*references, *painted])))
    (found,) = advantages(rewards(rule("weighted_sum"), scores(table)), std="global")
    return float(found[len(references) :].mean())


def test_dino_reads_the_size_that_the_options_name(models: dict[str, Path]) -> None:
    from contracts.config.scorers import AdversarialDinoOptions
    from reward_servers.online.adversarial import DinoFeatures

    features = DinoFeatures(AdversarialDinoOptions(model=str(models["dino"]), size=42))
    assert features(list(pictures_of((40, 48), 2))).shape == (2, 1 + 9, 64)
    assert features.num_patches == 9
    assert set(features.some_patches(64, np.random.default_rng(0)).tolist()) == set(range(1, 10))


def test_the_served_reward_is_the_papers_mix_and_masks_prompts_without_references(
    models: dict[str, Path], tmp_path: Path
) -> None:
    trainer = adversarial(write_references(tmp_path / "refs", flat(RED)), models["dino"])
    trainer.load()
    version = publish(tmp_path, trainer)
    scorer = make_scorer("adversarial_dino", [f"model={models['dino']}", f"versions={tmp_path}", "size=null"])
    scorer.load()
    images = pictures_of((32, 32), 3)
    table = scorer.score(batch_of(images))
    with torch.no_grad():
        tokens = trainer.features(list(images))
        assert torch.allclose(tokens.norm(dim=-1), torch.ones(tokens.shape[:2]), atol=1e-5)
        out = trainer.head(tokens)[..., 0]
    np.testing.assert_allclose(table.values[:, 0], 0.7 * out[:, 0] + 0.3 * out[:, 1:].mean(1), rtol=1e-4, atol=1e-6)
    assert scorer.version.endswith(version.name)
    assert scorer.weight_digest == version.digest
    masked = scorer.score(batch_of(images, "another prompt"))
    assert (masked.outcomes == Outcome.UNDECIDED).all()
    everywhere = adversarial(write_references(tmp_path / "refs", flat(RED)), models["dino"], per_prompt=False)
    everywhere.load()
    publish(tmp_path, everywhere, 1)
    scorer.refresh()
    assert scorer.score(batch_of(images, "another prompt")).valid().all()


# ---- guarded -------------------------------------------------------------------------------------------------------


def test_the_trigger_fires_only_while_generated_images_score_higher() -> None:
    low, high = torch.tensor([0.0, 1.0]), torch.tensor([0.9, 0.2])
    assert hacked(low, high)
    assert not hacked(high, low)
    assert not hacked(low, low)
    loss = preference_loss(torch.tensor([2.0]), torch.tensor([0.5]))
    assert float(loss) == pytest.approx(float(-torch.log_softmax(torch.tensor([2.0, 0.5]), 0)[0]))


def test_guarded_pickscore_learns_when_it_is_hacked_and_rests_otherwise(
    models: dict[str, Path], tmp_path: Path
) -> None:
    probe = guarded(write_references(tmp_path / "a", flat(RED)), models["clip"])
    probe.load()
    with torch.no_grad():
        red, blue = (float(probe.score(list(flat(c)), "a red circle").mean()) for c in (RED, BLUE))
    better, worse = (RED, BLUE) if red > blue else (BLUE, RED)
    resting = guarded(write_references(tmp_path / "b", flat(better)), models["clip"])
    hit = guarded(write_references(tmp_path / "c", flat(worse)), models["clip"])
    resting.load()
    hit.load()
    before = {name: p.detach().clone() for name, p in hit.towers.network.named_parameters()}
    assert resting.learn(fed(0, flat(worse))) is None
    assert resting.counts() == {"triggered_share": 0.0}
    first = hit.learn(fed(0, flat(better)))
    last = [hit.learn(fed(0, flat(better))) for _ in range(3)]
    assert hit.counts()["triggered_share"] > 0
    gaps = [m["real"] - m["fake"] for m in (first, *last) if m is not None]
    assert gaps[0] < 0
    assert len(gaps) == 1 or gaps[-1] > gaps[0]
    changed = {n for n, p in hit.towers.network.named_parameters() if not torch.equal(p.detach(), before[n])}
    assert changed
    assert all(name.startswith("vision_model.encoder.layers.1.") for name in changed), "the last layer alone"
    publish(tmp_path, hit)
    scorer = make_scorer("guarded_pickscore", [f"model={models['clip']}", f"versions={tmp_path}"])
    scorer.load()
    with torch.no_grad():
        expected = hit.score(list(flat(RED)), "a red circle").numpy()
    np.testing.assert_allclose(scorer.score(batch_of(flat(RED))).values[:, 0], expected, rtol=1e-5)


def test_layers_that_are_not_there_are_named(models: dict[str, Path], tmp_path: Path) -> None:
    trainer = guarded(write_references(tmp_path, flat(RED)), models["clip"], layers=3)
    with pytest.raises(ConfigError, match="2 layers, not 3"):
        trainer.load()


# ---- distilled -----------------------------------------------------------------------------------------------------


def test_duplicates_are_asked_about_once_and_failures_again() -> None:
    labels = Labels(2)
    assert labels.claim([(1, 1), (1, 1), (1, 2)], 5) == [0, 2]
    assert labels.claim([(1, 1), (1, 3)], 1) == [1]
    labels.give_up([(1, 1)])
    assert labels.claim([(1, 1)], 1) == [0]
    for number in range(3):
        labels.add((1, number), Label(np.zeros(2, np.float32), float(number), 0))
    assert [label.score for label in labels.all()] == [1.0, 2.0], "the oldest goes"
    picture = pictures_of((32, 32), 2)
    assert image_key("p", picture[0]) == image_key("p", np.clip(picture[0].astype(int) + 1, 0, 255).astype(np.uint8))
    assert image_key("p", picture[0]) != image_key("p", picture[1])
    assert image_key("p", picture[0]) != image_key("q", picture[0])
    assert [preferred(0.5, 0.52, 0.05), preferred(1, 0, 0.05), preferred(0, 1, 0.05)] == [0.5, 1.0, 0.0]


def colours(number: int, seed: int) -> np.ndarray:
    """Half of them mostly red, half mostly blue, no two alike: linearly separable by the judge."""
    rng = np.random.default_rng(seed)
    return np.concatenate([flat(RED if i % 2 else BLUE, 1, noise=40, seed=rng.integers(2**31)) for i in range(number)])


def test_the_head_comes_to_agree_with_the_judge(models: dict[str, Path], tmp_path: Path) -> None:
    trainer = distilled("judges_of_tests:redness", models["clip"], lr=0.02, images_per_group=8, steps_per_update=20)
    trainer.load()
    for number in range(4):
        labelled = trainer.label(fed(number, colours(8, number)))
        trainer.learn(labelled)
        trainer.updates += 1
    assert trainer.label(fed(9, colours(8, 0))) is None, "all of it is known"
    assert trainer.counts()["coverage"] > 0
    publish(tmp_path, trainer)
    options = [f"model={models['clip']}", f"versions={tmp_path}"]
    scorer, waiting = make_scorer("distilled", options), make_scorer("distilled", [*options, "min_labels=1000"])
    scorer.load()
    waiting.load()
    fresh = colours(40, 77)
    table = scorer.score(batch_of(fresh))
    truth = judges_of_tests.redness(fresh, (), ())
    assert (table.values[:, 0] == truth).mean() >= 0.9
    np.testing.assert_array_equal(table.values[:, 0], table.values[:, 1] > 0.5)
    assert (waiting.score(batch_of(fresh)).outcomes == Outcome.UNDECIDED).all()
    trainer.close()


def test_the_head_orders_better_the_more_is_labelled(models: dict[str, Path]) -> None:
    """AUROC against the judge on images that nobody labelled, after 4 labels and after 64."""
    trainer = distilled("judges_of_tests:redness", models["clip"], lr=0.02, images_per_group=4, steps_per_update=20)
    trainer.load()
    rng = np.random.default_rng(5)

    def any_colours(number: int) -> np.ndarray:
        return np.concatenate([flat(rng.integers(0, 256, 3), 1, 40, int(rng.integers(2**31))) for _ in range(number)])

    fresh = any_colours(64)
    truth = judges_of_tests.redness(fresh, (), ()) > 0
    found = {}
    for number in range(16):
        trainer.learn(trainer.label(fed(number, any_colours(4))))
        trainer.updates += 1
        if number in (0, 15):
            said = trainer.head(trainer.features(fresh, ("a red circle",) * 64))[:, 0].detach().numpy()
            found[len(trainer.labels)] = float(np.mean(said[truth][:, None] > said[~truth][None]))
    trainer.close()
    assert found[64] > found[4] + 0.1, found
    assert found[64] > 0.8


def test_ranking_standardises_and_cuts_at_its_floor(models: dict[str, Path], tmp_path: Path) -> None:
    trainer = distilled("judges_of_tests:red_share", models["clip"], form="ranking", lr=0.02, images_per_group=8,
                        steps_per_update=20, quantile=0.5)  # fmt: skip
    trainer.load()
    for number in range(3):
        trainer.learn(trainer.label(fed(number, colours(8, number))))
    publish(tmp_path, trainer)
    scorer = make_scorer("distilled", [f"model={models['clip']}", f"versions={tmp_path}", "min_labels=4", "novelty=1"])
    scorer.load()
    images = colours(12, 5)
    table = scorer.score(batch_of(images))
    truth = judges_of_tests.red_share(images, (), ())
    order = np.argsort(truth)
    assert table.values[order[6:], 1].mean() > table.values[order[:6], 1].mean() + 0.5
    floor = trainer.pack()[2]["floor"]
    np.testing.assert_array_equal(table.values[:, 0] == 0, table.values[:, 1] < floor)
    twice = scorer.score(batch_of(np.concatenate([images[-1:], images[-1:], images[:1]])))
    np.testing.assert_allclose(twice.values[0, 0], twice.values[0, 1] / 2, rtol=1e-6, err_msg="1 / count")
    trainer.close()


def test_retrieval_knows_what_was_labelled_and_nothing_else(models: dict[str, Path], tmp_path: Path) -> None:
    trainer = distilled("judges_of_tests:red_share", models["clip"], form="retrieval", images_per_group=2)
    trainer.load()
    images = pictures_of((32, 32), 4, seed=8)
    trainer.learn(trainer.label(fed(0, images)))
    publish(tmp_path, trainer)
    scorer = make_scorer("distilled", [f"model={models['clip']}", f"versions={tmp_path}"])
    scorer.load()
    table = scorer.score(batch_of(images))
    np.testing.assert_allclose(table.values[:2, 0], judges_of_tests.red_share(images[:2], (), ()), rtol=1e-6)
    assert table.outcomes[:, 0].tolist() == [Outcome.OK, Outcome.OK, Outcome.UNDECIDED, Outcome.UNDECIDED]
    trainer.learn(trainer.label(fed(1, images)))
    publish(tmp_path, trainer, 1)
    scorer.refresh()
    after = scorer.score(batch_of(images))
    assert after.valid().all(), "what was unseen is labelled when it comes again"
    np.testing.assert_allclose(after.values[:, 0], judges_of_tests.red_share(images, (), ()), rtol=1e-6)
    trainer.close()


def test_ranking_needs_two_images() -> None:
    with pytest.raises(ValueError, match="images_per_group to 2"):
        DistilledConfig(scorer="o", judge={"name": "j", "function": "m:f"}, form="ranking", images_per_group=1)


# ---- what goes on --------------------------------------------------------------------------------------------------


def test_every_trainer_goes_on_from_its_version_as_if_nothing_had_happened(
    models: dict[str, Path], tmp_path: Path
) -> None:
    references = write_references(tmp_path, flat(RED, noise=60))
    makers = (
        lambda: adversarial(references, models["dino"]),
        lambda: guarded(references, models["clip"]),
        lambda: distilled("judges_of_tests:redness", models["clip"], images_per_group=8),
    )
    for make in makers:
        through, first, second = make(), make(), make()
        for trainer in (through, first, second):
            trainer.load()
        for number in range(2):
            step(through, number)
        step(first, 0)
        weights, state, _ = first.pack()
        second.restore(weights, state)
        second.updates = first.updates
        step(second, 1)
        for mine, theirs in zip(through.pack()[:2], second.pack()[:2], strict=True):
            assert mine.keys() == theirs.keys()
            for name in mine:
                np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)
        for trainer in (through, first, second):
            trainer.close()


def step(trainer: object, number: int) -> None:
    item = trainer.label(fed(number, colours(4, number)))  # type: ignore[attr-defined]
    if hasattr(trainer, "preprocess"):  # guarded: the trigger is another test's
        trainer.update(list(flat(RED)), list(item.images), item.prompt)  # type: ignore[attr-defined]
    else:
        trainer.learn(item)  # type: ignore[attr-defined]
    trainer.updates += 1  # type: ignore[attr-defined]


def test_a_damaged_version_is_refused(tmp_path: Path) -> None:
    version, files = versions.pack(3, {"a": np.arange(3.0)}, {}, {"base": "x"})
    assert versions.unpack(files)[1]["a"].tolist() == [0, 1, 2]
    spoilt = {**files, versions.WEIGHTS: files[versions.WEIGHTS][:-1] + b"\x01"}
    with pytest.raises(PayloadError, match="damaged"):
        versions.unpack(spoilt)
    with pytest.raises(PayloadError, match="no version"):
        versions.flip(tmp_path, version.name)
    versions.place(tmp_path, version, files)
    versions.flip(tmp_path, version.name)
    assert versions.current(tmp_path) == version.name == f"v000003-{version.digest[:8]}"
    (tmp_path / versions.POINTER).write_text('{"version": "../elsewhere"}')
    with pytest.raises(PayloadError, match="names no version"):
        versions.current(tmp_path)
