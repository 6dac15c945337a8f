"""configs/sd35_medium_grpo_lora.yaml through a whole step: painted, scored, credited, trained, loaded and proven.

The model is SD3.5-medium's architecture at full size with random weights, built on the spot: nothing is downloaded.
That needs a GPU; the same code runs here at miniature size, so that the test itself is tested. What differs from the
file: the model's folder, the jury (a scorer that needs no weights), one rank, groups that fit one device.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from tests.learner.learner_harness import needs_deepspeed, run_ranks
from tests.policy.sd35_kit import MEDIUM, MINIATURE, save_pipeline

CONFIG = "configs/sd35_medium_grpo_lora.yaml"
PEAK_GIB = 70


def smoke_tree(root: Path, model: Path, device: str) -> dict[str, Any]:
    """The file's tree with what one device cannot give or has no need of replaced."""
    tree: dict[str, Any] = yaml.safe_load((root / CONFIG).read_text())
    gpus = 1 if device == "cuda" else 0
    tree["model"] |= {"path": str(model), "device": device}
    tree["prompts"]["path"] = str(root / tree["prompts"]["path"])
    tree["rollout"] |= {"actors": 1, "gpus_per_actor": gpus, "groups_per_step": 2, "group_size": 4, "micro_batch": 2}
    tree["learner"] |= {"ranks": 1, "gpus_per_rank": gpus}
    tree["scorers"] = [{"name": "reward", "serve": "jpeg_size"}]
    return tree


def one_step(rank: int, world: int, tree: dict[str, Any]) -> dict[str, Any]:
    """What a step measured, and the adapter before and after."""
    from cluster.inprocess import start_in_process
    from contracts.config.load import config_from_tree
    from policy.weights import export_arrays, live_digest

    config = config_from_tree(tree)
    on_gpu = config.model.device == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    run = start_in_process(config)
    before, _ = export_arrays(run.painter.policy.trainable())
    shapes: dict[str, tuple[int, ...]] = {}
    make_group = run._make_group

    def watched() -> Any:
        made = make_group()
        shapes.update({name: array.shape for name, array in run.arrays[made[0].group_id].items()})
        return made

    run._make_group = watched  # type: ignore[method-assign]
    report, rewards = run.step()
    after, dtypes = export_arrays(run.painter.policy.trainable())
    return {
        "metrics": report.metrics, "updates": report.num_updates, "rewards": rewards, "shapes": shapes,
        "changed": sum(not np.array_equal(before[name], after[name]) for name in before), "tensors": len(before),
        "dtypes": set(dtypes.values()), "bytes": sum(array.nbytes for array in after.values()),
        "digest": live_digest(run.painter.policy), "version": run.version, "device": run.learner.policy.device.type,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0,
    }  # fmt: skip


def check_step(seen: dict[str, Any], tree: dict[str, Any], pixels: int) -> None:
    metrics = seen["metrics"]
    assert seen["device"] == tree["model"]["device"]
    assert seen["updates"] == tree["learner"]["updates_per_step"]
    assert seen["version"] == 1, "the painter has loaded and proven the weights after the step"
    assert seen["dtypes"] == {"bfloat16"}
    assert seen["shapes"]["images"] == (4, pixels, pixels, 3)
    assert seen["shapes"]["states"][:2] == (4, tree["sampler"]["steps"])
    assert all(np.isfinite(value) for value in metrics.values())
    assert metrics["grad_norm"] > 0
    assert seen["changed"] > seen["tensors"] / 2
    assert seen["rewards"]["reward/kilobytes"]["std"] > 0
    assert metrics["log_prob_mismatch"] < 100 * tree["objective"]["clip_range"]


def test_a_step_at_miniature_size(tmp_path: Path, repo_root: Path) -> None:
    tree = smoke_tree(repo_root, save_pipeline(MINIATURE, tmp_path / "model"), "cpu")
    tree["model"]["lora"]["rank"] = 4
    tree["learner"] |= {"engine": "plain", "threads": 1}  # DeepSpeed on a CPU is test_engine_ranks.py's subject
    check_step(one_step(0, 1, tree), tree, pixels=64)


@pytest.mark.gpu
@needs_deepspeed
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_step_at_full_size(tmp_path: Path, repo_root: Path) -> None:
    tree = smoke_tree(repo_root, save_pipeline(MEDIUM, tmp_path / "model", "cuda"), "cuda")
    torch.cuda.empty_cache()
    (seen,) = run_ranks(1, one_step, tree, timeout_s=1000)
    print(
        f"log-prob mismatch {seen['metrics']['log_prob_mismatch']:.2e}, adapter {seen['bytes'] / 2**20:.1f} MiB, "
        f"gradient norm {seen['metrics']['grad_norm']:.3g}, peak memory {seen['peak_gib']:.1f} GiB"
    )
    check_step(seen, tree, pixels=1024)
    assert seen["peak_gib"] < PEAK_GIB
