"""The scorers that serve what learns online: adversarial_dino, guarded_pickscore, distilled. No torch before load().

Whole groups: a request is one group, so one version scores all of it; advantages never mix versions within a group.
Does not own: learning (the trainers), taking up versions (following.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from contracts.config.scorers import AdversarialDinoOptions, DistilledOptions, GuardedPickScoreOptions
from contracts.scores import Outcome, ScoreTable
from contracts.versions import Version
from reward_servers.online.following import CANARY_PROMPT, Following
from reward_servers.scorers.base import ScoreBatch, declared
from reward_servers.scorers.parts.model_scorer import OptionScorer, TorchScorer

if TYPE_CHECKING:
    import torch

ADV_GRPO = "The Image as Its Own Reward: Reinforcement Learning with Adversarial Reward for Image Generation"
ONI = "Online Intrinsic Rewards for Decision Making Agents from Large Language Model Feedback"


class AdversarialDino(Following, TorchScorer[AdversarialDinoOptions]):
    """(1 - patch_share) h(CLS) + patch_share mean over patches h(patch), with its gradient.

    Undecided for prompts without references. The patches are drawn once a version, the same for every image.
    """

    declares = declared("adversarial_dino")
    name = "adversarial_dino"
    paper = ADV_GRPO

    def load(self) -> None:
        from reward_servers.online.adversarial import DinoFeatures

        self.features = DinoFeatures(self.options)
        self.preprocess = self.features.preprocess
        self.follow(self.features.network)

    def take_up(self, version: Version, weights: Mapping[str, np.ndarray]) -> None:
        from reward_servers.online.adversarial import REFERENCE_PROMPTS
        from reward_servers.online.heads import load_head
        from reward_servers.scorers.parts.loading import device_of

        prompts = set(weights[REFERENCE_PROMPTS].tolist())
        self.head, self._prompts = load_head(weights).to(device_of(self.options)), prompts
        self._patches = self.features.some_patches(
            self.options.patches, np.random.default_rng(int(version.digest[:16], 16))
        )

    def forward(self, pixels: torch.Tensor, batch: ScoreBatch) -> torch.Tensor:
        out = self.head(self.features.of_pixels(pixels))[..., 0]
        share = self.options.patch_share
        return ((1 - share) * out[:, 0] + share * out[:, self._patches].mean(dim=1))[:, None]

    def score(self, batch: ScoreBatch) -> ScoreTable:
        from reward_servers.online.references import prompt_key

        table = super().score(batch)
        if not self._prompts:
            return table
        known = [prompt_key(prompt) in self._prompts or prompt == CANARY_PROMPT for prompt in batch.prompts]
        return undecided(table, known, "the prompt has no references")


class GuardedPickScore(Following, TorchScorer[GuardedPickScoreOptions]):
    """PickScore with the last vision layers of its version: exp(logit scale) cos(image, prompt), with its gradient."""

    declares = declared("guarded_pickscore")
    name = "guarded_pickscore"
    paper = ADV_GRPO

    def load(self) -> None:
        from reward_servers.scorers.pickscore import load_pickscore

        self.towers, self.preprocess = load_pickscore(self.options)
        self.follow(self.towers.network)

    def take_up(self, version: Version, weights: Mapping[str, np.ndarray]) -> None:
        from reward_servers.online.guarded import set_layers

        set_layers(self.towers.network, weights)

    def forward(self, pixels: torch.Tensor, batch: ScoreBatch) -> torch.Tensor:
        cosine = (self.towers.images(pixels) * self.towers.texts(batch.prompts)).sum(dim=1, keepdim=True)
        return self.towers.scale * cosine


class Distilled(Following, OptionScorer[DistilledOptions]):
    """What the judge would say, at once. Columns: reward (the paper's form, times 1/count^novelty), raw.

    raw: probability (classification), standardised output (ranking), label (retrieval). Undecided before the trainer
    has `min_labels`, and for an image without a label in the retrieval form.
    """

    declares = declared("distilled")
    name = "distilled"
    paper = ONI

    def load(self) -> None:
        from reward_servers.online.distilled import ClipFeatures

        self.features = ClipFeatures(self.options)
        self.follow(self.features.towers.network)

    def take_up(self, version: Version, weights: Mapping[str, np.ndarray]) -> None:
        from reward_servers.online.heads import load_head
        from reward_servers.scorers.parts.loading import device_of

        facts = version.facts
        if facts["form"] == "retrieval":
            keys = [(int(a), int(b)) for a, b in weights["label_keys"].tolist()]
            self._said = dict(zip(keys, weights["label_scores"].tolist(), strict=True))
        else:
            self.head = load_head(weights).to(device_of(self.options))
        self._facts = facts

    def score(self, batch: ScoreBatch) -> ScoreTable:
        raw, known = self._raw(batch)
        form = self._facts["form"]
        reward = raw
        if form == "classification":
            reward = (raw > 0.5).astype(np.float32)
        elif form == "ranking":
            reward = np.where(raw >= self._facts.get("floor", -np.inf), raw, 0.0)
        if self.options.novelty:
            reward = reward / group_counts(batch) ** self.options.novelty
        table = self.table(np.stack([reward, raw], axis=1))
        return undecided(table, known, "the judge has not labelled enough")

    def _raw(self, batch: ScoreBatch) -> tuple[np.ndarray, list[bool]]:
        import torch

        from reward_servers.online.labels import image_key

        canary = [prompt == CANARY_PROMPT for prompt in batch.prompts]
        if self._facts["form"] == "retrieval":
            keys = [image_key(p, image) for p, image in zip(batch.prompts, batch.images, strict=True)]
            known = [key in self._said or one for key, one in zip(keys, canary, strict=True)]
            return np.array([self._said.get(key, 0.0) for key in keys], np.float32), known
        with torch.no_grad():
            output = self.head(self.features(batch.images, batch.prompts))[:, 0]
        enough = self._facts["labels"] >= self.options.min_labels
        if self._facts["form"] == "classification":
            return torch.sigmoid(output).cpu().numpy(), [enough or one for one in canary]
        mean, std = self._facts.get("mean", 0.0), self._facts.get("std", 1.0)
        return ((output - mean) / std).cpu().numpy(), [enough or one for one in canary]


def undecided(table: ScoreTable, known: Sequence[bool], reason: str) -> ScoreTable:
    """The table with UNDECIDED in place of the rows that are not known."""
    unknown = ~np.asarray(known, bool)
    if not unknown.any():
        return table
    gradients = None if table.gradients is None else np.where(unknown[:, None, None, None], 0, table.gradients)
    return replace(
        table,
        values=np.where(unknown[:, None], np.nan, table.values).astype(np.float32),
        outcomes=np.where(unknown[:, None], np.uint8(Outcome.UNDECIDED), table.outcomes).astype(np.uint8),
        reasons=tuple(reason if no else "" for no in unknown),
        gradients=gradients,
    )


def group_counts(batch: ScoreBatch) -> np.ndarray:
    """How many images of the batch have an image's key: float [N], at least 1."""
    from reward_servers.online.labels import image_key

    keys = [image_key(prompt, image) for prompt, image in zip(batch.prompts, batch.images, strict=True)]
    return np.array([keys.count(key) for key in keys], np.float32)
