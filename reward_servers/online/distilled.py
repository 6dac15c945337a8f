"""ONI: a slow judge labels a part of what is painted, newest first; a small head on CLIP features learns to say it.

    classification   cross entropy on 1[judge > threshold]          served: p, and 1[p > 1/2] as the reward
    ranking          Bradley-Terry on pairs of a group, ties at 1/2  served: (r - mean)/std, 0 where it is below a floor
    retrieval        no head: the labels themselves                  served: label of the key; nothing for an unseen one

"Online Intrinsic Rewards for Decision Making Agents from LLM Feedback" (facebookresearch/oni, appo/learner.py,
llm_annotator.py). Features, our choice: [sqrt(D) v, sqrt(D) t, D v*t] of the unit image and text embeddings of a CLIP.
Agreement is measured on labels before they are learnt from. Does not own: queues (loop.py), the judge's answers.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from contracts.config.online import DistilledConfig
from contracts.config.scorers import DistilledOptions
from reward_servers.client import SyncRewardClient
from reward_servers.online.heads import head_arrays, make_head, moments, set_head, set_moments
from reward_servers.online.inbox import FedGroup
from reward_servers.online.labels import Key, Label, Labels, image_key
from reward_servers.online.trainer import Arrays, Metrics, OnlineTrainer
from reward_servers.scorers.parts.loading import device_of, dtype_of, tensors_digest
from reward_servers.training.losses import pair_loss

SMOOTHING = 0.9  # of the agreement and coverage that are reported


@dataclass(frozen=True)
class Labelled:
    """What the judge said of a group: new labels by key."""

    labels: dict[Key, Label]


class ClipFeatures:
    """Features float32 [N,3D] of images and one prompt by a frozen CLIP."""

    def __init__(self, options: DistilledOptions) -> None:
        from reward_servers.scorers.parts.towers import load_clip

        self.options = options
        self.towers, self.preprocess = load_clip(options.model, options)
        self.width = 3 * int(self.towers.network.config.projection_dim)
        self.digest = tensors_digest(self.towers.network)
        self._one_at_a_time = threading.Lock()  # the towers keep texts, and several threads label

    def __call__(self, images: np.ndarray, prompts: tuple[str, ...]) -> Tensor:
        with torch.no_grad(), self._one_at_a_time:
            pixels = self.preprocess.exact(images).to(device_of(self.options), dtype_of(self.options))
            return joint_features(self.towers.images(pixels), self.towers.texts(prompts))


def joint_features(vision: Tensor, text: Tensor) -> Tensor:
    """[sqrt(D) v, sqrt(D) t, D v*t] of unit embeddings [N,D]: entries of size about 1."""
    width = vision.shape[1]
    return torch.cat([width**0.5 * vision, width**0.5 * text, width * vision * text], dim=1)


class Distilled(OnlineTrainer):
    """Asks the judge in label threads, learns in the other."""

    config: DistilledConfig
    labels_first: ClassVar[bool] = True

    def __init__(self, config: DistilledConfig, options: Mapping[str, Any], seed: int) -> None:
        super().__init__(config, options, seed)
        self.options = DistilledOptions.model_validate(dict(options))
        self.labels = Labels(config.max_labels)
        self.seen = self.covered = self.undecided = 0
        self.agreement: float | None = None

    def load(self) -> None:
        self.features = ClipFeatures(self.options)
        self.judge = SyncRewardClient(self.config.judge)
        self.head = make_head(self.features.width, self.config.hidden, self.seed).to(device_of(self.options))
        self.named = dict(self.head.named_parameters())
        self.optimizer = torch.optim.Adam(self.named.values(), lr=self.config.lr)

    def restore(self, weights: Mapping[str, np.ndarray], state: Mapping[str, np.ndarray]) -> None:
        set_head(self.head, state)
        set_moments(self.optimizer, self.named, state)
        self.labels.restore(dict(state))

    def close(self) -> None:
        self.judge.close()

    # ---- labels ------------------------------------------------------------------------------------------------

    def label(self, group: FedGroup) -> Labelled | None:
        """Ask the judge about images of a group that nobody asked about; waits for it."""
        keys = [image_key(group.prompt, image) for image in group.images]
        self.seen += len(keys)
        self.covered += self.labels.known(keys)
        rows = self.labels.claim(keys, self.config.images_per_group)
        if not rows:
            return None
        try:
            scores = self._ask(group, rows)
        except BaseException:
            self.labels.give_up([keys[row] for row in rows])
            raise
        features = self.features(group.images[rows], (group.prompt,) * len(rows)).cpu().numpy()
        found: dict[Key, Label] = {}
        for row, score, feature in zip(rows, scores, features, strict=True):
            if np.isfinite(score):
                found[keys[row]] = Label(feature, float(score), group.group_id)
            else:
                self.undecided += 1
                self.labels.give_up([keys[row]])
        return Labelled(found) if found else None

    def _ask(self, group: FedGroup, rows: list[int]) -> np.ndarray:
        """The judge's scores of some rows, NaN where it has none."""
        table = self.judge.score(
            group.images[rows], [group.prompt] * len(rows), [group.metadata] * len(rows),
            deadline_s=self.config.judge.deadline_s,
        )  # fmt: skip
        values, valid = table.column(self.config.column or table.columns[0])
        return np.where(valid, values, np.nan)

    # ---- learning ----------------------------------------------------------------------------------------------

    def learn(self, item: Labelled) -> Metrics | None:
        new = list(item.labels.values())
        self._measure(new)
        for key, label in item.labels.items():
            self.labels.add(key, label)
        if self.config.form == "retrieval":
            return {"labels": float(len(self.labels))}
        losses = []
        for step in range(self.config.steps_per_update):
            loss = self._loss(self.labels.all(), np.random.default_rng([self.seed, self.updates, step]))
            if loss is None:
                continue
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(float(loss.detach()))
        return {"labels": float(len(self.labels)), **({"loss": float(np.mean(losses))} if losses else {})}

    def _loss(self, labels: list[Label], rng: np.random.Generator) -> Tensor | None:
        if self.config.form == "classification":
            some = [labels[i] for i in rng.permutation(len(labels))[: self.config.batch_size]]
            yes = torch.tensor([float(label.score > self.config.threshold) for label in some])
            return F.binary_cross_entropy_with_logits(self._outputs(some), yes.to(device_of(self.options)))
        pairs = self._pairs(labels, rng)
        if not pairs:
            return None
        first, second = ([pair[side] for pair in pairs] for side in (0, 1))
        better = torch.tensor([preferred(a.score, b.score, self.config.tie) for a, b in pairs])
        gap = self._outputs(first) - self._outputs(second)
        return pair_loss(gap, better.to(gap.device), torch.zeros_like(gap)).mean()

    def _pairs(self, labels: list[Label], rng: np.random.Generator) -> list[tuple[Label, Label]]:
        groups: dict[int, list[Label]] = {}
        for label in labels:
            groups.setdefault(label.group, []).append(label)
        pairs = [(a, b) for mine in groups.values() for i, a in enumerate(mine) for b in mine[i + 1 :]]
        return [pairs[i] for i in rng.permutation(len(pairs))[: self.config.batch_size]]

    def _outputs(self, labels: list[Label]) -> Tensor:
        features = torch.from_numpy(np.stack([label.features for label in labels])).to(device_of(self.options))
        return self.head(features)[:, 0]

    def _measure(self, new: list[Label]) -> None:
        """Agreement of the head with labels that it has not learnt from."""
        if self.config.form == "retrieval" or not len(self.labels):
            return
        with torch.no_grad():
            said = self._outputs(new).cpu().numpy()
        scores = np.array([label.score for label in new])
        if self.config.form == "classification":
            right = (said > 0) == (scores > self.config.threshold)
        else:
            i, j = np.triu_indices(len(new), 1)
            decided = np.abs(scores[i] - scores[j]) > self.config.tie
            right = ((said[i] - said[j]) * (scores[i] - scores[j]) > 0)[decided]
        if len(right):
            now = float(right.mean())
            self.agreement = now if self.agreement is None else SMOOTHING * self.agreement + (1 - SMOOTHING) * now

    def counts(self) -> Metrics:
        known = {} if self.agreement is None else {"agreement": self.agreement}
        coverage = self.covered / self.seen if self.seen else 0.0
        return {**known, "coverage": coverage, "undecided": float(self.undecided)}

    def pack(self) -> tuple[Arrays, Arrays, dict[str, Any]]:
        arrays = self.labels.arrays()
        state = {**head_arrays(self.head), **moments(self.optimizer, self.named), **arrays}
        facts: dict[str, Any] = {"base": self.features.digest, "form": self.config.form, "labels": len(self.labels)}
        if self.config.form == "retrieval":
            return {name: arrays[name] for name in ("label_keys", "label_scores")}, state, facts
        if self.config.form == "ranking" and len(self.labels):
            facts |= self._scale()
        return head_arrays(self.head), state, facts

    def _scale(self) -> dict[str, float]:
        """Mean and spread of the head over what is labelled, and the floor below which a reward is 0."""
        with torch.no_grad():
            raw = self._outputs(self.labels.all()).double().cpu().numpy()
        mean, std = float(raw.mean()), float(raw.std())
        floor = float(np.quantile((raw - mean) / max(std, 1e-6), self.config.quantile))
        return {"mean": mean, "std": max(std, 1e-6), "floor": floor}


def preferred(first: float, second: float, tie: float) -> float:
    """1: the first is better; 0: the second is; 1/2: they differ by no more than `tie`."""
    return 0.5 if abs(first - second) <= tie else float(first > second)
