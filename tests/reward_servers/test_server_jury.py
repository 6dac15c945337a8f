"""The jury of a run before real servers: who reads latents gets them, and the vault is asked for them only then."""

from __future__ import annotations

import asyncio

import numpy as np
from reward_helpers import MeanScorer, config_for, mean_and_first, pictures, served
from test_server_tables import LatentNorm

from cluster.scoring import Jury
from contracts.config.scoring import RewardConfig


def test_each_scorer_of_a_group_gets_what_it_reads() -> None:
    images = pictures(4)
    latents = np.random.default_rng(1).normal(size=(4, 2, 4, 4)).astype(np.float32)

    async def go() -> None:
        scorers = [config_for(plain.url, name="plain"), config_for(norms.url, name="norms")]
        both, one = Jury(scorers, RewardConfig()), Jury(scorers[:1], RewardConfig())
        assert one.reads_latents(), "nobody has said yet what it reads"
        tables = await both.score(images, ["p"] * 4, [{}] * 4, group=True, latents=latents)
        np.testing.assert_allclose(tables["plain"].values, mean_and_first(images), rtol=1e-6)
        np.testing.assert_allclose(tables["norms"].values[:, 0], np.square(latents).sum(axis=(1, 2, 3)), rtol=1e-5)
        await one.score(images, ["p"] * 4, [{}] * 4)
        assert both.reads_latents()
        assert not one.reads_latents(), "scorers of images alone cost no latents"
        judged = await both.score(images, ["p"] * 4, [{}] * 4)  # an evaluation has images only
        assert judged["plain"].valid().all()
        assert not judged["norms"].valid().any()
        for jury in (both, one):
            await jury.aclose()

    with served(MeanScorer()) as plain, served(LatentNorm()) as norms:
        asyncio.run(go())
