"""Every kind of table through a real server and the client: step, region, whole groups, previews, changed versions."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reward_helpers import MeanScorer, Picky, config_for, mean_and_first, pictures, served

from contracts.config.scoring import ScorerConfig
from contracts.declarations import ScorerGives
from contracts.errors import PayloadError
from contracts.scores import Outcome, ScoreTable, point_table
from reward_servers.client import RewardClient, score_steps
from reward_servers.client.function import FunctionScorer
from reward_servers.client.steps import fold_steps
from reward_servers.scorers.base import ScoreBatch, Scorer


class Steps(Scorer):
    """A scorer that itself answers one number a stage: the mean of each colour channel."""

    declares = ScorerGives(kind="step", columns=("mean",))
    name = "stages"

    def score(self, batch: ScoreBatch) -> ScoreTable:
        values = batch.images.astype(np.float32).mean(axis=(1, 2))[:, None]
        values[batch.images[:, 0, 0, 0] == 13] = np.nan
        outcomes = np.zeros((len(batch), 1), np.uint8)
        return ScoreTable(self.name, "1", ("mean",), values, outcomes, "step", step_ids=(0, 4, 7))


class Maps(Scorer):
    """A map over the image: its own first channel, at half size, with how sure it is."""

    declares = ScorerGives(kind="region", columns=("a", "b"))
    name = "maps"

    def score(self, batch: ScoreBatch) -> ScoreTable:
        halves = batch.images[:, ::2, ::2, :2].astype(np.float32).transpose(0, 3, 1, 2)
        outcomes = np.zeros((len(batch), 2), np.uint8)
        return ScoreTable(self.name, "1", ("a", "b"), halves, outcomes, "region", uncertainty=halves / 10)


class Ranks(Scorer):
    """A rank within the group: meaningless for a part of one."""

    declares = ScorerGives(columns=("rank",), whole_group=True)
    name = "ranks"
    batches: list[int]

    def __init__(self) -> None:
        self.batches = []

    def score(self, batch: ScoreBatch) -> ScoreTable:
        self.batches.append(len(batch))
        return self.table(batch.images.mean(axis=(1, 2, 3)).argsort().argsort())


def ask(scorer: Scorer, images: Any, *, server: dict[str, Any] | None = None, **client: Any) -> ScoreTable:
    async def go() -> ScoreTable:
        async with RewardClient(config_for(running.url, **client)) as asking:
            return await asking.score(images, ["p"] * len(images), [])

    with served(scorer, **(server or {})) as running:
        return asyncio.run(go())


def test_step_tables_keep_their_steps_and_fail_by_image() -> None:
    images = pictures(7)
    images[3, 0, 0, 0] = 13
    table = ask(Steps(), images, server={"max_batch": 2}, max_batch=3)
    assert (table.kind, table.step_ids, table.values.shape) == ("step", (0, 4, 7), (7, 1, 3))
    good = np.arange(7) != 3
    np.testing.assert_allclose(table.values[good, 0], images[good].mean(axis=(1, 2)), rtol=1e-5)
    assert table.outcomes[:, 0].tolist() == [0, 0, 0, Outcome.FAILED, 0, 0, 0]
    assert np.isnan(table.values[3]).all()


def test_region_tables_keep_their_maps_and_their_doubt() -> None:
    images = pictures(5)
    table = ask(Maps(), images, max_batch=2)
    expected = images[:, ::2, ::2, :2].transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(table.values, expected.astype(np.float32))
    assert table.uncertainty is not None
    np.testing.assert_allclose(table.uncertainty, expected / 10, rtol=1e-6)
    assert table.valid().all()


def test_a_whole_group_is_neither_cut_by_the_client_nor_by_the_server_nor_joined_with_another() -> None:
    scorer, groups = Ranks(), [pictures(6, seed=seed) for seed in range(3)]

    async def go() -> list[ScoreTable]:
        async with RewardClient(config_for(server.url, max_batch=2)) as client:
            info = await client.info()
            assert info.whole_group
            return await asyncio.gather(*(client.score(group, ["p"] * 6, []) for group in groups))

    with served(scorer, max_batch=4, max_wait_s=0.05) as server:
        tables = asyncio.run(go())
    for group, table in zip(groups, tables, strict=True):
        np.testing.assert_array_equal(table.values[:, 0], group.mean(axis=(1, 2, 3)).argsort().argsort())
    assert scorer.batches == [1, 6, 6, 6], "the canary, then each group in one call"


def previews_of(num: int, steps: int) -> np.ndarray:
    return pictures(num * steps).reshape(num, steps, 8, 8, 3)


def test_previews_are_scored_by_any_scorer_of_images_as_a_step_table() -> None:
    previews = previews_of(4, 3)
    previews[1, 2, 0, 0, 0] = 14  # Picky answers NaN for it
    previews[2, 0, 0, 0, 0] = 13  # and raises for it

    async def go() -> ScoreTable:
        async with RewardClient(config_for(server.url, max_batch=5)) as client:
            return await score_steps(client, previews, ["p"] * 4, [{"x": i} for i in range(4)], (2, 5, 9))

    with served(Picky()) as server:
        table = asyncio.run(go())
    assert (table.kind, table.step_ids, table.values.shape) == ("step", (2, 5, 9), (4, 2, 3))
    expected = mean_and_first(previews.reshape(12, 8, 8, 3)).reshape(4, 3, 2).transpose(0, 2, 1)
    np.testing.assert_allclose(table.values[[0, 3]], expected[[0, 3]], rtol=1e-6)
    assert table.outcomes.tolist() == [[0, 0], [1, 1], [1, 1], [0, 0]]
    assert np.isnan(table.values[[1, 2]]).all()
    assert "unlucky" in table.reasons[2]


def brighter_with_the_step(images: np.ndarray, prompts: tuple[str, ...], metadata: tuple[dict, ...]) -> list[float]:
    return [meta["step_id"] + 100 * meta["x"] for meta in metadata]


def test_a_scorer_sees_which_step_and_sample_a_preview_is_of() -> None:
    config = ScorerConfig(name="f", function="test_server_tables:brighter_with_the_step")
    table = asyncio.run(
        score_steps(FunctionScorer(config), previews_of(2, 3), ["a", "b"], [{"x": 0}, {"x": 1}], (0, 3, 4))
    )
    np.testing.assert_array_equal(table.values[:, 0], [[0, 3, 4], [100, 103, 104]])


def test_previews_that_do_not_fit_their_steps_are_refused() -> None:
    client = FunctionScorer(ScorerConfig(name="f", function="test_server_tables:brighter_with_the_step"))
    for shape, steps, metadata in (((2, 3), (0, 1), []), ((1, 3), (0, 1, 2), []), ((2, 3), (0, 1, 2), [{}])):
        with pytest.raises(ValueError, match=r"previews of shape|metadata entries"):
            asyncio.run(score_steps(client, previews_of(*shape), ["a", "b"], metadata, steps))
    maps = ScoreTable("s", "1", ("a",), np.zeros((2, 1, 2, 2), np.float32), np.zeros((2, 1), np.uint8), "region")
    with pytest.raises(PayloadError, match="region"):
        fold_steps(maps, (0,))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.data())
def test_folding_loses_no_number_and_no_failure(num: int, steps: int, columns: int, data: st.DataObject) -> None:
    failed = data.draw(st.lists(st.booleans(), min_size=num * steps * columns, max_size=num * steps * columns))
    values = np.arange(num * steps * columns, dtype=np.float32).reshape(num * steps, columns)
    values[np.array(failed).reshape(values.shape)] = np.nan
    table = fold_steps(point_table("s", "1", [f"c{i}" for i in range(columns)], values), tuple(range(steps)))
    whole = values.reshape(num, steps, columns).transpose(0, 2, 1)
    np.testing.assert_array_equal(table.valid(), np.isfinite(whole).all(axis=2))
    np.testing.assert_array_equal(table.values[table.valid()], whole[table.valid()])
    assert np.isnan(table.values[~table.valid()]).all()


def test_an_exact_version_is_served_until_it_is_gone() -> None:
    """A server that comes back with other weights: `latest` goes on and says so, an exact version fails by name."""
    images = pictures(2)
    for wanted, outcome in (("latest", Outcome.OK), ("3", Outcome.OK)):
        table = ask(MeanScorer(), images, version=wanted)
        assert (table.outcomes == outcome).all()
        assert table.version == "3"
    newer = MeanScorer()
    newer.version = "4"
    assert ask(newer, images).version == "4"
    gone = ask(newer, images, version="3")
    assert (gone.outcomes == Outcome.FAILED).all()
    assert "409" in gone.reasons[0]
    assert "'3' is gone" in gone.reasons[0]


class LatentNorm(Scorer):
    declares = ScorerGives(columns=("norm",), accepts="latents")
    name = "norms"

    def canary(self) -> ScoreBatch:
        return ScoreBatch(np.zeros((0, 0, 0, 3), np.uint8), ("x",), ({},), np.ones((1, 2, 4, 4), np.float32))

    def score(self, batch: ScoreBatch) -> ScoreTable:
        assert batch.latents is not None
        return self.table(np.square(batch.latents).sum(axis=(1, 2, 3)))


def test_a_scorer_of_latents_is_sent_the_latents_beside_the_images() -> None:
    """As the dispatcher calls it: one call for every scorer, who takes what it reads."""
    images, latents = pictures(5), np.random.default_rng(0).normal(size=(5, 2, 4, 4)).astype(np.float32)

    async def go() -> tuple[ScoreTable, ScoreTable, ScoreTable]:
        async with (
            RewardClient(config_for(of_latents.url, max_batch=2)) as latent,
            RewardClient(config_for(of_images.url)) as plain,
        ):
            assert (latent.reads, plain.reads) == (None, None)
            tables = [
                await latent.score(images, ["p"] * 5, [], latents=latents),
                await plain.score(images, ["p"] * 5, [], latents=latents),
                await latent.score(images, ["p"] * 5, []),
            ]
            assert (latent.reads, plain.reads) == ("latents", "images")
            return tables[0], tables[1], tables[2]

    with served(LatentNorm()) as of_latents, served(MeanScorer()) as of_images:
        norms, means, without = asyncio.run(go())
    np.testing.assert_allclose(norms.values[:, 0], np.square(latents).sum(axis=(1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(means.values, mean_and_first(images), rtol=1e-6)
    assert (without.outcomes == Outcome.FAILED).all()
    assert "reads latents and was given images" in without.reasons[0]


def test_a_request_of_several_prompts_is_cut_into_their_groups() -> None:
    scorer, images = Ranks(), pictures(5)

    async def go() -> ScoreTable:
        async with RewardClient(config_for(server.url)) as client:
            return await client.score(images, ["a", "a", "b", "b", "b"], [])

    with served(scorer) as server:
        table = asyncio.run(go())
    means = images.mean(axis=(1, 2, 3))
    np.testing.assert_array_equal(table.values[:2, 0], means[:2].argsort().argsort())
    np.testing.assert_array_equal(table.values[2:, 0], means[2:].argsort().argsort())
