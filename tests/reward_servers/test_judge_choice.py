"""judge_choice (ACRE, GeoReason), judge_checklist_group (VeRPO) and votes over samples, by name and over HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from judge_helpers import brightness, flat, judging, leans, pictures_of, says, texts_of
from reward_helpers import config_for, served

from contracts.errors import ConfigError
from contracts.scores import Outcome, ScoreTable
from reward_servers.client import RewardClient
from reward_servers.construct import make_scorer

LEVELS = (40, 90, 140, 190)
IMAGES = np.stack([flat(level, 8) for level in LEVELS])
QUICK = {"model": "judge", "timeout_s": 60.0, "deadline_s": 120.0, "max_retries": 0, "hedge_quantile": None}
CHOICE = {"question": "How bright is it?", "options": ["dark", "bright", "black"], "answer": "bright"}
EDGE = 100


def scorer_of(name: str, url: str, **options: Any) -> Any:
    given = {**QUICK, "urls": [url], **options}
    return make_scorer(name, [f"{key}={json.dumps(value)}" for key, value in given.items()])


def ask(scorer: Any, metadata: Sequence[dict[str, Any]] | None = None) -> ScoreTable:
    async def go(url: str) -> ScoreTable:
        async with RewardClient(config_for(url, deadline_s=120.0, timeout_s=60.0)) as client:
            return await client.score(IMAGES, ["bright"] * len(IMAGES), metadata or [{}] * len(IMAGES))

    with served(scorer) as server:
        return asyncio.run(go(server.url))


def by_content(body: dict[str, Any]) -> dict[str, Any]:
    """Chooses the option that is true, wherever it stands; the canary's options it does not know."""
    option = "bright" if brightness(pictures_of(body)[0]) > EDGE else "dark"
    letter = texts_of(body).partition(f". {option}")[0][-1] if option in texts_of(body) else "A"
    return leans({letter: 0.8, "A" if letter != "A" else "B": 0.1}, body)


def by_place(body: dict[str, Any]) -> dict[str, Any]:
    return leans({"A": 0.9, "B": 0.05}, body)


def choices(**fields: Any) -> list[dict[str, Any]]:
    return [{"choice": {**CHOICE, **fields}}] * len(IMAGES)


@pytest.mark.parametrize("options", [{}, {"reward": "georeason", "shuffles": 3}])
def test_a_judge_of_contents_is_paid_for_being_right(options: dict[str, Any]) -> None:
    with judging(by_content) as fake:
        table = ask(scorer_of("judge_choice", fake.url, **options), choices())
    right = [float(level > EDGE) for level in LEVELS]
    assert table.values.tolist() == [[value, 1.0, 0.0] for value in right]


@pytest.mark.parametrize(
    ("answer", "acre", "georeason"), [("dark", 0.5, 1 / 3), ("bright", 0.5, 0.0), ("black", 0.0, 0.0)]
)
def test_a_judge_of_places_gets_half_at_most_and_always_flips(answer: str, acre: float, georeason: float) -> None:
    """It says dark, then bright, then black. Over all answers GeoReason pays it 1/9: right once in three, a third."""
    with judging(by_place) as fake:
        both = ask(scorer_of("judge_choice", fake.url), choices(answer=answer))
        every = ask(
            scorer_of("judge_choice", fake.url, reward="georeason", shuffles=3, cache_entries=0), choices(answer=answer)
        )
    assert both.values[0].tolist() == [acre, 0.5, 1.0]
    np.testing.assert_allclose(every.values[0], [georeason, 1 / 3, 1.0], rtol=1e-6)


def test_below_the_threshold_alone_does_drift_cost() -> None:
    def behave(body: dict[str, Any]) -> dict[str, Any]:
        return by_place(body) if "C. dark" in texts_of(body) else by_content(body)

    with judging(behave) as fake:
        tables = [
            ask(scorer_of("judge_choice", fake.url, reward="georeason", shuffles=3, threshold=threshold), choices())
            for threshold in (1.0, 0.6)
        ]
    drifting = LEVELS.index(40)
    assert [table.values[drifting, 1] for table in tables] == pytest.approx([2 / 3, 2 / 3])
    assert [table.values[drifting, 0] for table in tables] == [0.0, 0.0], "a wrong answer stays wrong"
    with judging(behave) as fake:
        options = {"reward": "georeason", "shuffles": 3}
        dark = [
            ask(scorer_of("judge_choice", fake.url, **options, threshold=t), choices(answer="dark")) for t in (1, 0.6)
        ]
    assert [table.values[drifting, 0] for table in dark] == pytest.approx([2 / 3, 1.0])


def test_a_choice_that_is_none_fails_and_an_order_without_answer_is_undecided() -> None:
    def behave(body: dict[str, Any]) -> dict[str, Any]:
        unsure = brightness(pictures_of(body)[0]) == LEVELS[3] and "A. bright" in texts_of(body)
        return leans({"A": 0.4, "B": 0.4}, body) if unsure else by_content(body)

    given = choices()
    given[0] = {"choice": {**CHOICE, "answer": "red"}}
    given[1] = {"choice": {"question": "Which?"}}
    with judging(behave) as fake:
        table = ask(scorer_of("judge_choice", fake.url), given)
    failed, undecided = Outcome.FAILED, Outcome.UNDECIDED
    assert table.outcomes[:, 0].tolist() == [failed, failed, Outcome.OK, undecided]
    assert "'red' is none of its options" in table.reasons[0]
    assert "choice.options" in table.reasons[1]


@pytest.mark.parametrize(
    ("name", "options", "problem"),
    [
        ("judge_choice", {"shuffles": 3}, "reward: georeason"),
        ("judge_choice", {"reward": "georeason", "threshold": 0}, "threshold"),
        ("judge_checklist_group", {"full_pass": 2}, "full_pass"),
        ("rationalrewards", {"vote": "majority", "samples": 2}, "samples of 3 or more"),
        ("rationalrewards", {"vote": "majority", "samples": 3, "temperature": 0}, "temperature"),
    ],
)
def test_settings_that_do_not_fit_are_found_at_once(name: str, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        scorer_of(name, "http://127.0.0.1:9", **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("judge_choice", {"partial": 0.25}),
        ("judge_checklist_group", {"full_pass": 0.5}),
        ("rationalrewards", {"samples": 3, "vote": "majority"}),
    ],
)
def test_what_makes_another_value_of_the_same_answers_is_part_of_the_version(
    name: str, options: dict[str, Any]
) -> None:
    plain, other = (scorer_of(name, "http://127.0.0.1:9", **chosen) for chosen in ({}, options))
    assert plain.fingerprint() != other.fingerprint()


ITEMS = ("Is it an image?", "Is it brighter than 60?", "Is it brighter than 120?", "Is it brighter than 250?")


def ticks(body: dict[str, Any]) -> dict[str, Any]:
    """Each item is true of the pictures it says; the second brightest picture is not answered about."""
    if "response_format" in body:
        return says(json.dumps({"items": ITEMS}))
    level, text = brightness(pictures_of(body)[0]), texts_of(body)
    if level == LEVELS[2]:
        return leans({"the": 0.99, "yes": 1e-4, "no": 1e-4}, body)
    passes = level > next((edge for edge in (60, 120, 250) if str(edge) in text), 0)
    return leans({"yes": 0.8, "no": 0.2} if passes else {"yes": 0.2, "no": 0.8}, body)


def test_items_weigh_by_how_few_of_the_group_pass_them() -> None:
    with judging(ticks) as fake:
        table = ask(scorer_of("judge_checklist_group", fake.url, full_pass=0.0, cache_entries=0))
        plans = [body for body in fake.bodies if "response_format" in body]
    weights = np.array([0, 1 / 3, 2 / 3, 1]) / 2  # decided are three: passed by 3, 2, 1 and 0 of them
    passed = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]])
    decided = [0, 1, 3]
    np.testing.assert_allclose(table.column("dense")[0][decided], passed @ weights, rtol=1e-6)
    assert table.column("all")[0][decided].tolist() == [0, 0, 0]
    assert table.outcomes[2].tolist() == [Outcome.UNDECIDED] * 2, "it moves nobody's weights"
    assert table.reasons[1] == "; ".join(ITEMS[2:])
    assert len(plans) == 2, "one plan for the canary, one for the group"


def test_only_a_full_pass_is_worth_1_and_without_a_plan_the_group_is_undecided() -> None:
    def behave(body: dict[str, Any]) -> dict[str, Any]:
        return says(json.dumps({"items": ITEMS[:3]})) if "response_format" in body else ticks(body)

    with judging(behave) as fake:
        table = ask(scorer_of("judge_checklist_group", fake.url))
    dense = table.column("dense")[0]
    assert dense[3] == pytest.approx(1.0)
    assert (dense[[0, 1]] < 0.8).all()
    assert table.column("all")[0][[0, 1, 3]].tolist() == [0, 0, 1]

    def unplanned(body: dict[str, Any]) -> dict[str, Any]:
        return says("no list") if "response_format" in body and '"bright"' in texts_of(body) else ticks(body)

    with judging(unplanned) as fake:
        table = ask(scorer_of("judge_checklist_group", fake.url))
    assert (table.outcomes == Outcome.UNDECIDED).all()


def test_a_majority_of_samples_counts_and_without_one_the_image_is_undecided() -> None:
    def behave(body: dict[str, Any]) -> dict[str, Any]:
        level = brightness(pictures_of(body)[0])
        scores = {LEVELS[0]: (4, 2.5, 4), LEVELS[1]: (1, 2, 3)}.get(int(level), (2.5, 2.5, 2.5))
        if level == LEVELS[2] and body["seed"] != 1:
            return says("I would rather not")
        entry = {"justification": f"sample {body['seed']}", "score": scores[body["seed"]]}
        form = dict.fromkeys(("text_faithfulness", "physical_quality"), entry)
        return says(json.dumps(form | {"text_rendering": {**entry, "score": "N/A"}, "refined_request": ""}))

    with judging(behave) as fake:
        table = ask(scorer_of("rationalrewards", fake.url, samples=3, temperature=0.7, vote="majority"))
    assert table.outcomes[:, 0].tolist() == [Outcome.OK, Outcome.UNDECIDED, Outcome.UNDECIDED, Outcome.OK]
    np.testing.assert_allclose(table.values[[0, 3], 0], [1.0, 0.5])
    assert "sample 0" in table.reasons[0]
    assert "no majority" in table.reasons[1]
