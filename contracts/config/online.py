"""Reward models that learn beside a run: which scorer, from what, how fast. One variant a trainer, told by `name`.

Does not own: the scorers that serve them (scorers.py), the trainers (reward_servers/online).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from contracts.config.base import Section
from contracts.config.scoring import ScorerConfig


class OnlineSection(Section):
    """What every trainer has. It runs in a process of its own and never makes the loop wait."""

    name: str = Field(description="the trainer, and the registered scorer that reads its versions")
    scorer: str = Field(description="name of the scorer (served by the run) whose versions this trains")
    queue_groups: int = Field(
        default=16, gt=0, description="copies of groups that wait for the trainer; the oldest is dropped for a new one"
    )
    updates_per_step: int = Field(
        default=9, gt=0, description="most updates a learner step; further groups wait, or are dropped"
    )
    every_steps: int = Field(default=1, gt=0, description="learner steps between two versions of the scorer")
    lr: float = Field(gt=0)
    cpus: float = Field(default=0, ge=0, description="CPUs the trainer's process reserves")
    gpus: float = Field(default=0, ge=0, description="GPUs the trainer's process reserves")

    @property
    def judge_config(self) -> ScorerConfig | None:
        return None


class References(OnlineSection):
    """Trainers that compare with reference images (Adv-GRPO)."""

    references: str = Field(description="JSONL of reference images: prompt, image (relative to the file)")
    per_prompt: bool = Field(
        default=True,
        description="a reference is one of its own prompt, and prompts without any are not scored; false: of every "
        "prompt, as for a style",
    )
    references_per_update: int = Field(default=8, gt=0, description="drawn for each group")


class AdversarialDinoConfig(References):
    """Adv-GRPO: a head on frozen DINO features, trained to tell references from what the policy paints."""

    name: Literal["adversarial_dino"] = "adversarial_dino"
    lr: float = Field(default=1e-4, gt=0)
    betas: tuple[float, float] = (0.5, 0.999)
    hidden: int = Field(default=256, ge=0, description="width of the head's hidden layer; 0: a linear head")
    patch_weight: float = Field(default=0.3, ge=0, description="of the patches' hinge loss beside the image's")


class GuardedPickScoreConfig(References):
    """Adv-GRPO: PickScore's last vision layers, updated only while it prefers generated images to references."""

    name: Literal["guarded_pickscore"] = "guarded_pickscore"
    lr: float = Field(default=5e-6, gt=0)
    layers: int = Field(default=2, gt=0, description="last vision layers that train")


class DistilledConfig(OnlineSection):
    """ONI: a slow judge labels some images, newest first, and a small head learns to say the same at once."""

    name: Literal["distilled"] = "distilled"
    judge: ScorerConfig = Field(
        description="the slow scorer: urls (or names of deployed ones), or a function; its first column, or `column`"
    )
    column: str | None = None
    form: Literal["classification", "ranking", "retrieval"] = Field(
        default="classification",
        description="classification: probability of a label above `threshold`; ranking: Bradley-Terry on pairs of a "
        "group; retrieval: the labels themselves, nothing for an image that has none",
    )
    threshold: float = Field(default=0.5, description="classification: a judge's score above it is a yes")
    tie: float = Field(default=0.05, ge=0, description="ranking: scores that differ by no more are a tie")
    quantile: float = Field(default=0.0, ge=0, lt=1, description="ranking: the lowest share of rewards, which become 0")
    images_per_group: int = Field(default=4, gt=0, description="most images of a group that the judge is asked about")
    max_labels: int = Field(default=4096, gt=1, description="newest labels kept to learn from")
    steps_per_update: int = Field(default=8, gt=0, description="optimizer steps when labels of a group arrive")
    batch_size: int = Field(default=64, gt=1, description="labels a step")
    hidden: int = Field(default=0, ge=0, description="width of the head's hidden layer; 0: a linear head")
    lr: float = Field(default=1e-3, gt=0)

    @property
    def judge_config(self) -> ScorerConfig:
        return self.judge

    @model_validator(mode="after")
    def _ranks_two(self) -> DistilledConfig:
        if self.form == "ranking" and self.images_per_group < 2:
            raise ValueError("ranking compares images of a group: set images_per_group to 2 or more")
        return self


OnlineConfig = Annotated[
    AdversarialDinoConfig | GuardedPickScoreConfig | DistilledConfig, Field(discriminator="name")
]  # fmt: skip

TRAINERS = {
    "adversarial_dino": "reward_servers.online.adversarial:AdversarialDino",
    "guarded_pickscore": "reward_servers.online.guarded:GuardedPickScore",
    "distilled": "reward_servers.online.distilled:Distilled",
}
"""Trainer's name -> its class."""
