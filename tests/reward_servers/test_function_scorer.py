"""A plain function as a scorer: the same typed outcomes as over HTTP."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reward_helpers import pictures

from contracts.config.scoring import ScorerConfig
from contracts.errors import RegistryError
from contracts.scores import Outcome, ScoreTable
from reward_servers.client import FunctionScorer

release = threading.Event()


def brightness(images: np.ndarray, prompts: Any, metadata: Any) -> np.ndarray:
    return images.mean(axis=(1, 2, 3))


def two_columns(images: np.ndarray, prompts: Any, metadata: Any) -> dict[str, Any]:
    return {"length": [len(prompt) for prompt in prompts], "bonus": [entry.get("bonus") for entry in metadata]}


def unlucky(images: np.ndarray, prompts: Any, metadata: Any) -> list[float]:
    if (images[:, 0, 0, 0] == 102).any():
        raise RuntimeError("not this one")
    return [1.0] * len(images)


def one_number(images: np.ndarray, prompts: Any, metadata: Any) -> float:
    return 1.0


def hangs(images: np.ndarray, prompts: Any, metadata: Any) -> list[float]:
    release.wait(30)
    return [1.0] * len(images)


def ask(function: Callable[..., Any] | str, num: int = 4, **fields: Any) -> tuple[ScoreTable, FunctionScorer]:
    target = function if isinstance(function, str) else f"{__name__}:{function.__name__}"
    scorer = FunctionScorer(ScorerConfig(name="mine", function=target, **fields))
    prompts = ["p" * (i + 1) for i in range(num)]
    metadata = [{"bonus": float(i)} if i != 1 else {} for i in range(num)]
    return asyncio.run(scorer.score(pictures(num), prompts, metadata)), scorer


def test_numbers_make_one_column_named_by_the_weights() -> None:
    table, scorer = ask(brightness, max_batch=3)
    np.testing.assert_allclose(table.values[:, 0], pictures(4).mean(axis=(1, 2, 3)), rtol=1e-6)
    assert (table.scorer, table.columns) == ("mine", ("score",))
    assert scorer.stats.requests == 2, "batches of three and one"
    named, _ = ask(brightness, weights={"light": 1.0})
    assert named.columns == ("light",)


def test_a_dictionary_makes_columns_and_none_is_a_failed_entry() -> None:
    table, scorer = ask(two_columns)
    assert table.columns == ("length", "bonus")
    assert table.values[:, 0].tolist() == [1, 2, 3, 4]
    assert table.outcomes[:, 1].tolist() == [0, 1, 0, 0]
    assert scorer.stats.images == {"ok": 3, "failed": 1}


def test_an_exception_costs_only_the_image_that_caused_it() -> None:
    table, _ = ask(unlucky)
    assert table.outcomes[:, 0].tolist() == [0, 0, Outcome.FAILED, 0]
    assert table.reasons[2] == "RuntimeError: not this one"


@pytest.mark.parametrize(
    ("function", "weights"), [(one_number, {}), (brightness, {"a": 1.0, "b": 1.0}), (two_columns, {"other": 1.0})]
)
def test_an_answer_that_does_not_fit_fails_with_a_reason(
    function: Callable[..., Any], weights: dict[str, float]
) -> None:
    table, _ = ask(function, weights=weights)
    assert (table.outcomes == Outcome.FAILED).all()
    assert all("PayloadError" in reason for reason in table.reasons)
    assert table.columns == (tuple(weights) or ("score",))


def test_a_function_that_hangs_times_out() -> None:
    release.clear()
    table, _ = ask(hangs, deadline_s=0.2)
    release.set()
    assert (table.outcomes == Outcome.TIMED_OUT).all()


def test_functions_come_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_reward.py").write_text(
        "def score(images, prompts, metadata):\n    return [7.0] * len(images)\n"
    )
    monkeypatch.chdir(tmp_path)
    table, _ = ask("my_own_reward:score")
    assert table.values[:, 0].tolist() == [7.0] * 4
    with pytest.raises(RegistryError, match="no 'other'"):
        ask("my_own_reward:other")


def test_gradients_cannot_be_had() -> None:
    scorer = FunctionScorer(ScorerConfig(name="mine", function=f"{__name__}:brightness"))
    table = asyncio.run(scorer.score(pictures(2), ["p"] * 2, [], want_gradients=True))
    assert (table.outcomes == Outcome.FAILED).all()
    assert table.gradients is not None
    assert not table.gradients.any()
