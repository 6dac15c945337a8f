"""||z||_{V^-1}: closed forms, and PrefPaint's checks through the weights that the uncertainty rule makes of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from contracts.config.aggregation import UncertaintyConfig
from contracts.config.scoring import ScorerConfig
from contracts.errors import ConfigError
from contracts.scores import point_table
from learner.credit.aggregation.columns import group_scores
from learner.credit.aggregation.uncertainty import Uncertainty
from reward_servers.training.coverage import COVERAGE_FILE, Coverage, load_coverage

WIDTH, RIDGE = 5, 0.5
numbers = st.floats(-3, 3, width=32)
vectors = st.lists(numbers, min_size=WIDTH, max_size=WIDTH).filter(lambda z: np.linalg.norm(z) > 0.1)


def seen(*rows: list[float]) -> Coverage:
    coverage = Coverage.new(WIDTH, RIDGE)
    if rows:
        coverage.add(torch.tensor(rows))
    return coverage


def unsure(coverage: Coverage, z: list[float]) -> float:
    return float(coverage.uncertainty(torch.tensor([z]))[0])


def gammas(*uncertainties: float) -> np.ndarray:
    """PrefPaint's weights, not normalised, of a group with these uncertainties."""
    config = TypeAdapter(UncertaintyConfig).validate_python({"form": "bound", "low": 1e-9, "normalise": False})
    values, sure = np.arange(len(uncertainties)), np.array(uncertainties, np.float32)[:, None]
    table = point_table("a", "1", ("x",), values, uncertainty=sure)
    group = group_scores({"a": table}, [ScorerConfig(name="a", function="m:f")])
    scale = Uncertainty(config).aggregate({0: group}, 1).rewards[0].scale
    assert scale is not None
    return scale


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(vectors, max_size=8), z=vectors)
def test_it_is_the_norm_by_the_inverse_of_v(rows: list[list[float]], z: list[float]) -> None:
    v = RIDGE * np.eye(WIDTH) + sum((np.outer(row, row) for row in rows), np.zeros((WIDTH, WIDTH)))
    assert unsure(seen(*rows), z) == pytest.approx(np.sqrt(np.array(z) @ np.linalg.inv(v) @ np.array(z)), rel=1e-4)


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(vectors, max_size=4), z=vectors)
def test_an_image_like_this_one_lowers_it_by_sherman_and_morrison(rows: list[list[float]], z: list[float]) -> None:
    """b'^2 = b^2 / (1 + b^2), so the weight rises."""
    coverage = seen(*rows)
    before = unsure(coverage, z)
    coverage.add(torch.tensor([z]))
    after = unsure(coverage, z)
    assert after**2 == pytest.approx(before**2 / (1 + before**2), rel=1e-4)
    assert after < before
    low, high = gammas(before, after)
    assert high >= low


def test_what_resembles_no_training_image_weighs_less_than_what_does() -> None:
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
    coverage = seen(*(rng.normal(size=(20, 2)) @ basis[:2]).tolist())
    inside, outside = basis[:2].sum(0) / np.sqrt(2), basis[3]
    assert unsure(coverage, outside.tolist()) == pytest.approx(1 / np.sqrt(RIDGE), rel=1e-5)
    assert unsure(coverage, inside.tolist()) < unsure(coverage, outside.tolist()) / 3
    weights = gammas(unsure(coverage, inside.tolist()), unsure(coverage, outside.tolist()))
    assert weights[0] > weights[1]
    assert unsure(seen(), inside.tolist()) == pytest.approx(unsure(seen(), outside.tolist()))


@given(st.lists(st.floats(0, 100, width=32), min_size=2, max_size=6))
def test_the_weight_never_rises_with_the_uncertainty(uncertainties: list[float]) -> None:
    assert (np.diff(gammas(*sorted(uncertainties))) <= 0).all()


def test_its_state_goes_on_where_it_was_written(tmp_path: Path) -> None:
    rows = torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(1))
    straight, part = Coverage.new(WIDTH, RIDGE), Coverage.new(WIDTH, RIDGE)
    for row in rows:
        straight.add(row[None])
    part.add(rows[:7])
    part.save(tmp_path)
    again = load_coverage(str(tmp_path))
    assert again is not None
    again.add(rows[7:])
    torch.testing.assert_close(again.uncertainty(rows), straight.uncertainty(rows))
    assert again.digest() != part.digest()
    assert load_coverage(str(tmp_path / "elsewhere")) is None
    (tmp_path / COVERAGE_FILE).write_bytes(b"torn")
    with pytest.raises(ConfigError, match="does not hold a coverage"):
        load_coverage(str(tmp_path))
