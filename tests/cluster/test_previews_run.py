"""Previews through a whole run: painted, stored, scored over HTTP as a step table, and trained on by ppr_renorm."""

from __future__ import annotations

import re
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from actors.painter import PaintedGroup, Painter
from cluster import plan, validate
from cluster.inprocess import start_in_process
from cluster.ledger.reader import LedgerReader
from cluster.step import group_rewards
from contracts.config import RunConfig
from contracts.wire import PromptTask
from tests.cluster.whole_run import check_finished, folder_of, rows
from tests.laws.run_kit import run_on_cluster, state_tensors, tiny_config

STEPS = 2
BRIGHT = "tests.cluster.own_scorers:Brightness"
OUTCOME = {"name": "outcome", "serve": BRIGHT}
RENORM = {"aggregation": {"name": "ppr_renorm", "outcome": "outcome", "process": "process"}}


def process(previews: Any = "recorded", **more: Any) -> dict[str, Any]:
    return {"name": "process", "serve": BRIGHT, "previews": previews, **more}


def make_run(model: Path, runs: Path, **changes: Any) -> RunConfig:
    usual = {"scorers": [OUTCOME, process()], "credit": RENORM, "stop__steps": STEPS}
    return tiny_config(model, runs, **{"objective": "ppo", **usual, **changes})


@pytest.fixture(scope="module")
def ran(
    shared_ray: None, tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunConfig, dict[str, Any]]:
    config = make_run(tiny_model_folder, tmp_path_factory.mktemp("previews"))
    assert validate.check(config) == []
    return config, run_on_cluster(config)


def brightness(images: np.ndarray) -> np.ndarray:
    return images.mean(axis=(-3, -2, -1)) / 255


def repainted(painter: Painter, ledger: LedgerReader, group_id: int) -> PaintedGroup:
    task = PromptTask(
        group_id=group_id, attempt=0, prompt=ledger.prompt(group_id), group_size=4, min_version=0, deadline_s=60
    )
    return painter.finish(painter.denoise(task))


@pytest.mark.slow
def test_a_run_trains_on_what_the_scorer_says_of_its_previews(ran: tuple[RunConfig, dict[str, Any]]) -> None:
    config, summary = ran
    check_finished(config, summary, STEPS)
    painter = Painter(config)  # the model's own weights: version 0, which the first step's groups were painted with
    with closing(LedgerReader(folder_of(config) / "ledger.sqlite")) as ledger:
        first = [row.group_id for row in ledger.rows(step=1)]
        assert len(first) == config.rollout.groups_per_step
        for group_id in first:
            group, tables = repainted(painter, ledger, group_id), ledger.tables(group_id)
            assert (tables["process"].kind, tables["process"].step_ids) == ("step", (0, 1))
            judged, image = brightness(group.arrays["previews"]), brightness(group.arrays["images"])
            np.testing.assert_allclose(tables["process"].values[:, 0], judged, atol=1e-6)
            np.testing.assert_allclose(tables["outcome"].values[:, 0], image, atol=1e-6)
            rewards = group_rewards(group.header, tables, config)
            expected = np.concatenate([judged + image[:, None] - 1, image[:, None]], axis=1)
            np.testing.assert_allclose(rewards.steps, expected, atol=1e-6)
    assert 0 < rows(config)[0]["reward_mean/process/brightness"] < 1


@pytest.mark.slow
def test_asynchrony_changes_nothing_of_it(ran: tuple[RunConfig, dict[str, Any]], tmp_path: Path) -> None:
    """Law 2 with previews; and a run whose process score is another ends with other weights."""
    config, _ = ran

    def weights(config: RunConfig, folder: Path) -> dict[str, np.ndarray]:
        run = start_in_process(config)
        for _ in range(STEPS):
            run.step()
        run.learner.save_state(folder)
        return state_tensors(folder)

    here = weights(config, tmp_path / "same")
    there = state_tensors(folder_of(config) / "checkpoints" / f"step-{STEPS:06d}")
    assert here.keys() == there.keys()
    assert [name for name in here if not np.array_equal(here[name], there[name])] == []
    flat = {"name": "process", "serve": "tests.cluster.own_scorers:Constant", "previews": "recorded"}
    other = weights(make_run(Path(config.model.path), tmp_path, scorers=[OUTCOME, flat]), tmp_path / "other")
    assert any(not np.array_equal(here[name], other[name]) for name in here)


WINDOW = {"name": "flow_sde", "steps": 6, "noise_level": 0.7, "window": {"size": 3, "lo": 0, "hi": 5}}
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "no such step": ({"scorers": [OUTCOME, process([0, 1, 4])]}, "scorers.1.previews, sampler.steps", "0 to 3"),
    "steps that the rule misses": (
        {"scorers": [OUTCOME, process([0])]}, "credit.aggregation.process", "set previews: recorded",
    ),
    "steps that the rule misses in some window": (
        {"scorers": [OUTCOME, process([0, 1, 2])], "sampler": WINDOW}, "credit.aggregation.process", "judge 3",
    ),
    "a rule of steps without previews": (
        {"scorers": [OUTCOME, process(None)]}, "credit.aggregation.process", "set previews: recorded on it",
    ),
    "previews under a rule of images": ({"credit": {}}, "credit.aggregation.name", "ppr_renorm"),
    "one recorded step": (
        {"sampler": {**WINDOW, "window": {"size": 1}}}, "scorers.1.previews, sampler", "raise sampler.steps",
    ),
    "an objective that records nothing": (
        {"objective": "nft", "credit": {}}, "scorers.1.previews, objective.name", "list the steps, 0 to 3",
    ),
    "a learner that paints": (
        {"objective": "alignprop", "credit": {}, "scorers": [OUTCOME, process([1], held_out=True)]},
        "scorers.1.previews, objective.name", "painted groups",
    ),
    "a scorer of latents": (
        {"scorers": [OUTCOME, {**process(), "serve": "latent"}]}, "scorers.1.previews", "reads latents",
    ),
    "a scorer of pairs": (
        {"scorers": [OUTCOME, {**process(), "serve": "pickscore_pairs"}]}, "scorers.1.previews", "answers a pair table",
    ),
    "a judge that teaches": (
        {"scorers": [OUTCOME, process(), {"name": "fast", "serve": "distilled", "held_out": True}],
         "online": [{"name": "distilled", "scorer": "fast", "judge": process([1])}]},
        "online.0.judge.previews", "remove it",
    ),
    "a scorer of whole groups": (
        {"scorers": [OUTCOME, {**process(), "serve": "consistency"}]}, "scorers.1.previews", "group as a whole",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", list(REFUSED))
def test_previews_that_cannot_be_had_are_refused_before_any_image(
    mistake: str, tiny_model_folder: Path, tmp_path: Path
) -> None:
    changes, field, words = REFUSED[mistake]
    errors = validate.check(make_run(tiny_model_folder, tmp_path, **changes))
    assert any(field in error.field and words in str(error) for error in errors), errors


def test_the_settings_of_the_page_fit_together(repo_root: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    page = (repo_root / "docs" / "rewards.md").read_text()
    (section,) = re.findall(r"## A reward for each step.*?```yaml\n(.*?)```", page, re.S)
    settings = yaml.safe_load(section)
    objective = settings.pop("objective")["name"]
    assert validate.check(make_run(tiny_model_folder, tmp_path, objective=objective, **settings)) == []


def test_files_have_no_denoising_steps(tiny_model_folder: Path, tmp_path: Path) -> None:
    scorers, prompts = [OUTCOME, process([1])], {"source": "pairs", "path": str(tmp_path / "pairs.jsonl")}
    errors = validate.check(make_run(tiny_model_folder, tmp_path, objective="dpo", scorers=scorers, prompts=prompts))
    assert any(error.field == "scorers.1.previews, prompts.source" for error in errors), errors


def test_listed_previews_suit_any_sampler_where_they_are_measured_alone(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    changes = {"objective": "nft", "credit": {}, "sampler": {"name": "ode", "steps": 4}}
    scorers = [OUTCOME, process([0, 3], held_out=True)]
    assert validate.check(make_run(tiny_model_folder, tmp_path, scorers=scorers, **changes)) == []


def test_the_plan_counts_previews(tiny_model_folder: Path, tmp_path: Path) -> None:
    config = make_run(tiny_model_folder, tmp_path, scorers=[OUTCOME, process(max_batch=3)])
    made, plain = plan.make_plan(config), plan.make_plan(make_run(tiny_model_folder, tmp_path, scorers=[OUTCOME]))
    assert made.reward_requests == {"outcome": 2, "process": 2 * 3}  # a group's 4 x 2 previews, 3 a request
    assert made.group_bytes - plain.group_bytes == 4 * 2 * 32 * 32 * 3
    assert "previews       2 steps of each image, 16 decoded" in plan.describe(config)
    assert "of each image" not in plan.describe(make_run(tiny_model_folder, tmp_path, scorers=[OUTCOME]))
