"""What alignprop does to the scorer it follows, and to the truth: the playground's CNN against the exact verifier.

configs/playground_alignprop.yaml in one process: the learner follows dR/d image of the trained CNN; the verifier, which
has no gradient, only watches. Both judge the same held-out (validation) pictures at regular steps, painted at the
rollout's own schedule. A scorer that rises while strict accuracy does not is being pleased, not served.

    python -m benchmarks run alignprop_cnn [--repeats SEEDS] [--steps N]
"""

from __future__ import annotations

from typing import Any

from benchmarks.learning import EVAL_PROMPTS, Curve, learn, mean_and_error

CONFIG = "configs/playground_alignprop.yaml"
EVALUATIONS = 6
COLUMNS = ("cnn/score", "playground/dense", "playground/strict")


def run(repeats: int = 1, steps: int = 60) -> dict[str, Any]:
    """Rows by step: means of the scorer's and the verifier's columns over held-out pictures. repeats: seeds."""
    every = max(1, steps // EVALUATIONS)
    overrides = {"eval.num_prompts": EVAL_PROMPTS}
    curves = [learn(CONFIG, seed, steps, every, **overrides) for seed in range(repeats)]
    return {
        "repeats": repeats, "steps": steps, "config": CONFIG, "pictures": EVAL_PROMPTS,
        "rows": [_row(curves, int(evaluated["step"]), every) for evaluated in curves[0].evaluations],
    }  # fmt: skip


def _row(curves: list[Curve], step: int, every: int) -> dict[str, Any]:
    found = [curve.evaluation(step) for curve in curves]
    reward = None
    if step:
        reward, _ = mean_and_error([curve.mean("reward", max(1, step - every + 1), step) for curve in curves])
    return {
        "step": step, "training_reward": reward,
        **{column: mean_and_error([row[column] for row in found])[0] for column in COLUMNS},
        "strict_standard_error": mean_and_error([row["standard_error"] for row in found])[0] / len(curves) ** 0.5,
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    lines = [
        "| step | CNN's score | verifier, dense | verifier, strict | standard error | reward in training since |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        reward = row["training_reward"]
        lines.append(
            f"| {row['step']} | {row['cnn/score']:.3f} | {row['playground/dense']:.3f} "
            f"| {row['playground/strict']:.3f} | {row['strict_standard_error']:.3f} "
            f"| {'' if reward is None else f'{reward:.3f}'} |"
        )
    return "\n".join(lines)
