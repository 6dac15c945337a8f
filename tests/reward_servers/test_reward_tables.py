"""Tables and circuits in themselves: properties under random inputs, states without sleeping."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from contracts.errors import PayloadError
from contracts.scores import Outcome, ScorerInfo, ScoreTable, TableHeader
from reward_servers.client.breaker import CircuitBreaker, RetryBudget
from reward_servers.client.parts import make_part
from reward_servers.client.stats import outcome_counts
from reward_servers.client.tables import Expected, blank_table, build_table, join, take

ANY_FLOAT = st.floats(width=32, allow_nan=True, allow_infinity=True)


@st.composite
def point_arrays(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    shape = (draw(st.integers(1, 6)), draw(st.integers(1, 3)))
    values = draw(hnp.arrays(np.float32, shape, elements=ANY_FLOAT))
    return values, draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, 3)))


def build(values: np.ndarray, outcomes: np.ndarray, **arrays: np.ndarray) -> ScoreTable:
    columns = tuple(f"c{i}" for i in range(values.shape[1]))
    header = TableHeader(scorer="s", version="1", columns=columns)
    return build_table(
        header, {"values": values, "outcomes": outcomes, **arrays}, Expected("point", columns, len(values))
    )


@given(point_arrays())
def test_a_built_table_is_finite_where_ok_and_nan_elsewhere(arrays: tuple[np.ndarray, np.ndarray]) -> None:
    values, outcomes = arrays
    table = build(values, outcomes)
    was_good = (outcomes == Outcome.OK) & np.isfinite(values)
    np.testing.assert_array_equal(table.valid(), was_good)
    np.testing.assert_array_equal(table.values[was_good], values[was_good])
    assert np.isnan(table.values[~was_good]).all()
    kept = outcomes != Outcome.OK
    np.testing.assert_array_equal(table.outcomes[kept], outcomes[kept])
    assert sum(outcome_counts(table).values()) == len(values)


@given(point_arrays(), st.data())
def test_cutting_and_joining_gives_the_table_back(arrays: tuple[np.ndarray, np.ndarray], data: st.DataObject) -> None:
    table = build(*arrays)
    cut = data.draw(st.integers(0, table.num_images))
    parts = [part for part in (take(table, slice(0, cut)), take(table, slice(cut, None))) if part.num_images]
    again = join(parts)
    np.testing.assert_array_equal(again.values, table.values)
    np.testing.assert_array_equal(again.outcomes, table.outcomes)
    order = data.draw(st.permutations(range(table.num_images)))
    np.testing.assert_array_equal(take(table, order).outcomes, table.outcomes[list(order)])


@settings(max_examples=200)
@given(
    values=hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=4), elements=ANY_FLOAT),
    outcomes=hnp.arrays(np.uint8, hnp.array_shapes(max_dims=3, max_side=4)),
)
def test_arbitrary_arrays_make_a_table_of_the_expected_shape_or_a_payload_error(
    values: np.ndarray, outcomes: np.ndarray
) -> None:
    header = TableHeader(scorer="s", version="1", columns=("a", "b"))
    try:
        table = build_table(header, {"values": values, "outcomes": outcomes}, Expected("point", ("a", "b"), 3))
    except PayloadError:
        return
    assert table.values.shape == (3, 2)
    assert np.isfinite(table.values[table.valid()]).all()


def test_a_failed_part_takes_the_shape_of_its_neighbours() -> None:
    expected = Expected("step", ("a",), 2, (4, 4, 3))
    good = ScoreTable(
        "s", "1", ("a",), np.ones((3, 1, 5), np.float32), np.zeros((3, 1), np.uint8), "step", step_ids=(0, 1, 2, 3, 4),
        gradients=np.ones((3, 4, 4, 3), np.float32),
    )  # fmt: skip
    table = join([blank_table("s", "", expected, Outcome.TIMED_OUT, "late"), good])
    assert table.values.shape == (5, 1, 5)
    assert table.step_ids == (0, 1, 2, 3, 4)
    assert table.outcomes[:, 0].tolist() == [2, 2, 0, 0, 0]
    assert table.gradients is not None
    assert table.gradients[:, 0, 0, 0].tolist() == [0, 0, 1, 1, 1]
    assert table.reasons == ("late", "late", "", "", "")


def test_one_bad_step_or_map_point_spoils_its_entry_alone() -> None:
    values = np.ones((3, 1, 4), np.float32)
    values[1, 0, 2] = np.nan
    header = TableHeader(scorer="s", version="1", kind="step", columns=("a",), step_ids=(0, 1, 2, 3))
    arrays = {"values": values, "outcomes": np.zeros((3, 1), np.uint8)}
    table = build_table(header, arrays, Expected("step", ("a",), 3))
    assert table.outcomes[:, 0].tolist() == [0, 1, 0]
    assert np.isnan(table.values[1]).all()


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 5000))
def test_parts_cover_every_image_once_in_order(num: int, max_images: int, max_bytes: int) -> None:
    images = np.zeros((num, 4, 4, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(num)
    whole = make_part(images, [str(i) for i in range(num)], [{"i": i} for i in range(num)])
    parts = list(whole.cut(max_images, max_bytes))
    assert [p for part in parts for p in part.prompts] == [str(i) for i in range(num)]
    assert [m["i"] for part in parts for m in part.metadata] == list(range(num))
    np.testing.assert_array_equal(np.concatenate([part.inputs for part in parts]), images)
    assert all(len(part) <= max_images and (part.num_bytes <= max_bytes or len(part) == 1) for part in parts)


@pytest.mark.parametrize("kind", ["point", "step", "pair", "region"])
def test_a_right_answer_always_fits_the_limit_for_answers(kind: str) -> None:
    from contracts.codec import encode
    from contracts.scores import ScoreResponse, to_message

    info = ScorerInfo(
        name="s", version="1", kind=kind, columns=("a", "b"), offers_gradients=True, max_images=64, max_pixels=10**6,
        max_body_bytes=10**8,
    )  # fmt: skip
    part = make_part(np.zeros((8, 32, 32, 3), np.uint8), ["p"] * 8, [])
    expected = part.expected(info, want_gradients=True)
    trailing = {"step": (50,), "region": (32, 32)}.get(kind, ())
    table = blank_table("s", "1", expected, Outcome.FAILED, "x" * 300, trailing)
    header, arrays = to_message(table)
    answer = encode(ScoreResponse(request_id="r", table=header), {**arrays, "uncertainty": table.values})
    assert len(answer) <= part.answer_limit(expected)


def test_circuit_states_follow_the_clock() -> None:
    breaker = CircuitBreaker(failures=2, reset_s=10.0)
    breaker.failed(0.0)
    breaker.succeeded()
    breaker.failed(1.0)
    assert breaker.state(1.0) == "closed", "only failures in a row count"
    breaker.failed(2.0)
    assert (breaker.state(2.0), breaker.wait_s(2.0)) == ("open", 1.25), "the first pause is an eighth"
    assert (breaker.state(3.25), breaker.wait_s(3.25)) == ("half_open", 0.0)
    breaker.enter(3.25)
    assert breaker.wait_s(3.25) > 0, "one probe at a time"
    breaker.released()
    assert breaker.wait_s(3.25) == 0, "a cancelled probe frees the place"
    now = 3.25
    for pause in (2.5, 5.0, 10.0, 10.0):
        breaker.enter(now)
        breaker.failed(now)
        assert (breaker.state(now), breaker.wait_s(now)) == ("open", pause), "twice as long, up to reset_s"
        now += pause
    breaker.enter(now)
    breaker.succeeded()
    assert (breaker.state(now), breaker.wait_s(now)) == ("closed", 0.0)
    breaker.failed(now)
    breaker.failed(now)
    assert breaker.wait_s(now) == 1.25, "a new outage begins with a short pause"


@given(st.lists(st.booleans(), max_size=400), st.floats(0, 2))
def test_retries_never_exceed_their_share_of_requests_plus_ten(asks: list[bool], share: float) -> None:
    budget, requests, retries = RetryBudget(share), 0, 0
    for retry in asks:
        if retry:
            retries += budget.take()
        else:
            budget.earn()
            requests += 1
        assert retries <= share * requests + 10 + 1e-9
