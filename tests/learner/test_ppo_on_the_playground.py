"""PPO's critic on the real thing: the shipped base paints, the verifier scores, and values learn to tell rewards apart.

Eight prompts, painted anew at every step: what values can explain is which prompts, and which beginnings of a picture,
this base paints well. `python -m benchmarks run ppo_critic` has the curve on the whole stream of prompts.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from cluster.inprocess import start_in_process
from contracts.config import load_config
from playground.world.prompts import prompt_stream

STEPS = 12


def write_prompts(path: Path, num: int) -> None:
    """The first different prompts of one shape and of two, with what the verifier must know."""
    specs = {}
    for spec in prompt_stream("train", 0, {"single": 1, "two": 1}):
        specs.setdefault(spec.text, spec)
        if len(specs) == num:
            break
    rows = [{"prompt": text, "metadata": {"playground": spec.to_metadata()}} for text, spec in specs.items()]
    path.write_text("\n".join(map(json.dumps, rows)))


def test_the_explained_variance_of_values_rises_on_pictures_the_critic_has_not_seen(
    repo_root: Path, tmp_path: Path
) -> None:
    """A step's values are computed on groups just painted, before its updates: each figure is of unseen pictures."""
    write_prompts(tmp_path / "prompts.jsonl", num=8)
    changes = [
        "prompts.source=jsonl", f"prompts.path={tmp_path / 'prompts.jsonl'}", "pipeline.max_staleness=0",
        "rollout.groups_per_step=8", "rollout.group_size=8", "rollout.micro_batch=8", "sampler.steps=4",
        "sampler.window.hi=3", "learner.engine=plain", "learner.updates_per_step=8", "objective.value_lr_scale=20",
    ]  # fmt: skip
    run = start_in_process(load_config(repo_root / "configs" / "playground_ppo.yaml", changes))
    metrics = [run.step()[0].metrics for _ in range(STEPS)]
    explained = [row["explained_variance"] for row in metrics]
    assert abs(explained[0]) < 1e-6, "a head of zeros says the same of every state"
    assert np.mean(explained[STEPS // 2 :]) > 0.05, np.round(explained, 3)
    assert np.mean([row["value_error"] for row in metrics[STEPS // 2 :]]) < metrics[0]["value_error"] / 2
