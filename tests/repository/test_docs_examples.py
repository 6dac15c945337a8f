"""The examples of docs/adding-a-method.md and README.md run as they stand there."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from cluster import validate
from contracts.config.guards import CustomGuard
from contracts.config.load import config_from_tree
from contracts.config.objectives import CustomObjective
from contracts.config.rollout import PromptsConfig
from contracts.config.scoring import ScorerConfig
from contracts.registry import import_target
from learner.guards.run_guards import RunGuards
from learner.types import MicroBatch
from reward_servers.client import FunctionScorer
from reward_servers.scorers.base import ScoreBatch

EXAMPLE = re.compile(r"```python\n# (my_\w+\.py)(.*?)```", re.S)


@pytest.fixture
def examples(tmp_path: Path, repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the pages' files in it."""
    for page in ("README.md", "docs/adding-a-method.md"):
        for name, code in EXAMPLE.findall((repo_root / page).read_text()):
            (tmp_path / name).write_text("#" + code)
            monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_a_run_of_the_examples_alone_validates(examples: Path, tiny_model_folder: Path) -> None:
    assert {path.name for path in examples.iterdir()} >= {
        "my_reward.py", "my_scorer.py", "my_prompts.py", "my_objective.py", "my_guard.py",
    }  # fmt: skip
    config = config_from_tree(
        {
            "name": "own", "model": {"path": str(tiny_model_folder)}, "prompts": {"source": "my_prompts:Numbers"},
            "scorers": [{"name": "bright", "serve": "my_scorer:Brightness", "weights": {"brightness": 1}},
                        {"name": "same", "function": "my_reward:brightness", "held_out": True}],
            "objective": {"name": "my_objective:AdvantageWeighted"}, "learner": {"engine": "plain"},
            "guards": [{"name": "my_guard:Collapse", "action": "stop", "options": {"share": 0.2}}],
            "stop": {"steps": 1},
        }
    )  # fmt: skip
    assert validate.check(config) == []


def test_the_scorer_and_the_function_agree(examples: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    prompts, metadata = ("a", "b", "c"), ({}, {}, {})
    table = import_target("my_scorer:Brightness")().score(ScoreBatch(images, prompts, metadata))
    scorer = FunctionScorer(ScorerConfig(name="f", function="my_reward:brightness"))
    by_function = asyncio.run(scorer.score(images, prompts, metadata))
    np.testing.assert_allclose(table.values, by_function.values, rtol=1e-6)


def test_the_prompt_source_holds_its_splits_apart(examples: Path) -> None:
    source = import_target("my_prompts:Numbers")(PromptsConfig(source="my_prompts:Numbers"), 0)
    trained = {source.at(position).text for position in range(200)}
    held_out = [{prompt.text for prompt in source.held_out(split, 1000)} for split in ("validation", "test")]
    assert not trained & (held_out[0] | held_out[1])
    assert not held_out[0] & held_out[1]


def test_the_objective_follows_good_samples_alone(examples: Path) -> None:
    """Rows at or below the group's mean leave no gradient; twice the advantage is twice the gradient."""
    objective = import_target("my_objective:AdvantageWeighted")(
        CustomObjective(name="my_objective:AdvantageWeighted"), SimpleNamespace(run_seed=0)
    )
    weight = torch.zeros((), requires_grad=True)
    model = SimpleNamespace(velocity=lambda x, s, cond: weight * x)
    gradients = []
    for advantage in ([1.0, -1.0], [2.0, -1.0], [0.0, -3.0]):
        batch = MicroBatch(
            cond=None, uncond=None, guidance_scale=1.0, weight=torch.ones(2), advantage=torch.tensor(advantage),
            noise_keys=(1, 2), step=1, sigmas=torch.linspace(1, 0, 5), step_indices=(), staleness=torch.zeros(2),
            clean=torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)),
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(objective.loss(model, batch, 0).loss, weight)
        gradients.append(float(gradient))
    assert gradients[0] != 0
    assert gradients[1] == pytest.approx(2 * gradients[0], rel=1e-6)
    assert gradients[2] == 0


def test_the_guard_stops_at_a_share_of_the_first_spread_also_after_a_resume(examples: Path) -> None:
    config = CustomGuard(name="my_guard:Collapse", action="stop", options={"share": 0.2})
    guards, resumed = RunGuards((config,)), RunGuards((config,))
    assert guards.see({}) == guards.see({"reward_std_within_group": 0.5}) == []
    resumed.load_state_dict(json.loads(json.dumps(guards.state_dict())))
    assert resumed.see({"reward_std_within_group": 0.1}) == []
    (word,) = resumed.see({"reward_std_within_group": 0.09})
    assert (word.guard, word.kind) == ("my_guard:Collapse", "stop")


def test_the_guards_of_the_page_are_valid(repo_root: Path) -> None:
    (text,) = re.findall(r"```yaml\n(guards:.*?)```", (repo_root / "docs/reading-a-run.md").read_text(), re.S)
    given = {"scorers": [{"name": "judge", "function": "m:f", "held_out": True}, {"name": "a", "function": "m:f"}]}
    config = config_from_tree(
        {"name": "page", "model": {"path": "m"}, "stop": {"steps": 1}, **given,
         "objective": {"name": "grpo", "kl_beta": 0.1}, **yaml.safe_load(text)}
    )  # fmt: skip
    assert [error for error in validate.check(config) if error.field.startswith("guards")] == []


def test_the_readmes_yaml_is_valid(examples: Path, repo_root: Path, tiny_model_folder: Path) -> None:
    """The example names a checkpoint and servers of its reader; everything else must be accepted."""
    (text,) = re.findall(r"```yaml\n(.*?)```", (repo_root / "README.md").read_text(), re.S)
    config = config_from_tree({"name": "readme", "stop": {"steps": 1}, **yaml.safe_load(text)})
    assert [scorer.name for scorer in config.scorers] == ["bright", "mine", "judge"]
    assert config.objective.name == "my_objective:MyObjective"
