"""The demo's figures for several seeds: `python -m benchmarks.demo_seeds 0 1 2`.

Runs configs/demo.yaml once a seed, each as a user would (a process of its own, from command to exit), evaluates the
trained policy on more test prompts than the demo has time for, and writes every seed's figures to docs/demo.json and
docs/demo.md. Nothing else may run on the machine meanwhile.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "configs/demo.yaml"
MANY = 1_000
"""Test prompts of the closer look, as many as the base's card was made with."""
COLUMNS = (
    ("seed", "seed"),
    ("before", "held_out_strict_before"),
    ("after", "held_out_strict_after"),
    ("gain, points", "held_out_gain_points"),
    (f"after, {MANY} prompts", "after_many"),
    ("gain, points", "gain_many"),
    ("command to exit, s", "command_seconds"),
    ("training, s", "train_seconds"),
    ("steps", "steps"),
    ("painted", "images_painted"),
    ("trained", "images_trained"),
    ("max staleness", "max_staleness_seen"),
)


def run_seed(seed: int) -> dict[str, Any]:
    """One demo run; its summary and the seconds from command to exit."""
    name, start = f"demo-seed-{seed}", time.monotonic()
    command = [sys.executable, "-m", "cluster", "train", CONFIG, f"seed={seed}", f"name={name}", "exist=replace"]
    subprocess.run(command, cwd=ROOT, check=True)
    took = round(time.monotonic() - start, 1)
    summary = json.loads((ROOT / "runs" / name / "summary.json").read_text())
    return {**summary, "command_seconds": took, **closer_look(name)}


def closer_look(name: str) -> dict[str, float]:
    """Accuracy of a run's policy on MANY test prompts, and its gain over the base's as its card has it."""
    command = [sys.executable, "-m", "cluster", "eval", f"runs/{name}", f"eval.num_prompts={MANY}", "--json"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return compared_with_base(json.loads(done.stdout)["accuracy"])


def compared_with_base(accuracy: float) -> dict[str, float]:
    card = json.loads((ROOT / "playground" / "base" / "salon.json").read_text())["measured"]
    assert card["test_prompts"] == MANY, "the base was measured on another number of prompts"
    return {"after_many": accuracy, "gain_many": round(100 * (accuracy - card["test_strict"]["all"]), 1)}


def spread(gains: list[float]) -> str:
    return f"median {statistics.median(gains):.1f}, lowest {min(gains):.1f}"


def as_markdown(rows: list[dict[str, Any]]) -> str:
    """The table and the two figures the demo is held to."""
    gains, closer = [row["held_out_gain_points"] for row in rows], [row["gain_many"] for row in rows]
    lines = [
        "# The demo, seed by seed",
        "",
        "`python -m benchmarks.demo_seeds` on 2 CPU cores; from command to exit, both evaluations included.",
        "Held-out accuracy is strict (each object, colour, count and relation right) on test prompts with combinations",
        "that neither pretraining nor RL saw; settings were tuned on the validation split. *Before* is the base at its",
        "own best steps, shift and guidance.",
        "",
        f"Gain in points, {len(gains)} seeds: {spread(gains)} on the demo's own prompts;",
        f"{spread(closer)} on {MANY}, which is the better estimate.",
        "",
        "| " + " | ".join(title for title, _ in COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    lines += ["| " + " | ".join(str(row[key]) for _, key in COLUMNS) + " |" for row in rows]
    tasks = sorted(rows[0]["evaluation_after"]["by_task"])
    lines += ["", "After, by task:", "", "| seed | " + " | ".join(tasks) + " |", "|" + "---|" * (len(tasks) + 1)]
    for row in rows:
        by_task = row["evaluation_after"]["by_task"]
        lines.append(f"| {row['seed']} | " + " | ".join(f"{by_task[task]:.2f}" for task in tasks) + " |")
    return "\n".join(lines) + "\n"


def main(seeds: list[int]) -> None:
    rows = [run_seed(seed) for seed in seeds]
    (ROOT / "docs" / "demo.json").write_text(json.dumps(rows, indent=1) + "\n")
    (ROOT / "docs" / "demo.md").write_text(as_markdown(rows))
    print(as_markdown(rows))


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]] or [0, 1, 2])
