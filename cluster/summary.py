"""summary.json: what a run did, from the ledger and the two evaluations. Does not own: how they are made."""

from __future__ import annotations

from typing import Any

from cluster.evaluate import EvalResult


def summarise_run(
    *,
    name: str,
    objective: str,
    seed: int,
    books: Any,
    steps: int,
    groups_trained: int,
    train_seconds: float,
    total_seconds: float,
    claim_order: str,
    before: EvalResult | None,
    after: EvalResult | None,
    rebuilds: int,
    actor_restarts: int,
    version: int,
    outcome: str,
) -> dict[str, Any]:
    """The summary as plain JSON values. Every count of images is the ledger's."""
    return {
        "name": name,
        "objective": objective,
        "seed": seed,
        "outcome": outcome,
        "held_out_strict_before": _accuracy(before),
        "held_out_strict_after": _accuracy(after),
        "held_out_gain_points": _gain(before, after),
        "evaluation_before": evaluation(before),
        "evaluation_after": evaluation(after),
        "train_seconds": round(train_seconds, 2),
        "total_seconds": round(total_seconds, 2),
        "steps": steps,
        "groups_trained": groups_trained,
        "images_painted": books.painted,
        "images_trained": books.trained,
        "images_discarded": {
            str(reason): count for reason, count in sorted(books.discarded_by_reason.items()) if count
        },
        "images_discarded_by_weight_sync": books.discarded_by_weight_sync,
        "images_alive": books.alive,
        "max_staleness_seen": books.max_staleness_seen,
        "staleness_bounded": claim_order == "admission",
        "weight_versions": version + 1,
        "learner_rebuilds": rebuilds,
        "actor_restarts": actor_restarts,
        "images_trained_per_second": round(books.trained / train_seconds, 3) if train_seconds else None,
    }


def evaluation(result: EvalResult | None) -> dict[str, Any] | None:
    """One evaluation as JSON."""
    if result is None:
        return None
    return {
        "accuracy": round(result.accuracy, 4),
        "standard_error": round(result.standard_error, 4),
        "num_images": result.num_images,
        "num_valid": result.num_valid,
        "by_task": {task: round(value, 4) for task, value in result.by_task.items()},
        "columns": {column: round(value, 4) for column, value in result.columns.items()},
        "sampling": result.sampling.model_dump(),
    }


def _accuracy(result: EvalResult | None) -> float | None:
    """None also of an evaluation that nobody judged: NaN is no accuracy."""
    return None if result is None or not result.num_valid else round(result.accuracy, 4)


def _gain(before: EvalResult | None, after: EvalResult | None) -> float | None:
    if before is None or after is None or not (before.num_valid and after.num_valid):
        return None
    return round(100 * (after.accuracy - before.accuracy), 2)
