"""Whether PPO's critic learns: the explained variance of its values on the playground, step by step.

configs/playground_ppo.yaml in one process. Values are computed before a step's update, on groups just painted, so a
step's explained variance, 1 - Var(R - V) / Var(R) over the samples and recorded states of that step, is of states that
the critic has not been trained on. A step has 8 prompts; single steps scatter, so the table shows means over blocks of
steps, with the standard error of the mean over all steps and seeds of the block.

    python -m benchmarks run ppo_critic [--repeats SEEDS] [--steps N]
"""

from __future__ import annotations

from typing import Any

from benchmarks.learning import Curve, blocks, learn, mean_and_error

CONFIG = "configs/playground_ppo.yaml"
NUM_BLOCKS = 5
METRICS = ("explained_variance", "value_error", "playground/reward/mean")


def run(repeats: int = 1, steps: int = 100) -> dict[str, Any]:
    """Rows by block of steps: mean and standard error of the explained variance and others. repeats: seeds."""
    curves = [learn(CONFIG, seed, steps) for seed in range(repeats)]
    return {
        "repeats": repeats, "steps": steps, "config": CONFIG,
        "rows": [_row(curves, first, last) for first, last in blocks(steps, NUM_BLOCKS)],
        "strict": {
            name: [curve.evaluation(step)["accuracy"] for curve in curves]
            for name, step in (("before", 0), ("after", steps))
        },
        "explained_variance": {
            str(curve.seed): [round(row.get("explained_variance", float("nan")), 4) for row in curve.steps]
            for curve in curves
        },
    }  # fmt: skip


def _row(curves: list[Curve], first: int, last: int) -> dict[str, Any]:
    rows = [row for curve in curves for row in curve.steps[first - 1 : last]]
    figures = {}
    for metric in METRICS:
        mean, error = mean_and_error([row[metric] for row in rows if metric in row])
        figures[metric] = {"mean": mean, "standard_error": error}
    return {"first": first, "last": last, **figures}


def table(result: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    lines = [
        "| steps | explained variance | standard error | squared error of values | mean reward |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        variance, error, reward = (row[metric] for metric in METRICS)
        lines.append(
            f"| {row['first']} – {row['last']} | {variance['mean']:.3f} | {variance['standard_error']:.3f} "
            f"| {error['mean']:.4f} | {reward['mean']:.3f} |"
        )
    return "\n".join(lines)
