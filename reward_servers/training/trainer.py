"""The training of a reward model, from settings to a folder that can be served.

    read splits --> strengths (voters) --> [batch -> pair loss -> AdamW] x steps --> anchor --> coverage
                --> evaluation --> card

The same settings give the same weights, killed and resumed or not (same machine, same threads). A finished folder is
not trained again. Does not own: data, loss, checkpoints, figures (their files).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from contracts.errors import ConfigError, SalonError
from reward_servers.training.card import write_card
from reward_servers.training.config import TrainingConfig
from reward_servers.training.coverage import Coverage
from reward_servers.training.data import Pair, Sample, Split, Target, batches, read_image, read_samples, read_splits
from reward_servers.training.evaluation import Evaluation, evaluate
from reward_servers.training.extras import Extras
from reward_servers.training.losses import pair_loss
from reward_servers.training.model import RewardModel
from reward_servers.training.state import load_state, save_state

Say = Callable[[str], None]
_MAY_CHANGE = {"save_every", "log_every", "device", "out", "ridge"}
"""Settings that a resumed training may have otherwise."""


def train(config: TrainingConfig, say: Say) -> Path:
    """Train, evaluate and write config.out; goes on from its checkpoint when there is one. Returns the folder."""
    out = Path(config.out)
    if (out / "card.json").is_file():
        raise ConfigError("out", f"{out} holds a finished model", "give another folder, or remove it")
    out.mkdir(parents=True, exist_ok=True)
    training, held_out = read_splits(config)
    training = replace(training, pairs=tuple(with_strengths(training.pairs, config)))
    model = RewardModel(config.model, config.device, config.head, config.seed)
    before = measure(model, held_out, config)
    say(f"{len(training.pairs)} pairs and {len(training.passed) + len(training.failed)} single images to train on; "
        f"held out: {_brief(before)}")  # fmt: skip
    _fit(model, training, config, out, say)
    anchored_on = _anchor(model, held_out, config)
    _cover(model, training, config)
    after = measure(model, held_out, config)
    model.save(out)
    facts = {
        "model": config.model, "out": str(out), "steps": config.steps, "weight_digest": model.digest(),
        "anchor": model.anchor, "anchored_on": anchored_on, "train_pairs": len(training.pairs),
        "train_items": len(training.passed) + len(training.failed), "settings": config.model_dump(mode="json"),
    }  # fmt: skip
    write_card(out, facts, before, after)
    say(f"held out: {_brief(before)} before, {_brief(after)} after; card in {out / 'README.md'}")
    return out


def with_strengths(pairs: Sequence[Pair], config: TrainingConfig) -> list[Pair]:
    """The pairs with the voters' mean reward difference as strength, where there are voters."""
    if not config.voters:
        return list(pairs)
    votes = []
    for folder in config.voters:
        voter = RewardModel(folder, config.device)
        votes.append(differences(voter, pairs, config))
    strengths = np.mean(votes, axis=0)
    return [replace(pair, strength=float(mu)) for pair, mu in zip(pairs, strengths, strict=True)]


def measure(model: RewardModel, split: Split, config: TrainingConfig) -> Evaluation:
    """Figures of a split; labels as they stand in the data."""
    samples = split.samples()
    rewards = dict(zip(samples, score(model, samples, config), strict=True))

    def gaps(pairs: Sequence[Pair]) -> np.ndarray:
        return np.array([rewards[pair.chosen] - rewards[pair.rejected] for pair in pairs], np.float64)

    return evaluate(
        gaps([pair for pair in split.pairs if not pair.tie]), gaps([pair for pair in split.pairs if pair.tie]),
        np.array([rewards[s] for s in split.passed]), np.array([rewards[s] for s in split.failed]),
        np.array(list(rewards.values())),
    )  # fmt: skip


def differences(model: RewardModel, pairs: Sequence[Pair], config: TrainingConfig) -> np.ndarray:
    """r_chosen - r_rejected of each pair, float64 [B]."""
    samples = Split(tuple(pairs)).samples()
    rewards = dict(zip(samples, score(model, samples, config), strict=True))
    return np.array([rewards[pair.chosen] - rewards[pair.rejected] for pair in pairs], np.float64)


@torch.no_grad()
def score(model: RewardModel, samples: Sequence[Sample], config: TrainingConfig) -> np.ndarray:
    """Rewards of samples, float64 [N]."""
    parts = [model.of_features(features).double().cpu().numpy() for features in _features(model, samples, config)]
    return np.concatenate([np.zeros(0), *parts])


def _features(model: RewardModel, samples: Sequence[Sample], config: TrainingConfig) -> Iterator[torch.Tensor]:
    """Features [n,D] of samples, some at a time."""
    for start in range(0, len(samples), 2 * config.batch_size):
        some = samples[start : start + 2 * config.batch_size]
        images = [read_image(sample.image, config.max_pixels) for sample in some]
        yield model.features(images, [sample.prompt for sample in some])


def _fit(model: RewardModel, split: Split, config: TrainingConfig, out: Path, say: Say) -> None:
    """The steps that are still to be made."""
    named = dict(model.train_only(config.trainable))
    extras = Extras(config, model)
    named |= extras.parameters()
    optimizer = torch.optim.AdamW(list(named.values()), lr=config.lr, weight_decay=config.weight_decay)
    facts = {k: v for k, v in config.model_dump(mode="json").items() if k not in _MAY_CHANGE}
    done = load_state(out / "checkpoint", named, optimizer, facts)
    if done:
        say(f"going on after step {done}")
    progress = _Progress(config, done, say, out / "metrics.jsonl")
    model.network.train()
    for step, targets in enumerate(batches(split, config, done), done + 1):
        if step > config.steps:
            break
        torch.manual_seed(config.seed * 1_000_003 + step)  # dropout, where the model has some
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min(1.0, step / max(1, config.warmup_steps))
        loss, accuracy = _update(model, targets, named, optimizer, config, step, extras)
        progress.tell(step, loss, accuracy, len(targets))
        if step % config.save_every == 0 or step == config.steps:
            save_state(out / "checkpoint", step, named, optimizer, facts)
    model.network.eval()


def _update(
    model: RewardModel, targets: Sequence[Target], named: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer, config: TrainingConfig, step: int, extras: Extras,
) -> tuple[float, float]:  # fmt: skip
    """One optimizer step; (mean loss, accuracy over decided pairs) before it."""
    samples = [s for target in targets for s in (target.pair.chosen, target.pair.rejected)]
    images = [read_image(sample.image, config.max_pixels) for sample in samples]
    with extras.moved(named, step):
        features = model.features(images, [sample.prompt for sample in samples])
        rewards = model.of_features(features).reshape(-1, 2)
        gap = rewards[:, 0] - rewards[:, 1]
        probability = torch.tensor([target.probability for target in targets], device=gap.device)
        margin = torch.tensor([target.margin for target in targets], device=gap.device)
        loss = pair_loss(gap, probability, margin).mean() + extras.contrastive(features)
        optimizer.zero_grad()
        loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(list(named.values()), config.clip_grad_norm)
    if not torch.isfinite(norm):
        raise SalonError(f"step {step}: the gradient is not finite; lower lr. The last checkpoint is whole")
    optimizer.step()
    decided = gap.detach()[probability != 0.5]
    accuracy = float((decided > 0).float().mean()) if len(decided) else float("nan")
    return float(loss.detach()), accuracy


def _anchor(model: RewardModel, held_out: Split, config: TrainingConfig) -> str:
    """Shift rewards so that references average to 0 (2009.01325); says on what. Preferences do not change."""
    model.anchor = 0.0
    if config.anchor is None:
        return "no shift"
    samples = held_out.samples() if config.anchor == "held_out" else read_samples(Path(config.anchor))
    if not samples:
        raise ConfigError("anchor", f"{config.anchor} holds no images")
    model.anchor = float(score(model, samples, config).mean())
    what = "held-out images" if config.anchor == "held_out" else f"images of {config.anchor}"
    return f"the mean reward of {len(samples)} {what} is 0"


@torch.no_grad()
def _cover(model: RewardModel, training: Split, config: TrainingConfig) -> None:
    """Take up every training image once, as the final weights see it."""
    model.coverage = None
    for features in _features(model, training.samples(), config):
        model.coverage = model.coverage or Coverage.new(features.shape[1], config.ridge)
        model.coverage.add(features)


class _Progress:
    """Lines with loss, speed and time left, and a row of metrics.jsonl for each."""

    def __init__(self, config: TrainingConfig, done: int, say: Say, path: Path) -> None:
        self.config, self.done, self.say, self.path = config, done, say, path
        self.began = time.monotonic()
        self.pairs = 0
        self.recent: list[tuple[float, float]] = []

    def tell(self, step: int, loss: float, accuracy: float, pairs: int) -> None:
        self.pairs += pairs
        self.recent.append((loss, accuracy))
        if step % self.config.log_every and step != self.config.steps:
            return
        losses, accuracies = np.array(self.recent).T
        self.recent = []
        seconds = max(time.monotonic() - self.began, 1e-9)
        left = seconds / (step - self.done) * (self.config.steps - step)
        known = accuracies[np.isfinite(accuracies)]
        row: dict[str, Any] = {
            "step": step, "loss": float(losses.mean()), "accuracy": float(known.mean()) if len(known) else None,
            "pairs_per_second": self.pairs / seconds,
        }  # fmt: skip
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        share = "" if row["accuracy"] is None else f"  right {row['accuracy']:.3f}"
        self.say(f"step {step}/{self.config.steps}  loss {row['loss']:.4f}{share}  "
                 f"{row['pairs_per_second']:.1f} pairs/s  {left:.0f} s left")  # fmt: skip


def _brief(figures: Evaluation) -> str:
    parts = []
    if figures.accuracy is not None:
        parts.append(f"accuracy {figures.accuracy:.3f}, calibration error {figures.calibration_error:.3f}")
    if figures.auroc is not None:
        parts.append(f"AUROC {figures.auroc:.3f}")
    return ", ".join(parts)
