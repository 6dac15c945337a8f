"""Handling of score tables that both ends need: checking, cutting and joining without losing an outcome.

Invariant: whatever comes in, a table that leaves here has NaN where the outcome is not OK, a finite value where it is,
and, if it has gradients, finite ones that are zero where the score is not OK.
Does not own: the table's type (contracts.scores).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from contracts.errors import PayloadError
from contracts.scores import Outcome, ScoreTable, TableHeader, TableKind


@dataclass(frozen=True)
class Expected:
    """What a table of some request must look like. gradient_shape: (H, W, 3) when gradients were asked for."""

    kind: TableKind
    columns: tuple[str, ...]
    num_images: int
    gradient_shape: tuple[int, int, int] | None = None


def build_table(header: TableHeader, arrays: dict[str, np.ndarray], expected: Expected) -> ScoreTable:
    """The table in an answer; entries that are not finite become FAILED. Raises PayloadError on anything else wrong."""
    if "values" not in arrays or "outcomes" not in arrays:
        raise PayloadError("the table lacks the arrays 'values' and 'outcomes'")
    if (header.kind, header.columns) != (expected.kind, expected.columns):
        raise PayloadError(
            f"a {header.kind} table of {', '.join(header.columns)} instead of a {expected.kind} table of "
            f"{', '.join(expected.columns)}"
        )
    values, outcomes = arrays["values"], arrays["outcomes"]
    for name, array in (("values", values), ("outcomes", outcomes)):
        if array.ndim == 0 or len(array) != expected.num_images:
            raise PayloadError(f"{name} of shape {array.shape} for {expected.num_images} images")
    if outcomes.dtype != np.uint8 or (outcomes > max(Outcome)).any():
        raise PayloadError("outcomes are not codes from 0 to 3")
    if values.dtype.kind != "f":
        raise PayloadError(f"values have dtype {values.dtype}")
    gradients = _checked_gradients(arrays.get("gradients"), expected)
    uncertainty = arrays.get("uncertainty")
    values, outcomes, gradients = seal(values, outcomes, gradients)
    return ScoreTable(
        header.scorer, header.version, header.columns, values, outcomes, header.kind, uncertainty, header.reasons,
        header.step_ids, gradients,
    )  # fmt: skip


def seal(
    values: np.ndarray, outcomes: np.ndarray, gradients: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """The same with non-finite entries FAILED, NaN in every entry that is not OK, and zero gradients there."""
    extra = tuple(range(outcomes.ndim, values.ndim))  # step and map axes: one bad number spoils the entry
    finite = np.isfinite(values).all(axis=extra) if extra else np.isfinite(values)
    if finite.shape != outcomes.shape:
        raise PayloadError(f"outcomes have shape {outcomes.shape} beside values of shape {values.shape}")
    if outcomes.ndim == 3 and outcomes.shape[0] != outcomes.shape[1]:
        raise PayloadError(f"a pair table has outcomes of shape {outcomes.shape}, not [N,N,K]")
    if outcomes.ndim == 3:  # a sample is not compared with itself: NaN on the diagonal of a pair table is no failure
        diagonal = np.arange(len(outcomes))
        outcomes = outcomes.copy()
        outcomes[diagonal, diagonal] = Outcome.UNDECIDED
    outcomes = np.where((outcomes == Outcome.OK) & ~finite, np.uint8(Outcome.FAILED), outcomes).astype(np.uint8)
    if gradients is not None:
        sound = np.isfinite(gradients).all(axis=(1, 2, 3))
        outcomes[:, 0] = np.where((outcomes[:, 0] == Outcome.OK) & ~sound, Outcome.FAILED, outcomes[:, 0])
        usable = (outcomes[:, 0] == Outcome.OK)[:, None, None, None]
        gradients = np.where(usable, gradients, 0).astype(np.float32)
    good = (outcomes == Outcome.OK).reshape(outcomes.shape + (1,) * len(extra))
    return np.where(good, values, np.nan).astype(np.float32), outcomes, gradients


def _checked_gradients(gradients: np.ndarray | None, expected: Expected) -> np.ndarray | None:
    if expected.gradient_shape is None:
        return None
    shape = (expected.num_images, *expected.gradient_shape)
    if gradients is None:
        raise PayloadError("gradients were asked for and are missing")
    if gradients.shape != shape or gradients.dtype.kind != "f":
        raise PayloadError(f"gradients of shape {gradients.shape} and dtype {gradients.dtype} instead of float {shape}")
    return gradients


def blank_table(
    scorer: str, version: str, expected: Expected, outcome: Outcome, reason: str, trailing: tuple[int, ...] = ()
) -> ScoreTable:
    """A table of the expected kind in which every entry ended with `outcome`.

    trailing: step or map axes of its values; where they are unknown they have length 0.
    """
    n, k = expected.num_images, len(expected.columns)
    outcome_shape = (n, n, k) if expected.kind == "pair" else (n, k)
    num_trailing = {"point": 0, "pair": 0, "step": 1, "region": 2}[expected.kind]
    shape = outcome_shape + (trailing or (0,) * num_trailing)
    gradients = None if expected.gradient_shape is None else np.zeros((n, *expected.gradient_shape), np.float32)
    return ScoreTable(
        scorer, version, expected.columns, np.full(shape, np.nan, np.float32),
        np.full(outcome_shape, int(outcome), np.uint8), expected.kind, reasons=(reason,) * n, gradients=gradients,
    )  # fmt: skip


def take(table: ScoreTable, rows: Sequence[int] | slice) -> ScoreTable:
    """The rows of some images (not of pair tables, which cover a whole group)."""
    if table.kind == "pair":
        raise PayloadError("pair tables cover a whole group and cannot be cut")
    index = rows if isinstance(rows, slice) else np.asarray(rows, dtype=np.intp)
    picked = range(table.num_images)[rows] if isinstance(rows, slice) else rows
    return replace(
        table,
        values=table.values[index],
        outcomes=table.outcomes[index],
        uncertainty=None if table.uncertainty is None else table.uncertainty[index],
        gradients=None if table.gradients is None else table.gradients[index],
        reasons=tuple(table.reasons[i] for i in picked) if table.reasons else (),
    )


def join(tables: Sequence[ScoreTable]) -> ScoreTable:
    """Tables of consecutive images of one scorer as one. Failed parts take the steps or map size that the others have.

    Versions of parts with a valid entry are joined by '+' where they differ. Raises PayloadError when the parts do not
    fit (other steps, other map sizes), or are pair tables, which cover a whole group.
    """
    if len(tables) > 1 and tables[0].kind == "pair":
        raise PayloadError("pair tables cover a whole group and cannot be joined")
    scored = [table for table in tables if table.valid().any()]
    model = (scored or tables)[0]
    fitted = [table if table.valid().any() else _fitted(table, model) for table in tables]
    if any(table.values.shape[1:] != model.values.shape[1:] or table.step_ids != model.step_ids for table in fitted):
        raise PayloadError("parts of one request were answered with different steps or map sizes")
    return replace(
        fitted[0],
        scorer=next((table.scorer for table in fitted if table.scorer), ""),
        version="+".join(dict.fromkeys(table.version for table in scored or tables[:1])),
        values=np.concatenate([table.values for table in fitted]),
        outcomes=np.concatenate([table.outcomes for table in fitted]),
        uncertainty=_joined([table.uncertainty for table in fitted]),
        gradients=_joined([table.gradients for table in fitted]),
        reasons=_joined_reasons(fitted),
    )


def _joined(parts: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """The parts as one array; None where one of them is missing."""
    present = [part for part in parts if part is not None]
    return np.concatenate(present) if len(present) == len(parts) else None


def _joined_reasons(tables: Sequence[ScoreTable]) -> tuple[str, ...]:
    """A reason an image, or none at all where no part gives any."""
    if not any(table.reasons for table in tables):
        return ()
    return tuple(reason for table in tables for reason in (table.reasons or ("",) * table.num_images))


def _fitted(table: ScoreTable, model: ScoreTable) -> ScoreTable:
    """A table without any valid entry in the shape of another."""
    values = np.full((table.num_images, *model.values.shape[1:]), np.nan, np.float32)
    uncertainty = None if model.uncertainty is None else values.copy()
    return replace(table, values=values, uncertainty=uncertainty, step_ids=model.step_ids)
