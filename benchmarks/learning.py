"""What a method learns on the playground: a run in this process, a row a step, held-out evaluations in between.

Figures of learning depend on the number of steps and the seed, not on how busy the machine is; only the engine's last
digits differ between machines. Validation prompts judge: test prompts are for the demo's reported figures alone.
Does not own: which configuration runs and what is made of its rows (ppo_critic.py, alignprop_cnn.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from contracts.config import RunConfig

ROOT = Path(__file__).resolve().parent.parent
EVAL_PROMPTS = 200


@dataclass(frozen=True)
class Curve:
    """One run. steps: metrics of each learner step; evaluations: by number of steps before, first and last included."""

    seed: int
    steps: list[dict[str, float]]
    evaluations: list[dict[str, float]]

    def mean(self, metric: str, first: int, last: int) -> float:
        """Mean of a metric over steps first..last (counted from 1, both included); NaN where no step has it."""
        found = [row[metric] for row in self.steps[first - 1 : last] if metric in row]
        return float(np.mean(found)) if found else float("nan")

    def evaluation(self, step: int) -> dict[str, float]:
        return next(row for row in self.evaluations if row["step"] == step)


def playground_config(config_file: str, changes: Mapping[str, Any]) -> RunConfig:
    """A configuration of this repository with changes, judged on validation prompts; the plain engine where DeepSpeed
    cannot start. Raises ConfigErrors when it does not fit."""
    from cluster.validate import check, refuse
    from contracts.config import load_config
    from learner.engines.deepspeed import deepspeed_usable

    engine = {} if deepspeed_usable()[0] else {"learner.engine": "plain"}
    merged = {"eval.split": "validation", "model.device": "cpu", **engine, **changes}
    config = load_config(ROOT / config_file, [f"{key}={value}" for key, value in merged.items()])
    refuse(check(config))
    return config


def learn(config_file: str, seed: int, steps: int, every: int | None = None, **overrides: Any) -> Curve:
    """Run `config_file` for `steps` steps. every: steps between evaluations; None: only before and after.

    Evaluations paint at the rollout's own schedule, the base too, so that they show what training alone changed.
    """
    from cluster.evaluate import evaluate_in_process, rollout_sampling
    from cluster.inprocess import InProcessRun, start_in_process

    config = playground_config(config_file, {"seed": seed, "stop.steps": steps, **overrides})
    rows: list[dict[str, float]] = []
    evaluations: list[dict[str, float]] = []

    def evaluate(run: InProcessRun) -> None:
        result = evaluate_in_process(config, run.painter, rollout_sampling(config), config.eval.num_prompts)
        evaluations.append(
            {"step": run.steps, "accuracy": result.accuracy, "standard_error": result.standard_error, **result.columns}
        )

    def on_step(run: InProcessRun, report: Any, rewards: dict[str, dict[str, float]]) -> None:
        means = {f"{column}/mean": value["mean"] for column, value in rewards.items()}
        rows.append({"step": run.steps, **report.metrics, **means})
        if run.steps == steps or (every is not None and run.steps % every == 0):
            evaluate(run)

    run = start_in_process(config)
    evaluate(run)
    run.train(on_step)
    return Curve(seed, rows, evaluations)


def blocks(steps: int, number: int) -> list[tuple[int, int]]:
    """`steps` cut into at most `number` ranges of equal length (the last may be shorter): (first, last) from 1."""
    length = max(1, -(-steps // number))
    return [(first, min(first + length - 1, steps)) for first in range(1, steps + 1, length)]


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error; the error of a single value is NaN."""
    error = float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")
    return float(np.mean(values)), error
