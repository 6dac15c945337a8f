"""Scorers, rewards and judging: do the scorers answer what the reward, the objective and the evaluation read?

`check_jury` decides by declarations; `ask_servers` asks running servers for theirs (/v1/info). Does not own: scoring.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import httpx
from pydantic import ValidationError

from cluster.checks.aggregation import scorer_mismatch
from cluster.checks.declared import Declared, look_up
from cluster.checks.options import check_options
from cluster.checks.previews import preview_mismatch
from contracts import registry
from contracts.config import RunConfig
from contracts.config.online import OnlineSection
from contracts.config.scoring import ScorerConfig
from contracts.declarations import AggregationNeeds, ScorerGives
from contracts.errors import ConfigError
from contracts.scores import ScorerInfo

ASK_TIMEOUT_S = 10.0


def check_jury(config: RunConfig, declared: Declared) -> Iterator[ConfigError]:
    """Every mismatch that the scorers' declarations show."""
    for index, scorer in enumerate(config.scorers):
        gives = declared.scorers[scorer.name]
        if gives is not None:
            yield from _scorer(config, index, scorer, gives, declared.aggregation)
    yield from check_options(config)
    yield from _weights(config)
    yield from _judging(config, declared)
    if declared.objective is not None and declared.objective.reward_gradient:
        yield from _gradient(config, declared)


def _scorer(
    config: RunConfig, index: int, scorer: ScorerConfig, gives: ScorerGives, rule: AggregationNeeds | None
) -> Iterator[ConfigError]:
    where = f"scorers.{index}"
    unknown = [] if scorer.function else [column for column in scorer.weights if column not in gives.columns]
    if unknown:
        yield ConfigError(
            f"{where}.weights",
            f"{scorer.name} has no column {', '.join(unknown)}",
            f"it has {', '.join(gives.columns)}",
        )
    yield from preview_mismatch(scorer, index, gives)
    yield from scorer_mismatch(config, index, gives, rule)
    if gives.accepts == "latents" and judging_scorer(config) == scorer.name:
        yield ConfigError(where, f"{scorer.name} reads latents; held-out images are judged as images",
                          "set eval.scorer to a scorer of images")  # fmt: skip


def _weights(config: RunConfig) -> Iterator[ConfigError]:
    for index, scorer in enumerate(config.scorers):
        if scorer.weights and not any(scorer.weights.values()):
            yield ConfigError(f"scorers.{index}.weights", "all weights are 0: the scorer counts for nothing",
                              "set held_out: true instead")  # fmt: skip
    training = [scorer for scorer in config.scorers if not scorer.held_out]
    if not any(scorer.required for scorer in training):
        yield ConfigError("scorers", "no scorer that trains is required, so every sample may end without a reward",
                          "let one of them be required")  # fmt: skip


def judging_scorer(config: RunConfig) -> str:
    """Name of the scorer that judges held-out images: eval.scorer, else the first held-out one, else the first."""
    held_out = [scorer.name for scorer in config.scorers if scorer.held_out]
    return config.eval.scorer or (held_out or [config.scorers[0].name])[0]


def _judging(config: RunConfig, declared: Declared) -> Iterator[ConfigError]:
    name = judging_scorer(config)
    if name not in declared.scorers:
        yield ConfigError("eval.scorer", f"no scorer is called {name!r}", f"one of {', '.join(declared.scorers)}")
        return
    gives, column = declared.scorers[name], config.eval.column
    if next(scorer for scorer in config.scorers if scorer.name == name).function:
        return  # a function's columns are whatever it answers
    if gives is not None and gives.kind != "point":
        yield ConfigError("eval.scorer", f"{name} answers a {gives.kind} table; accuracy is read from a point table")
    elif gives is not None and column is not None and column not in gives.columns:
        yield ConfigError("eval.column", f"{name} has no column {column!r}", f"it has {', '.join(gives.columns)}")


def _gradient(config: RunConfig, declared: Declared) -> Iterator[ConfigError]:
    training = [(i, scorer) for i, scorer in enumerate(config.scorers) if not scorer.held_out]
    objective = config.objective.name
    if len(training) != 1:
        names = ", ".join(scorer.name for _, scorer in training)
        yield ConfigError(
            "scorers, objective.name", f"{objective} follows the gradient of exactly one scorer; {names} would train",
            "set held_out: true on the others",
        )  # fmt: skip
        return
    index, scorer = training[0]
    gives = declared.scorers[scorer.name]
    if scorer.function or (gives is not None and not gives.gradients):
        able = [
            e.name for e in registry.entries("scorer") if isinstance(e.declares, ScorerGives) and e.declares.gradients
        ]
        yield ConfigError(
            f"scorers.{index}, objective.name", f"{objective} follows the reward's gradient; {scorer.name} offers none",
            f"use a scorer that declares gradients ({', '.join(able)}), or another objective",
        )  # fmt: skip
    elif gives is not None and gives.accepts == "latents":
        yield ConfigError(
            f"scorers.{index}, objective.name", f"{objective} sends decoded images; {scorer.name} reads latents",
            "use a scorer of images",
        )  # fmt: skip
    elif gives is not None and set(scorer.weights) - {gives.columns[0]}:
        yield ConfigError(
            f"scorers.{index}.weights", f"gradients are those of the first column ({gives.columns[0]})",
            f"weight only {gives.columns[0]}",
        )  # fmt: skip


def check_metadata(config: RunConfig, declared: Declared, known: Sequence[str] | None) -> Iterator[ConfigError]:
    """Prompt metadata against what scorers read. known: keys a prompt file was seen to have; None: not seen."""
    if declared.prompts is None:
        return
    offered = {*declared.prompts.metadata_keys, *(known or ())}
    for index, scorer in enumerate(config.scorers):
        gives = declared.scorers[scorer.name]
        missing = [key for key in gives.metadata_keys if key not in offered] if gives is not None else []
        if missing and (known is not None or config.prompts.source in ("playground", "text")):
            yield ConfigError(
                f"scorers.{index}, prompts.source",
                f"{scorer.name} reads metadata that {config.prompts.source} does not give: {', '.join(missing)}",
                _metadata_way_out(missing),
            )  # fmt: skip


def _metadata_way_out(missing: Sequence[str]) -> str:
    sources = [
        e.name for e in registry.entries("prompts") if set(missing) <= set(getattr(e.declares, "metadata_keys", ()))
    ]
    first = f"use prompts.source={' or '.join(sources)}, or " if sources else ""
    return f"{first}a JSONL or parquet file with {', '.join(missing)}"


@dataclass(frozen=True)
class Reached:
    """Whom the run reaches over HTTP: one of its scorers, or the judge of a `trainer` of an online one.

    place: section and number in the configuration.
    """

    place: str
    scorer: ScorerConfig
    index: int
    trainer: OnlineSection | None = None


def reached(config: RunConfig) -> list[Reached]:
    """All of them."""
    scorers = [Reached(f"scorers.{index}", scorer, index) for index, scorer in enumerate(config.scorers)]
    judges = [
        Reached(f"online.{index}.judge", each.judge_config, index, each)
        for index, each in enumerate(config.online)
        if each.judge_config is not None
    ]
    return [each for each in (*scorers, *judges) if each.scorer.urls]


def check_names(config: RunConfig) -> Iterator[ConfigError]:
    """Names of deployed scorers, in a run that starts a Ray of its own, where nothing is deployed."""
    if config.cluster.address or os.environ.get("RAY_ADDRESS"):
        return
    for each in reached(config):
        if each.scorer.deployments:
            yield ConfigError(
                f"{each.place}.urls, cluster.address",
                f"{', '.join(each.scorer.deployments)} names a deployed scorer, and the run joins no Ray cluster",
                "set cluster.address (or RAY_ADDRESS) to the cluster it is deployed on, or give URLs",
            )


@dataclass(frozen=True)
class Asked:
    """What reward servers said. errors: in which they are otherwise than the configuration expects, or say nothing;
    infos: by name of the run's scorers (judges of trainers left out)."""

    errors: list[ConfigError]
    infos: dict[str, ScorerInfo]


async def ask_servers(config: RunConfig) -> Asked:
    """Ask every reward server given by URL alone what it is, and compare. Takes at most ASK_TIMEOUT_S."""
    chosen = [each for each in reached(config) if not each.scorer.deployments]
    async with httpx.AsyncClient(timeout=ASK_TIMEOUT_S, follow_redirects=False) as client:
        answers = await asyncio.gather(*(_ask(client, config, each) for each in chosen))
    infos = {
        each.scorer.name: found[0]
        for each, (_, found) in zip(chosen, answers, strict=True)
        if found and each.trainer is None
    }
    return Asked([error for errors, _ in answers for error in errors], infos)


async def _ask(
    client: httpx.AsyncClient, config: RunConfig, asked: Reached
) -> tuple[list[ConfigError], list[ScorerInfo]]:
    """(errors, what each of its servers that answered said)."""
    scorer = asked.scorer
    token = os.environ.get(scorer.token_env, "")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    errors: list[ConfigError] = []
    infos: list[ScorerInfo] = []
    for position, url in enumerate(scorer.urls):
        where = f"{asked.place}.urls.{position}"
        try:
            answer = await client.get(f"{url.rstrip('/')}/v1/info", headers=headers)
            answer.raise_for_status()
            infos.append(ScorerInfo.model_validate_json(answer.content))
        except httpx.HTTPStatusError as error:
            errors.append(_refused(where, url, scorer, error.response.status_code))
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            problem = f"{url} does not answer ({type(error).__name__})"
            errors.append(
                ConfigError(where, problem, "start it (`python -m reward_servers serve NAME`) or mend the address")
            )
        except ValidationError:
            errors.append(ConfigError(where, f"{url} is no reward server: /v1/info holds something else"))
    return errors + list(_compare(config, asked, infos)), infos


def _refused(where: str, url: str, scorer: ScorerConfig, status: int) -> ConfigError:
    way_out = f"set the environment variable {scorer.token_env}" if status in (401, 403) else ""
    return ConfigError(where, f"{url} answers HTTP {status} to /v1/info", way_out)


def _compare(config: RunConfig, asked: Reached, infos: Sequence[ScorerInfo]) -> Iterator[ConfigError]:
    where, scorer = asked.place, asked.scorer
    if len({(info.columns, info.version) for info in infos}) > 1:
        said = "; ".join(f"{info.version}: {', '.join(info.columns)}" for info in infos)
        yield ConfigError(f"{where}.urls", f"the replicas of {scorer.name} differ ({said})", "serve one version")
    for info in infos[:1]:
        if scorer.version not in ("latest", info.version):
            yield ConfigError(
                f"{where}.version", f"{scorer.name} is at {info.version}", f"write {info.version} or latest"
            )
        if scorer.max_batch > info.max_images:
            yield ConfigError(f"{where}.max_batch", f"{scorer.name} takes at most {info.max_images} images a request",
                              f"use {info.max_images} or less")  # fmt: skip
        gives = gives_of(info)
        if asked.trainer is not None:
            yield from _labels(asked, gives)
            return
        yield from _scorer(config, asked.index, scorer, gives, look_up(config).aggregation)
        alone = {name: gives if name == scorer.name else None for name in (s.name for s in config.scorers)}
        declared = Declared(None, None, None, alone)
        yield from _judging_of(config, declared, scorer.name)


def gives_of(info: ScorerInfo) -> ScorerGives:
    """The declaration of a scorer that says itself what it is."""
    return ScorerGives(
        kind=info.kind, columns=info.columns, gradients=info.offers_gradients, accepts=info.accepts,
        whole_group=info.whole_group,
    )  # fmt: skip


def _labels(judge: Reached, gives: ScorerGives) -> Iterator[ConfigError]:
    """Whether an online scorer can learn from what its judge answers."""
    column = getattr(judge.trainer, "column", None)
    if gives.kind != "point" or gives.accepts != "images":
        said = f"{judge.scorer.name} answers a {gives.kind} table of {gives.accepts}"
        yield ConfigError(judge.place, said, "ask a scorer of single images")
    elif column is not None and column not in gives.columns:
        yield ConfigError(f"online.{judge.index}.column", f"{judge.scorer.name} has no column {column!r}",
                          f"it has {', '.join(gives.columns)}")  # fmt: skip


def _judging_of(config: RunConfig, declared: Declared, name: str) -> Iterator[ConfigError]:
    if judging_scorer(config) == name:
        yield from _judging(config, declared)
