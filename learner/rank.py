"""One rank of the learner: policy, critic, engine, objective and snapshots, driven through learner steps.

What a step does (`update`), the same forwards in the same order on every rank:

    fetch            this rank's rows, once
    prepass          the objective's no-grad passes, under the snapshots it names, before any weight changes
    for each update: for each micro-batch and pass: backward(sum over rows * world_size / (global_weight * passes))
                     one optimizer step: gradients averaged over ranks, so what is minimised is
                     (sum over all rows and passes) / (global_weight * passes), whatever the number of ranks
                     `ema` moves
    at the end       `old` moves; metrics are reduced over ranks as sums and weights

An update whose loss or gradient is not finite changes nothing and raises NonFiniteLoss on every rank. One that runs
out of memory is repeated once from zeroed gradients with every micro-batch halved, from then on.

Does not own: what is minimised (objectives/), credit and plan (which come with the job), when weights are published.
"""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from contracts.config import RunConfig
from contracts.config.objectives import PPOConfig
from contracts.digests import digest_arrays
from contracts.errors import LearnerError, NonFiniteLoss, NotStored, OutOfMemory
from contracts.needs import objective_needs
from contracts.wire import StepReport, UpdatePlan, WeightOffer
from learner.batching import EmbeddingCache, StepBatches, halves, take
from learner.critic import CriticHandle, build_critic
from learner.distributed import any_rank, check_same_names, init_distributed, sum_over_ranks
from learner.engines.base import Engine, EngineStep, ParamGroup
from learner.objectives.base import ModelHandle, ScoreGradient, make_objective
from learner.snapshots import EMA, OLD, Snapshots
from learner.state import begin_save, load_state, save_state
from learner.state_writer import PendingSave
from learner.types import FetchArrays, FetchEmbedding, LossSum, MicroBatch, StepJob
from policy.policy import Policy
from policy.weights import canary, export_arrays

__all__ = ["Published", "RankLearner", "init_distributed"]

logger = logging.getLogger(__name__)

_NO_MEMORY_EITHER = "out of memory with half the micro-batch; lower learner.micro_batch, or add ranks"

T = TypeVar("T")


@dataclass(frozen=True)
class Published:
    """Weights as actors load them. arrays by canonical name, in the actors' dtype; canaries as policy.weights has them.

    canary_previous: what the version before answered; None for version 0 and after a load of an older state.
    """

    offer: WeightOffer
    arrays: dict[str, np.ndarray]
    canary_current: np.ndarray
    canary_previous: np.ndarray | None


class RankLearner:
    """One rank. Every method is collective: all ranks call it with equal arguments."""

    def __init__(
        self, config: RunConfig, rank: int, world_size: int, *, score_gradient: ScoreGradient | None = None
    ) -> None:
        """Several ranks need MASTER_ADDR and MASTER_PORT in the environment (or a process group made before).

        Raises ConfigError as Policy.load does, DeepSpeedUnavailable where the engine cannot start.
        """
        init_distributed(config, rank, world_size)
        self.config, self.rank, self.world_size = config, rank, world_size
        self.needs = objective_needs(config)
        self.policy = Policy.load(config.model, config.seed, trainable=True)
        self._weight_names = list(self.policy.trainable())
        self.engine, self.model = _build_engine(config, self.policy, world_size, critic=self.needs.critic)
        self.objective = make_objective(config, self.policy, score_gradient)
        painted_by_old = [OLD] if self.needs.paints_with == "sampling" else []
        self.snapshots = Snapshots(self.engine, [*self.needs.snapshots, *painted_by_old], config.learner.ema)
        self._embeddings = EmbeddingCache(self.policy.encode_prompt)
        self._canaries: dict[int, np.ndarray] = {}
        self._halved = False
        self._seconds: dict[str, float] = {}

    # -- weights -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def snapshot(self, version: int, step: int, average: bool = False) -> Published | None:
        """The weights actors should paint with, as `version` after learner step `step`; None except on rank 0.

        `sampling` is the snapshot `old`, for objectives that paint with it; average: learner.ema's, for an evaluation.
        Tensors are collected one at a time.
        """
        sampling = self.needs.paints_with == "sampling"
        kind: Literal["ema", "sampling", "current"] = "ema" if average else "sampling" if sampling else "current"
        arrays: dict[str, np.ndarray] = {}
        dtypes: dict[str, str] = {}
        with self.snapshots.use({"ema": EMA, "sampling": OLD, "current": None}[kind]):
            for name in self._weight_names:
                tensor = self.engine.full_live(name)
                if self.rank == 0:
                    array, dtype = export_arrays({name: tensor})
                    arrays |= array
                    dtypes |= dtype
            answer = canary(self.policy, self.engine.module)
        previous = self._canaries.get(version - 1)
        self._canaries = {v: a for v, a in self._canaries.items() if v == version - 1} | {version: answer}
        if self.rank != 0:
            return None
        offer = WeightOffer(
            version=version,
            step=step,
            snapshot=kind,
            digest=digest_arrays(arrays, dtypes),
            num_bytes=sum(array.nbytes for array in arrays.values()),
            dtypes=dtypes,
        )
        return Published(offer, arrays, answer, previous)

    # -- steps ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def values(self, job: StepJob, fetch: FetchArrays, fetch_embedding: FetchEmbedding) -> dict[int, np.ndarray]:
        """The critic's values float32 [G,K] of every group of the job's one plan, on every rank."""
        batches = self._batches(job, fetch, fetch_embedding)
        group_ids = sorted(job.headers)
        groups = [job.headers[group] for group in group_ids]
        size = max(header.group_size for header in groups)
        table = torch.zeros(len(groups), size, len(groups[0].step_indices), device=self.policy.device)
        self._fetch_together(lambda: batches.of_update(0))
        for batch in batches.of_update(0):
            values = self.objective.values(self.model, batch)  # type: ignore[attr-defined]
            for row, of_row in zip(batch.rows, values, strict=True):
                if row.weight > 0:  # padding repeats rows that another rank holds
                    table[group_ids.index(row.group), row.sample] = of_row
        found = sum_over_ranks(table, self.world_size).cpu().numpy()
        return {h.group_id: found[i, : h.group_size].astype(np.float32) for i, h in enumerate(groups)}

    def update(self, job: StepJob, fetch: FetchArrays, fetch_embedding: FetchEmbedding) -> StepReport:
        """Make the job's optimizer steps. Metrics are those of all ranks; times are this rank's.

        Raises NonFiniteLoss, before which earlier updates of the step have been made; LearnerError when the memory
        does not suffice for half the micro-batch either, or the plan is for another number of ranks.
        """
        self._check_plans(job)
        self._seconds = dict.fromkeys(("fetch", "prepass", "forward_backward", "optimizer"), 0.0)
        sums = _Sums()
        if job.plans:
            batches = self._batches(job, fetch, fetch_embedding)
            with self._timed("fetch"):
                self._fetch_together(lambda: [batches.of_update(index) for index in range(len(job.plans))])
            self._within_memory(lambda: self._prepass(job, batches), "prepass")
            for index, plan in enumerate(job.plans):
                self._one_update(batches, index, plan, sums)
            self.snapshots.after_step(self.engine.optimizer_steps, self.objective.snapshot_decay)
        metrics = self._metrics(sums) if job.plans else {}
        return StepReport(step=job.step, num_updates=len(job.plans), metrics=metrics, seconds=dict(self._seconds))

    def _one_update(self, batches: StepBatches, index: int, plan: UpdatePlan, sums: _Sums) -> None:
        attempt = self._within_memory(lambda: self._accumulate(batches, index, plan), "forward_backward")
        with self._timed("optimizer"):
            loss = float(sum_over_ranks(attempt.loss, self.world_size)) / plan.global_weight
            if not math.isfinite(loss):
                self.engine.zero_grad()
                raise NonFiniteLoss(self._non_finite_message(index, f"the loss is {loss}", attempt))
            step = self.engine.step()
            if not step.finite:
                raise NonFiniteLoss(self._non_finite_message(index, "the gradient is not finite", attempt))
            self.snapshots.after_update(self.engine.optimizer_steps)
        sums.add_update(loss, plan.global_weight, step, attempt)

    def _accumulate(self, batches: StepBatches, index: int, plan: UpdatePlan) -> _Attempt:
        """Gradients of one update."""
        attempt = _Attempt(self.policy.device)
        for batch in self._sized(batches.of_update(index)):
            passes = self.objective.num_passes(batch)
            scale = self.world_size / (plan.global_weight * passes)
            for p in range(passes):
                result = self.objective.loss(self.model, batch, p)
                self.engine.backward(result.loss * scale)
                attempt.add(result, passes)
        attempt.finish()
        return attempt

    def _within_memory(self, work: Callable[[], T], phase: str) -> T:
        """The result of `work`; when any rank runs out of memory, of a second try with halved micro-batches."""
        while True:
            done: list[T] = []
            with self._timed(phase):
                try:
                    done.append(work())
                except torch.OutOfMemoryError as error:
                    if self.world_size > 1 and self.engine.communicates_in_backward:
                        # the other ranks wait in a collective of this one: nothing but a rebuild frees them
                        raise self._out_of_memory() from error
                if not any_rank(not done, self.world_size, self.policy.device):
                    return done[0]
            done.clear()
            if self._halved:
                raise LearnerError(_NO_MEMORY_EITHER)
            self.halve_micro_batches()
            self._recover_memory()

    def _prepass(self, job: StepJob, batches: StepBatches) -> None:
        snapshots = self.objective.prepasses(job)
        if not snapshots:
            return
        distinct = batches.distinct()
        for snapshot in snapshots:
            with self.snapshots.use(snapshot), torch.no_grad():
                for batch in distinct:
                    batch.prepass.update(self._prepass_of(batch, snapshot))

    def _prepass_of(self, batch: MicroBatch, snapshot: str | None) -> dict[str, Tensor]:
        """The objective's outputs for all rows, computed in parts once micro-batches are halved."""
        if not self._halved:
            return self.objective.prepass(self.model, batch, snapshot)
        parts = self._parts(batch)
        outputs = [self.objective.prepass(self.model, take(batch, part), snapshot) for part in parts]
        order = torch.tensor([row for part in parts for row in part], device=batch.weight.device).argsort()
        return {name: torch.cat([output[name] for output in outputs])[order] for name in outputs[0]}

    # -- state ---------------------------------------------------------------------------------------------------

    def begin_save(self, folder: str | Path) -> PendingSave:
        """Hand the canonical state to the writer of a new folder on this node (learner/state.py). Rank 0 writes.

        Training may go on at once; what finish() returns are the files' sizes and digests.
        """
        stage_bytes = self.config.checkpoint.stage_mb * 2**20
        return begin_save(Path(folder), self.engine, self.snapshots, self._own_state(), self.rank, stage_bytes)

    def save_state(self, folder: str | Path) -> None:
        """The same, waiting until the folder is there, whole."""
        save_state(Path(folder), self.engine, self.snapshots, self._own_state(), self.rank, self.world_size)

    def _own_state(self) -> dict[str, Any]:
        canaries = {str(version): answer.tolist() for version, answer in self._canaries.items()}
        return {"canaries": canaries, "halved": self._halved}

    def load_state(self, folder: str | Path) -> None:
        """Load a state written at any number of ranks by any engine. Raises LearnerError when it does not fit."""
        described = load_state(Path(folder), self.engine, self.snapshots)
        self._canaries = {int(v): np.array(a, dtype=np.float32) for v, a in described["canaries"].items()}
        self._halved = bool(described["halved"])

    # -- inside --------------------------------------------------------------------------------------------------

    def _check_plans(self, job: StepJob) -> None:
        for plan in job.plans:
            if len(plan.ranks) != self.world_size:
                raise LearnerError(f"a plan for {len(plan.ranks)} ranks was given to {self.world_size}")

    def _fetch_together(self, fetch: Callable[[], object]) -> None:
        """Read what a step needs, or raise on every rank: none may wait in a collective for one without its rows."""
        failure: Exception | None = None
        try:
            fetch()
        except Exception as error:  # whatever a vault or the way to it raises
            failure = error
        if any_rank(failure is not None, self.world_size, self.policy.device):
            raise failure or NotStored("another rank could not read its groups")

    def _batches(self, job: StepJob, fetch: FetchArrays, fetch_embedding: FetchEmbedding) -> StepBatches:
        return StepBatches(
            job, self.needs, self.rank, self.policy.device, self.policy.dtype, self._embeddings, fetch, fetch_embedding
        )

    def _sized(self, batches: list[MicroBatch]) -> Iterator[MicroBatch]:
        """The batches, halved if a step once ran out of memory."""
        for batch in batches:
            yield from [take(batch, part) for part in self._parts(batch)] if self._halved else [batch]

    def _parts(self, batch: MicroBatch) -> list[list[int]]:
        return halves(len(batch.rows), pairs=self.needs.unit == "pair")

    def _out_of_memory(self) -> LearnerError:
        """To be raised where this rank's peers are left in a collective: a rebuild halves all ranks' micro-batches."""
        if self._halved:
            return LearnerError(_NO_MEMORY_EITHER)
        return OutOfMemory(f"learner rank {self.rank} ran out of memory with learner.micro_batch")

    def halve_micro_batches(self) -> None:
        """From now on, unless they are halved already. Every rank does, or none."""
        self._halved = True
        logger.warning("out of memory: micro-batches are halved from now on, and what failed is started again")

    def _recover_memory(self) -> None:
        self.engine.zero_grad()
        gc.collect()
        if self.policy.device.type == "cuda":
            torch.cuda.empty_cache()

    def _non_finite_message(self, index: int, what: str, attempt: _Attempt) -> str:
        """Names the metrics that are not finite. Collective, so that all ranks say the same."""
        totals = self._over_ranks(attempt.sums())
        culprits = [name for name, (total, _) in totals.items() if not math.isfinite(total)]
        naming = f"; not finite among its metrics: {', '.join(culprits)}" if culprits else ""
        return f"update {index}: {what}{naming}; the weights are as before this update"

    def _metrics(self, sums: _Sums) -> dict[str, float]:
        totals = self._over_ranks(sums.objective)
        means = {name: total / weight for name, (total, weight) in totals.items() if weight > 0}
        return {**self.objective.finish_metrics(means), **sums.of_updates()}

    def _over_ranks(self, sums: dict[str, Tensor]) -> dict[str, list[float]]:
        """(weighted sum, weight) by name, added up over ranks in one all-reduce."""
        if not sums:
            return {}
        names = sorted(sums)
        check_same_names(names, self.world_size, self.policy.device)
        table = sum_over_ranks(torch.stack([sums[name] for name in names]), self.world_size)
        return dict(zip(names, table.tolist(), strict=True))

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            if self.policy.device.type == "cuda":
                torch.cuda.synchronize(self.policy.device)
            self._seconds[phase] += time.perf_counter() - start


class _Attempt:
    """Loss and metrics of one update on this rank, left on the device until the end."""

    def __init__(self, device: torch.device) -> None:
        self._losses: list[Tensor] = []
        self._pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self.loss = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, result: LossSum, passes: int) -> None:
        self._losses.append(result.loss.detach() / passes)
        for name, pair in result.metrics.items():
            self._pairs.setdefault(name, []).append(pair)

    def finish(self) -> None:
        """Sum the losses: sum over rows, mean over passes."""
        if self._losses:
            self.loss = torch.stack(self._losses).double().sum()

    def sums(self) -> dict[str, Tensor]:
        """name -> float64 [2]: (weighted sum, weight)."""
        return {
            name: torch.stack([torch.stack([pair[i].detach().double() for pair in pairs]).sum() for i in (0, 1)])
            for name, pairs in sorted(self._pairs.items())
        }


class _Sums:
    """Metrics of a learner step over all its updates."""

    def __init__(self) -> None:
        self.objective: dict[str, Tensor] = {}
        self._losses: list[float] = []
        self._weights: list[float] = []
        self._steps: list[EngineStep] = []

    def add_update(self, loss: float, weight: float, step: EngineStep, attempt: _Attempt) -> None:
        self._losses.append(loss)
        self._weights.append(weight)
        self._steps.append(step)
        for name, pair in attempt.sums().items():
            self.objective[name] = self.objective[name] + pair if name in self.objective else pair

    def of_updates(self) -> dict[str, float]:
        """loss: mean over the rows of all updates; grad_norm: mean over updates; lr: of the last."""
        return {
            "loss": float(np.average(self._losses, weights=self._weights)),
            "grad_norm": float(np.mean([step.grad_norm for step in self._steps])),
            "lr": self._steps[-1].lr,
        }


def _build_engine(config: RunConfig, policy: Policy, world_size: int, *, critic: bool) -> tuple[Engine, ModelHandle]:
    """The engine around the policy's network (and critic), and what objectives call."""
    groups = [ParamGroup("policy", policy.trainable())]
    module: nn.Module = policy.module
    critic_config: PPOConfig | None = None
    if critic:
        critic_config = config.objective if isinstance(config.objective, PPOConfig) else PPOConfig()
        joint = build_critic(policy, critic_config, config.seed)
        groups.append(ParamGroup("critic", joint.critic_parameters(), critic_config.value_lr_scale))
        module = joint
    engine = make_engine(config, module, groups, world_size)
    if critic_config is not None:
        return engine, CriticHandle(policy, engine.module, critic_config)
    return engine, ModelHandle(policy, engine.module)


def make_engine(config: RunConfig, module: nn.Module, groups: list[ParamGroup], world_size: int) -> Engine:
    """The configured engine. DeepSpeed is imported only where it is used."""
    learner: Any = config.learner
    if learner.engine == "plain":
        from learner.engines.plain import PlainEngine

        return PlainEngine(module, groups, learner.optimizer, world_size)
    from learner.engines.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(
        module, groups, learner.optimizer, world_size, stage=learner.zero_stage, dtype=config.model.dtype
    )
