"""Ranks as processes: what one engine writes any other loads, and failures that all ranks must agree on.

Under ZeRO-3 most tensors are in pieces of odd sizes here. About 60 s on two idle cores.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from contracts.errors import LearnerError, NonFiniteLoss
from tests.learner.learner_harness import (
    Painted,
    engine_section,
    job_of,
    make_config,
    needs_deepspeed,
    paint_with,
    run_ranks,
    seeded_rewards,
    weights_of,
    with_advantages,
)

LR = 1e-3
PPO = {"name": "ppo", "kl_beta": 0.04}
NFT = {"name": "nft", "decay_rate": 0.1}
LORA = {"tuning": "lora", "lora": {"rank": 2, "alpha": 4}}
ENGINES: list[int | None] = [None, 1, 2, 3]  # None: plain
LORA_STAGES: list[int | None] = [2, 3]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    needs_deepspeed,
]


def config_of(folder: str, objective: dict[str, Any], ranks: int, stage: int | None, **model: Any) -> Any:
    learner = {**engine_section(stage), "ranks": ranks, "optimizer": {"lr": LR, "eps": 1e-6}, "ema": {"decay": 0.5}}
    return make_config(folder, objective, learner=learner, model=model)


class Rank:
    """A learner in this process with what the tests do to it."""

    def __init__(
        self, rank: int, world: int, folder: str, objective: dict[str, Any], stage: int | None, painted: Painted,
        **model: Any,
    ) -> None:  # fmt: skip
        from learner.engines import deepspeed
        from learner.rank import RankLearner

        torch.set_num_threads(1)
        deepspeed.PERSISTENT_ELEMENTS = 200  # ZeRO-3 splits most of so small a model, and keeps some whole
        self.painted = painted
        self.learner = RankLearner(config_of(folder, objective, world, stage, **model), rank, world)

    def job(self) -> Any:
        return job_of(self.learner.config, self.painted, seeded_rewards(self.painted, {1: [0, 1]}), self.learner)

    def train(self, job: Any = None) -> dict[str, float]:
        return self.painted.train(self.learner, job or self.job()).metrics

    def snapshot_tensors(self, name: str) -> dict[str, np.ndarray]:
        names = self.learner.engine.named_trainable()
        return {n: self.learner.snapshots.full_tensor(name, n).numpy().copy() for n in names}


def write_and_go_on(
    rank: int, world: int, folder: str, objective: dict[str, Any], stage: int | None, painted: Painted, state: str,
    **model: Any,
) -> Any:  # fmt: skip
    """Train, save, train on: metrics of the second step, weights at both times, snapshots, what is published, and
    AdamW's moments as saved."""
    one = Rank(rank, world, folder, objective, stage, painted, **model)
    one.train()
    one.learner.save_state(state)
    saved, moments = weights_of(one.learner), moments_of(one.learner)
    published = one.learner.snapshot(1, 1)
    metrics = one.train()
    snapshots = {name: one.snapshot_tensors(name) for name in one.learner.snapshots.names}
    return metrics, saved, weights_of(one.learner), snapshots, published and published.arrays, moments


def read_and_go_on(
    rank: int,
    world: int,
    folder: str,
    objective: dict[str, Any],
    stages: list[int | None],
    painted: Painted,
    state: str,
    **model: Any,
) -> Any:
    """For each stage: load, train: metrics of that step, weights before and after it, snapshots after it, and AdamW's
    moments as loaded."""
    results = []
    for stage in stages:
        one = Rank(rank, world, folder, objective, stage, painted, **model)
        one.learner.load_state(state)
        loaded, moments = weights_of(one.learner), moments_of(one.learner)
        metrics = one.train()
        snapshots = {name: one.snapshot_tensors(name) for name in one.learner.snapshots.names}
        results.append((metrics, loaded, weights_of(one.learner), snapshots, moments))
    return results


def moments_of(learner: Any) -> dict[str, np.ndarray]:
    """AdamW's, whole, by kind and name. Collective."""
    kinds = ("exp_avg", "exp_avg_sq")
    return {f"{kind}/{name}": value for kind in kinds for name, value in weights_of(learner, kind).items()}


def on_two_ranks(rank: int, world: int, folder: str, painted: Painted, states: str) -> dict[str, Any]:
    """All that the tests ask of two ranks, in one start of their processes."""
    return {
        "ppo": write_and_go_on(rank, world, folder, PPO, 3, painted, f"{states}/zero3-ppo"),
        "nft": write_and_go_on(rank, world, folder, NFT, 3, painted, f"{states}/zero3-nft"),
        "of plain": read_and_go_on(rank, world, folder, PPO, [3, 2, None], painted, f"{states}/plain-ppo"),
        "failures": {stage: fail_together(rank, world, folder, stage, painted) for stage in ENGINES},
        "lora": lora_steps(rank, world, folder, [1, 2, 3], painted),
        **{
            f"lora state {stage}": write_and_go_on(
                rank, world, folder, NFT, stage, painted, f"{states}/zero{stage}-lora", **LORA
            )
            for stage in LORA_STAGES
        },
        "of plain lora": read_and_go_on(rank, world, folder, NFT, LORA_STAGES, painted, f"{states}/plain-lora", **LORA),
        "other names": report_other_names(rank, world),
    }


def on_one_rank(rank: int, world: int, folder: str, painted: Painted, states: str) -> dict[str, Any]:
    """The same of one rank under DeepSpeed."""
    return {
        "of zero3": read_and_go_on(rank, world, folder, PPO, [0, 1, 2, 3], painted, f"{states}/zero3-ppo"),
        "bf16": bf16_steps(rank, world, folder, ENGINES, painted),
    }


@pytest.fixture(scope="module")
def painted(tiny_model_folder: Path) -> Painted:
    return paint_with(config_of(str(tiny_model_folder), {"name": "grpo"}, 1, None), 3)


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("states"))


@pytest.fixture(scope="module")
def plain(tiny_model_folder: Path, painted: Painted, states: str) -> Any:
    """What one plain rank does, which all others are held to."""
    folder = str(tiny_model_folder)
    return {
        "ppo": write_and_go_on(0, 1, folder, PPO, None, painted, f"{states}/plain-ppo"),
        "nft": write_and_go_on(0, 1, folder, NFT, None, painted, f"{states}/plain-nft"),
        "lora": write_and_go_on(0, 1, folder, NFT, None, painted, f"{states}/plain-lora", **LORA),
        "clean step": Rank(0, 1, folder, NFT, None, painted).train(),
    }


@pytest.fixture(scope="module")
def two_ranks(tiny_model_folder: Path, painted: Painted, states: str, plain: Any) -> list[dict[str, Any]]:
    return run_ranks(2, on_two_ranks, str(tiny_model_folder), painted, states, timeout_s=600)


@pytest.fixture(scope="module")
def one_rank(tiny_model_folder: Path, painted: Painted, states: str, two_ranks: Any) -> dict[str, Any]:
    return run_ranks(1, on_one_rank, str(tiny_model_folder), painted, states, timeout_s=300)[0]


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], atol: float) -> None:
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=atol, err_msg=name)


def same_step(found: Any, expected: Any) -> None:
    """(metrics, weights before, weights after, snapshots, ..., moments before) agree; those before exactly."""
    for metric in ("loss", "grad_norm"):
        assert found[0][metric] == pytest.approx(expected[0][metric], rel=1e-5, abs=1e-7)
    assert all(np.array_equal(found[1][name], value) for name, value in expected[1].items())
    assert all(np.array_equal(found[-1][name], value) for name, value in expected[-1].items())
    assert any(value.any() for value in expected[-1].values())
    same(found[2], expected[2], atol=0.04 * LR)
    for name, tensors in expected[3].items():
        same(found[3][name], tensors, atol=0.04 * LR)


@pytest.mark.parametrize("objective", ["ppo", "nft"])
def test_two_partitioned_ranks_do_what_one_plain_rank_does(objective: str, two_ranks: Any, plain: Any) -> None:
    """Weights, snapshots put together from pieces, and published arrays."""
    _, saved, _, snapshots, published, _ = two_ranks[0][objective]
    _, expected_saved, _, expected_snapshots, expected_published, _ = plain[objective]
    same(saved, expected_saved, atol=0.02 * LR)
    same(published, expected_published, atol=0.02 * LR)
    for name, tensors in expected_snapshots.items():
        same(snapshots[name], tensors, atol=0.04 * LR)
    same_step(two_ranks[1][objective], two_ranks[0][objective])
    assert two_ranks[1][objective][4] is None, "rank 0 alone publishes"


@pytest.mark.parametrize("objective", ["ppo", "nft"])
def test_what_two_partitioned_ranks_write_one_plain_rank_loads(
    objective: str, two_ranks: Any, tiny_model_folder: Path, painted: Painted, states: str
) -> None:
    tree = {"ppo": PPO, "nft": NFT}[objective]
    folder, state = str(tiny_model_folder), f"{states}/zero3-{objective}"
    (found,) = read_and_go_on(0, 1, folder, tree, [None], painted, state)
    same_step(found, two_ranks[0][objective])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_two_partitioned_ranks_write_one_rank_loads_at_every_stage(
    stage: int, two_ranks: Any, one_rank: Any
) -> None:
    same_step(one_rank["of zero3"][stage], two_ranks[0]["ppo"])


@pytest.mark.parametrize("index", [0, 1, 2], ids=["zero3", "zero2", "plain"])
def test_what_one_plain_rank_writes_two_ranks_load(index: int, two_ranks: Any, plain: Any) -> None:
    for of_rank in two_ranks:
        same_step(of_rank["of plain"][index], plain["ppo"])


@pytest.mark.parametrize("stage", LORA_STAGES)
def test_what_two_partitioned_ranks_write_of_a_lora_one_plain_rank_loads(
    stage: int, two_ranks: Any, tiny_model_folder: Path, painted: Painted, states: str
) -> None:
    state = f"{states}/zero{stage}-lora"
    (found,) = read_and_go_on(0, 1, str(tiny_model_folder), NFT, [None], painted, state, **LORA)
    assert all("lora_" in name for name in found[1])
    same_step(found, two_ranks[0][f"lora state {stage}"])


@pytest.mark.parametrize("index", range(len(LORA_STAGES)), ids=["zero2", "zero3"])
def test_what_one_plain_rank_writes_of_a_lora_two_ranks_load(index: int, two_ranks: Any, plain: Any) -> None:
    for of_rank in two_ranks:
        same_step(of_rank["of plain lora"][index], plain["lora"])


def fail_together(rank: int, world: int, folder: str, stage: int | None, painted: Painted) -> dict[str, Any]:
    """What each failure does under an engine; then a clean step."""
    one = Rank(rank, world, folder, NFT, stage, painted)
    learner, job = one.learner, one.job()
    start = weights_of(learner)
    seen: dict[str, Any] = {}
    broken = with_advantages(job, lambda group, values: np.where(group == 0, np.nan, values))  # one rank's rows
    with pytest.raises(NonFiniteLoss, match="policy_loss") as caught:
        one.train(broken)
    seen["message"] = str(caught.value)
    seen["untouched"] = all(np.array_equal(v, start[n]) for n, v in weights_of(learner).items())
    loss, steep = learner.objective.loss, [True]

    def infinite_slope(model: Any, batch: Any, p: int) -> Any:
        result = loss(model, batch, p)
        if steep[0] and rank == 1:
            result.loss = result.loss + (result.loss - result.loss.detach()).sqrt()
        return result

    learner.objective.loss = infinite_slope  # type: ignore[method-assign]
    with pytest.raises(NonFiniteLoss, match="gradient"):
        one.train()
    seen["untouched_by_gradient"] = all(np.array_equal(v, start[n]) for n, v in weights_of(learner).items())
    steep[0] = False
    if stage is None or stage < 2:
        out_of_memory_on_rank_1(learner, rank, loss)
    seen["metrics"] = one.train(job)
    seen["halved"] = learner._halved
    return seen


def out_of_memory_on_rank_1(learner: Any, rank: int, loss: Any) -> None:
    def scarce(model: Any, batch: Any, p: int) -> Any:
        if rank == 1 and len(batch.rows) > 1 and p == 1:
            raise torch.OutOfMemoryError("as a test would have it")
        return loss(model, batch, p)

    learner.objective.loss = scarce


@pytest.mark.parametrize("stage", ENGINES, ids=["plain", "zero1", "zero2", "zero3"])
def test_ranks_fail_together_and_go_on_as_if_nothing_had_been(stage: int | None, two_ranks: Any, plain: Any) -> None:
    """A NaN or an infinite gradient on one rank stops all and changes nothing; so does its out-of-memory, once."""
    expected = plain["clean step"]
    for of_rank in two_ranks:
        seen = of_rank["failures"][stage]
        assert seen["untouched"]
        assert seen["untouched_by_gradient"]
        assert "the weights are as before" in seen["message"]
        assert seen["metrics"]["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert seen["metrics"]["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        assert seen["halved"] == (stage is None or stage < 2)


def lora_steps(rank: int, world: int, folder: str, stages: list[int | None], painted: Painted) -> Any:
    """Of each engine: the adapter's weights after two steps, and what is published. The base stays frozen."""
    from learner.rank import RankLearner

    results = []
    for stage in stages:
        learner = RankLearner(config_of(folder, NFT, world, stage, **LORA), rank, world)
        job = job_of(learner.config, painted, seeded_rewards(painted))
        for _ in range(2):
            painted.train(learner, job)
        published = learner.snapshot(1, 1)
        results.append((weights_of(learner), None if published is None else published.arrays))
    return results


def test_lora_trains_its_adapter_alone_under_every_engine(
    two_ranks: Any, tiny_model_folder: Path, painted: Painted
) -> None:
    ((expected, published),) = lora_steps(0, 1, str(tiny_model_folder), [None], painted)
    assert all("lora_" in name for name in expected)
    for weights, arrays in two_ranks[0]["lora"]:
        same(weights, expected, atol=0.04 * LR)
        same(arrays, published, atol=0.04 * LR)


def bf16_steps(rank: int, world: int, folder: str, stages: list[int | None], painted: Painted) -> Any:
    from learner.rank import RankLearner

    results = []
    for stage in stages:
        learner = RankLearner(config_of(folder, {"name": "nft"}, world, stage, dtype="bf16"), rank, world)
        job = job_of(learner.config, painted, seeded_rewards(painted))
        masters, losses = [weights_of(learner)], []
        for _ in range(3):
            losses.append(painted.train(learner, job).metrics["loss"])
            masters.append(weights_of(learner))
        published = learner.snapshot(1, 1)
        assert published is not None
        ema = {name: learner.snapshots.full_tensor("ema", name).numpy().copy() for name in masters[0]}
        results.append((losses, masters, published.offer.dtypes, ema))
    return results


def test_bf16_has_fp32_masters_under_every_engine(one_rank: Any) -> None:
    """bf16's rounding differs with the order of sums, so engines agree to a few per cent of the steps taken."""
    results = one_rank["bf16"]
    plain_losses, plain_masters, *_ = results[0]
    plain_weights = plain_masters[-1]
    for losses, masters, dtypes, ema in results:
        weights = masters[-1]
        assert set(dtypes.values()) == {"bfloat16"}
        assert losses == pytest.approx(plain_losses, rel=2e-3)
        off = np.concatenate([np.abs(weights[name] - value).ravel() for name, value in plain_weights.items()])
        assert off.mean() < 0.1 * LR * 3
        finer_than_bf16 = [name for name, v in weights.items() if np.any(v.view(np.uint32) & 0xFFFF)]
        assert len(finer_than_bf16) > len(weights) / 2
        same(ema, average_of(masters), atol=1e-6)  # of the fp32 masters: bf16 would lose most of each step


def average_of(masters: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The average at decay 0.5, warm-up included, of weights before and after each optimizer step."""
    from learner.snapshots import warmup_decay

    average = dict(masters[0])
    for step, weights in enumerate(masters[1:]):
        decay = warmup_decay(step, 0.5)
        average = {name: decay * value + (1 - decay) * weights[name] for name, value in average.items()}
    return average


def test_ranks_with_other_metrics_are_told_so(two_ranks: Any) -> None:
    for of_rank in two_ranks:
        assert "different metrics" in of_rank["other names"]


def report_other_names(rank: int, world: int) -> str:
    from learner.distributed import check_same_names

    check_same_names(["a", "b"], world, torch.device("cpu"))
    with pytest.raises(LearnerError) as caught:
        check_same_names(["a", f"b{rank}"], world, torch.device("cpu"))
    return str(caught.value)
