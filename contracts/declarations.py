"""What plug-ins need and give, so that `validate` decides by declarations instead of by name.

Objectives declare needs; samplers, scorers and prompt sources declare what they give. Built-in entries carry their
declaration in the registry (registry.py); a user's class carries it as the class attribute `declares`.
Does not own: the checks themselves (cluster/validate.py).
"""

from __future__ import annotations

from typing import Literal

from contracts.wire import Message, Source

Snapshot = Literal["ref", "old"]


class ObjectiveNeeds(Message):
    """What an objective must be handed for every row it trains on."""

    unit: Literal["sample", "pair"] = "sample"
    states: bool = False  # recorded latents of the stochastic steps
    log_probs: bool = False  # behaviour log-probs: the sampler must score its own steps
    means: bool = False  # means of the recorded steps; needs.py adds it where drift is measured
    gaussian_density: bool = False  # the log-prob must be a true density (cps published form is not)
    clean: bool = False  # final latents
    reward_gradient: bool = False  # the learner paints with gradient; scorers must offer dR/d image
    critic: bool = False  # a value head and a value pass before credit
    snapshots: tuple[Snapshot, ...] = ()  # no-grad passes under named snapshots
    guidance: Literal["same", "none"] = "same"  # train with the rollout's guidance, or without any
    paints_with: Literal["current", "sampling"] = "current"  # snapshot the actors should hold
    sources: tuple[Source, ...] = (Source.ACTORS,)


class SamplerGives(Message):
    """What a transition kernel offers."""

    log_probs: bool
    gaussian_density: bool = False
    params: tuple[str, ...] = ()  # names of its numeric parameters, as in the sampler config


class ScorerGives(Message):
    """What a scorer's table holds."""

    kind: Literal["point", "step", "pair", "region"] = "point"
    columns: tuple[str, ...] = ("score",)
    gradients: bool = False
    accepts: Literal["images", "latents"] = "images"
    metadata_keys: tuple[str, ...] = ()  # keys every prompt's metadata must hold
    whole_group: bool = False  # a score depends on the others of its request: never cut nor joined; pair tables always
    uncertainty: bool = False  # the table says how sure each value is (standard deviations)

    @property
    def needs_group(self) -> bool:
        """Whether a request is one group that must be scored in one call."""
        return self.whole_group or self.kind == "pair"


class PromptsGive(Message):
    """What a prompt source yields."""

    source: Source = Source.ACTORS
    metadata_keys: tuple[str, ...] = ()
    has_held_out: bool = False  # can yield a held-out split for evaluation


class CreditGives(Message):
    """Shape of the advantages an entry yields, and what it needs to compute them."""

    shape: Literal["sample", "step"] = "sample"
    needs_values: bool = False


class AggregationNeeds(Message):
    """What a rule from many scores to one signal reads, and what its signal is good for."""

    kinds: tuple[Literal["point", "step", "pair", "region"], ...] = ("point", "pair")  # tables it reads
    columns: Literal["weighted", "named"] = "weighted"  # takes the scorers' weights, or names its columns itself
    uncertainty: bool = False  # some scorer must say how sure it is
    std: tuple[Literal["global", "group", "none"], ...] = ("global", "group", "none")  # what credit.std may be
    critic: Literal["any", "never", "always"] = "any"  # never: the signal is relative to a group; always: per step
    scales: bool = False  # weighs samples after centring, which preference pairs would not see


Declaration = ObjectiveNeeds | SamplerGives | ScorerGives | PromptsGive | CreditGives | AggregationNeeds | None
