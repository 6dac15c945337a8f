"""Options of built-in scorers: refused before anything starts, with field and way out; the plan counts pairs."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.checks.options import check_options
from cluster.plan import _comparisons
from contracts.config import RunConfig
from contracts.config.load import load_config
from contracts.config.scorers import SCORER_OPTIONS, num_comparisons
from contracts.config.scoring import ScorerConfig


@pytest.fixture(scope="module")
def config(repo_root_module: Path) -> RunConfig:
    return load_config(repo_root_module / "configs" / "demo.yaml")


@pytest.fixture(scope="module")
def repo_root_module() -> Path:
    return Path(__file__).resolve().parents[2]


def with_scorer(config: RunConfig, serve: str, **options: object) -> RunConfig:
    return config.model_copy(update={"scorers": [ScorerConfig(name="juror", serve=serve, options=options)]})


@pytest.mark.parametrize(
    ("serve", "options", "field", "words"),
    [
        ("clip_goal", {"alpha": 2}, "scorers.0.options.alpha", "less than or equal to 1"),
        ("clip", {"modle": "x"}, "scorers.0.options.modle", "its options are .*model"),
        ("hpsv2", {}, "scorers.0.options.model", "Field required"),
        ("siglip", {"dtype": "float8"}, "scorers.0.options.dtype", "float32"),
        ("geneval_regions", {"grid": [1]}, "scorers.0.options.grid.1", "Field required"),
    ],
)
def test_a_wrong_option_is_found_before_a_server_starts(
    config: RunConfig, serve: str, options: dict[str, object], field: str, words: str
) -> None:
    import re

    (error,) = check_options(with_scorer(config, serve, **options))
    assert error.field == field
    assert re.search(words, str(error))


def test_right_options_and_own_scorers_pass(config: RunConfig) -> None:
    assert not list(check_options(with_scorer(config, "clip", model="x", dtype="bfloat16")))
    assert not list(check_options(with_scorer(config, "my_module:Own", anything=1)))


def test_every_option_is_described() -> None:
    for name, section in SCORER_OPTIONS.items():
        assert section.__doc__, name
        for option, field in section.model_fields.items():
            assert field.description, f"{name}.{option} has no description"


def test_the_plan_says_how_many_comparisons_a_step_costs(config: RunConfig) -> None:
    from cluster.checks.declared import look_up

    assert num_comparisons(8, None) == 56
    assert num_comparisons(8, 10) == 20
    assert num_comparisons(4, 100) == 12, "no more than there are"
    for pairs, number in ((None, 56), (10, 20)):
        options = {} if pairs is None else {"pairs": pairs}
        paired = with_scorer(config, "pickscore_pairs", **options)
        assert _comparisons(paired, look_up(paired), {}, groups=3, size=8) == {"juror": 3 * number}
