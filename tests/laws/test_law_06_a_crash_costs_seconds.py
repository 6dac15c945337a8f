"""Law 6: a crash costs seconds, not data. Every process of a run, and all at once, killed and stopped for real.

One run at max_staleness 0 goes through every fault at a seeded moment; whoever starts it (here: the test) only starts
it again with `resume` when its driver was killed. After each fault no acknowledged group is lost, at most the groups in
flight are painted again, and the books balance; at the end the weights are those of a run that nothing happened to, to
the last bit. The soak (benchmarks/soak.py) does the same for hours.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from benchmarks.faults import (
    FAULTS,
    KINDS,
    RunUnderFire,
    Watch,
    at_full_strength,
    fault_name,
    frozen_s,
    is_woken,
    recover,
)
from cluster.checkpoints.layout import list_whole
from cluster.evaluate import LocalJury, make_source
from cluster.inprocess import InProcessRun, start_in_process
from cluster.ledger.reader import Event, GroupRow, LedgerReader
from cluster.step import make_credit
from contracts.config import RunConfig, to_yaml
from contracts.config.load import config_from_tree
from contracts.errors import ExitCode
from tests.laws.exact_stand_ins import ExactLearner, ExactPainter
from tests.laws.run_kit import state_tensors, tiny_config

SEED = 6
IN_FLIGHT = 2


def exact_config(folder: Path) -> RunConfig:
    """Two groups a step, no staleness; deadlines short enough for a test, long enough for a busy machine.

    A hung vault is noticed before the leases of those who wait for it run out, so that they need no restart too.
    """
    return config_from_tree(
        {
            "name": "fire",
            "seed": SEED,
            "runs_dir": str(folder),
            "model": {"path": "none"},
            "prompts": {"source": "tests.laws.exact_stand_ins:Prompts", "options": {"paint_s": 0.1}},
            "rollout": {"actors": 2, "groups_per_step": 2, "group_size": 4, "micro_batch": 4, "lease_s": 8.0,
                        "prefetch": 1, "max_attempts": 100, "cpus_per_actor": 0.1},
            "scorers": [{"name": "colour", "serve": "colourfulness", "timeout_s": 3.0, "deadline_s": 30.0,
                         "max_retries": 50, "retry_budget": 10.0, "breaker_reset_s": 1.0}],
            "reward": {"lease_s": 30.0},
            "objective": {"name": "nft"},
            "learner": {"engine": "plain", "hang_timeout_s": 8.0, "max_rebuilds": 100, "cpus_per_rank": 0.1},
            "pipeline": {"max_staleness": 0},
            "checkpoint": {"every_steps": 5},
            "weights": {"timeout_s": 8.0},
            "cluster": {"hang_timeout_s": 5.0, "controller_restarts": 100},
            "eval": {"before": False, "num_prompts": 1, "samples_to_save": 0},
            "telemetry": {"tensorboard": False},
            "stop": {"steps": 1_000_000},
        }
    )  # fmt: skip


def start(config: RunConfig, folder: Path, root: Path, *parts: str) -> RunUnderFire:
    file = folder / f"{config.name}.yaml"
    file.write_text(to_yaml(config))
    command = [sys.executable, "-m", "tests.laws.run_driver", str(file)]
    return RunUnderFire(
        [*command, "train", *parts], [*command, "resume", *parts], folder / config.name / "ledger.sqlite",
        folder / "driver.log", root,
    )  # fmt: skip


@dataclass
class Fire:
    """What is left of the run."""

    config: RunConfig
    folder: Path
    struck: Counter[str]
    seconds: dict[str, float]
    exit_code: int
    starts: int
    rows: list[GroupRow]
    journal: list[Event]
    lost_in_sleep: dict[str, set[int]]


@pytest.fixture(scope="module")
def fire(tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> Fire:
    """The run through every fault, stopped in the end by SIGTERM."""
    folder = tmp_path_factory.mktemp("fire")
    config = exact_config(folder)
    rng, watch = random.Random(SEED), Watch(config)
    run = start(config, folder, repo_root, "exact")
    struck: Counter[str] = Counter()
    seconds: dict[str, float] = {}
    lost_in_sleep: dict[str, set[int]] = {}
    try:
        recover(run, watch, steps=3)
        for fault in rng.sample(FAULTS, len(FAULTS)):
            recover(run, watch, steps=rng.randint(1, 4))  # a seeded moment
            number, victims = len(run.processes(fault[0])), run.strike(fault, rng)
            assert victims, fault
            struck[fault_name(fault)] += 1
            if is_woken(fault):
                before = pids(run)
                if fault[0] == "driver":
                    recover(run, watch, steps=2)  # the run goes on without its driver
                else:
                    time.sleep(max(frozen_s(config), config.reward.lease_s + 2.0))  # every limit is over
                run.wake()
                recover(run, watch, steps=2)
                lost_in_sleep[fault_name(fault)], victims = before - pids(run), []
            seconds[fault_name(fault)] = recover(run, watch, restored=at_full_strength(run, fault[0], number, victims))
        exit_code = run.stop()
    finally:
        run.end()
        print("\n".join(f"{name}: recovered in {taken:.1f} s" for name, taken in seconds.items()))
        print((folder / "driver.log").read_text()[-4000:])
    with closing(LedgerReader(folder / "fire" / "ledger.sqlite")) as ledger:
        rows, journal = ledger.rows(), ledger.journal()
    return Fire(config, folder / "fire", struck, seconds, exit_code, run.starts, rows, journal, lost_in_sleep)


def pids(run: RunUnderFire) -> set[int]:
    """Every process of the run that can be judged to hang."""
    return {process.pid for kind in ("driver", *KINDS) for process in run.processes(kind)}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_fault_struck_and_the_run_stopped_resumable(fire: Fire) -> None:
    assert set(fire.struck) == {fault_name(fault) for fault in FAULTS}
    assert sum(fire.struck.values()) >= 10
    assert fire.exit_code == ExitCode.STOPPED_RESUMABLE
    assert fire.starts == 3  # SIGKILL of the driver, and of everything
    summary = json.loads((fire.folder / "summary.json").read_text())
    assert summary["outcome"] == "stopped"
    assert list((fire.folder / "stacks").glob("actor-0-*.txt"))  # the environment of the run reached its processes
    assert summary["images_discarded"] == {}


@pytest.mark.slow
def test_a_run_that_is_stopped_as_a_whole_goes_on_with_all_its_processes(fire: Fire) -> None:
    """Whoever was stopped together with the others takes none of them for hung, though every limit is over."""
    assert fire.lost_in_sleep == {"driver SIGSTOP": set(), "everything SIGSTOP": set()}


@pytest.mark.slow
def test_no_acknowledged_group_is_lost_or_painted_again(fire: Fire) -> None:
    with closing(LedgerReader(fire.folder / "ledger.sqlite")) as ledger:
        books = ledger.books()
    assert books.balanced
    assert books.discarded == 0
    acknowledged = Counter(event.group_id for event in fire.journal if event.event == "generated")
    assert max(acknowledged.values()) == 1
    trained = [row for row in fire.rows if row.step is not None]
    assert Counter(row.step for row in trained) == dict.fromkeys(range(1, books.trained_steps + 1), 2)
    assert [row.position for row in fire.rows] == list(range(len(fire.rows)))  # no prompt left out, none twice


@pytest.mark.slow
def test_only_groups_in_flight_are_painted_again(fire: Fire) -> None:
    begun = Counter(event.group_id for event in fire.journal if event.event == "generating")
    again = sum(number - 1 for number in begun.values())
    assert again <= IN_FLIGHT * sum(fire.struck.values())


@pytest.mark.slow
def test_the_weights_are_those_of_an_undisturbed_run(fire: Fire) -> None:
    newest = list_whole(fire.folder / "checkpoints")[-1]
    reference = undisturbed(fire.config, newest.step)
    found = load_file(newest.path / "param.safetensors")
    assert np.array_equal(found["weight"], reference.weights)
    assert np.array_equal(found["moment"], reference.moment)
    assert np.abs(reference.weights).max() > 0


def undisturbed(config: RunConfig, steps: int) -> ExactLearner:
    """The same steps in one process, painted at once."""
    at_once = config.prompts.model_copy(update={"options": {"paint_s": 0.0}})
    config = config.model_copy(update={"prompts": at_once})
    learner = ExactLearner(config, 0, 1)
    run = InProcessRun(
        config, ExactPainter(config), learner, make_source(config), LocalJury(config), make_credit(config)
    )
    run.publish()
    for _ in range(steps):
        run.step()
    return learner


@pytest.mark.long  # tests/cluster/test_resume_from_url.py does it, and with less left: without the local folder
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kill_9_of_everything_and_resume_with_the_real_model(
    tiny_model_folder: Path, tmp_path: Path, repo_root: Path
) -> None:
    """grpo, AdamW and the real painter, killed a step after a checkpoint: bit-equal to the loop in one process."""
    config = tiny_config(
        tiny_model_folder, tmp_path, stop__steps=5, checkpoint__every_steps=2, learner__ema={"decay": 0.5}
    )
    run, rng, watch = start(config, tmp_path, repo_root), random.Random(SEED), Watch(config)
    try:
        recover(run, watch, steps=3)
        assert run.strike(("everything", FAULTS[0][1]), rng)
        run.process.wait(30)
        run.again()
        assert run.process.wait(240) == ExitCode.FINISHED, (tmp_path / "driver.log").read_text()[-4000:]
    finally:
        run.end()
    reference = start_in_process(config)
    for _ in range(5):
        reference.step()
    reference.learner.save_state(tmp_path / "reference")
    found, expected = (
        state_tensors(tmp_path / "tiny" / "checkpoints" / "step-000005"),
        state_tensors(tmp_path / "reference"),
    )
    assert found.keys() == expected.keys()
    assert [name for name in expected if not np.array_equal(found[name], expected[name])] == []
    with closing(LedgerReader(tmp_path / "tiny" / "ledger.sqlite")) as ledger:
        books = ledger.books()
    assert (books.balanced, books.groups_trained, books.discarded) == (True, 10, 0)
