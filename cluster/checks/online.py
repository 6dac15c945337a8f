"""Reward models that learn beside the run: are their scorers there, served by the run, and is there what they read?

Does not own: options of scorers (options.py), what trainers check themselves when they load.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from contracts.config import RunConfig
from contracts.config.online import TRAINERS, OnlineSection, References
from contracts.config.scoring import ScorerConfig
from contracts.errors import ConfigError, SalonError
from contracts.wire import Source


def check_online(config: RunConfig) -> Iterator[ConfigError]:
    """Every mismatch between `online` and the scorers."""
    scorers = {scorer.name: scorer for scorer in config.scorers}
    trained = [each.scorer for each in config.online]
    for index, each in enumerate(config.online):
        where = f"online.{index}"
        if trained.count(each.scorer) > 1:
            yield ConfigError(f"{where}.scorer", f"{each.scorer} is trained twice", "leave one of them out")
        yield from _scorer(where, each, scorers)
        if isinstance(each, References) and not Path(each.references).is_file():
            yield ConfigError(f"{where}.references", f"{each.references} is not there", "give a JSONL of prompt, image")
        if each.judge_config is not None and each.judge_config.serve is not None:
            yield ConfigError(
                f"{where}.judge.serve", "a judge is not served by the run",
                "start it (`python -m reward_servers serve NAME`, `python -m cluster jury deploy NAME`) and give its "
                "urls, or a function",
            )  # fmt: skip
    if config.online and _source(config) is not Source.ACTORS:
        yield ConfigError("online, objective.name", "no actor paints in this run, so there is nothing to learn from",
                          "leave `online` out")  # fmt: skip
    for index, scorer in enumerate(config.scorers):
        follows = scorer.serve in TRAINERS and "versions" not in scorer.options
        if follows and scorer.name not in trained:
            yield ConfigError(
                f"scorers.{index}, online", f"nothing trains {scorer.name}",
                f"give it an entry: online: [{{name: {scorer.serve}, scorer: {scorer.name}, ...}}]",
            )  # fmt: skip


def _scorer(where: str, each: OnlineSection, scorers: dict[str, ScorerConfig]) -> Iterator[ConfigError]:
    scorer = scorers.get(each.scorer)
    if scorer is None:
        yield ConfigError(f"{where}.scorer", f"no scorer is called {each.scorer!r}", f"one of {', '.join(scorers)}")
    elif scorer.serve != each.name:
        yield ConfigError(
            f"{where}.scorer", f"{each.scorer} is no {each.name} that the run serves",
            f"write serve: {each.name} on that scorer",
        )  # fmt: skip
    elif scorer.version != "latest":
        yield ConfigError(f"{where}.scorer", f"{each.scorer} learns, and its version is pinned to {scorer.version}",
                          "write version: latest")  # fmt: skip
    elif "versions" in scorer.options:
        yield ConfigError(f"{where}.scorer", f"options.versions of {each.scorer} is the run's to set", "leave it out")


def _source(config: RunConfig) -> Source:
    """Where groups come from; an objective or a source that is unknown is another check's to tell."""
    from cluster.step import group_source

    try:
        return group_source(config)
    except SalonError:
        return Source.ACTORS
