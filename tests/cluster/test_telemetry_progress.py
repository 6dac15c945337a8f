"""The driver's display, on a terminal and off it."""

from __future__ import annotations

import io

import pytest

from cluster.telemetry.progress import ProgressDisplay, RunStatus, seconds_left

STATUS: RunStatus = {
    "phase": "training", "step": 12, "total_steps": 40, "reward": 0.5, "held_out": 0.615, "held_out_step": 0,
    "images_per_second": 41.26, "staleness": 1, "seconds": 60, "seconds_left": 3725, "share_done": 0.3,
}  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_off_a_terminal_lines_come_at_an_interval_and_at_every_phase() -> None:
    now, stream = 0.0, io.StringIO()
    with ProgressDisplay("run demo", stream, clock=lambda: now, plain_interval_s=5.0) as display:
        for now in (0.0, 1.0, 4.9, 5.0, 6.0):  # noqa: B007 (read by the clock)
            display.update(STATUS)
        display.update({**STATUS, "phase": "evaluating"})
    lines = stream.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["training", "training", "evaluating"]
    for words in (
        "step 12/40",
        "reward 0.500",
        "held-out 61.5% (step 0)",
        "images/s 41.3",
        "staleness 1",
        "time left 1:02:05",
    ):
        assert words in lines[0]


def test_what_is_not_known_yet_is_a_dash() -> None:
    stream = io.StringIO()
    with ProgressDisplay("run demo", stream) as display:
        display.update({"phase": "starting"})
        display.update(
            {**STATUS, "phase": "training", "reward": float("nan"), "total_steps": None, "seconds_left": 59.6}
        )
    first, second = stream.getvalue().splitlines()
    assert " ".join(first.split()) == "starting step 0 reward – held-out – images/s – staleness – time left –"
    assert "reward –" in second
    assert "step 12  " in second
    assert "time left 1:00" in second


def test_on_a_terminal_one_table_is_redrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    with ProgressDisplay("run demo", stream) as display:
        display.update(STATUS)
    text = stream.getvalue()
    for words in ("run demo: training", "12/40", "61.5%", "41.3", "time left"):
        assert words in text


def test_time_left_is_at_the_pace_so_far() -> None:
    assert seconds_left(0.25, 100.0) == 300.0
    assert seconds_left(0.0, 100.0) is None
    assert seconds_left(1.0, 100.0) == 0.0
