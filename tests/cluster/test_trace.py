"""The trace: valid Chrome trace JSON, a lane a role, overlaps in rows of their own, bounded, whole after a crash."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.telemetry import Telemetry
from cluster.telemetry.trace import OLDER, TRACE, Trace
from contracts.spans import SpanLog, wall_clock
from contracts.wire import Span
from tests.cluster.made_up_run import config_of
from tests.cluster.small_disk import fill, small_disk


def read(path: Path) -> list[dict[str, Any]]:
    """Events of a trace as viewers read it: the array may lack its end."""
    text = path.read_text()
    found = json.loads(text) if text.endswith("]\n") else json.loads(text.rstrip().rstrip(",") + "]")
    return [event for event in found if event]


def lanes(events: list[dict[str, Any]]) -> dict[str, int]:
    return {event["args"]["name"]: event["pid"] for event in events if event["name"] == "process_name"}


def span(lane: str, start: float, seconds: float, name: str = "work") -> Span:
    return Span(lane=lane, name=name, start=start, seconds=seconds)


def test_a_lane_a_role_and_a_row_an_overlap(tmp_path: Path) -> None:
    trace = Trace(tmp_path)
    trace.add([span("actor-0", 10.0, 2.0, "paint"), span("actor-0", 12.0, 1.0, "store")], group=7, version=3)
    trace.add([span("actor-0", 12.5, 2.0, "paint"), span("scorer a", 13.0, 1.0), span("scorer a", 13.5, 1.0)])
    trace.instant("controller", "actor_restart", {"actor": "actor-0", "stacks": "x" * 10_000, "why": [1]})
    trace.close()
    events = read(tmp_path / TRACE)
    where = lanes(events)
    assert set(where) == {"actor-0", "scorer a", "controller"}
    work = [event for event in events if event["ph"] == "X"]
    assert [(e["name"], e["tid"], e["ts"], e["dur"]) for e in work if e["pid"] == where["actor-0"]] == [
        ("paint", 0, 10_000_000, 2_000_000), ("store", 0, 12_000_000, 1_000_000), ("paint", 1, 12_500_000, 2_000_000),
    ]  # fmt: skip
    assert [event["tid"] for event in work if event["pid"] == where["scorer a"]] == [0, 1]
    assert work[0]["args"] == {"group": 7, "version": 3}
    (mark,) = [event for event in events if event["ph"] == "i"]
    assert mark["name"] == "actor_restart"
    assert len(mark["args"]["stacks"]) <= 200
    assert "why" not in mark["args"]


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 10)), min_size=1, max_size=30))
def test_spans_of_a_row_never_overlap(tmp_path_factory: Any, times: list[tuple[float, float]]) -> None:
    folder = tmp_path_factory.mktemp("trace")
    trace = Trace(folder)
    trace.add([span("a", start, seconds) for start, seconds in sorted(times, key=sum)])
    trace.close()
    rows: dict[int, list[tuple[int, int]]] = {}
    for event in read(folder / TRACE):
        if event["ph"] == "X":
            rows.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"]))
    for row in rows.values():
        for (_, end), (start, _) in pairwise(row):
            assert start >= end - 3, "to the rounding of microseconds"


def test_its_size_is_bounded_and_the_newest_is_kept(tmp_path: Path) -> None:
    trace = Trace(tmp_path, limit_mb=0.05)
    for index in range(3000):
        trace.add([span("actor-0", float(index), 0.5), span("actor-0", index + 0.2, 0.5)], group=index)
    trace.close()
    sizes = [(tmp_path / name).stat().st_size for name in (TRACE, OLDER)]
    assert sum(sizes) < 0.055 * 2**20
    newest, older = read(tmp_path / TRACE), read(tmp_path / OLDER)
    assert lanes(newest) == lanes(older) == {"actor-0": 1}, "each file names its lanes"
    groups = [event["args"]["group"] for event in [*older, *newest] if event["ph"] == "X"]
    assert groups == sorted(groups)
    assert groups[-1] == 2999


def test_what_a_crash_leaves_opens_and_the_next_process_keeps_it(tmp_path: Path) -> None:
    crashed = Trace(tmp_path)
    crashed.add([span("actor-0", 1.0, 1.0)])
    crashed._flush()
    assert len(read(tmp_path / TRACE)) == 4
    Trace(tmp_path).close()
    assert len(read(tmp_path / OLDER)) == 4


def test_the_trace_goes_on_when_a_full_disk_has_room_again(tmp_path: Path) -> None:
    """What found no room is missing; what stands there is whole, and every lane has its name."""
    with small_disk(tmp_path / "disk", megabytes=1) as disk:
        trace = Trace(disk)
        trace.add([span("actor-0", 1.0, 1.0)], group=1)
        trace._flush()
        room = fill(disk)
        for index in range(2000):
            trace.add([span("actor-1", float(index), 0.5)], group=2)
        trace._flush()
        full = read(disk / TRACE)
        room.unlink()
        trace.add([span("actor-1", 9000.0, 1.0)], group=3)
        trace.close()
        events = read(disk / TRACE)
    groups = [event["args"]["group"] for event in events if event["ph"] == "X"]
    assert [event["args"]["group"] for event in full if event["ph"] == "X"] == groups[:-1]
    assert (groups[0], groups[-1]) == (1, 3)
    assert groups.count(2) < 2000
    assert set(lanes(events)) == {"actor-0", "actor-1"}


def test_a_trace_that_has_no_folder_is_no_error(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "missing" / "folder")
    trace.add([span("actor-0", 1.0, 1.0)])
    trace.instant("controller", "x", {})
    trace.close()
    silent = Trace(None)
    silent.ended("learner", "update", 1.0)
    silent.close()


def test_telemetry_traces_phases_spans_and_events(tmp_path: Path) -> None:
    telemetry = Telemetry(config_of(tmp_path), tmp_path, serve=False)
    telemetry.phase("learner", "update", 2.0, lane="learner")
    with telemetry.timed("controller", "evaluate", lane="controller"):
        pass
    telemetry.phase("actor", "paint", 1.0)
    telemetry.spans([span("actor-0", 1.0, 1.0, "paint")], group=1)
    telemetry.event("actor_restart", actor="actor-0")
    telemetry.close()
    events = read(tmp_path / TRACE)
    assert set(lanes(events)) == {"learner", "controller", "actor-0"}
    (update,) = [event for event in events if event["name"] == "update"]
    assert update["dur"] == 2_000_000
    assert abs((update["ts"] + update["dur"]) / 1e6 - wall_clock()) < 600
    off = Telemetry(config_of(tmp_path, telemetry={"trace_mb": 0, "tensorboard": False}), tmp_path / "off", serve=False)
    off.event("x")
    off.close()
    assert not (tmp_path / "off" / TRACE).exists()


def test_a_span_log_measures_and_lays_out() -> None:
    log = SpanLog("actor-0")
    before = wall_clock()
    try:
        with log.span("paint"):
            raise ValueError
    except ValueError:
        pass
    (painted,) = log.spans
    assert painted.lane == "actor-0"
    assert before <= painted.start
    assert painted.seconds >= 0
    ranks = SpanLog("learner-1")
    ranks.end_to_end(100.0, {"fetch": 1.0, "prepass": 0.0, "optimizer": 2.0})
    assert [(one.name, one.start, one.seconds) for one in ranks.spans] == [
        ("fetch", 100.0, 1.0),
        ("optimizer", 101.0, 2.0),
    ]
