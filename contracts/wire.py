"""The messages of a run: who produces each and who consumes it.

| message      | produced by            | consumed by                                  |
|--------------|------------------------|----------------------------------------------|
| PromptTask   | controller (admission) | rollout actor, files reader, learner         |
| GroupHeader  | rollout actor          | vault (stored with the bytes), ledger        |
| PaintReceipt | rollout actor          | controller                                   |
| WeightOffer  | weight store           | rollout actor                                |
| WeightProof  | rollout actor          | controller (law 5)                           |
| Row, UpdatePlan | learner.plan        | learner ranks                                |
| StepReport   | learner ranks          | controller                                   |

Arrays never stand in these models: they travel beside them (codec.py) under the names listed in GROUP_ARRAYS.
Does not own: score tables (scores.py), configuration (config/).
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

WIRE_VERSION = 1

# Names, shapes and meaning of a group's arrays in a vault. G samples, K recorded stochastic steps.
GROUP_ARRAYS = {
    "images": "uint8 [G,H,W,3], lossless, for the jury; absent from files-source groups that need no score",
    "previews": "uint8 [G,S,H,W,3], images that S steps pointed to (previews.py), only where a scorer judges them",
    "clean": "[G,C,h,w] final latents x_0",
    "states": "[G,K+1,C,h,w] latents before each recorded step and after the last, in the storage dtype",
    "log_prob_sum": "float32 [G,K] sum over dimensions of the step log-prob under the behaviour policy",
    "means": "float32 [G,K,C,h,w] means of the recorded steps (only when the objective needs them)",
}


class Message(BaseModel):
    """Base of all messages: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Source(StrEnum):
    """Where a group's samples come from."""

    ACTORS = "actors"  # painted online by rollout actors
    FILES = "files"  # pairs or images read from files and encoded by an actor
    LEARNER = "learner"  # painted with gradient by the learner itself


class GroupState(StrEnum):
    """Life of a sample group, in order; `discarded` can follow any state before `trained`."""

    ADMITTED = "admitted"
    GENERATING = "generating"
    GENERATED = "generated"
    SCORING = "scoring"
    READY = "ready"
    CLAIMED = "claimed"
    TRAINED = "trained"
    DISCARDED = "discarded"


class DiscardReason(StrEnum):
    """Why a group will never be trained. Every discarded group has exactly one."""

    LATE = "late"  # at the head of the claim order past its deadline
    ZERO_VARIANCE = "zero_variance"  # all valid rewards equal: no signal
    TOO_FEW_VALID = "too_few_valid"  # not enough samples with every required score
    NO_PAIR = "no_pair"  # a pair objective found no strict preference
    STALE = "stale"  # painted by weights older than the bound allows
    ATTEMPTS = "attempts"  # painting or scoring failed max_attempts times
    RUN_END = "run_end"  # alive when the run reached its last step
    LOST = "lost"  # the vault's disk lost its bytes: this painting is gone, the group is painted again
    WEIGHT_SYNC = "weight_sync"  # must stay at zero: weights are loaded between groups


class PromptSpec(Message):
    """What a prompt source yields. metadata is passed to scorers as it is (JSON values only)."""

    text: str
    negative: str = ""
    metadata: dict[str, Any] = Field(default_factory=dict)


class PromptTask(Message):
    """One group to be made: a lease on `group_id` with fencing token `attempt`."""

    group_id: int = Field(ge=0, description="admission order, unique in the run")
    attempt: int = Field(ge=0, description="fencing token: results of older attempts are refused")
    prompt: PromptSpec
    group_size: int = Field(gt=0)
    min_version: int = Field(ge=0, description="lowest weight version it may be painted with")
    deadline_s: float = Field(gt=0, description="seconds this lease lasts from hand-over")
    source: Source = Source.ACTORS
    purpose: Literal["train", "eval"] = "train"


class GroupHeader(Message):
    """What is known of a painted group beside its arrays."""

    wire_version: int = WIRE_VERSION
    group_id: int
    attempt: int
    prompt: PromptSpec
    group_size: int
    weight_version: int
    source: Source = Source.ACTORS
    prompt_digest: str = Field(description="names the stored prompt embedding")
    negative_digest: str | None = Field(default=None, description="set when painted with guidance_scale > 1")
    guidance_scale: float = 1.0
    sampler: str = "ode"
    sampler_params: dict[str, float] = Field(default_factory=dict)
    sigmas: list[float] = Field(default_factory=list, description="T+1 noise levels from 1 to 0")
    step_indices: list[int] = Field(default_factory=list, description="the K recorded stochastic steps")
    preview_steps: list[int] = Field(default_factory=list, description="the S steps that have previews, ascending")
    seeds: list[int] = Field(default_factory=list, description="initial-noise seed of each sample")
    micro_batches: list[int] = Field(default_factory=list, description="sizes in which the group was painted")
    dims: int = Field(default=0, description="D = C*h*w, number of dimensions log_prob_sum runs over")
    dtypes: dict[str, str] = Field(default_factory=dict, description="true dtype of arrays stored as raw bits")


class Span(Message):
    """A stretch of work, for the trace. lane: who did it ('actor-0'); start: contracts.spans.wall_clock() there."""

    lane: str
    name: str
    start: float
    seconds: float


class WeightProof(Message):
    """Evidence that an actor holds the version it says: digest of live tensors and a canary output."""

    version: int
    digest: str
    canary_to_current: float = Field(description="max |canary output - the learner's output at this version|")
    canary_to_previous: float | None = Field(description="the same against the previous version; None for version 0")
    load_seconds: float


class PaintReceipt(Message):
    """Acknowledgement that a group's bytes are durable in a vault."""

    group_id: int
    attempt: int
    weight_version: int
    vault: str
    num_bytes: int
    paint_seconds: float
    store_seconds: float
    wait_weights_seconds: float = 0.0
    proof: WeightProof | None = Field(default=None, description="set on the first group painted with a version")
    actor: str = ""
    images_digest: str | None = Field(default=None, description="contracts.digests.digest_images; None without images")
    spans: tuple[Span, ...] = Field(default=(), description="what the actor did for this group, and when")


class WeightOffer(Message):
    """A published version. The arrays travel by the weight store's transport, keyed by canonical parameter name."""

    version: int
    step: int
    snapshot: Literal["current", "sampling", "ema"]
    digest: str
    num_bytes: int
    dtypes: dict[str, str] = Field(default_factory=dict)


class Row(Message):
    """One training row of a micro-batch: a sample, its weight in the loss and the key of its random numbers."""

    group: int = Field(description="group_id")
    sample: int
    weight: float = Field(description="1 for a valid sample, 0 for an invalid one or padding")
    noise_key: int = Field(description="rows that share it share time and noise (both halves of a pair)")


class MicroBatchPlan(Message):
    """Rows one forward takes together. Pair objectives: first half winners, second half losers, row by row."""

    rows: tuple[Row, ...]


class UpdatePlan(Message):
    """One optimizer step: the micro-batches of each rank (equal in number) and the global denominator."""

    ranks: tuple[tuple[MicroBatchPlan, ...], ...]
    global_weight: float = Field(description="sum of row weights (pairs count once) over all ranks, >= 1")


class StepReport(Message):
    """What a learner step yields: global metrics (already reduced over ranks) and times."""

    step: int
    num_updates: int
    metrics: dict[str, float]
    seconds: dict[str, float] = Field(default_factory=dict)
    spans: tuple[Span, ...] = Field(default=(), description="what each rank did, and when")
