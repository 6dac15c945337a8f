"""The painter: one model that turns prompt tasks into sample groups. Knows nothing of Ray, vaults or scores.

Invariant: a group is a pure function of (weights, run seed, group id, task); who painted it and when leaves no trace.
`denoise` is the work of the denoising thread; `finish` (decode, copy to the host) may run beside the next one.
Threads of torch are set by the process that holds the painter.

Does not own: when weights are loaded (the cluster's worker), the sampling loop (policy/rollout.py).
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from actors.images import read_image
from actors.proof import check_canary, check_digest
from actors.recording import Recording, decide_recording
from contracts.config import RunConfig
from contracts.config.rollout import EvalSampling, SamplerConfig
from contracts.digests import digest_text
from contracts.errors import ConfigError, WeightsError
from contracts.previews import steps_of_group
from contracts.seeds import Stream, derive_seed
from contracts.wire import GroupHeader, PromptSpec, PromptTask, Source, WeightOffer, WeightProof
from policy import schedule
from policy.policy import Policy
from policy.rollout import paint
from policy.samplers.base import build_sampler
from policy.types import EmbeddingBatch, PromptEmbedding, Trajectory
from policy.weights import export_arrays, load_arrays

_CACHED_PROMPTS = 256
_UNPROVEN = -1
"""The version while weights are in place but not proven: below every task's lowest version, so nothing is painted."""


@dataclass(frozen=True)
class PaintedGroup:
    """A group ready for a vault: header, arrays as wire.GROUP_ARRAYS names them, embeddings by prompt digest."""

    header: GroupHeader
    arrays: dict[str, np.ndarray]
    embeddings: dict[str, dict[str, np.ndarray]]


@dataclass(frozen=True)
class Denoised:
    """A group between denoise and finish: trajectories of its micro-batches, still on the device."""

    header: GroupHeader
    trajectories: tuple[Trajectory, ...]
    embeddings: dict[str, PromptEmbedding]


class Painter:
    """Paints with the weights last loaded; before any load with the model folder's own (version 0)."""

    def __init__(self, config: RunConfig) -> None:
        """Loads the model. Raises ConfigError as Policy.load does, or when nothing can be recorded that must be."""
        self.config = config
        self.version = 0
        self._sampler = build_sampler(config.sampler)
        self._recording: Recording = decide_recording(config)
        self.policy = Policy.load(config.model, config.seed, trainable=False)
        self._prompts: OrderedDict[str, PromptEmbedding] = OrderedDict()

    # -- weights

    def load(
        self,
        offer: WeightOffer,
        arrays: Mapping[str, np.ndarray],
        canary_current: np.ndarray,
        canary_previous: np.ndarray | None,
    ) -> WeightProof:
        """Load a published version and prove it (law 5).

        Raises WeightsError when names or shapes do not fit (nothing is changed then), WeightsNotProven when the live
        tensors' digest is not the published one or the canary's answer is not the learner's.
        """
        start = time.perf_counter()
        load_arrays(self.policy, arrays, offer.dtypes)
        self.version = _UNPROVEN
        digest, to_current, to_previous = "not verified", float("nan"), None
        if self.config.weights.verify:
            digest = check_digest(self.policy, offer)
            to_current, to_previous = check_canary(self.policy, offer.version, canary_current, canary_previous)
        self.version = offer.version
        return WeightProof(
            version=offer.version, digest=digest, canary_to_current=to_current, canary_to_previous=to_previous,
            load_seconds=time.perf_counter() - start,
        )  # fmt: skip

    # -- groups

    def denoise(self, task: PromptTask) -> Denoised:
        """Paint a group's latents in micro-batches. Raises WeightsError below the task's lowest version."""
        if self.version < task.min_version:
            raise WeightsError(f"group {task.group_id} needs version {task.min_version}, held is {self.version}")
        sampling, seed = self.config.sampler, self.config.seed
        cond_digest, cond = self._encode(task.prompt.text)
        embeddings = {cond_digest: cond}
        negative_digest, negative = None, None
        if sampling.guidance_scale != 1.0:
            negative_digest, negative = self._encode(task.prompt.negative)
            embeddings[negative_digest] = negative
        stochastic = schedule.stochastic_steps(sampling, seed, task.group_id)
        recorded = stochastic if self._recording.states else []
        preview_steps = steps_of_group(self.config.scorers, recorded)
        init_seeds = [derive_seed(seed, Stream.INIT_NOISE, task.group_id, i) for i in range(task.group_size)]
        step_seeds = [
            [derive_seed(seed, Stream.STEP_NOISE, task.group_id, i, k) for k in stochastic]
            for i in range(task.group_size)
        ]
        sizes = micro_batch_sizes(task.group_size, self.config.rollout.micro_batch)
        trajectories, first = [], 0
        for size in sizes:
            rows = slice(first, first + size)
            first += size
            trajectories.append(
                paint(
                    self.policy, self._batch(cond, size), self._batch(negative, size) if negative else None, sampling,
                    stochastic, init_seeds[rows], step_seeds[rows], storage_dtype=self._recording.storage_dtype,
                    record=self._recording.states, record_means=self._recording.means, preview_steps=preview_steps,
                )
            )  # fmt: skip
        header = GroupHeader(
            group_id=task.group_id, attempt=task.attempt, prompt=task.prompt, group_size=task.group_size,
            weight_version=self.version, source=Source.ACTORS, prompt_digest=cond_digest,
            negative_digest=negative_digest, guidance_scale=sampling.guidance_scale, sampler=sampling.name,
            sampler_params=self._sampler.params(), sigmas=schedule.sigmas(sampling.steps, sampling.shift).tolist(),
            step_indices=recorded, preview_steps=preview_steps, seeds=init_seeds, micro_batches=sizes,
            dims=int(np.prod(self.policy.latent_shape)),
        )  # fmt: skip
        return Denoised(header, tuple(trajectories), embeddings)

    def finish(self, denoised: Denoised) -> PaintedGroup:
        """Decode the images and previews and bring everything to the host. Safe beside a running `denoise`."""
        parts = denoised.trajectories
        named = {"clean": torch.cat([part.clean for part in parts])}
        for name in ("states", "log_prob_sum", "means"):
            recorded = [getattr(part, name) for part in parts]
            if recorded[0] is not None:
                named[name] = torch.cat(recorded)
        arrays, dtypes = export_arrays(named)
        arrays["images"] = np.concatenate([self.policy.decode(part.clean) for part in parts])
        if denoised.header.preview_steps:
            arrays["previews"] = np.concatenate([self._decode_previews(part.previews) for part in parts])
        embeddings = {digest: embedding.to_arrays() for digest, embedding in denoised.embeddings.items()}
        return PaintedGroup(denoised.header.model_copy(update={"dtypes": dtypes}), arrays, embeddings)

    def _decode_previews(self, previews: Tensor | None) -> np.ndarray:
        """uint8 [N,S,H,W,3], a step at a time: as many images at once as `finish` decodes, so as much memory."""
        assert previews is not None
        return np.stack([self.policy.decode(latents) for latents in previews.unbind(1)], axis=1)

    def encode_pair(self, task: PromptTask) -> PaintedGroup:
        """A preference pair read from its files as a group of two, [chosen, rejected]; clean latents only.

        Raises ConfigError naming the file when an image cannot be read or exceeds the limits.
        """
        if task.group_size != 2:
            raise ConfigError("rollout.group_size", "a preference pair is a group of 2", "set rollout.group_size=2")
        paths = [task.prompt.metadata[key] for key in ("chosen", "rejected")]
        images = np.stack([read_image(path, self.policy.image_size) for path in paths])
        digest, embedding = self._encode(task.prompt.text)
        sampling = self.config.sampler
        header = GroupHeader(
            group_id=task.group_id, attempt=task.attempt, prompt=task.prompt, group_size=2, weight_version=self.version,
            source=Source.FILES, prompt_digest=digest, sampler="none",
            sigmas=schedule.sigmas(sampling.steps, sampling.shift).tolist(), micro_batches=[2],
            dims=int(np.prod(self.policy.latent_shape)),
        )  # fmt: skip
        clean = self.policy.encode_images(images).cpu().numpy()
        return PaintedGroup(header, {"clean": clean}, {digest: embedding.to_arrays()})

    # -- evaluation

    def paint_images(self, prompts: Sequence[PromptSpec], sampling: EvalSampling, seeds: Sequence[int]) -> np.ndarray:
        """uint8 [N,H,W,3], one image a prompt, painted by the ODE: a function of weights, prompt and seed."""
        config = SamplerConfig(name="ode", **sampling.model_dump())
        images, first = [], 0
        for size in micro_batch_sizes(len(prompts), self.config.rollout.micro_batch):
            chunk = prompts[first : first + size]
            cond = self._stack([self._encode(prompt.text)[1] for prompt in chunk])
            uncond = None
            if sampling.guidance_scale != 1.0:
                uncond = self._stack([self._encode(prompt.negative)[1] for prompt in chunk])
            painted = paint(
                self.policy, cond, uncond, config, [], seeds[first : first + size], [[]] * size, record=False
            )
            images.append(self.policy.decode(painted.clean))
            first += size
        return np.concatenate(images) if images else np.empty((0, *self.policy.image_size, 3), np.uint8)

    # -- prompts

    def _encode(self, text: str) -> tuple[str, PromptEmbedding]:
        """(digest, embedding), kept for the most recent prompts."""
        digest = digest_text(text, self.policy.identity)
        if digest in self._prompts:
            self._prompts.move_to_end(digest)
        else:
            self._prompts[digest] = self.policy.encode_prompt(text)
            if len(self._prompts) > _CACHED_PROMPTS:
                self._prompts.popitem(last=False)
        return digest, self._prompts[digest]

    def _batch(self, embedding: PromptEmbedding, size: int) -> EmbeddingBatch:
        return self._stack([embedding] * size)

    def _stack(self, embeddings: Sequence[PromptEmbedding]) -> EmbeddingBatch:
        return EmbeddingBatch.stack(embeddings, self.policy.device, self.policy.dtype)


def micro_batch_sizes(num: int, micro_batch: int) -> list[int]:
    """How `num` samples are painted: full micro-batches and a last smaller one. (5, 2) -> [2, 2, 1]."""
    return [min(micro_batch, num - first) for first in range(0, num, micro_batch)]
