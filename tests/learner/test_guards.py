"""Guards: the step at which they act, what never makes them act, and a state that goes on as if nothing had been."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.config.guards import CustomGuard, GuardConfig, HeldOutDivergenceConfig, LimitConfig
from learner.guards.base import WELL, Guard, Row, Verdict
from learner.guards.held_out_divergence import HeldOutDivergence, change
from learner.guards.limit import Limit
from learner.guards.run_guards import RunGuards, Word

NAN, INF = float("nan"), float("inf")


def limit(**settings: Any) -> Limit:
    return Limit(LimitConfig(**{"metric": "kl", "max": 1.0, "patience": 3, "action": "stop", **settings}))


def acts_at(guard: Guard[Any], rows: Iterable[Row]) -> list[int]:
    """Steps, from 1, after which the guard does not find all well."""
    return [step for step, row in enumerate(rows, 1) if guard.see(row) != WELL]


def kl(*values: float | None) -> list[Row]:
    return [{} if value is None else {"kl": value} for value in values]


# ---- limit


def test_a_limit_acts_at_the_last_step_of_its_patience_and_until_a_value_within() -> None:
    assert acts_at(limit(), kl(2, 2, 2, 2, 1, 2, 2, 2)) == [3, 4, 8]
    assert acts_at(limit(patience=1), kl(1, 1.0001, 0, 5)) == [2, 4]
    assert acts_at(limit(max=None, min=0.5), kl(0.4, 0.4, 0.4, 0.6)) == [3]


def test_a_value_within_begins_the_count_anew() -> None:
    assert acts_at(limit(), kl(2, 2, 1, 2, 2, 1, 2, 2)) == []


@pytest.mark.parametrize("value", [1.0, 0.0, -5.0])
def test_a_constant_at_or_within_the_limit_never_acts(value: float) -> None:
    assert acts_at(limit(), kl(*[value] * 50)) == []


@pytest.mark.parametrize("nothing", [None, NAN, INF, -INF])
def test_a_step_that_measured_nothing_is_neither_beyond_nor_within(nothing: float | None) -> None:
    assert acts_at(limit(), kl(*[nothing] * 20)) == []
    assert acts_at(limit(), kl(2, nothing, 2, nothing, 2)) == [5]
    assert acts_at(limit(), kl(2, 2, 1, nothing, 2, 2)) == []


def test_both_limits_and_the_words() -> None:
    guard = limit(min=0.5, patience=2, action="warn")
    assert [guard.see(row) for row in kl(0.25, 2)] == [
        WELL, Verdict("warn", "kl is 2, and not within 0.5 to 1 for 2 steps in a row"),
    ]  # fmt: skip
    assert limit(patience=1).see({"kl": 2.5}) == Verdict("stop", "kl is 2.5, and above 1 for 1 step")


@pytest.mark.parametrize("settings", [{}, {"max": 1, "min": 2}, {"max": NAN}, {"max": 1, "patience": 0}, {"cap": 1}])
def test_a_limit_that_makes_no_sense_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"max|patience|cap"):
        LimitConfig(metric="kl", **settings)


# ---- held-out divergence


def divergence(**settings: Any) -> HeldOutDivergence:
    return HeldOutDivergence(HeldOutDivergenceConfig(**{"held_out": "judge", "window": 8, **settings}))


def scored(rewards: Sequence[float | None], held_out: Sequence[float | None]) -> list[Row]:
    pairs = zip(rewards, held_out, strict=True)
    return [
        {name: value for name, value in (("reward", r), ("reward_mean/judge/score", h)) if value is not None}
        for r, h in pairs
    ]


@pytest.mark.parametrize("half", [2, 5, 10, 50])
def test_a_line_without_noise_has_the_closed_form_of_its_standard_errors(half: int) -> None:
    difference, error = change([0.3 + 0.01 * step for step in range(2 * half)])
    assert difference == pytest.approx(0.01 * half)
    assert difference / error == pytest.approx(half * math.sqrt(6 / (half + 1)))


def test_the_standard_error_is_the_spread_of_many_such_differences() -> None:
    noise = np.random.default_rng(0).normal(size=(4000, 20))
    differences, errors = np.array([change(list(row)) for row in noise]).T
    assert differences.std() == pytest.approx(math.sqrt(2 / 10), rel=0.05)
    assert np.sqrt(np.mean(errors**2)) == pytest.approx(math.sqrt(2 / 10), rel=0.05)


def test_it_acts_when_the_window_is_full_and_both_have_moved_apart() -> None:
    line = [float(step) for step in range(12)]
    down = [-value for value in line]
    ratio = 4 * math.sqrt(6 / 5)  # of a line over 8 steps
    assert acts_at(divergence(rise=ratio - 0.01, fall=ratio - 0.01), scored(line, down)) == [8, 9, 10, 11, 12]
    assert acts_at(divergence(rise=ratio + 0.01, fall=ratio - 0.01), scored(line, down)) == []
    assert acts_at(divergence(rise=ratio - 0.01, fall=ratio + 0.01), scored(line, down)) == []


def test_a_step_change_is_seen_at_its_exact_step_and_forgotten_with_the_window() -> None:
    """Up by 1 and down by 1 after step 10, window 8: the halves differ by k/4 once k <= 4 steps of the newer half are
    new, with s^2 = k (4 - k) / 12 in it, so the ratio is sqrt(3 k / (4 - k)): 3 at k = 3, infinite at 4, then back."""
    rewards, held_out = [0.0] * 10 + [1.0] * 10, [0.0] * 10 + [-1.0] * 10
    assert acts_at(divergence(rise=2.9, fall=2.9), scored(rewards, held_out)) == [13, 14, 15]
    assert acts_at(divergence(rise=3.1, fall=3.1), scored(rewards, held_out)) == [14]


@pytest.mark.parametrize(
    ("rewards", "held_out"),
    [
        ([0.1] * 40, [0.7] * 40),
        ([0.1 * step for step in range(40)], [0.7] * 40),  # learns, and the held-out scorer does not mind
        ([0.1 * step for step in range(40)], [0.1 * step for step in range(40)]),  # learns what is meant
        ([0.1] * 40, [-0.1 * step for step in range(40)]),  # both are not well, but nothing is gamed
        ([-0.1 * step for step in range(40)], [0.1 * step for step in range(40)]),
    ],
)
def test_all_else_is_silent(rewards: list[float], held_out: list[float]) -> None:
    for limits in ({}, {"rise": 0.0, "fall": 0.0}):
        assert acts_at(divergence(**limits), scored(rewards, held_out)) == []


def test_noise_alone_hardly_ever_acts() -> None:
    draws = np.random.default_rng(1).normal(size=(2, 5000))
    assert len(acts_at(divergence(window=20), scored(*draws.tolist()))) <= 5


@pytest.mark.parametrize("nothing", [None, NAN, INF])
def test_a_step_without_one_of_the_two_is_left_out(nothing: float | None) -> None:
    line = [float(step) for step in range(12)]
    down = [-value for value in line]
    line[2], down[5] = nothing, nothing  # type: ignore[call-overload]
    assert acts_at(divergence(), scored(line, down)) == [10, 11, 12]
    assert acts_at(divergence(), scored(line, [nothing] * 12)) == []


def test_columns_can_be_named() -> None:
    rows = [
        {"reward": 0.0, "reward_mean/a/x": 0.0, "reward_mean/a/y": float(n), "reward_mean/judge/p": 0.0,
         "reward_mean/judge/q": -float(n)}
        for n in range(8)
    ]  # fmt: skip
    assert acts_at(divergence(), rows) == []
    assert acts_at(divergence(reward="a", held_out="judge/q"), rows) == []
    assert acts_at(divergence(reward="a/y", held_out="judge"), rows) == []
    guard = divergence(reward="a/y", held_out="judge/q", action="stop")
    (verdict,) = [verdict for verdict in map(guard.see, rows) if verdict != WELL]
    assert verdict.action == "stop"
    assert verdict.reason.startswith("over 8 steps a/y rose by 4 (standard error 0.91) while judge/q, held out, fell")


# ---- the guards of a run

CONFIGS: tuple[GuardConfig, ...] = (
    LimitConfig(metric="kl", max=1.0, patience=2),
    LimitConfig(metric="kl", max=5.0, patience=1, action="stop", label="hard"),
    HeldOutDivergenceConfig(held_out="judge", window=4, rise=0.5, fall=0.5),
)


def test_a_warning_is_said_when_it_begins_and_when_it_is_over_and_a_stop_each_time() -> None:
    guards = RunGuards(CONFIGS)
    said = [guards.see(row) for row in kl(2, 2, 2, 9, 9, 0.5, 0.5)]
    assert [[(word.guard, word.kind) for word in words] for words in said] == [
        [], [("limit/kl", "begins")], [], [("hard", "stop")], [("hard", "stop")], [("limit/kl", "over")], [],
    ]  # fmt: skip
    assert said[1] == [Word("limit/kl", "begins", "kl is 2, and above 1 for 2 steps in a row")]


values = st.one_of(st.none(), st.just(NAN), st.floats(-10, 10))
stories = st.lists(st.tuples(values, values, values), max_size=30)


@settings(deadline=None)
@given(stories, st.integers(0, 30))
def test_a_state_through_json_goes_on_as_the_uninterrupted_guards(story: Any, cut: int) -> None:
    rows = [
        {name: value for name, value in zip(("kl", "reward", "reward_mean/judge/s"), each, strict=True)
         if value is not None}
        for each in story
    ]  # fmt: skip
    whole = RunGuards(CONFIGS)
    expected = [whole.see(row) for row in rows]
    first, second = RunGuards(CONFIGS), RunGuards(CONFIGS)
    said = [first.see(row) for row in rows[:cut]]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert said + [second.see(row) for row in rows[cut:]] == expected
    assert second.state_dict() == whole.state_dict()


def test_a_window_half_full_goes_on_through_json() -> None:
    line = [float(step) for step in range(8)]
    rows = scored(line, [-value for value in line])
    first, second = divergence(), divergence()
    assert acts_at(first, rows[:5]) == []
    second.restore(json.loads(json.dumps(first.state())))
    assert acts_at(second, rows[5:]) == [3]


def test_nothing_known_begins_anew_and_a_state_of_other_settings_is_read_with_these() -> None:
    guards = RunGuards(CONFIGS)
    for row in kl(2, 2):
        guards.see(row)
    state = guards.state_dict()
    guards.load_state_dict({})  # a checkpoint from before there were guards
    assert guards.state_dict() == RunGuards(CONFIGS).state_dict()
    wider = RunGuards((LimitConfig(metric="kl", max=3.0, patience=1, action="stop"),))
    wider.load_state_dict(state)
    assert [wider.see(row) for row in kl(2.5)] == [[Word("limit/kl", "over")]]
    other = RunGuards((LimitConfig(metric="loss", max=1.0, patience=1, label="limit/kl"),))
    other.load_state_dict(state)
    assert other.see({}) == [Word("limit/kl", "over")], "it watches something else now"
    longer = RunGuards((LimitConfig(metric="kl", max=1.0, patience=4, action="stop"),))
    longer.load_state_dict(state)
    assert [[word.kind for word in longer.see(row)] for row in kl(2, 2)] == [["over"], ["stop"]]
    another = RunGuards((HeldOutDivergenceConfig(held_out="judge", label="limit/kl"),))
    another.load_state_dict(state)
    assert (
        another.state_dict() == RunGuards((HeldOutDivergenceConfig(held_out="judge", label="limit/kl"),)).state_dict()
    )


def test_a_guard_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Third(Guard[CustomGuard]):
        """Acts at every third step."""

        seen = 0

        def see(self, row: Row) -> Verdict:
            self.seen += 1
            return self.alarm(self.config.options["why"]) if self.seen % 3 == 0 else WELL

    own = ModuleType("own_guards")
    own.Third = Third  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_guards", own)
    guards = RunGuards((CustomGuard(name="own_guards:Third", options={"why": "three"}, action="stop"),))
    assert [guards.see({}) for _ in range(3)] == [[], [], [Word("own_guards:Third", "stop", "three")]]
    guards.load_state_dict(guards.state_dict())
    assert guards.see({}) == [], "a guard that keeps no state begins anew"
