"""Settings of a reward model's training, one YAML file. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from contracts.config.base import Section
from contracts.config.load import read_tree
from contracts.errors import ConfigError, ConfigErrors


class LabelConfig(Section):
    """What is made of a pair's vote strength mu (Secrets of RLHF II, 2401.06080)."""

    kind: Literal["hard", "smooth", "soft"] = Field(
        default="hard",
        description="hard: the label; smooth: the label with probability 1 - smoothing; soft: sigmoid(mu)",
    )
    smoothing: float = Field(default=0.1, ge=0, lt=0.5, description="smooth: probability that a label is wrong")
    flip_share: float = Field(
        default=0.0, ge=0, le=0.5, description="training pairs of lowest strength, all below 0, whose labels are turned"
    )
    margin: Literal["none", "fixed", "strength"] = Field(
        default="none", description="what the chosen must lead by: nothing, margin_size, or margin_size x mu"
    )
    margin_size: float = Field(default=1.0, ge=0)


class ItemsConfig(Section):
    """Single images that passed or failed, paired across prompts (SoliReward, 2512.22170)."""

    path: str = Field(description="JSONL: prompt, image, passed")
    wins_per_item: int = Field(
        default=1, ge=0, description="failed images that each passed one is paired with, an epoch"
    )
    ties_per_item: int = Field(default=1, ge=0, description="passed images that each passed one is tied with, an epoch")


class HeadConfig(Section):
    """SoliReward's hierarchical query attention over hidden states, in place of CLIP's cosine (2512.22170)."""

    layers: tuple[int, ...] = Field(
        default=(), description="hidden layers read one after another, counted from 1; empty: four, evenly spaced"
    )
    width: int = Field(default=256, gt=0, description="of queries and attention")
    heads: int = Field(default=8, gt=0)

    @model_validator(mode="after")
    def _divides(self) -> HeadConfig:
        if self.width % self.heads:
            raise ValueError(f"head.width {self.width} is no multiple of head.heads {self.heads}")
        if list(self.layers) != sorted(set(self.layers)) or any(layer < 1 for layer in self.layers):
            raise ValueError("head.layers must rise from 1 or more")
        return self


class ContrastiveConfig(Section):
    """A contrastive loss on a pair's features beside the pair loss, L = L_rm + weight L_cl (2401.06080)."""

    kind: Literal["simcse", "swav"] = Field(
        default="simcse", description="simcse: two dropout passes of an image attract; swav: they swap prototypes"
    )
    weight: float = Field(default=0.1, gt=0)
    on: Literal["features", "difference"] = Field(
        default="difference", description="of each image, or chosen minus rejected"
    )
    dropout: float = Field(default=0.1, gt=0, lt=1, description="of the features, drawn anew in each of two passes")
    temperature: float = Field(default=0.05, gt=0)
    prototypes: int = Field(default=16, gt=1, description="swav: clusters")


class MetaConfig(Section):
    """MetaRM: before each step the model is moved to tell images of a shifted distribution apart (2401.06080)."""

    path: str = Field(description="JSONL of that distribution: prompt, image; several images a prompt")
    lr: float = Field(default=1e-5, gt=0, description="eta: theta' = theta + eta grad J")
    batch_size: int = Field(default=16, gt=0, description="pairs of images of one prompt, a step")


class TrainingConfig(Section):
    """One reward model: r = exp(logit scale) cos(image, prompt) of a CLIP, in PickScore's format, minus an anchor."""

    model: str = Field(description="CLIP to start from: hub name or local folder; safetensors only")
    out: str = Field(description="folder to write: the model, its checkpoint, metrics and evaluation card")
    pairs: str | None = Field(
        default=None, description="JSONL: prompt, chosen, rejected (image paths), and perhaps votes, strength or tie"
    )
    items: ItemsConfig | None = None
    voters: tuple[str, ...] = Field(
        default=(),
        description="trained reward models whose mean difference is a pair's strength, in place of its votes",
    )
    label: LabelConfig = LabelConfig()
    contrastive: ContrastiveConfig | None = None
    meta: MetaConfig | None = None
    head: HeadConfig | None = None
    anchor: str | None = Field(
        default="held_out",
        description="JSONL of reference images (prompt, image) whose mean reward becomes 0; held_out: the held-out "
        "images; null: no shift",
    )  # fmt: skip
    ridge: float = Field(
        default=1.0, gt=0, description="of the uncertainty ||z||_{V^-1}: V = ridge I + sum z z^T over training images"
    )
    trainable: Literal["all", "projections"] = Field(
        default="all", description="projections: the two projections and the logit scale alone"
    )
    held_out_fraction: float = Field(default=0.1, gt=0, lt=1, description="of prompts, by their digest")
    seed: int = Field(default=0, ge=0)
    steps: int = Field(default=1000, gt=0)
    batch_size: int = Field(default=16, gt=0, description="pairs a step")
    lr: float = Field(default=3e-6, gt=0)
    warmup_steps: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    clip_grad_norm: float = Field(default=1.0, gt=0)
    save_every: int = Field(default=100, gt=0, description="steps between checkpoints, from which a killed run goes on")
    log_every: int = Field(default=10, gt=0)
    device: str = "auto"
    max_pixels: int = Field(default=2**24, gt=0, description="an image with more is refused")

    @model_validator(mode="after")
    def _something_to_learn_from(self) -> TrainingConfig:
        if self.pairs is None and self.items is None:
            raise ValueError("there is nothing to learn from: set pairs, items, or both")
        if self.items is not None and self.items.wins_per_item + self.items.ties_per_item == 0:
            raise ValueError("items make no pairs: set items.wins_per_item above 0")
        if self.items is not None and self.items.wins_per_item == 0 and self.pairs is None:
            raise ValueError("ties alone teach nothing but a constant: set items.wins_per_item above 0, or pairs")
        return self


def load_training(path: str | Path, overrides: Sequence[str] = ()) -> TrainingConfig:
    """The settings of a YAML file with overrides a.b=c. Raises ConfigErrors listing every mistake."""
    try:
        return TrainingConfig.model_validate(read_tree(Path(path), overrides))
    except ValidationError as error:
        raise ConfigErrors([_explain(item) for item in error.errors()]) from error


def _explain(item: object) -> ConfigError:
    assert isinstance(item, dict)
    field = ".".join(map(str, item["loc"])) or "configuration"
    return ConfigError(field, str(item["msg"]).removeprefix("Value error, "))
