"""A learner rank that dies or hangs: noticed, every rank rebuilt from the last state, no group and no bit lost."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from cluster.controller import Parts
from cluster.ledger.reader import LedgerReader
from contracts.config import RunConfig
from contracts.config.load import config_from_tree
from contracts.errors import GuardStop, RankLost
from tests.cluster.lost_ranks import write_faults
from tests.laws.run_kit import events, run_on_cluster, state_tensors, tiny_config
from tests.learner.learner_harness import engine_section, needs_deepspeed

STEPS = 5
TIMERS = Parts("benchmarks.stand_ins:WaitingPainter", "tests.cluster.lost_ranks:MortalTimer")


@pytest.mark.long  # law 6 strikes ranks, too, and law 3 compares what engines load
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("shared_ray")
@pytest.mark.parametrize(
    "zero_stage",
    [pytest.param(None, id="ddp"), pytest.param(2, id="zero2", marks=needs_deepspeed)],
)
def test_killed_and_hung_ranks_cost_a_rebuild_and_no_bit(
    zero_stage: int | None, tiny_model_folder: Path, tmp_path: Path
) -> None:
    """Two ranks. One is killed before any state was saved, later one hangs; at staleness 0 the weights at the end are
    those of a run without faults."""
    undisturbed = two_ranks(tiny_model_folder, tmp_path, "undisturbed", zero_stage)
    run_on_cluster(undisturbed)
    config = two_ranks(tiny_model_folder, tmp_path, "disturbed", zero_stage)
    write_faults(config, [("update", 2, 1, "SIGKILL"), ("update", 4, 0, "SIGSTOP")])
    summary = run_on_cluster(config, Parts(learner="tests.cluster.lost_ranks:mortal_learner"))

    assert (summary["steps"], summary["learner_rebuilds"], summary["actor_restarts"]) == (STEPS, 2, 0)
    rebuilds = events(config, "learner_rebuild")
    assert [(event["kind"], event["step"], event["to_step"]) for event in rebuilds] == [("death", 1, 0), ("hang", 3, 2)]
    assert "[0]" in rebuilds[1]["reason"] or "[0, 1]" in rebuilds[1]["reason"]
    again = [event["rolled_back"] for event in events(config, "learner_rebuilt")]
    assert [len(groups) for groups in again] == [2, 2]  # steps 1 and 3
    check_books(config, summary, again)
    check_processes(config)
    ours, other = final_state(config), final_state(undisturbed)
    assert ours.keys() == other.keys()
    assert [name for name in ours if not np.array_equal(ours[name], other[name])] == []


def check_books(config: RunConfig, summary: dict[str, Any], again: list[list[int]]) -> None:
    """Every group trained once in the lineage of the weights, the rolled back ones from their first painting."""
    with closing(LedgerReader(Path(config.runs_dir) / config.name / "ledger.sqlite")) as ledger:
        books, rows = ledger.books(), {row.group_id: row for row in ledger.rows()}
    assert books.balanced
    assert (books.trained_steps, books.groups_trained, books.max_staleness_seen) == (STEPS, 2 * STEPS, 0)
    assert sorted(row.step for row in rows.values() if row.step) == sorted([*range(1, STEPS + 1)] * 2)
    for group_id in (group_id for groups in again for group_id in groups):
        assert rows[group_id].step is not None
        assert rows[group_id].paint_attempt == 0
    assert summary["images_painted"] == summary["images_trained"] == books.trained == 2 * 4 * STEPS


def check_processes(config: RunConfig) -> None:
    """No rank process of before a rebuild is left, not even the stopped one."""
    replaced = [process for process in events(config, "started")[0]["processes"] if "learner" in process["name"]]
    replaced += events(config, "learner_rebuilt")[0]["processes"]
    assert len({process["pid"] for process in replaced}) == 4
    for process in replaced:
        assert not psutil.pid_exists(process["pid"]), process


@pytest.mark.usefixtures("shared_ray")
def test_too_many_rebuilds_end_the_run_with_their_reason(tmp_path: Path) -> None:
    config = timer_config(tmp_path, "hopeless", learner={"max_rebuilds": 1})
    write_faults(config, [("update", 2, 0, "SIGKILL")] * 2)
    with pytest.raises(RankLost, match=r"ranks \[0\] died.*learner\.max_rebuilds=1"):
        run_on_cluster(config, TIMERS)
    assert len(events(config, "learner_rebuild")) == 1


@pytest.mark.usefixtures("shared_ray")
def test_ranks_lost_with_a_checkpoint_in_between_are_rebuilt_in_the_last_save_too(tmp_path: Path) -> None:
    config = timer_config(tmp_path, "last-save", learner={"max_rebuilds": 1})
    write_faults(config, [("update", 2, 0, "SIGKILL"), ("save_state", 3, 0, "SIGKILL")])
    summary = run_on_cluster(config, TIMERS)
    assert (summary["steps"], summary["learner_rebuilds"], summary["groups_trained"]) == (3, 2, 6)
    assert [event["to_step"] for event in events(config, "learner_rebuild")] == [0, 2]
    assert final_step(config) == 3


@pytest.mark.usefixtures("shared_ray")
def test_a_guard_stops_the_run_though_a_rank_is_lost_in_its_save(tmp_path: Path) -> None:
    """The steps since the last checkpoint are made again, by guards that have not seen them."""
    guard = {"name": "limit", "metric": "loss", "max": -1.0, "patience": 2, "action": "stop"}
    config = timer_config(tmp_path, "guarded", guards=[guard], checkpoint={"every_steps": 9})
    write_faults(config, [("save_state", 2, 0, "SIGKILL")])
    with pytest.raises(GuardStop, match=r"guard stop: limit/loss: loss is 0.*\(step 2\)"):
        run_on_cluster(config, TIMERS)
    assert [event["to_step"] for event in events(config, "learner_rebuild")] == [0]
    assert [event["step"] for event in events(config, "guard_stopped")] == [2, 2]
    assert final_step(config) == 2


def two_ranks(model: Path, folder: Path, name: str, zero_stage: int | None) -> RunConfig:
    learner = {**engine_section(zero_stage), "ranks": 2, "hang_timeout_s": 25.0, "optimizer": {"lr": 1e-3}}
    return tiny_config(
        model, folder, name=name, learner=learner, checkpoint__every_steps=2, eval__num_prompts=1, stop__steps=STEPS
    )


def timer_config(
    folder: Path, name: str, ranks: int = 1, learner: dict[str, Any] | None = None, **sections: Any
) -> RunConfig:  # fmt: skip
    """Three steps without a model."""
    return config_from_tree(
        {
            "name": name,
            "runs_dir": str(folder),
            "model": {"path": "none"},
            "prompts": {"source": "benchmarks.stand_ins:Prompts", "options": {"paint_s": 0.05, "update_s": 0.05}},
            "rollout": {"groups_per_step": 2, "group_size": 4, "micro_batch": 4},
            "scorers": [{"name": "timer", "function": "benchmarks.stand_ins:score"}],
            "objective": {"name": "nft"},
            "learner": {"engine": "plain", "ranks": ranks, **(learner or {})},
            "checkpoint": {"every_steps": 2},
            "eval": {"before": False, "num_prompts": 1, "samples_to_save": 0},
            "telemetry": {"tensorboard": False, "report": False},
            "stop": {"steps": 3},
            **sections,
        }
    )


def final_step(config: RunConfig) -> int:
    folders = (Path(config.runs_dir) / config.name / "checkpoints").iterdir()
    return max(int(folder.name.removeprefix("step-")) for folder in folders)


def final_state(config: RunConfig) -> dict[str, np.ndarray]:
    return state_tensors(Path(config.runs_dir) / config.name / "checkpoints" / f"step-{STEPS:06d}")
