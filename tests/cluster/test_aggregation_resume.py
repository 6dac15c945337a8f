"""A rule's state is in the checkpoint: stopped and resumed, a run gives the signals it would have given undisturbed.

Controller, ledger, vaults, jury and checkpoints are real; painter and learner are law 6's exact stand-ins, whose
weights depend on every advantage to the last bit. The undisturbed run is the same steps in one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from cluster.checkpoints.layout import Checkpoint, list_whole
from cluster.evaluate import LocalJury, make_source
from cluster.inprocess import InProcessRun
from cluster.step import make_credit
from contracts.config import RunConfig
from tests.cluster.whole_run import folder_of, rows
from tests.laws.exact_stand_ins import ExactLearner, ExactPainter
from tests.laws.run_driver import EXACT
from tests.laws.run_kit import run_on_cluster, tiny_config

STOP, END = 3, 6
RULES: dict[str, dict[str, Any]] = {
    "constrained": {"thresholds": {"bright": 0.2, "red": 0.9}, "anchor": "bright", "initial": 0.3},
    "confidence_mix": {"model": "bright", "rule": "red", "confidence": "red", "decay": 0.5},
}


def bright(images: np.ndarray, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> np.ndarray:
    """Mean of all channels, 0 to 1."""
    return images.mean(axis=(1, 2, 3)) / 255


def red(images: np.ndarray, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> np.ndarray:
    """Mean of the red channel, 0 to 1."""
    return images[..., 0].mean(axis=(1, 2)) / 255


def config_of(folder: Path, name: str, stop: int) -> RunConfig:
    return tiny_config(
        Path("none"), folder, "nft", name=name,
        prompts={"source": "tests.laws.exact_stand_ins:Prompts", "options": {"paint_s": 0.0}},
        scorers=[{"name": scorer, "function": f"tests.cluster.test_aggregation_resume:{scorer}"}
                 for scorer in ("bright", "red")],
        credit={"std": "none", "aggregation": {"name": name, **RULES[name]}}, eval__num_prompts=1, stop__steps=stop,
    )  # fmt: skip


def controlled(config: RunConfig, resume: bool) -> Checkpoint:
    """The run through its controller, to its end; its last checkpoint."""
    summary = run_on_cluster(config, EXACT, resume)
    assert (summary["outcome"], summary["steps"]) == ("finished", config.stop.steps)
    return list_whole(folder_of(config) / "checkpoints")[-1]


class Undisturbed:
    """The same steps in one process; what each said of its rule."""

    def __init__(self, config: RunConfig, forget_at: int | None = None) -> None:
        """forget_at: after this step the rule begins anew."""
        self.learner = ExactLearner(config, 0, 1)
        jury = LocalJury(config)
        run = InProcessRun(config, ExactPainter(config), self.learner, make_source(config), jury, make_credit(config))
        run.publish()
        self.metrics, self.states = [], []
        for number in range(1, END + 1):
            self.metrics.append(run.step()[0].metrics)
            self.states.append(run.credit.state_dict())
            if number == forget_at:
                run.credit = make_credit(config)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("shared_ray")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "constrained" else pytest.mark.long) for name in RULES]
)
def test_stopped_and_resumed_a_rule_goes_on_with_its_state(name: str, tmp_path: Path) -> None:
    straight = Undisturbed(config_of(tmp_path, name, END))
    halfway = controlled(config_of(tmp_path, name, STOP), resume=False)
    assert halfway.run_state().credit == straight.states[STOP - 1]
    config = config_of(tmp_path, name, END)
    end = controlled(config, resume=True)
    assert end.run_state().credit == straight.states[END - 1]
    assert straight.states[END - 1] != straight.states[STOP - 1], "the state moves"

    told = {key: value for key, value in straight.metrics[0].items() if key.startswith(("multiplier", "model_reward"))}
    assert told
    written = {row["step"]: row for row in rows(config)}
    for step, metrics in enumerate(straight.metrics, 1):
        assert all(written[step][f"train_metric/{key}"] == metrics[key] for key in told), step

    weights = load_file(end.path / "param.safetensors")
    np.testing.assert_array_equal(weights["weight"], straight.learner.weights)
    np.testing.assert_array_equal(weights["moment"], straight.learner.moment)
    forgetful = Undisturbed(config, forget_at=STOP)
    assert not np.array_equal(forgetful.learner.weights, straight.learner.weights), "without its state it is another"
