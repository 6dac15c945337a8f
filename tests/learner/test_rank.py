"""A rank's learner steps in one process, on the miniature model with the real objectives. About 25 s."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.painter import Painter
from contracts.declarations import ObjectiveNeeds
from contracts.digests import digest_arrays
from contracts.errors import LearnerError, NonFiniteLoss, NotStored, OutOfMemory, RankLost
from contracts.wire import StepReport
from learner.objectives.base import ModelHandle, Objective
from learner.rank import RankLearner
from learner.snapshots import OLD
from learner.types import LossSum, MicroBatch, StepJob
from tests.learner.learner_harness import (
    Painted,
    job_of,
    make_config,
    paint_groups,
    seeded_rewards,
    weights_of,
    with_advantages,
)

OBJECTIVES = ("grpo", "nft", "ppo", "dpo")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def painted(tiny_model_folder: Path) -> Painted:
    return paint_groups(Painter(make_config(tiny_model_folder, {"name": "grpo"}, max_staleness=1)), 3)  # with means


@pytest.fixture
def build(tiny_model_folder: Path, painted: Painted) -> Callable[..., tuple[RankLearner, StepJob]]:
    def make(objective: str | dict[str, Any], **more: Any) -> tuple[RankLearner, StepJob]:
        tree = {"name": objective} if isinstance(objective, str) else objective
        config = make_config(tiny_model_folder, tree, **more)
        learner = RankLearner(config, 0, 1)
        return learner, job_of(config, painted, seeded_rewards(painted, {1: [3]}), learner)

    return make


def update(learner: RankLearner, job: StepJob, painted: Painted) -> StepReport:
    return learner.update(job, painted.fetch, painted.fetch_embedding)


def close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], atol: float) -> None:
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=atol, err_msg=name)


def changed(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> list[str]:
    return [name for name, value in before.items() if not np.array_equal(value, after[name])]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_changes_weights_and_reports(name: str, build: Any, painted: Painted) -> None:
    learner, job = build(name, learner={"updates_per_step": 2})
    before = weights_of(learner)
    report = update(learner, job, painted)
    assert report.num_updates == len(job.plans) == learner.engine.optimizer_steps
    assert {"loss", "grad_norm", "lr", "policy_loss"} <= set(report.metrics)
    assert all(np.isfinite(value) for value in report.metrics.values())
    assert set(report.seconds) == {"fetch", "prepass", "forward_backward", "optimizer"}
    assert changed(before, weights_of(learner))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_micro_batch_does_not_change_the_result(name: str, build: Any, painted: Painted) -> None:
    reports, weights = [], []
    for size in (2, 4):
        learner, job = build(name, learner={"micro_batch": size, "optimizer": {"lr": 1e-3, "eps": 1e-6}})
        # off centre: a loss that is zero by construction could not show a wrong count
        job = with_advantages(job, lambda _, values: values + 0.5 * (values != 0))
        reports.append(update(learner, job, painted).metrics)
        weights.append(weights_of(learner))
    assert reports[0]["loss"] == pytest.approx(reports[1]["loss"], rel=1e-5)
    assert reports[0]["grad_norm"] == pytest.approx(reports[1]["grad_norm"], rel=1e-4)
    close(weights[1], weights[0], atol=0.05 * 1e-3)


def test_the_step_is_that_of_one_mean_over_all_rows(build: Any, painted: Painted) -> None:
    """The gradient of (sum over rows and passes) / (count * passes), written out with the objective alone."""
    learner, job = build("nft", learner={"optimizer": {"lr": 1e-3, "clip_grad_norm": None}})
    twin, _ = build("nft")
    from learner.batching import StepBatches

    batches = StepBatches(
        job, twin.needs, 0, torch.device("cpu"), torch.float32, twin._embeddings, painted.fetch, painted.fetch_embedding
    )
    total, count = torch.zeros(()), 0.0
    for batch in batches.of_update(0):
        for snapshot in ("old", "ref"):
            with torch.no_grad():
                batch.prepass.update(twin.objective.prepass(twin.model, batch, snapshot))
        passes = twin.objective.num_passes(batch)
        total = total + sum(twin.objective.loss(twin.model, batch, p).loss for p in range(passes)) / passes
        count += float(batch.weight.sum())
    (total / count).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in twin.policy.trainable().values() if p.grad is not None])
    report = update(learner, job, painted)
    assert count == 11  # 3 groups of 4, one sample without a score
    assert report.metrics["loss"] == pytest.approx(float(total.detach()) / count, rel=1e-6)
    assert report.metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-5)


# -- failures


class OutOfMemoryOnce:
    """Stands in for an objective's loss: runs out of memory while a forward takes more than `rows` rows."""

    def __init__(self, objective: Objective[Any], rows: int) -> None:
        self.loss, self.rows, self.failures, self.sizes = objective.loss, rows, 0, []  # type: ignore[var-annotated]
        self.calls = 0

    def __call__(self, model: ModelHandle, batch: MicroBatch, p: int) -> LossSum:
        self.calls += 1
        self.sizes.append(len(batch.rows))
        if len(batch.rows) > self.rows and self.calls > 1:  # in mid-update, with gradients accumulated already
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory (as a test would have it)")
        return self.loss(model, batch, p)


@pytest.mark.parametrize("name", ["nft", "dpo", "grpo"])
def test_out_of_memory_halves_the_micro_batch_once_and_repeats_the_update(
    name: str, build: Any, painted: Painted, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {"learner": {"micro_batch": 4, "optimizer": {"lr": 1e-3, "eps": 1e-6}}}
    tree = {"name": name, **({"pairs_per_group": 2} if name == "dpo" else {})}
    (twin, job), (learner, _) = build(tree, **sizes), build(tree, **sizes)
    failing = OutOfMemoryOnce(learner.objective, 2)
    learner.objective.loss = failing  # type: ignore[method-assign]
    with caplog.at_level(logging.WARNING):
        report = update(learner, job, painted)
    expected = update(twin, job, painted)
    assert failing.failures == 1
    assert max(failing.sizes[-2:]) <= 2
    assert "halved" in caplog.text
    assert report.metrics["loss"] == pytest.approx(expected.metrics["loss"], rel=1e-5, abs=1e-7)
    close(weights_of(learner), weights_of(twin), atol=0.05 * 1e-3)
    update(learner, job, painted)
    assert failing.failures == 1, "the next step starts with the halved micro-batch"


def test_out_of_memory_again_is_an_error_that_names_the_setting(build: Any, painted: Painted) -> None:
    learner, job = build("nft", learner={"micro_batch": 4})
    learner.objective.loss = OutOfMemoryOnce(learner.objective, 0)  # type: ignore[method-assign]
    before = weights_of(learner)
    with pytest.raises(LearnerError, match=r"learner\.micro_batch"):
        update(learner, job, painted)
    assert not changed(before, weights_of(learner))


def test_out_of_memory_where_peers_wait_asks_for_a_rebuild_once(
    build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Under ZeRO-2 and 3 the others are in a collective by then: all ranks begin again with half the micro-batch."""
    learner, _ = build("nft", learner={"micro_batch": 4})
    monkeypatch.setattr(type(learner.engine), "communicates_in_backward", True)
    learner.world_size, learner._seconds = 2, {"prepass": 0.0}

    def scarce() -> None:
        raise torch.OutOfMemoryError("as a test would have it")

    with pytest.raises(OutOfMemory, match="ran out of memory"):
        learner._within_memory(scarce, "prepass")
    learner.halve_micro_batches()  # as a rebuilt rank is told to
    with pytest.raises(LearnerError, match=r"learner\.micro_batch") as caught:
        learner._within_memory(scarce, "prepass")
    assert not isinstance(caught.value, RankLost), "another rebuild would change nothing"


def test_rows_that_cannot_be_read_stop_the_step_before_it_begins(build: Any, painted: Painted) -> None:
    learner, job = build("nft")
    before = weights_of(learner)

    def lost(group_id: int, names: tuple[str, ...], samples: slice) -> Any:
        raise NotStored(f"group {group_id} is not stored")

    with pytest.raises(NotStored, match="is not stored"):
        learner.update(job, lost, painted.fetch_embedding)
    assert not changed(before, weights_of(learner))
    assert update(learner, job, painted).num_updates == 1


def test_out_of_memory_in_the_prepass_is_repeated_too(build: Any, painted: Painted) -> None:
    (learner, job), (twin, _) = build("nft", learner={"micro_batch": 4}), build("nft", learner={"micro_batch": 4})
    prepass = learner.objective.prepass

    def scarce(model: ModelHandle, batch: MicroBatch, snapshot: str | None) -> dict[str, torch.Tensor]:
        if len(batch.rows) > 2:
            raise torch.OutOfMemoryError("as a test would have it")
        return prepass(model, batch, snapshot)

    learner.objective.prepass = scarce  # type: ignore[method-assign]
    found, expected = update(learner, job, painted).metrics, update(twin, job, painted).metrics
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["kl"] == expected["kl"] == 0.0  # rows of old and ref stand where they belong


def test_a_loss_that_is_not_finite_names_the_metric_and_changes_nothing(build: Any, painted: Painted) -> None:
    learner, job = build("nft")
    before, moments = weights_of(learner), weights_of(learner, "exp_avg")
    broken = with_advantages(job, lambda group, values: np.where(group == 0, np.nan, values))
    with pytest.raises(NonFiniteLoss, match="policy_loss"):
        update(learner, broken, painted)
    assert not changed(before, weights_of(learner))
    assert not changed(moments, weights_of(learner, "exp_avg"))
    twin, _ = build("nft")
    assert update(learner, job, painted).metrics == update(twin, job, painted).metrics


def test_a_gradient_that_is_not_finite_changes_nothing(build: Any, painted: Painted) -> None:
    learner, job = build("nft")
    loss = learner.objective.loss

    def steep(model: ModelHandle, batch: MicroBatch, p: int) -> LossSum:
        """Finite value, infinite slope: sqrt at 0."""
        result = loss(model, batch, p)
        return LossSum(result.loss + (result.loss - result.loss.detach()).sqrt(), result.metrics)

    learner.objective.loss = steep  # type: ignore[method-assign]
    before = weights_of(learner)
    with pytest.raises(NonFiniteLoss, match="gradient"):
        update(learner, job, painted)
    assert not changed(before, weights_of(learner))


def test_a_plan_for_other_ranks_is_refused(build: Any, painted: Painted) -> None:
    learner, _ = build("nft")
    _, job = build("nft", learner={"ranks": 2})
    with pytest.raises(LearnerError, match="2 ranks was given to 1"):
        update(learner, job, painted)


# -- prepasses and snapshots


class Recorder(Objective[Any]):
    """Moves every weight and writes down what it is called with."""

    declares = ObjectiveNeeds(clean=True, snapshots=("ref", "old"), guidance="none")
    log: list[Any]

    def prepasses(self, job: StepJob) -> tuple[str | None, ...]:
        self.log = []
        return (None, "ref", "old")

    def prepass(self, model: ModelHandle, batch: MicroBatch, snapshot: str | None) -> dict[str, torch.Tensor]:
        assert not torch.is_grad_enabled()
        self.log.append(("prepass", snapshot))
        return {f"v_{snapshot}": self._velocity(model, batch)}

    def loss(self, model: ModelHandle, batch: MicroBatch, p: int) -> LossSum:
        self.log.append(("loss", batch.update))
        v = self._velocity(model, batch)
        error = {name: (v - other).abs().flatten(1).mean(1) for name, other in batch.prepass.items()}
        metrics = {name: ((batch.weight * e).sum().detach(), batch.weight.sum()) for name, e in error.items()}
        return LossSum((batch.weight * v.square().flatten(1).mean(1)).sum(), metrics)

    def snapshot_decay(self, snapshot: str, optimizer_steps: int) -> float | None:
        return 0.0 if snapshot == OLD else None

    @staticmethod
    def _velocity(model: ModelHandle, batch: MicroBatch) -> torch.Tensor:
        assert batch.clean is not None
        return model.velocity(batch.clean, torch.full_like(batch.weight, 0.5), batch.cond)


def test_prepasses_run_once_under_their_snapshots_before_any_update(build: Any, painted: Painted) -> None:
    learner, job = build({"name": f"{__name__}:Recorder"}, learner={"epochs": 2, "micro_batch": 6})
    first = update(learner, job, painted).metrics
    log = learner.objective.log  # type: ignore[attr-defined]
    assert log == [("prepass", name) for name in (None, None, "ref", "ref", "old", "old")] + [
        ("loss", index) for index in (0, 0, 1, 1)
    ]
    assert first["v_None"] == first["v_ref"] == first["v_old"] > 0  # one update had changed the weights by then
    second = update(learner, job, painted).metrics
    assert second["v_ref"] > second["v_None"] == second["v_old"]  # ref stayed, old is the start of this step


def test_current_weights_are_published_with_their_digest_and_canary(build: Any, painted: Painted) -> None:
    learner, job = build("grpo")
    first = learner.snapshot(0, 0)
    assert first is not None
    assert first.canary_previous is None
    assert first.offer.snapshot == "current"
    update(learner, job, painted)
    second = learner.snapshot(1, 1)
    assert second is not None
    assert np.array_equal(second.canary_previous, first.canary_current)
    assert not np.array_equal(second.canary_current, first.canary_current)
    assert second.offer.digest == digest_arrays(second.arrays, second.offer.dtypes) != first.offer.digest
    assert second.offer.num_bytes == sum(array.nbytes for array in second.arrays.values())
    close(second.arrays, weights_of(learner), atol=0)
    update(learner, job, painted)
    assert second.offer.digest == digest_arrays(second.arrays, second.offer.dtypes), "published arrays are copies"


@pytest.mark.parametrize(
    "model", [{}, {"dtype": "bf16"}, {"tuning": "lora", "lora": {"rank": 2, "alpha": 4}}], ids=["full", "bf16", "lora"]
)
def test_a_painter_proves_what_the_learner_publishes(
    model: dict[str, Any], build: Any, painted: Painted, tiny_model_folder: Path
) -> None:
    learner, job = build("ppo", model=model)  # the critic stays behind
    painter = Painter(make_config(tiny_model_folder, {"name": "ppo"}, model=model))
    for version in range(2):
        published = learner.snapshot(version, version)
        assert published is not None
        proof = painter.load(
            published.offer, published.arrays, published.canary_current, published.canary_previous
        )  # fmt: skip
        assert proof.canary_to_current <= 1e-6
        update(learner, job, painted)
    assert proof.canary_to_previous is not None
    assert proof.canary_to_previous > proof.canary_to_current


def test_the_average_is_published_when_asked_for(build: Any, painted: Painted) -> None:
    """After the first optimizer step the average has moved by 1 - 1/10 of the way."""
    learner, job = build("grpo", learner={"engine": "plain", "ema": {"decay": 0.9}})
    start = weights_of(learner)
    update(learner, job, painted)
    usual, average = learner.snapshot(1, 1), learner.snapshot(1, 1, average=True)
    assert usual is not None
    assert average is not None
    assert (usual.offer.snapshot, average.offer.snapshot) == ("current", "ema")
    now = weights_of(learner)
    close(average.arrays, {name: 0.1 * start[name] + 0.9 * now[name] for name in now}, atol=1e-6)
    close(usual.arrays, now, atol=0)


def test_nft_publishes_the_snapshot_it_paints_with(build: Any, painted: Painted) -> None:
    """With rate 0.1 old keeps 0.1 of itself after the first optimizer step: neither the start nor the current."""
    learner, job = build({"name": "nft", "decay_rate": 0.1})
    start = weights_of(learner)
    update(learner, job, painted)
    published = learner.snapshot(1, 1)
    assert published is not None
    assert published.offer.snapshot == "sampling"
    now = weights_of(learner)
    expected = {name: 0.1 * start[name] + 0.9 * now[name] for name in now}
    close(published.arrays, expected, atol=1e-6)
    assert changed(now, published.arrays)
    assert not changed(now, weights_of(learner)), "the current weights are back after publishing"


# -- the critic


def test_values_of_every_sample_and_state_are_the_critics(build: Any, painted: Painted) -> None:
    learner, job = build("ppo")
    update(learner, job, painted)
    from cluster.step import draft_job

    draft = draft_job(1, 0, painted.headers, learner.config)
    values = learner.values(draft, painted.fetch, painted.fetch_embedding)
    assert sorted(values) == [0, 1, 2]
    assert all(array.shape == (4, 3) and array.dtype == np.float32 for array in values.values())
    flat = np.concatenate(list(values.values()))
    assert len(np.unique(flat)) > 30, "each sample and state has a value of its own"


def test_the_critic_learns_faster_than_the_policy(build: Any, painted: Painted) -> None:
    """At Adam's first step every weight with a gradient moves by its group's learning rate."""
    learner, job = build(
        {"name": "ppo", "value_lr_scale": 10.0}, learner={"optimizer": {"lr": 1e-4, "weight_decay": 0}}
    )
    before = weights_of(learner)
    update(learner, job, painted)
    moved = {name: np.abs(value - before[name]).max() for name, value in weights_of(learner).items()}
    critic = max(value for name, value in moved.items() if name.startswith("critic."))
    policy = max(value for name, value in moved.items() if not name.startswith("critic."))
    assert critic == pytest.approx(1e-3, rel=0.02)
    assert policy == pytest.approx(1e-4, rel=0.02)
