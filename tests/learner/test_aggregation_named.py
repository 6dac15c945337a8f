"""Aggregation rules over named columns, against the closed forms of their papers (catalogue *Check*)."""

from __future__ import annotations

import numpy as np
import pytest
from aggregation_kit import advantages, point, rewards, rule, scorer, scores, steps
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.config.objectives import CreditConfig
from contracts.config.scoring import RewardConfig
from contracts.errors import ScoringError
from learner.credit.gae import GAE
from learner.credit.rewards import combine, filter_group
from learner.types import CreditBatch

FEW = settings(max_examples=25, deadline=None)
rows = st.integers(2, 6).flatmap(
    lambda size: st.tuples(*[st.lists(st.floats(0, 1, width=32), min_size=size, max_size=size) for _ in range(2)])
)


def two(a, b):
    return scores(point("a", a), point("b", b))


# ---- constrained ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multiplier", ["tanh", "sigmoid", "clamp"])
def test_a_multiplier_falls_above_its_threshold_and_rises_below(multiplier):
    for score, sign in ((0.9, -1), (0.1, 1)):
        constrained = rule("constrained", thresholds={"a": 0.5}, multiplier=multiplier, initial=0.2)
        before = constrained.multiplier("a")
        constrained.update({"a": score})
        assert np.sign(constrained.multiplier("a") - before) == sign


@pytest.mark.parametrize("multiplier", ["tanh", "sigmoid", "clamp"])
@FEW
@given(lam=st.floats(0.1, 2), gap=st.floats(1e-6, 0.5))
def test_at_its_threshold_a_multiplier_rests_and_turns_there(multiplier, lam, gap):
    """d lambda = -lr mu'(lambda) (J - theta): nothing at theta, and as much up below it as down above it."""

    def moved(score):
        constrained = rule("constrained", thresholds={"a": 0.5}, multiplier=multiplier, initial=lam)
        constrained.update({"a": score})
        return constrained.duals["a"].lam - lam

    assert moved(0.5) == 0
    assert moved(0.5 + gap) == pytest.approx(-moved(0.5 - gap), rel=1e-6)
    slope = {"tanh": 1 - np.tanh(lam) ** 2, "sigmoid": np.exp(-lam) / (1 + np.exp(-lam)) ** 2, "clamp": 1.0}
    assert moved(0.5 + gap) == pytest.approx(-0.1 * slope[multiplier] * gap, rel=1e-6)


def test_above_its_threshold_only_tanh_comes_to_push_down():
    """Held above theta for long: xi goes below 0 and on, mu stays in (0, 1), the clamped one ends at 0."""
    ends = {}
    for multiplier in ("tanh", "sigmoid", "clamp"):
        constrained = rule("constrained", thresholds={"a": 0.5}, multiplier=multiplier, initial=0.2)
        for _ in range(200):
            constrained.update({"a": 0.9})
        ends[multiplier] = constrained.multiplier("a")
        (got,) = rewards(constrained, scores(point("a", [0.9, 0.95])))
        assert np.sign(got.totals()[1]) == np.sign(ends[multiplier])
    assert ends["tanh"] < -0.9
    assert 0 < ends["sigmoid"] < 0.2
    assert ends["clamp"] == 0


def settle(multiplier, pull, steps=8000, dt=0.05, initial=0.0, moves=True):
    """The catalogue's toy: J' = mu - (1 - mu) k J, k = pull; the dual step sees J after each move."""
    settings_ = {"multiplier": multiplier, "lr": 0.05 * dt, "momentum": 0.0, "initial": initial}
    constrained = rule("constrained", thresholds={"a": 1.0}, **settings_)
    path = [0.0]
    for _ in range(steps):
        mu = constrained.multiplier("a")
        path.append(path[-1] + dt * (mu - (1 - mu) * pull * path[-1]))
        if moves:
            constrained.update({"a": path[-1]})
    return path, constrained.multiplier("a")


def test_the_toy_settles_at_its_threshold_with_the_closed_form_multiplier():
    """mu* = k theta / (1 + k theta) = 1/3 at theta = 1, k = 1/2."""
    path, mu = settle("tanh", 0.5)
    assert path[-1] == pytest.approx(1.0, abs=1e-3)
    assert mu == pytest.approx(1 / 3, abs=1e-3)


def test_with_a_multiplier_that_stays_one_the_toy_runs_through_its_threshold_without_bound():
    """J' = mu - (1 - mu) k J = 1: what fixed weights do. With the dual step J stays about theta."""
    path, mu = settle("clamp", 0.5, initial=1.0, moves=False)
    assert mu == 1
    assert path[-1] == pytest.approx(8000 * 0.05)
    assert max(settle("tanh", 0.5)[0]) < 2


def test_without_the_pull_the_toy_goes_on_swinging():
    """What validate refuses: J' = mu, lambda' = -(J - theta) is undamped."""
    path, _ = settle("tanh", 0.0)
    late = np.array(path[-3000:])
    assert late.max() - late.min() > 0.5


def test_one_constraint_with_multiplier_one_is_the_plain_advantage():
    constrained = rule("constrained", thresholds={"a": 0.5}, multiplier="clamp", initial=1.0)
    values = [0.1, 0.4, 0.7]
    (got,) = rewards(constrained, scores(point("a", values)))
    centred = np.array(values, np.float32).astype(np.float64) - np.mean(np.array(values, np.float32).astype(np.float64))
    np.testing.assert_allclose(got.totals(), centred / (centred.std() + 1e-8), atol=1e-12)


def test_a_group_is_not_given_up_for_multipliers_that_are_still_zero():
    """tanh(0) = 0 silences every reward in the first step; before the claim a group must count all the same."""
    constrained = rule("constrained", thresholds={"a": 0.5}, multiplier="tanh")
    group = scores(point("a", [0, 1]))
    assert rewards(constrained, group)[0].totals().tolist() == [0, 0]
    tables = dict(group.tables)
    ahead = combine(tables, [scorer("a")], aggregation=constrained.config)
    np.testing.assert_allclose(ahead.totals(), [-1, 1], atol=1e-6)
    assert filter_group(ahead, RewardConfig()) is None


def test_the_anchor_weighs_what_the_multipliers_leave():
    constrained = rule("constrained", thresholds={"a": 0.5}, anchor="b", multiplier="clamp", initial=0.25)
    (got,) = rewards(constrained, two([0, 1], [1, 0]))
    np.testing.assert_allclose(got.totals(), [0.75 - 0.25, 0.25 - 0.75], atol=1e-6)


# ---- base and bonus ------------------------------------------------------------------------------------------------

UNIT = {"base": "a", "bonus": ["b"], "base_range": [0, 1], "bonus_range": [0, 1]}


def test_firm_pays_nothing_for_quality_alone():
    """(base, bonus): (0, any) -> 0, (1, 1) -> 1, (1, 0) -> 0.4; a weighted sum would pay 0.4 to (0, 1)."""
    (got,) = rewards(rule("base_and_bonus", **UNIT), two([0, 0, 1, 1, 0.5], [0, 1, 1, 0, 0.5]))
    np.testing.assert_allclose(got.totals(), [0, 0, 1, 0.4, 0.5 * 0.7], atol=1e-7)
    (edit,) = rewards(rule("base_and_bonus", **UNIT, base_share=0.6, bonus_share=0.4), two([0, 1], [1, 0]))
    np.testing.assert_allclose(edit.totals(), [0, 0.6], atol=1e-7)


def test_firm_maps_scores_of_one_to_five_takes_the_smallest_bonus_and_fails_below_a_score():
    jury = [scorer("a"), scorer("b"), scorer("c")]
    group = scores(point("a", [5, 3, 4]), point("b", [5, 5, 5]), point("c", [3, 5, 5]), jury=jury)
    (got,) = rewards(rule("base_and_bonus", base="a", bonus=["b", "c"]), group)
    np.testing.assert_allclose(got.totals(), [0.4 + 0.6 * 0.5, 0.5, 0.75], atol=1e-7)
    (failed,) = rewards(rule("base_and_bonus", base="a", bonus=["b", "c"], fail_at=3), group)
    np.testing.assert_allclose(failed.totals(), [0.7, 0.5 * 0.4, 0.75], atol=1e-7)


def test_a_bonus_that_failed_is_neither_the_full_one_nor_none():
    jury = [scorer("a"), scorer("b", required=False)]
    group = scores(point("a", [1, 1, 1]), point("b", [0.2, 0.8, np.nan]), jury=jury)
    (got,) = rewards(rule("base_and_bonus", **UNIT), group)
    np.testing.assert_allclose(got.totals(), 0.4 + 0.6 * np.array([0.2, 0.8, 0.5]), atol=1e-7)
    (a,) = advantages([got])
    assert a[2] == pytest.approx(0, abs=1e-7)


# ---- gates ---------------------------------------------------------------------------------------------------------


def gates(above, **more):
    return rule("gates", order=[{"column": "a", "above": above}, {"column": "b", "weight": 0.5}], **more)


def test_behind_a_shut_gate_nothing_counts_and_before_minus_infinity_everything_does():
    (got,) = rewards(gates(0.5), two([0.4, 0.4, 0.5, 0.6], [0, 1, 1, 1]))
    np.testing.assert_allclose(got.totals(), [0.4, 0.4, 0.5, 1.1], atol=1e-6)
    (open_,) = rewards(gates(-1e30), two([0.4, 0.6], [1, 0.2]))
    np.testing.assert_allclose(open_.totals(), [0.9, 0.7], atol=1e-6)
    (soft,) = rewards(gates(0.5, temperature=0.1), two([0.6, 0.4], [1, 1]))
    np.testing.assert_allclose(soft.totals(), [0.6 + 0.5 / (1 + np.exp(-1)), 0.4 + 0.5 / (1 + np.exp(1))], atol=1e-6)


@FEW
@given(group=rows)
def test_a_passing_sample_outranks_a_failing_one(group):
    passes = np.array(group[0]) > 0.5
    order = [{"column": "a", "above": 0.5}, {"column": "b"}]
    (got,) = rewards(rule("gates", order=order), two(passes.astype(float), group[1]))
    if passes.any() and not passes.all():
        assert got.totals()[passes].min() >= got.totals()[~passes].max()


def test_an_unknown_gate_neither_grants_nor_refuses_what_lies_behind():
    jury = [scorer("a"), scorer("b", required=False), scorer("c")]
    order = [{"column": "a"}, {"column": "b", "above": 0.5}, {"column": "c"}]
    group = scores(point("a", [1, 1, 1]), point("b", [1, 0, np.nan]), point("c", [0.8, 0.8, 0.8]), jury=jury)
    (got,) = rewards(rule("gates", order=order), group)
    assert got.valid.all()
    (a,) = advantages([got])
    np.testing.assert_allclose(a, [0.9, -0.9, 0.0], atol=1e-6)


# ---- trust ---------------------------------------------------------------------------------------------------------


def test_a_judge_that_prefers_wrong_samples_by_one_is_trusted_by_one_over_e():
    trust = rule("trust", outcome="a", judge="b")
    assert trust.trust(two([1, 1, 0, 0], [0, 0, 1, 1]).named("a", "b")) == pytest.approx(np.exp(-1))
    assert trust.trust(two([1, 1, 0, 0], [0.6, 0.4, 0.5, 0.5]).named("a", "b")) == 1.0
    assert trust.trust(two([1, 1], [0.3, 0.9]).named("a", "b")) is None
    assert trust.trust(two([0.05, 0], [0.3, 0.9]).named("a", "b")) is None
    assert trust.trust(two([0.6, 0.7], [0.3, 0.9]).named("a", "b")) is None, "none is wrong"


def test_the_judge_adds_its_trusted_share_fades_and_adds_nothing_to_failures():
    group = two([1, 0.4, 0], [0.9, 0.5, 0.8])
    (got,) = rewards(rule("trust", outcome="a", judge="b"), group, step=0)
    np.testing.assert_allclose(got.totals(), np.array([1, 0.4, 0]) + 0.3 * np.array([0.9, 0.5, 0]), atol=1e-6)
    (late,) = rewards(rule("trust", outcome="a", judge="b", anneal_steps=10), group, step=10)
    np.testing.assert_allclose(late.totals() - [1, 0.4, 0], (got.totals() - [1, 0.4, 0]) / np.e, atol=1e-6)
    (never,) = rewards(rule("trust", outcome="a", judge="b", anneal_steps=1), group, step=2000)
    np.testing.assert_allclose(never.totals(), [1, 0.4, 0], atol=1e-6)


@FEW
@given(group=rows)
def test_trust_lies_between_one_over_e_and_one(group):
    outcome = (np.array(group[0]) > 0.5).astype(float)
    trust = rule("trust", outcome="a", judge="b").trust(two(outcome, group[1]).named("a", "b"))
    assert trust is None or np.exp(-1) <= trust <= 1


# ---- confidence mix ------------------------------------------------------------------------------------------------

MIX = {"model": "a", "rule": "b", "confidence": "c", "weights": [1.0, 0.5, 0.5]}


def mixed(model, of_rule, confidence, lengths=None, adherence=None, **settings_):
    tables = [point("a", model), point("b", of_rule), point("c", confidence)]
    jury = [scorer("a"), scorer("b", required=False), scorer("c", required=False)]
    if lengths is not None:
        tables.append(point("d", lengths))
        jury.append(scorer("d"))
    if adherence is not None:
        tables.append(point("e", adherence))
        jury.append(scorer("e"))
    return rewards(rule("confidence_mix", **{**MIX, **settings_}), scores(*tables, jury=jury))[0]


def test_full_confidence_ignores_the_model_and_none_ignores_the_rule():
    np.testing.assert_allclose(mixed([-50, 9, 3], [0.1, 0.2, 0.9], [1, 1, 1]).totals(), [0.1, 0.2, 0.9], atol=1e-6)
    model = np.array([1.0, 2.0, 6.0])
    sigmoid = 1 / (1 + np.exp(-(model - model.mean()) / model.std()))
    np.testing.assert_allclose(mixed(model, [1, 0, 1], [0, 0, 0]).totals(), sigmoid, atol=1e-6)
    np.testing.assert_allclose(mixed(model, [np.nan] * 3, [1, 1, 1]).totals(), sigmoid, atol=1e-6)
    assert mixed(model, [np.nan] * 3, [1, 1, 1]).valid.all()


def test_length_is_free_up_to_its_maximum_and_penalised_to_one_beyond():
    free = mixed([1, 2, 3], [1, 1, 1], [1, 1, 1], [0, 5, 10], length="d", length_max=10, length_buffer=4)
    np.testing.assert_allclose(free.totals(), [1, 1, 1])
    paid = mixed([1, 2, 3], [1, 1, 1], [1, 1, 1], [10, 12, 99], length="d", length_max=10, length_buffer=4)
    np.testing.assert_allclose(paid.totals(), [1, 0.75, 0.5])


EXTRAS = {"instruction": "e", "length": "d", "length_max": 10, "length_buffer": 4}


def test_every_part_of_the_mix_in_closed_form():
    """R = w_a (q r_rule + (1 - q) sigmoid(z)) + w_i r_instr - w_l pen."""
    model, of_rule, q = np.array([1.0, 2.0, 6.0]), np.array([0.5, 1.0, 0.25]), np.array([0.0, 0.5, 1.0])
    adherence, lengths = np.array([0.5, 0.25, 1.0]), np.array([10.0, 11.0, 20.0])
    weights = [2.0, 0.75, 0.25]
    got = mixed(model, of_rule, q, lengths, adherence, weights=weights, **EXTRAS)
    accuracy = q * of_rule + (1 - q) / (1 + np.exp(-(model - model.mean()) / model.std()))
    expected = 2.0 * accuracy + 0.75 * adherence - 0.25 * np.array([0, 0.25, 1])
    np.testing.assert_allclose(got.totals(), expected, atol=1e-6)


@FEW
@given(
    parts=st.tuples(st.floats(-3, 3), st.floats(0, 1), st.floats(0, 1), st.floats(0, 20), st.floats(0, 1)),
    more=st.floats(0, 2),
)
def test_the_mix_is_monotone_in_each_component(parts, more):
    """Five samples: the first as it is, each other with more of one part; more length is worse."""
    model, of_rule, q, length, adherence = parts
    plain, by_model, by_rule, by_length, by_adherence = mixed(
        [model, model + more, model, model, model], [of_rule, of_rule, of_rule + more, of_rule, of_rule], [q] * 5,
        [length, length, length, length + more, length], [adherence] * 4 + [adherence + more], **EXTRAS,
    ).totals()  # fmt: skip
    assert by_model >= plain - 1e-6
    assert by_rule >= plain - 1e-6
    assert by_length <= plain + 1e-6
    assert by_adherence == pytest.approx(plain + 0.5 * more, abs=1e-5)


def test_running_statistics_are_those_of_what_was_seen():
    mix = rule("confidence_mix", **MIX, decay=0.5)
    for model in ([1.0, 3.0], [5.0, 7.0]):
        rewards(mix, scores(point("a", model), point("b", [0, 1]), point("c", [1, 1])))
    mean, square = (0.5 * 2 + 6) / 1.5, (0.5 * 5 + 37) / 1.5
    assert mix.past.mean == pytest.approx(mean)
    assert mix.past.variance == pytest.approx(square - mean**2)


# ---- directional ---------------------------------------------------------------------------------------------------


def test_the_corrected_score_is_that_of_the_corrected_embedding():
    rng = np.random.default_rng(0)
    features, text, b = rng.normal(size=(5, 8)), rng.normal(size=8), rng.normal(size=8)

    def unit(vector):
        return vector / np.linalg.norm(vector)

    plus, minus = unit(unit(text) + b), unit(unit(text) - b)
    images = features / np.linalg.norm(features, axis=1, keepdims=True)
    for omega in (1.5, 1.0, 0.5):
        (got,) = rewards(
            rule("directional", plus="a", minus="b", strength=omega), two(images @ plus, images @ minus)
        )  # fmt: skip
        np.testing.assert_allclose(got.totals(), images @ (minus + omega * (plus - minus)), atol=1e-6)
    (same,) = rewards(rule("directional", plus="a", minus="b"), two(images @ unit(text), images @ unit(text)))
    np.testing.assert_allclose(same.totals(), images @ unit(text), atol=1e-6)


# ---- ppr renorm ----------------------------------------------------------------------------------------------------

PPR = {"outcome": "a", "process": "b"}


def test_the_sign_of_a_steps_reward_follows_the_outcome():
    process = np.array([[0.2, 0.7, 0.4], [0.2, 0.7, 0.4]])
    (got,) = rewards(rule("ppr_renorm", **PPR), scores(point("a", [1, 0]), steps("b", process, (0, 2, 3))))
    np.testing.assert_allclose(got.steps, [[0.2, 0.7, 1], [-0.8, -0.3, 0]], atol=1e-6)
    np.testing.assert_allclose(got.totals(), [1, 0])


def test_steps_are_found_by_their_number_and_a_missing_one_is_told():
    process = np.array([[0.9, 0.2, 0.7], [0.9, 0.2, 0.7]])
    (got,) = rewards(rule("ppr_renorm", **PPR), scores(point("a", [1, 0]), steps("b", process, (1, 0, 2))))
    np.testing.assert_allclose(got.steps[0], [0.2, 0.7, 1], atol=1e-6)
    with pytest.raises(ScoringError, match="no score of the recorded step 2"):
        rewards(rule("ppr_renorm", **PPR), scores(point("a", [1, 0]), steps("b", process, (0, 1, 3))))


def test_a_missing_optional_process_score_is_the_groups_mean():
    jury = [scorer("a"), scorer("b", required=False)]
    process = np.array([[0.2, 0.6, 0.1], [0.4, 0.8, 0.1], [np.nan] * 3])
    (got,) = rewards(
        rule("ppr_renorm", **PPR), scores(point("a", [1, 1, 1]), steps("b", process, (0, 2, 3)), jury=jury)
    )
    np.testing.assert_allclose(got.steps[2], [0.3, 0.7, 1], atol=1e-6)


def test_a_critic_takes_the_rewards_of_each_step_and_beta_cancels_from_no_sum():
    """With V = 0, gamma = lam = 1 the advantage of step k is the sum of rewards from k on."""
    process = np.array([[0.2, 0.7, 0.4], [0.9, 0.1, 0.4]])
    (got,) = rewards(rule("ppr_renorm", **PPR), scores(point("a", [1, 0]), steps("b", process, (0, 2, 3))))

    class Objective:
        gamma, lam = 1.0, 1.0

    credit = GAE(CreditConfig(normalise=False), Objective()).advantages(CreditBatch({0: got}, {0: np.zeros((2, 3))}))
    np.testing.assert_allclose(credit.advantages[0], [[1.9, 1.7, 1.0], [-1.0, -0.9, 0.0]], atol=1e-6)
