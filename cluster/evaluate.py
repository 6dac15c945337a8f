"""Held-out evaluation: which prompts, which seeds, what counts as right; in a run and from the command line.

An evaluation paints deterministically (ODE, fixed seeds), so two evaluations of the same weights agree, and asks the
judging scorer's column (by default `strict`). *before* is the base at its own best setting, which its folder states in
salon.json; *after* is the trained policy at the rollout's setting.
Does not own: painting (actors.painter), scorers (reward_servers).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from contracts import registry
from contracts.config import RunConfig
from contracts.config.rollout import EvalSampling
from contracts.errors import ConfigError, ScoringError
from contracts.previews import Previews
from contracts.scores import ScoreTable
from contracts.seeds import Stream, derive_seed
from contracts.wire import PromptSpec

CHUNK = 40
"""Images painted and scored together."""


@dataclass(frozen=True)
class EvalPlan:
    """What one evaluation paints: prompts (one an image), seeds, sampling."""

    prompts: tuple[PromptSpec, ...]
    seeds: tuple[int, ...]
    sampling: EvalSampling

    def chunks(self) -> list[EvalPlan]:
        return [
            EvalPlan(self.prompts[i : i + CHUNK], self.seeds[i : i + CHUNK], self.sampling)
            for i in range(0, len(self.prompts), CHUNK)
        ]


@dataclass(frozen=True)
class EvalResult:
    """accuracy: mean of the judging column over valid images; by_task: the same per metadata 'tag'."""

    accuracy: float
    standard_error: float
    num_images: int
    num_valid: int
    by_task: dict[str, float]
    columns: dict[str, float]
    sampling: EvalSampling


def rollout_sampling(config: RunConfig) -> EvalSampling:
    """Sampling of the trained policy: eval.sampling, else the rollout's schedule and guidance as an ODE."""
    sampler = config.sampler
    return config.eval.sampling or EvalSampling(
        steps=sampler.steps, shift=sampler.shift, guidance_scale=sampler.guidance_scale, order=sampler.order
    )


def base_sampling(config: RunConfig) -> EvalSampling:
    """The base's own best sampling, from salon.json in its folder; else the rollout's."""
    card = Path(config.model.path) / "salon.json"
    if card.is_file():
        try:
            return EvalSampling.model_validate(json.loads(card.read_text())["eval"])
        except (KeyError, ValueError) as error:
            raise ConfigError("model.path", f"{card} has no readable `eval` section ({error})") from error
    return rollout_sampling(config)


def make_source(config: RunConfig) -> Any:
    """The run's prompt source."""
    return registry.resolve("prompts", config.prompts.source).load()(config.prompts, config.seed)


def plan_evaluation(config: RunConfig, source: Any, sampling: EvalSampling, num_prompts: int) -> EvalPlan:
    """Held-out prompts of eval.split with eval.images_per_prompt seeds each; independent of the run's seed."""
    held_out = source.held_out(config.eval.split, num_prompts)
    per_prompt = config.eval.images_per_prompt
    prompts = tuple(prompt for prompt in held_out for _ in range(per_prompt))
    seeds = tuple(derive_seed(0, Stream.EVAL, index, k) for index in range(len(held_out)) for k in range(per_prompt))
    return EvalPlan(prompts, seeds, sampling)


def judging(config: RunConfig) -> tuple[str, str | None]:
    """(scorer, column) that decide accuracy; the column is None until the scorer's columns are known."""
    held_out = [scorer.name for scorer in config.scorers if scorer.held_out]
    name = config.eval.scorer or (held_out or [config.scorers[0].name])[0]
    return name, config.eval.column


def summarise(config: RunConfig, plan: EvalPlan, tables: Sequence[Mapping[str, ScoreTable]]) -> EvalResult:
    """The result of an evaluation from its chunks' tables. Images without a valid score count for nothing."""
    scorer, column = judging(config)
    values, valid = _judged(tables, scorer, column)
    good = values[valid].astype(np.float64)
    kinds = np.array([str(prompt.metadata.get("tag", "all")) for prompt in plan.prompts])
    return EvalResult(
        accuracy=float(good.mean()) if len(good) else float("nan"),
        standard_error=float(good.std() / max(len(good), 1) ** 0.5) if len(good) else float("nan"),
        num_images=len(values),
        num_valid=int(valid.sum()),
        by_task={str(k): float(values[valid & (kinds == k)].mean()) for k in np.unique(kinds[valid])},
        columns=_column_means(tables),
        sampling=plan.sampling,
    )


def require_judged(config: RunConfig, result: EvalResult) -> EvalResult:
    """The result. Raises ScoringError when it rests on no image at all: NaN is no accuracy."""
    if result.num_valid == 0:
        raise ScoringError(f"scorer {judging(config)[0]} judged none of {result.num_images} images; is its server up?")
    return result


def _judged(
    tables: Sequence[Mapping[str, ScoreTable]], scorer: str, column: str | None
) -> tuple[np.ndarray, np.ndarray]:
    pairs = []
    for chunk in tables:
        table = chunk[scorer]
        name = column or ("strict" if "strict" in table.columns else table.columns[0])
        pairs.append(table.column(name))
    return np.concatenate([v for v, _ in pairs]), np.concatenate([ok for _, ok in pairs])


def _column_means(tables: Sequence[Mapping[str, ScoreTable]]) -> dict[str, float]:
    sums: dict[str, list[float]] = {}
    for chunk in tables:
        for name, table in chunk.items():
            for column in table.columns if table.kind == "point" else ():
                values, valid = table.column(column)
                sums.setdefault(f"{name}/{column}", []).extend(values[valid].tolist())
    return {key: float(np.mean(values)) for key, values in sums.items() if values}


def image_grid(images: np.ndarray, columns: int = 8, scale: int = 3) -> np.ndarray:
    """N images [N,H,W,3] as one picture with a thin border, small ones enlarged `scale` times."""
    if images.shape[1] > 128:
        scale = 1
    big = images.repeat(scale, axis=1).repeat(scale, axis=2)
    padded = np.pad(big, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
    missing = -len(padded) % columns
    padded = np.concatenate([padded, np.full((missing, *padded.shape[1:]), 255, np.uint8)])
    rows = [np.concatenate(list(padded[i : i + columns]), axis=1) for i in range(0, len(padded), columns)]
    return np.concatenate(rows, axis=0)


def evaluate_in_process(config: RunConfig, painter: Any, sampling: EvalSampling, num_prompts: int) -> EvalResult:
    """An evaluation without Ray or HTTP: paint and score here."""
    source = make_source(config)
    plan = plan_evaluation(config, source, sampling, num_prompts)
    jury = LocalJury(config)
    tables = []
    for chunk in plan.chunks():
        images = painter.paint_images(chunk.prompts, chunk.sampling, chunk.seeds)
        tables.append(jury.score(images, [p.text for p in chunk.prompts], [p.metadata for p in chunk.prompts]))
    return summarise(config, plan, tables)


class LocalJury:
    """The run's scorers called as functions, for the in-process loop and for evaluation from the command line.

    Served scorers are instantiated here; scorers by URL are asked over HTTP as always.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.scorers: dict[str, Any] = {}
        for scorer in config.scorers:
            if scorer.serve:
                self.scorers[scorer.name] = registry.resolve("scorer", scorer.serve).load()(**scorer.options)
                self.scorers[scorer.name].load()

    def score(
        self,
        images: np.ndarray,
        prompts: Sequence[str],
        metadata: Sequence[dict[str, Any]],
        previews: Mapping[str, Previews] | None = None,
    ) -> dict[str, ScoreTable]:
        """One table a scorer, for N images; previews: of the scorers that judge them in their place."""
        from reward_servers.client.steps import fold_steps, unfold_steps

        tables = {}
        for scorer in self.config.scorers:
            if previews and scorer.name in previews:
                seen, steps = previews[scorer.name]
                table = self._one(scorer, *unfold_steps(seen, prompts, metadata, steps))
                tables[scorer.name] = fold_steps(table, steps)
            else:
                tables[scorer.name] = self._one(scorer, images, prompts, metadata)
        return tables

    def _one(self, scorer: Any, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Any:
        if scorer.name in self.scorers:
            from reward_servers.client.tables import join

            batch_type = registry.import_target("reward_servers.scorers.base:ScoreBatch")
            parts = [
                self.scorers[scorer.name].score(
                    batch_type(
                        images=images[i : i + scorer.max_batch], prompts=tuple(prompts[i : i + scorer.max_batch]),
                        metadata=tuple(metadata[i : i + scorer.max_batch]),
                    )
                )
                for i in range(0, len(images), scorer.max_batch)
            ]  # fmt: skip
            return join(parts)
        from cluster.scoring import make_judge

        async def ask() -> ScoreTable:
            judge = make_judge(scorer)
            try:
                return await judge.score(images, prompts, metadata)
            finally:
                await judge.aclose()

        return asyncio.run(ask())
