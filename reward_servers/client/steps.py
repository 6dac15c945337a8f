"""Step-wise scores: previews of a trajectory scored by any scorer of images, as one step table.

A preview is an image, so it travels, batches, retries and fails as one; only the table is folded. An entry of a step
table is one sample and column: it is OK when all its steps are (contracts.scores), else it ends like its worst step.
Does not own: which steps have previews (contracts.previews), painting them (actors), what is made of them (credit).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from contracts.errors import PayloadError
from contracts.scores import Outcome, ScoreTable


class Asks(Protocol):
    """RewardClient and FunctionScorer."""

    async def score(
        self,
        images: np.ndarray,
        prompts: Sequence[str],
        metadata: Sequence[dict[str, Any]],
        *,
        deadline_s: float | None = None,
    ) -> ScoreTable: ...


async def score_steps(
    client: Asks,
    previews: np.ndarray,
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]],
    step_ids: Sequence[int],
    *,
    deadline_s: float | None = None,
) -> ScoreTable:
    """The step table [N,K,S] of previews uint8 [N,S,H,W,3] (or latents [N,S,C,h,w]); never raises for a bad score.

    step_ids: S ids; each preview's metadata gets `step_id`. Raises ValueError when the arguments do not fit together.
    """
    images, texts, about = unfold_steps(previews, prompts, metadata, step_ids)
    return fold_steps(await client.score(images, texts, about, deadline_s=deadline_s), step_ids)


def unfold_steps(
    previews: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]], step_ids: Sequence[int]
) -> tuple[np.ndarray, list[str], list[dict[str, Any]]]:
    """What a scorer is asked: images [N*S,...], samples outermost, with prompts and metadata; `fold_steps` undoes it.

    Raises ValueError as score_steps does.
    """
    if previews.ndim != 5 or previews.shape[:2] != (len(prompts), len(step_ids)):
        raise ValueError(f"previews of shape {previews.shape} for {len(prompts)} prompts and {len(step_ids)} steps")
    if len(metadata) not in (0, len(prompts)):
        raise ValueError(f"{len(metadata)} metadata entries for {len(prompts)} prompts")
    rows = [(i, step) for i in range(len(prompts)) for step in step_ids]
    given = metadata or [{}] * len(prompts)
    about = [{**given[i], "step_id": int(step)} for i, step in rows]
    return previews.reshape(-1, *previews.shape[2:]), [prompts[i] for i, _ in rows], about


def fold_steps(table: ScoreTable, step_ids: Sequence[int]) -> ScoreTable:
    """A point table [N*S,K], samples outermost, as a step table [N,K,S]. Raises PayloadError for another kind."""
    if table.kind != "point":
        raise PayloadError(f"previews are scored by scorers of one number an image, not by {table.kind} tables")
    num_steps, columns = len(step_ids), len(table.columns)

    def folded(array: np.ndarray) -> np.ndarray:
        return np.moveaxis(array.reshape(-1, num_steps, columns), 1, 2)

    outcomes = folded(table.outcomes).max(axis=2, initial=int(Outcome.OK)).astype(np.uint8)
    values = np.where((outcomes == Outcome.OK)[..., None], folded(table.values), np.nan).astype(np.float32)
    return replace(
        table, kind="step", values=values, outcomes=outcomes, step_ids=tuple(map(int, step_ids)), gradients=None,
        uncertainty=None if table.uncertainty is None else folded(table.uncertainty),
        reasons=_first_reasons(table.reasons, num_steps),
    )  # fmt: skip


def _first_reasons(reasons: Sequence[str], num_steps: int) -> tuple[str, ...]:
    """Of each sample the first reason that says something."""
    groups = [reasons[start : start + num_steps] for start in range(0, len(reasons), num_steps)]
    return tuple(next(filter(None, group), "") for group in groups)
