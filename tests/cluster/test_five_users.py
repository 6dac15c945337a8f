"""The five thin users of the contracts as whole runs: Ray, HTTP, ledger, vault, learner, weights back to the actors.

Two steps each on the miniature model, all on one local Ray. What they learn is another test's subject. Law 2's test
takes the five through the cluster, too, and test_own_things.py one whose groups are a step old; so those marked `long`
are left to `make test LONG=yes`.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from contracts.config import RunConfig
from contracts.wire import DiscardReason
from tests.cluster.whole_run import check_finished, folder_of, rows, weight_changes
from tests.laws.run_kit import events, run_on_cluster, tiny_config

pytestmark = pytest.mark.usefixtures("shared_ray")

BRIGHTNESS = "tests.cluster.own_scorers:Brightness"


def proven_versions(config: RunConfig) -> set[int]:
    return {event["version"] for event in events(config, "weights_proven")}


@pytest.mark.long
@pytest.mark.parametrize("objective", ["grpo", "nft"])
def test_online_methods_with_groups_one_step_old(objective: str, tiny_model_folder: Path, tmp_path: Path) -> None:
    config = tiny_config(
        tiny_model_folder, tmp_path, objective, pipeline__max_staleness=1, eval__before=True, stop__steps=3,
        eval__samples_to_save=2,
    )  # fmt: skip
    summary = run_on_cluster(config)
    check_finished(config, summary, steps=3)
    assert summary["max_staleness_seen"] <= 1
    assert summary["held_out_strict_before"] is not None
    assert proven_versions(config) >= {0, 1}, "the actor painted with what the learner published"
    assert {path.name for path in (folder_of(config) / "samples").glob("*.png")} == {"before.png", "after.png"}
    last = rows(config)[-1]
    assert last["images_trained_total"] == summary["images_trained"] == 24
    assert {"reward_mean/colour/colourfulness", "train_metric/loss"} <= last.keys()
    if objective == "nft":
        state = folder_of(config) / "checkpoints" / "step-000003"
        assert (state / "snapshot-old.safetensors").is_file(), "nft paints with an average of past weights"


@pytest.mark.long  # test_own_things.py trains an adapter, law 1 replays under guidance
def test_grpo_trains_an_adapter_under_guidance(tiny_model_folder: Path, tmp_path: Path) -> None:
    config = tiny_config(
        tiny_model_folder, tmp_path, model__tuning="lora", model__lora={"rank": 4, "alpha": 8},
        sampler__guidance_scale=2.0, stop__steps=2,
    )  # fmt: skip
    summary = run_on_cluster(config)
    check_finished(config, summary)
    assert all("lora" in name for name in weight_changes(config))
    assert summary["max_staleness_seen"] == 0


@pytest.mark.long
def test_ppo_with_its_critic(tiny_model_folder: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_model_folder, tmp_path, "ppo", stop__steps=2)
    summary = run_on_cluster(config)
    check_finished(config, summary)
    for row in rows(config):
        assert np.isfinite(row["train_metric/explained_variance"])
        assert row["train_metric/explained_variance"] <= 1.0
    values = [row["train_metric/value_loss"] for row in rows(config)]
    assert np.isfinite(values).all()


@pytest.mark.long
def test_dpo_from_groups(tiny_model_folder: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_model_folder, tmp_path, "dpo", stop__steps=2, objective__pairs_per_group=2)
    check_finished(config, run_on_cluster(config))


def test_dpo_from_a_file_of_pairs(tiny_model_folder: Path, tmp_path: Path) -> None:
    config = tiny_config(
        tiny_model_folder, tmp_path, "dpo", stop__steps=2, learner__micro_batch=4,
        prompts={"source": "pairs", "path": str(write_pairs(tmp_path)), "held_out_fraction": 0.3},
    )  # fmt: skip
    summary = run_on_cluster(config)
    books = check_finished(config, summary)
    assert summary["images_trained"] == 2 * 2 * 2, "a pair is a group of two"
    assert set(books.discarded_by_reason) <= {DiscardReason.RUN_END.value}, "labels need no jury"


@pytest.mark.long
def test_alignprop_follows_a_gradient_over_http(tiny_model_folder: Path, tmp_path: Path) -> None:
    config = tiny_config(
        tiny_model_folder, tmp_path, "alignprop", stop__steps=2, sampler__name="ode",
        scorers=[{"name": "bright", "serve": BRIGHTNESS}],
    )  # fmt: skip
    summary = run_on_cluster(config)
    check_finished(config, summary)
    first, last = rows(config)[0], rows(config)[-1]
    assert first["train_metric/failed_fraction"] == 0
    assert 0 < first["train_metric/reward"] < 1
    assert last["train_metric/reward"] > first["train_metric/reward"], "two steps up the gradient of a linear reward"
    assert summary["images_painted"] == summary["images_trained"] == 16, "the actors painted none of them in vain"
    assert [row["images_painted_total"] for row in rows(config)] == [8, 16], "counted when they are painted"


def write_pairs(folder: Path, num: int = 12) -> Path:
    """PNGs of noise, bright ones chosen over dark ones, and the file that pairs them."""
    rng = np.random.default_rng(0)
    lines = []
    for index in range(num):
        for kind, low in (("chosen", 128), ("rejected", 0)):
            pixels = rng.integers(low, low + 128, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{kind}-{index}.png")
        pair = {"prompt": f"picture {index}", "chosen": f"chosen-{index}.png", "rejected": f"rejected-{index}.png"}
        lines.append(json.dumps(pair))
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(lines))
    return path
