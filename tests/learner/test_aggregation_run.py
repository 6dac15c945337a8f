"""Aggregation within a run: the example configuration, a rule with state, a rule of one's own, and what is refused."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from aggregation_kit import point, rewards, rule, scores, steps
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import validate
from cluster.inprocess import InProcessRun, start_in_process
from contracts.config import RunConfig, load_config
from contracts.config.load import config_from_tree
from contracts.errors import ConfigErrors
from contracts.scores import from_json, to_json
from learner.credit.aggregation.base import make_aggregation

SMALL = [
    "rollout.groups_per_step=2", "rollout.group_size=4", "rollout.micro_batch=4", "sampler.steps=4",
    "sampler.window.hi=3", "learner.engine=plain", "pipeline.max_staleness=0",
]  # fmt: skip


def two_steps(config: RunConfig) -> tuple[InProcessRun, list[dict[str, Any]]]:
    run = start_in_process(config)
    before = {name: p.detach().clone() for name, p in run.learner.policy.trainable().items()}
    metrics = [run.step()[0].metrics for _ in range(2)]
    assert any(not torch.equal(before[name], p) for name, p in run.learner.policy.trainable().items())
    return run, metrics


@pytest.fixture
def example(repo_root: Path, tiny_model_folder: Path) -> RunConfig:
    path = repo_root / "configs" / "playground_two_rewards.yaml"
    return load_config(path, [f"model.path={tiny_model_folder}", *SMALL])


def test_the_example_trains_on_both_rewards(example: RunConfig) -> None:
    assert validate.check(example) == []
    run, metrics = two_steps(example)
    assert run.steps == 2
    assert all(one["valid_fraction"] == 1 for one in metrics)
    # Each reward has unit spread within its group; the weights are 1 and 0.2.
    assert all(0 < one["reward_std_within_group"] < 1.2 for one in metrics)


def test_a_rule_with_state_moves_it_once_a_step(example: RunConfig) -> None:
    tree = example.model_dump(mode="json")
    for one in tree["scorers"]:
        one["weights"] = {}
    constrained = {
        "name": "constrained",
        "thresholds": {"playground/dense": 0.9, "colour": 20.0},
        "anchor": "playground",
    }
    tree["credit"] = {"std": "none", "aggregation": constrained}
    config = config_from_tree(tree)
    assert validate.check(config) == []
    run, metrics = two_steps(config)
    duals = run.credit.state_dict()["aggregation"]["state"]
    assert metrics[0]["multiplier/playground/dense"] == 0
    assert duals["playground/dense"]["lam"] > metrics[1]["multiplier/playground/dense"] > 0, "below its threshold"


def test_the_rule_of_the_page_works(
    repo_root: Path, tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ((name, code),) = re.findall(
        r"```python\n# (my_\w+\.py)(.*?)```", (repo_root / "docs" / "rewards.md").read_text(), re.S
    )
    (tmp_path / name).write_text("#" + code)
    monkeypatch.delitem(sys.modules, "my_rule", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    aggregation = {"name": "my_rule:Product", "options": {"columns": ["a", "b"]}}
    config = make_run(tiny_model_folder, {"credit": {"aggregation": aggregation}})
    assert validate.check(config) == []
    (got,) = rewards(make_aggregation(config.credit.aggregation), scores(point("a", [2, 3]), point("b", [5, 7])))
    np.testing.assert_array_equal(got.totals(), [10, 21])


def make_run(folder: Path, changes: dict[str, Any]) -> RunConfig:
    tree: dict[str, Any] = {
        "name": "v", "model": {"path": str(folder)},
        "rollout": {"groups_per_step": 2, "group_size": 4, "micro_batch": 2},
        "scorers": [{"name": "a", "serve": "playground_verifier"}, {"name": "b", "serve": "colourfulness"}],
        "objective": {"name": "grpo"}, "learner": {"engine": "plain"}, "stop": {"steps": 3},
    }  # fmt: skip
    return config_from_tree({**tree, **changes})


OPTIONAL_A = [{"name": "a", "serve": "playground_verifier", "required": False}, {"name": "b", "serve": "colourfulness"}]
HELD_OUT_B = [
    {"name": "a", "serve": "playground_verifier"}, {"name": "b", "serve": "colourfulness", "held_out": True},
]  # fmt: skip
WEIGHTED_A = [
    {"name": "a", "serve": "playground_verifier", "weights": {"dense": 1}}, {"name": "b", "serve": "colourfulness"},
]  # fmt: skip
JUDGE: dict[str, Any] = {
    "name": "a",
    "serve": "rationalrewards",
    "options": {"urls": ["http://127.0.0.1:1"], "model": "m"},
}
GATES = {"name": "gates", "order": [{"column": "a", "above": 0.5}, {"column": "b"}]}

REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "std that undoes it": ({"name": "gdpo"}, {"std": "group"}, "credit.std", "credit.std=global or none"),
    "critic of a relative signal": ({"name": "pareto"}, {"objective": {"name": "ppo"}}, "objective.name", "grpo"),
    "steps without a critic": ({"name": "ppr_renorm", "outcome": "a", "process": "b"}, {}, "objective.name", "ppo"),
    "no step table": (
        {"name": "ppr_renorm", "outcome": "a", "process": "b"}, {"objective": {"name": "ppo"}}, "process", "step table",
    ),
    "pairs have no weight": ({"name": "pareto"}, {"objective": {"name": "dpo"}}, "objective.name", "nft"),
    "nobody is unsure": ({"name": "uncertainty"}, {}, "credit.aggregation.name", "declares uncertainty"),
    "one answer has no spread": (
        {"name": "uncertainty"}, {"scorers": [JUDGE]}, "credit.aggregation.name", "options.samples above 1",
    ),
    "unknown scorer": ({"name": "trust", "outcome": "a", "judge": "c"}, {}, "judge", "one of a, b"),
    "unknown column": ({"name": "trust", "outcome": "a/nope", "judge": "b"}, {}, "outcome", "strict"),
    "held out": (GATES, {"scorers": HELD_OUT_B}, "order.1.column", "let it train"),
    "optional where it must not be": (GATES, {"scorers": OPTIONAL_A}, "scorers.0.required", "required: true"),
    "weights that nobody takes": (GATES, {"scorers": WEIGHTED_A}, "scorers.0.weights", "remove them"),
    "scorer that nobody names": (
        {"name": "constrained", "thresholds": {"a": 0.5}, "anchor": "a"}, {"std": "none"}, "scorers.1", "held_out",
    ),
    "nothing pulls back": (
        {"name": "constrained", "thresholds": {"a": 0.5, "b": 9}}, {"std": "none"}, "anchor", "kl_beta above 0",
    ),
    "condition on nobody": (
        {"name": "gdpo", "conditions": [{"column": "a", "on": "z", "at_least": 1}]}, {}, "conditions.0.on", "one of a",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", list(REFUSED))
def test_a_rule_that_does_not_fit_is_refused_with_the_way_out(mistake: str, tiny_model_folder: Path) -> None:
    aggregation, changes, field, way_out = REFUSED[mistake]
    std = {"std": changes["std"]} if "std" in changes else {}
    rest = {key: value for key, value in changes.items() if key != "std"}
    config = make_run(tiny_model_folder, {"credit": {"aggregation": aggregation, **std}, **rest})
    errors = validate.check(config)
    assert any(field in error.field and way_out in str(error) for error in errors), errors


@pytest.mark.parametrize("scorer", [
    {**JUDGE, "options": {**JUDGE["options"], "samples": 3}},
    {"name": "a", "serve": "trained", "options": {"model": "rewards/mine"}},
])  # fmt: skip
def test_scorers_that_say_how_sure_they_are_are_taken(scorer: dict[str, Any], tiny_model_folder: Path) -> None:
    config = make_run(tiny_model_folder, {"credit": {"aggregation": {"name": "uncertainty"}}, "scorers": [scorer]})
    assert not [error for error in validate.check(config) if "credit.aggregation" in error.field]


@pytest.mark.parametrize(
    ("aggregation", "words"),
    [
        ({"name": "gdop"}, "unknown aggregation 'gdop'"),
        ({"name": "gdpo", "epss": 1}, "did you mean 'eps'"),
        ({"name": "gates", "order": [{"column": "a"}, {"column": "b"}]}, "nothing is gated"),
        ({"name": "base_and_bonus", "base": "a", "bonus": ["b"], "base_range": [5, 1]}, "from a lower to a higher"),
        ({"name": "base_and_bonus", "base": "a", "bonus": ["b"], "base_share": 0, "bonus_share": 0}, "both 0"),
        ({"name": "constrained", "thresholds": {}}, "credit.aggregation.thresholds"),
    ],
)
def test_settings_that_cannot_be_are_told(aggregation: dict[str, Any], words: str, tiny_model_folder: Path) -> None:
    with pytest.raises(ConfigErrors, match=re.escape(words)):
        make_run(tiny_model_folder, {"credit": {"aggregation": aggregation}})


@settings(max_examples=20, deadline=None)
@given(values=st.lists(st.one_of(st.just(float("nan")), st.floats(-5, 5, width=32)), min_size=2, max_size=5))
def test_tables_read_back_from_the_ledger_give_the_same_rewards(values: list[float]) -> None:
    """After a roll-back rewards are made of tables from the ledger, where they stand as JSON."""
    table = point("a", values, [0.5] * len(values))
    again = from_json(to_json(table))
    for name in ("gdpo", "uncertainty"):
        (first,), (second,) = rewards(rule(name), scores(table)), rewards(rule(name), scores(again))
        np.testing.assert_array_equal(first.totals(), second.totals())


def test_step_tables_read_back_from_the_ledger_too() -> None:
    table = steps("b", np.array([[0.1, np.nan, 0.2], [0.3, 0.4, 0.5]]), (0, 2, 3))
    again = from_json(to_json(table))
    np.testing.assert_array_equal(again.values, table.values)
    np.testing.assert_array_equal(again.outcomes, table.outcomes)
    assert again.step_ids == (0, 2, 3)
