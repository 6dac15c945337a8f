"""Export of a run: the weights of its newest learner state, in files that diffusers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.export import export_run
from contracts.config import RunConfig, to_yaml
from contracts.config.load import config_from_tree
from contracts.errors import ConfigError
from learner.rank import RankLearner


def run_with_state(folder: Path, model: Path, objective: str, tuning: str) -> tuple[RunConfig, dict[str, torch.Tensor]]:
    """A run folder with two states, the newer one with moved weights; returns those that were current then."""
    config = config_from_tree(
        {
            "name": folder.name, "objective": {"name": objective}, "stop": {"steps": 1},
            "model": {"path": str(model), "tuning": tuning, "lora": {"rank": 2, "alpha": 4}, "device": "cpu"},
            "sampler": {"name": "flow_sde", "steps": 4}, "scorers": [{"name": "a", "serve": "jpeg_size"}],
            "learner": {"engine": "plain", "ema": {"decay": 0.5}},
        }
    )  # fmt: skip
    learner = RankLearner(config, 0, 1)
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    learner.save_state(folder / "checkpoints" / "step-000001")
    with torch.no_grad():
        for parameter in learner.policy.trainable().values():
            parameter.add_(0.05)
    learner.save_state(folder / "checkpoints" / "step-000002")
    return config, {name: tensor.detach().clone() for name, tensor in learner.policy.trainable().items()}


def transformer_of(folder: Path) -> dict[str, torch.Tensor]:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer").state_dict()


def test_a_full_run_becomes_a_pipeline_of_its_newest_weights(tmp_path: Path, tiny_model_folder: Path) -> None:
    from diffusers import DiffusionPipeline

    run = tmp_path / "run"
    _, current = run_with_state(run, tiny_model_folder, "grpo", "full")
    target = export_run(str(run), weights="current")
    assert target == run / "export"
    exported = transformer_of(target)
    for name, tensor in current.items():
        torch.testing.assert_close(exported[name], tensor, rtol=0, atol=0)
    pipeline = DiffusionPipeline.from_pretrained(target, use_safetensors=True)
    images = pipeline(
        "a red circle", num_inference_steps=1, max_sequence_length=12, output_type="np", height=32, width=32
    )
    assert images.images.shape == (1, 32, 32, 3)


def test_what_is_exported_is_what_was_evaluated_unless_asked_otherwise(tmp_path: Path, tiny_model_folder: Path) -> None:
    """nft paints with the snapshot `old`, which did not move here; ema likewise stayed at the start."""
    run = tmp_path / "run"
    _, current = run_with_state(run, tiny_model_folder, "nft", "full")
    base = transformer_of(tiny_model_folder)
    name = next(iter(current))
    for weights, expected in (("evaluated", base), ("sampling", base), ("ema", base), ("current", current)):
        exported = transformer_of(export_run(str(run), str(tmp_path / weights), weights=weights))
        torch.testing.assert_close(exported[name], expected[name], rtol=0, atol=0)


def test_a_lora_run_becomes_an_adapter_or_a_merged_pipeline(tmp_path: Path, tiny_model_folder: Path) -> None:
    """Base and adapter loaded by diffusers answer as the merged pipeline does."""
    from diffusers import StableDiffusion3Pipeline

    run = tmp_path / "run"
    run_with_state(run, tiny_model_folder, "grpo", "lora")
    adapter = export_run(str(run), str(tmp_path / "adapter"), lora=True, weights="current")
    merged = export_run(str(run), str(tmp_path / "merged"), weights="current")
    assert [path.name for path in adapter.iterdir()] == ["pytorch_lora_weights.safetensors"]
    settings: dict[str, Any] = {
        "num_inference_steps": 1, "max_sequence_length": 12, "output_type": "latent", "height": 32, "width": 32,
    }  # fmt: skip
    answers = []
    for folder, lora in ((tiny_model_folder, adapter), (merged, None), (tiny_model_folder, None)):
        pipeline = StableDiffusion3Pipeline.from_pretrained(folder, use_safetensors=True)
        if lora is not None:
            pipeline.load_lora_weights(lora)
        answers.append(pipeline("a red circle", generator=torch.Generator().manual_seed(0), **settings).images)
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(answers[0], answers[2], atol=1e-3), "the adapter does something"


def test_what_cannot_be_exported_is_said(tmp_path: Path, tiny_model_folder: Path) -> None:
    with pytest.raises(ConfigError, match="there is no run"):
        export_run(str(tmp_path / "nowhere"))
    run = tmp_path / "run"
    config, _ = run_with_state(run, tiny_model_folder, "grpo", "full")
    with pytest.raises(ConfigError, match="trained full weights"):
        export_run(str(run), lora=True)
    with pytest.raises(ConfigError, match="exists"):
        export_run(str(run), str(tiny_model_folder))
    with pytest.raises(ConfigError, match="name a local folder"):
        export_run("memory://runs/x")
    other = config.model_copy(update={"learner": config.learner.model_copy(update={"ema": None})})
    (run / "config.yaml").write_text(to_yaml(other))
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.yaml").write_text(to_yaml(config))
    with pytest.raises(ConfigError, match="no checkpoint"):
        export_run(str(empty))
    lora = config.model.model_copy(update={"tuning": "lora"})
    (run / "config.yaml").write_text(to_yaml(config.model_copy(update={"model": lora})))
    with pytest.raises(ConfigError, match="another model or tuning"):
        export_run(str(run))
