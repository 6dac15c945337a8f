"""`eval` of a run and of a pipeline folder: the same weights give the same figure, moved weights are seen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from cluster import cli
from cluster.evaluate_target import as_text, evaluate_target
from cluster.export import export_run
from contracts.config import load_config, to_yaml
from contracts.errors import ConfigError
from learner.rank import RankLearner

FEW = ["eval.num_prompts=6", "sampler.steps=2", "learner.engine=plain", "model.device=cpu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, repo_root: Path) -> Path:
    """A finished nft run whose snapshot that painted has moved away from the base."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    config = load_config(repo_root / "configs" / "playground_nft.yaml", [*FEW, f"model.path={tiny_model_folder}"])
    learner = RankLearner(config, 0, 1)
    with torch.no_grad():
        for parameter in learner.policy.trainable().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    learner.snapshots.reset("old")
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    learner.save_state(folder / "checkpoints" / "step-000001")
    return folder


def test_a_run_and_its_export_are_judged_alike(
    run: Path, tmp_path: Path, repo_root: Path, tiny_model_folder: Path
) -> None:
    of_run = evaluate_target(str(run))
    example = str(repo_root / "configs" / "playground_nft.yaml")
    of_export = evaluate_target(str(export_run(str(run), str(tmp_path / "pipeline"))), FEW, example)
    assert of_run == of_export
    assert (of_run.num_images, of_run.num_valid) == (6, 6)
    assert of_run.columns.keys() >= {"playground/reward", "playground/strict", "playground/dense"}
    of_base = evaluate_target(str(tiny_model_folder), FEW, example)
    colour = "colourfulness/colourfulness"
    assert of_base.columns[colour] != of_run.columns[colour], "the trained weights were painted with"
    text = as_text(of_run)
    assert "6 of 6 images judged" in text
    assert "2 steps, shift 2" in text


def test_the_command_prints_json(run: Path) -> None:
    result = CliRunner().invoke(cli.main, ["eval", str(run), "eval.num_prompts=2", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["num_images"] == 2


def test_a_model_folder_needs_no_configuration_from_wherever_it_is_judged(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the playground's prompts and scorers, when it paints the playground's images; else it is told what to give."""
    monkeypatch.chdir(tmp_path)
    few = ["eval.num_prompts=2", "sampler.steps=2", "model.device=cpu"]
    result = CliRunner().invoke(cli.main, ["eval", str(tiny_model_folder), *few])
    assert result.exit_code == 0, result.output
    assert "2 of 2 images judged" in result.stdout
    other = tmp_path / "other"
    shutil.copytree(tiny_model_folder, other)
    network = other / "transformer" / "config.json"
    network.write_text(json.dumps({**json.loads(network.read_text()), "sample_size": 64}))
    result = CliRunner().invoke(cli.main, ["eval", "other", *few])
    assert result.exit_code == 2
    assert "--config: other paints 64 x 64 pixels" in result.stderr


def test_a_run_whose_model_is_not_here_says_which_key_to_set(run: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    result = CliRunner().invoke(cli.main, ["eval", str(moved), "model.path=nowhere"])
    assert result.exit_code == 2
    assert "model.path: nowhere is no folder" in result.stderr


def test_what_is_neither_is_refused(tmp_path: Path, tiny_model_folder: Path, repo_root: Path) -> None:
    with pytest.raises(ConfigError, match="is neither"):
        evaluate_target(str(tmp_path))
    result = CliRunner().invoke(
        cli.main,
        ["eval", str(tiny_model_folder), "eval.scorer=nobody", "--config", str(repo_root / "configs/demo.yaml")],
    )
    assert result.exit_code == 2
    assert "no scorer is called 'nobody'" in result.stderr
