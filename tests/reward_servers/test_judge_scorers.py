"""Scorers that ask a judge, served over HTTP: values, typed outcomes entry by entry, metrics, readiness."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi.responses import JSONResponse
from judge_helpers import brightness, filled, flat, judging, leans, pictures_of, says, texts_of
from reward_helpers import config_for, served

from contracts.config.judges import JUDGE_SCORER_OPTIONS
from contracts.errors import ConfigError, ScoringError
from contracts.registry import entries, resolve
from contracts.scores import Outcome, ScoreTable
from reward_servers.client import RewardClient
from reward_servers.construct import make_scorer

LEVELS = (51, 102, 204)
IMAGES = np.stack([flat(level, 16) for level in LEVELS])
QUICK = {"model": "judge", "timeout_s": 30.0, "deadline_s": 60.0, "max_retries": 0, "hedge_quantile": None}


def scorer_of(name: str, *urls: str, **options: Any) -> Any:
    given = {**QUICK, "urls": list(urls), **options}
    return make_scorer(name, [f"{key}={json.dumps(value)}" for key, value in given.items()])


def ask(scorer: Any, images: np.ndarray = IMAGES, prompts: tuple[str, ...] | None = None) -> ScoreTable:
    async def go() -> ScoreTable:
        async with RewardClient(config_for(server.url, deadline_s=60.0, timeout_s=30.0)) as client:
            return await client.score(images, prompts or ("bright",) * len(images), [{}] * len(images))

    with served(scorer) as server:
        return asyncio.run(go())


def by_brightness(body: dict[str, Any]) -> dict[str, Any]:
    share = brightness(pictures_of(body)[0]) / 255
    return leans({"yes": 0.5 * share + 1e-9, "no": 0.5 * (1 - share) + 1e-9, "the": 0.4}, body)


def test_vqascore_is_the_probability_of_yes() -> None:
    with judging(by_brightness) as fake:
        table = ask(scorer_of("vqascore", fake.url))
    np.testing.assert_allclose(table.column("vqascore")[0], [0.1, 0.2, 0.4], rtol=1e-5)
    np.testing.assert_allclose(table.column("p_yes")[0], [0.2, 0.4, 0.8], rtol=1e-5)
    assert table.valid().all()


def test_refused_is_undecided_and_unreachable_has_failed_and_the_others_keep_their_scores() -> None:
    def behave(body: dict[str, Any]) -> Any:
        level = brightness(pictures_of(body)[0])
        if level == LEVELS[0]:
            return says(None, refusal="no comment")
        return JSONResponse({"error": "CUDA"}, 500) if level == LEVELS[1] else by_brightness(body)

    with judging(behave) as fake:
        scorer = scorer_of("vqascore", fake.url)
        with served(scorer) as server:

            async def go() -> ScoreTable:
                async with RewardClient(config_for(server.url, deadline_s=60.0, timeout_s=30.0)) as client:
                    return await client.score(IMAGES, ["x"] * 3, [{}] * 3)

            table, metrics = asyncio.run(go()), httpx.get(f"{server.url}/metrics").text
    assert table.outcomes[:, 0].tolist() == [Outcome.UNDECIDED, Outcome.FAILED, Outcome.OK]
    assert np.isnan(table.values[:2]).all()
    assert "no comment" in table.reasons[0]
    assert "CUDA" in table.reasons[1]
    assert 'salon_judge_questions_total{outcome="undecided",protocol="yes_no",scorer="vqascore"} 1.0' in metrics
    assert re.search(r'salon_judge_tokens_total\{direction="read",scorer="vqascore"\} \d', metrics)


def test_the_scale_has_an_uncertainty() -> None:
    with judging(lambda body: leans({"9": 0.5, "0": 0.4, "the": 0.1}, body)) as fake:
        table = ask(scorer_of("judge_scale", fake.url), IMAGES[:1])
    assert table.values[0, 0] == pytest.approx(5 / 9, rel=1e-5)
    assert table.uncertainty is not None
    assert table.uncertainty[0, 0] == pytest.approx(np.sqrt(5 / 9 * 4 / 9), rel=1e-4)


def test_unified_reward_and_rationalrewards_say_why() -> None:
    def grades(body: dict[str, Any]) -> dict[str, Any]:
        return says("Alignment Score (1-5): 5\nCoherence Score (1-5): 3\nStyle Score (1-5): 1")

    def aspects(body: dict[str, Any]) -> dict[str, Any]:
        score = 4 if body.get("seed") == 0 else 2.5
        entry = {"justification": "sharp", "score": score}
        form = {"text_faithfulness": entry, "physical_quality": entry, "text_rendering": {**entry, "score": "N/A"}}
        return says(json.dumps(form | {"refined_request": ""}))

    with judging(grades) as fake:
        table = ask(scorer_of("unified_reward", fake.url, form="dimensions"), IMAGES[:1])
    assert table.values[0, 0] == pytest.approx(0.5)
    assert table.reasons[0] == "alignment 1; coherence 0.5; style 0"
    with judging(aspects) as fake:
        table = ask(scorer_of("rationalrewards", fake.url, samples=3, temperature=0.7), IMAGES[:1])
    assert table.values[0, 0] == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert table.uncertainty is not None
    assert table.uncertainty[0, 0] == pytest.approx(np.std([1, 0.5, 0.5]))
    assert "sharp" in table.reasons[0]


def test_panels_are_compared_pair_by_pair_and_criterion_by_criterion() -> None:
    def alike(body: dict[str, Any]) -> dict[str, Any]:
        first, second = map(brightness, pictures_of(body))
        return leans({"yes": 0.9, "no": 0.1} if first == second else {"yes": 0.2, "no": 0.8}, body)

    panels = np.concatenate([flat(level, 8) for level in (9, 9, 200)], axis=1)
    with judging(alike) as fake:
        scorer = scorer_of("paco_consistency", fake.url, rows=1, columns=3, criteria=["style", "same hat"])
        table = ask(scorer, np.stack([panels, flat(3, 8).repeat(3, axis=1)[:, :24]]))
    np.testing.assert_allclose(table.values[:, 0], [(0.9 + 0.2 + 0.2) / 3, 0.9], rtol=1e-5)
    assert any("same hat" in texts_of(body) for body in fake.bodies)


def test_a_checklist_as_a_score() -> None:
    def behave(body: dict[str, Any]) -> dict[str, Any]:
        if "response_format" in body:
            return says(json.dumps({"items": ["Is it bright?", "Is it grey?"]}))
        passes = "grey" in texts_of(body) or brightness(pictures_of(body)[0]) > 150
        return leans({"yes": 0.8, "no": 0.2} if passes else {"yes": 0.2, "no": 0.8}, body)

    with judging(behave) as fake:
        table = ask(scorer_of("judge_checklist", fake.url))
    np.testing.assert_allclose(table.column("following")[0], [0.5, 0.5, 0.8], rtol=1e-5)
    assert table.column("all")[0].tolist() == [0.0, 0.0, 1.0]
    assert table.reasons[0] == "Is it bright?"


def test_regions_are_a_map_and_a_malformed_answer_is_undecided() -> None:
    def behave(body: dict[str, Any]) -> dict[str, Any]:
        if brightness(pictures_of(body)[0]) == LEVELS[1]:
            return says('{"objects": []}')
        item = {"object": "square", "box": [0, 0, 8, 16], "score": 0.0}
        return says(json.dumps({"objects": [item, {**item, "box": [0, 0, 8, 8], "score": 1.0}], "layout": 0.0}))

    with judging(behave) as fake:
        table = ask(scorer_of("judge_regions", fake.url, grid=[2, 2]))
    assert table.kind == "region"
    assert table.outcomes[:, 0].tolist() == [Outcome.OK, Outcome.UNDECIDED, Outcome.OK]
    np.testing.assert_allclose(table.values[0, 0], [[0.5, 0.25], [0.25, 0.25]])


def test_when_the_judge_is_away_the_server_says_it_is_not_ready() -> None:
    broken = False

    def behave(body: dict[str, Any]) -> Any:
        return JSONResponse({}, 500) if broken else by_brightness(body)

    async def score(url: str, deadline_s: float) -> ScoreTable:
        async with RewardClient(config_for(url, deadline_s=deadline_s)) as client:
            return await client.score(IMAGES, ["x"] * 3, [{}] * 3)

    with judging(behave) as fake:
        scorer = scorer_of("vqascore", fake.url, breaker_failures=2, breaker_reset_s=60.0, cache_entries=0)
        with served(scorer) as server:
            assert httpx.get(f"{server.url}/readyz").status_code == 200
            broken = True
            table = asyncio.run(score(server.url, 30.0))
            ready = httpx.get(f"{server.url}/readyz")
    assert not table.valid().any()
    assert ready.status_code == 503
    assert "is away" in ready.text


def test_options_and_addresses_are_checked_before_anything_is_served() -> None:
    with pytest.raises(ConfigError, match="urls"):
        make_scorer("vqascore", ["model=x"])
    with pytest.raises(ConfigError, match="prompt"):
        scorer_of("vqascore", "http://127.0.0.1:9", question="Is it good?")
    with (
        judging(by_brightness, model="other") as fake,
        pytest.raises(ConfigError, match="it has other"),
        served(scorer_of("vqascore", fake.url)),
    ):
        pass
    with pytest.raises(ScoringError, match="cannot be asked"), served(scorer_of("vqascore", "http://127.0.0.1:9")):
        pass


def test_every_scorer_that_asks_a_judge_is_in_the_registry_with_its_options() -> None:
    from reward_servers.judging.scorer import JudgeScorer

    names = {entry.name for entry in entries("scorer") if entry.name in JUDGE_SCORER_OPTIONS}
    assert names == set(JUDGE_SCORER_OPTIONS)
    for name in names:
        cls = resolve("scorer", name).load()
        assert issubclass(cls, JudgeScorer)
        (entry,) = (entry for entry in entries("scorer") if entry.name == name)
        assert (cls.name, cls.declares, cls.paper) == (name, entry.declares, entry.paper)
    versions = {scorer_of(name, "http://127.0.0.1:9").fingerprint() for name in names}
    assert len(versions) == len(names)


def brighter(body: dict[str, Any]) -> dict[str, Any]:
    first, second = map(brightness, pictures_of(body))
    return leans({"1": 0.9, "2": 0.1} if first > second else {"1": 0.1, "2": 0.9}, body)


def test_pairs_hold_what_was_said_and_their_number_is_g_times_g_minus_1() -> None:
    with judging(brighter) as fake:
        scorer = scorer_of("judge_pairs", fake.url, cache_entries=0)
        table = ask(scorer)
        canary = 2
        assert len(fake.bodies) == canary + 3 * 2
    assert table.kind == "pair"
    expected = np.array([[np.nan, 0.1, 0.1], [0.9, np.nan, 0.1], [0.9, 0.9, np.nan]])
    np.testing.assert_allclose(table.values[..., 0], expected, rtol=1e-5)


def test_a_pair_answered_in_one_order_only_is_undecided_and_a_broken_one_has_failed() -> None:
    def behave(body: dict[str, Any]) -> Any:
        levels = tuple(map(brightness, pictures_of(body)))
        if levels == (LEVELS[0], LEVELS[1]):
            return leans({"the": 0.9, "1": 0.001, "2": 0.001}, body)
        return JSONResponse({}, 500) if levels == (LEVELS[2], LEVELS[1]) else brighter(body)

    with judging(behave) as fake:
        table = ask(scorer_of("judge_pairs", fake.url))
    outcomes = table.outcomes[..., 0]
    assert outcomes[0, 1] == outcomes[1, 0] == Outcome.UNDECIDED
    assert outcomes[1, 2] == outcomes[2, 1] == Outcome.FAILED
    assert outcomes[0, 2] == outcomes[2, 0] == Outcome.OK


def test_with_k_pairs_a_fit_gives_the_rest() -> None:
    images = np.stack([flat(level, 8) for level in (10, 60, 110, 160, 210)])
    with judging(brighter) as fake:
        table = ask(scorer_of("judge_pairs", fake.url, pairs=6, cache_entries=0), images)
        assert len(fake.bodies) == 2 + 2 * 6
    wins = np.nanmean(table.values[..., 0], axis=1)
    ranks = np.argsort(np.argsort(wins))
    assert np.corrcoef(ranks, np.arange(5))[0, 1] > 0.8, "who was not compared is placed by those who were"
    off_diagonal = ~np.eye(5, dtype=bool)
    assert table.valid()[..., 0][off_diagonal].all()


def test_a_group_is_listed_as_a_whole() -> None:
    def behave(body: dict[str, Any]) -> dict[str, Any]:
        def marks(names: list[str], pictures: list[np.ndarray]) -> dict[str, Any]:
            order = np.argsort([-brightness(picture) for picture in pictures])
            scores = {names[i]: 5 - 2 * rank for rank, i in enumerate(order)}
            return {"reasoning": "", "scores": scores, "ranking": [names[i] for i in order]}

        return filled(body, marks)

    with judging(behave) as fake:
        table = ask(scorer_of("judge_listwise", fake.url))
    assert table.values[:, 0].tolist() == [0.0, 0.5, 1.0]
    with judging(lambda body: says("{}") if len(pictures_of(body)) > 2 else behave(body)) as fake:
        table = ask(scorer_of("judge_listwise", fake.url))
    assert (table.outcomes == Outcome.UNDECIDED).all()
