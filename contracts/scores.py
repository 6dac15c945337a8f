"""Typed score tables: a score is an outcome with a value, never a bare number (law 4).

Owns the table every scorer answers with, its JSON form in the ledger and its binary form on the wire, and the HTTP
headers of POST /v1/score and GET /v1/info. Does not own: turning tables into rewards (learner/credit), HTTP itself.

Shapes, for the N images of one request (the ledger's tables have N = G, one group):

| kind     | values           | meaning                                                    |
|----------|------------------|------------------------------------------------------------|
| point    | [N,K]            | one number an image and column                              |
| step     | [N,K,S]          | one number a preview step; `step_ids` [S] names the steps   |
| pair     | [N,N,K]          | probability that row beats column within a group; NaN diag  |
| region   | [N,K,h,w]        | a map over the image                                        |

`outcomes` has the shape of values without trailing S / h,w axes (and [N,N,K] for pair). A value whose outcome is not
OK is NaN: whoever forgets the mask sees it at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from contracts.errors import PayloadError
from contracts.wire import Message

PROTOCOL_VERSION: Literal[1] = 1

TableKind = Literal["point", "step", "pair", "region"]


class Outcome(IntEnum):
    """How scoring one entry ended."""

    OK = 0
    FAILED = 1  # the scorer raised, answered nonsense or NaN
    TIMED_OUT = 2  # no answer before the deadline
    UNDECIDED = 3  # a judge that could not decide


@dataclass(frozen=True)
class ScoreTable:
    """What one scorer says of N images.

    scorer, version: who says it; columns: K names; values, outcomes: see the module's table;
    uncertainty: standard deviations shaped like values, or None; reasons: N short texts, or empty;
    gradients: float32 [N,H,W,3] d value[:, 0] / d image (image in [0,1]), or None.
    """

    scorer: str
    version: str
    columns: tuple[str, ...]
    values: np.ndarray
    outcomes: np.ndarray
    kind: TableKind = "point"
    uncertainty: np.ndarray | None = None
    reasons: tuple[str, ...] = ()
    step_ids: tuple[int, ...] = ()
    gradients: np.ndarray | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        _check_shapes(self)

    @property
    def num_images(self) -> int:
        return int(self.values.shape[0])

    def valid(self) -> np.ndarray:
        """bool, shaped like outcomes: True where the value may be used."""
        return self.outcomes == Outcome.OK

    def column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(values, valid) of one column of a point table, both [N] (of a step table: values [N,S]).

        Raises KeyError with the known columns.
        """
        if name not in self.columns:
            raise KeyError(f"scorer {self.scorer!r} has no column {name!r}; it has {', '.join(self.columns)}")
        index = self.columns.index(name)
        return self.values[:, index], self.valid()[:, index]


def point_table(
    scorer: str, version: str, columns: Sequence[str], values: np.ndarray, reasons: Sequence[str] = (), **more: Any
) -> ScoreTable:
    """A point table from raw values [N,K]; non-finite entries become FAILED."""
    values = np.asarray(values, dtype=np.float32)
    if values.ndim == 1:
        values = values[:, None]
    outcomes = np.where(np.isfinite(values), Outcome.OK, Outcome.FAILED).astype(np.uint8)
    values = np.where(np.isfinite(values), values, np.nan).astype(np.float32)
    return ScoreTable(scorer, version, tuple(columns), values, outcomes, reasons=tuple(reasons), **more)


def failed_table(
    scorer: str, version: str, columns: Sequence[str], num_images: int, outcome: Outcome, reason: str
) -> ScoreTable:
    """A point table in which every entry ended with `outcome`."""
    shape = (num_images, len(columns))
    return ScoreTable(
        scorer, version, tuple(columns), np.full(shape, np.nan, np.float32), np.full(shape, int(outcome), np.uint8),
        reasons=(reason,) * num_images,
    )  # fmt: skip


class TableHeader(Message):
    """The part of a ScoreTable that is not an array; arrays travel as values, outcomes, uncertainty, gradients."""

    scorer: str
    version: str
    kind: TableKind = "point"
    columns: tuple[str, ...]
    reasons: tuple[str, ...] = ()
    step_ids: tuple[int, ...] = ()


def to_message(table: ScoreTable) -> tuple[TableHeader, dict[str, np.ndarray]]:
    """Header and arrays, for codec.encode."""
    header = TableHeader(
        scorer=table.scorer, version=table.version, kind=table.kind, columns=table.columns, reasons=table.reasons,
        step_ids=table.step_ids,
    )  # fmt: skip
    arrays = {"values": table.values, "outcomes": table.outcomes}
    if table.uncertainty is not None:
        arrays["uncertainty"] = table.uncertainty
    if table.gradients is not None:
        arrays["gradients"] = table.gradients
    return header, arrays


def from_message(header: TableHeader, arrays: dict[str, np.ndarray]) -> ScoreTable:
    """The inverse of to_message. Raises PayloadError when arrays are missing or misshapen."""
    if "values" not in arrays or "outcomes" not in arrays:
        raise PayloadError("a score table needs the arrays 'values' and 'outcomes'")
    return ScoreTable(
        header.scorer, header.version, header.columns, arrays["values"], arrays["outcomes"], header.kind,
        arrays.get("uncertainty"), header.reasons, header.step_ids, arrays.get("gradients"),
    )  # fmt: skip


def to_json(table: ScoreTable) -> dict[str, Any]:
    """The table as JSON for the ledger; gradients are left out. NaN is written as null."""
    header, arrays = to_message(replace(table, gradients=None))
    body = {name: _listing(array) for name, array in arrays.items()}
    return {"header": header.model_dump(mode="json"), "shape": list(table.values.shape), "arrays": body}


def from_json(body: dict[str, Any]) -> ScoreTable:
    """The inverse of to_json."""
    arrays = {
        name: np.array(
            [np.nan if item is None else item for item in flat], np.uint8 if name == "outcomes" else np.float32
        )
        for name, flat in body["arrays"].items()
    }
    header, shape = TableHeader.model_validate(body["header"]), tuple(body["shape"])
    arrays["values"] = arrays["values"].reshape(shape)
    arrays["outcomes"] = arrays["outcomes"].reshape(_outcome_shape(header.kind, shape))
    if "uncertainty" in arrays:
        arrays["uncertainty"] = arrays["uncertainty"].reshape(shape)
    return from_message(header, arrays)


def _listing(array: np.ndarray) -> list[Any]:
    return [None if item != item else item for item in array.reshape(-1).tolist()]


def _outcome_shape(kind: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape if kind in ("point", "pair") else shape[:2]


def _check_shapes(table: ScoreTable) -> None:
    ndim = {"point": 2, "step": 3, "pair": 3, "region": 4}[table.kind]
    values, outcomes = table.values, table.outcomes
    columns_axis = 2 if table.kind == "pair" else 1
    if values.ndim != ndim or values.shape[columns_axis] != len(table.columns):
        raise PayloadError(f"{table.kind} table of {len(table.columns)} columns has values of shape {values.shape}")
    if table.kind == "pair" and values.shape[0] != values.shape[1]:
        raise PayloadError(f"pair table has values of shape {values.shape}, not [N,N,K]")
    if outcomes.shape != _outcome_shape(table.kind, values.shape):
        raise PayloadError(f"outcomes have shape {outcomes.shape} beside values of shape {values.shape}")
    if table.step_ids and table.kind == "step" and len(table.step_ids) != values.shape[2]:
        raise PayloadError("step_ids and values disagree on the number of steps")
    if table.uncertainty is not None and table.uncertainty.shape != values.shape:
        raise PayloadError("uncertainty is not shaped like values")
    if table.reasons and len(table.reasons) != values.shape[0]:
        raise PayloadError("reasons must be empty or one an image")
    if table.gradients is not None and (table.gradients.ndim != 4 or len(table.gradients) != len(values)):
        raise PayloadError("gradients must be [N,H,W,3]")
    bad = outcomes == Outcome.OK
    if outcomes.shape == values.shape and not np.isfinite(values[bad]).all():
        raise PayloadError("a value with outcome OK is not finite")


class ScoreRequest(Message):
    """Header of POST /v1/score. Arrays: `images` uint8 [N,H,W,3], or `image_0`.. when sizes differ, or `latents`."""

    protocol_version: Literal[1] = PROTOCOL_VERSION
    request_id: str = Field(max_length=128)
    prompts: tuple[str, ...]
    metadata: tuple[dict[str, Any], ...] = ()
    version: str = Field(default="latest", description="'latest' or an exact scorer version (409 when it is gone)")
    want_gradients: bool = False
    deadline_s: float | None = Field(default=None, gt=0, description="seconds the caller will wait from now")


class ScoreResponse(Message):
    """Header of the answer; arrays as in to_message."""

    protocol_version: Literal[1] = PROTOCOL_VERSION
    request_id: str
    table: TableHeader


class ScorerInfo(Message):
    """GET /v1/info."""

    name: str
    version: str
    kind: TableKind
    columns: tuple[str, ...]
    higher_is_better: bool = True
    value_range: tuple[float | None, float | None] = (None, None)
    offers_gradients: bool = False
    accepts: Literal["images", "latents"] = "images"
    max_images: int
    max_pixels: int
    max_body_bytes: int
    paper: str = ""
    weight_digest: str = ""
    whole_group: bool = Field(default=False, description="a request is one group, scored in one call")
    pairs: Annotated[int, Field(gt=0)] | Literal["all"] | None = Field(
        default=None, description="unordered pairs of a group that a scorer of pairs compares; None: it does not say"
    )
