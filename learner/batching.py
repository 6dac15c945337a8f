"""From a step's job to micro-batches on the device: which arrays are read, once each, and how rows are laid out.

A rank reads its own slice of every group it trains on, once a step, and keeps each micro-batch it assembles for the
step's later passes (prepass, further updates, further epochs). Rows of one micro-batch share the schedule, the
stochastic steps and the guidance of the forward they stand in.

Does not own: which rows a rank takes (plan.py), where arrays come from (the caller's fetch), losses (objectives/).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from contracts.declarations import ObjectiveNeeds
from contracts.errors import LearnerError
from contracts.wire import GroupHeader, MicroBatchPlan, PromptSpec, Row, Source
from learner.types import FetchArrays, FetchEmbedding, MicroBatch, StepJob
from policy.types import EmbeddingBatch, PromptEmbedding

BatchKey = tuple[tuple[int, int, int], ...]
"""(group, sample, noise key) of each row: micro-batches that differ in weights alone are one."""

_CACHED_PROMPTS = 4096


class EmbeddingCache:
    """Prompt embeddings by digest, fetched once; the most recent stay. `encode` serves groups the learner paints."""

    def __init__(self, encode: Callable[[str], PromptEmbedding], size: int = _CACHED_PROMPTS) -> None:
        self._encode, self._size = encode, size
        self._held: OrderedDict[str, PromptEmbedding] = OrderedDict()

    def get(self, digest: str | None, text: str, source: Source, fetch: FetchEmbedding) -> PromptEmbedding:
        """The embedding named `digest`; one of the learner's own groups is encoded here."""
        key = digest if digest is not None else f"text:{text}"
        if key not in self._held:
            own = source is Source.LEARNER or digest is None
            self._held[key] = self._encode(text) if own else PromptEmbedding.from_arrays(fetch(key))
            if len(self._held) > self._size:
                self._held.popitem(last=False)
        self._held.move_to_end(key)
        return self._held[key]


def batch_key(rows: Iterable[Row]) -> BatchKey:
    return tuple((row.group, row.sample, row.noise_key) for row in rows)


def array_names(needs: ObjectiveNeeds) -> tuple[str, ...]:
    """The arrays of a group that an objective reads."""
    names = []
    if needs.clean:
        names.append("clean")
    if needs.states:
        names.append("states")
    if needs.log_probs:
        names.append("log_prob_sum")
    if needs.means:
        names.append("means")
    return tuple(names)


class StepBatches:
    """Micro-batches of one rank in one learner step. Everything it read stays until the step ends."""

    def __init__(
        self,
        job: StepJob,
        needs: ObjectiveNeeds,
        rank: int,
        device: torch.device,
        dtype: torch.dtype,
        embeddings: EmbeddingCache,
        fetch: FetchArrays,
        fetch_embedding: FetchEmbedding,
    ) -> None:
        self.job, self.needs, self.rank = job, needs, rank
        self._device, self._dtype = device, dtype
        self._embeddings, self._fetch, self._fetch_embedding = embeddings, fetch, fetch_embedding
        self._names = array_names(needs)
        self._spans = _sample_spans(job, rank)
        self._arrays: dict[int, dict[str, Tensor]] = {}
        self._batches: dict[BatchKey, MicroBatch] = {}

    def of_update(self, index: int) -> list[MicroBatch]:
        """The micro-batches of this rank in update `index`, prepass outputs included."""
        return [
            replace(self.get(plan), weight=self._weights(plan.rows), update=index, rows=plan.rows)
            for plan in self.job.plans[index].ranks[self.rank]
        ]

    def distinct(self) -> list[MicroBatch]:
        """Each micro-batch of this rank once, in the order of first use; as many on every rank (the first repeated).

        Their `prepass` is shared with what `of_update` returns.
        """
        keyed = {
            rank: list({batch_key(p.rows): p for plan in self.job.plans for p in plan.ranks[rank]}.values())
            for rank in range(len(self.job.plans[0].ranks))
        }
        longest = max(len(plans) for plans in keyed.values())
        own = keyed[self.rank]
        return [self.get(plan) for plan in [*own, *[own[0]] * (longest - len(own))]]

    def get(self, plan: MicroBatchPlan) -> MicroBatch:
        """The micro-batch of these rows, assembled once."""
        key = batch_key(plan.rows)
        if key not in self._batches:
            self._batches[key] = self._assemble(plan.rows)
        return self._batches[key]

    def _assemble(self, rows: tuple[Row, ...]) -> MicroBatch:
        headers = [self.job.headers[row.group] for row in rows]
        first = headers[0]
        _check_alike(headers)
        guided = self.needs.guidance == "same" and first.guidance_scale != 1.0
        credit = self.job.credit
        return MicroBatch(
            cond=self._stack([(h.prompt_digest, h.prompt.text, h.source) for h in headers]),
            uncond=self._stack([(h.negative_digest, h.prompt.negative, h.source) for h in headers]) if guided else None,
            guidance_scale=first.guidance_scale if guided else 1.0,
            weight=self._weights(rows),
            advantage=self._per_row(credit.advantages, rows),
            noise_keys=tuple(row.noise_key for row in rows),
            step=self.job.step,
            sigmas=torch.tensor(first.sigmas, dtype=torch.float32),  # on the host: replay reads single levels
            step_indices=tuple(first.step_indices),
            staleness=torch.tensor(
                [float(self.job.current_version - header.weight_version) for header in headers], device=self._device
            ),
            rows=rows,
            prompts=tuple(header.prompt for header in headers),
            returns=self._per_row(credit.returns, rows) if credit.returns else None,
            old_values=self._per_row(credit.old_values, rows) if credit.old_values else None,
            **{name: self._rows_of(name, rows) for name in self._names},  # type: ignore[arg-type]
        )

    def _weights(self, rows: Sequence[Row]) -> Tensor:
        return torch.tensor([row.weight for row in rows], dtype=torch.float32, device=self._device)

    def _per_row(self, by_group: Mapping[int, np.ndarray], rows: Sequence[Row]) -> Tensor:
        values = np.stack([by_group[row.group][row.sample] for row in rows]).astype(np.float32)
        return torch.from_numpy(values).to(self._device)

    def _stack(self, prompts: Sequence[tuple[str | None, str, Source]]) -> EmbeddingBatch:
        embeddings = [self._embeddings.get(*prompt, self._fetch_embedding) for prompt in prompts]
        return EmbeddingBatch.stack(embeddings, self._device, self._dtype)

    def _rows_of(self, name: str, rows: Sequence[Row]) -> Tensor:
        """fp32 [B,...] on the device: a view where the rows are a run of one group, else stacked."""
        parts = []
        for group, start, stop in _runs(rows):
            first = self._spans[group].start
            parts.append(self._group(group)[name][start - first : stop - first])
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)
        return joined.to(self._device, torch.float32, non_blocking=True)

    def _group(self, group: int) -> dict[str, Tensor]:
        if group not in self._arrays:
            arrays = self._fetch(group, self._names, self._spans[group])
            dtypes = self.job.headers[group].dtypes
            self._arrays[group] = {name: decode_tensor(arrays[name], dtypes.get(name)) for name in self._names}
        return self._arrays[group]


def decode_tensor(array: np.ndarray, true_dtype: str | None) -> Tensor:
    """A host tensor of an array as vaults hold it: bfloat16 comes as uint16 bits and is named in `true_dtype`.

    Shares the array's memory unless that is read-only. Raises LearnerError for a dtype that torch lacks.
    """
    array = np.ascontiguousarray(array)
    if not array.flags.writeable:
        array = array.copy()
    if true_dtype is None:
        return torch.from_numpy(array)
    dtype = getattr(torch, true_dtype, None)
    if not isinstance(dtype, torch.dtype) or dtype.itemsize != array.dtype.itemsize:
        raise LearnerError(f"an array of {array.dtype} says it holds {true_dtype}")
    return torch.from_numpy(array.view(f"i{array.dtype.itemsize}")).view(dtype)


def halves(size: int, pairs: bool) -> list[list[int]]:
    """Row positions of a micro-batch of `size` rows in two parts, or in one where there is nothing to split.

    pairs: rows i and i + size/2 belong together and stay together, winners first.
    """
    units = size // 2 if pairs else size
    if units < 2:
        return [list(range(size))]
    middle = units // 2
    parts = [list(range(middle)), list(range(middle, units))]
    return [[*part, *(unit + units for unit in part)] if pairs else part for part in parts]


def take(batch: MicroBatch, picked: list[int]) -> MicroBatch:
    """Those rows of a micro-batch, in that order."""
    index = torch.tensor(picked, device=batch.weight.device)
    rows_first = {
        name: value[index]
        for name in ("weight", "advantage", "staleness", "clean", "states", "log_prob_sum", "means", "returns",
                     "old_values")
        if (value := getattr(batch, name)) is not None
    }  # fmt: skip
    return replace(
        batch, **rows_first, cond=batch.cond[index], uncond=None if batch.uncond is None else batch.uncond[index],
        noise_keys=tuple(batch.noise_keys[i] for i in picked), rows=tuple(batch.rows[i] for i in picked),
        prompts=tuple[PromptSpec, ...](batch.prompts[i] for i in picked),
        prepass={name: value[index] for name, value in batch.prepass.items()},
    )  # fmt: skip


def _check_alike(headers: Sequence[GroupHeader]) -> None:
    """Raises LearnerError for rows that cannot stand in one forward."""
    first = headers[0]
    for header in headers[1:]:
        for name in ("sigmas", "step_indices", "guidance_scale"):
            if getattr(header, name) != getattr(first, name):
                raise LearnerError(
                    f"groups {first.group_id} and {header.group_id} differ in {name} and cannot share a micro-batch"
                )


def _sample_spans(job: StepJob, rank: int) -> dict[int, slice]:
    """Group -> the samples from the first to the last that this rank reads."""
    spans: dict[int, slice] = {}
    for plan in job.plans:
        for batch in plan.ranks[rank]:
            for row in batch.rows:
                span = spans.get(row.group, slice(row.sample, row.sample + 1))
                spans[row.group] = slice(min(span.start, row.sample), max(span.stop, row.sample + 1))
    return spans


def _runs(rows: Sequence[Row]) -> list[tuple[int, int, int]]:
    """(group, first sample, last + 1) of maximal runs of consecutive samples, in the rows' order."""
    runs: list[tuple[int, int, int]] = []
    for row in rows:
        if runs and runs[-1][0] == row.group and runs[-1][2] == row.sample:
            runs[-1] = (row.group, runs[-1][1], row.sample + 1)
        else:
            runs.append((row.group, row.sample, row.sample + 1))
    return runs
