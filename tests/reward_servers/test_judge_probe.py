"""The probe tells known judges apart: one that looks, one that says yes to everything, one that counts places."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from judge_helpers import consult, flat, judging, leans, options_for, pictures_of, says, texts_of

from playground.world.captions import parse_caption
from playground.world.verify import verify
from reward_servers.judging.cli import judge as judge_cli
from reward_servers.judging.probe import IMAGE_KEYS, TEXT_KEYS, Report, drawn, playground_cases, probe, wilson
from reward_servers.judging.protocols.pairwise import Pairwise
from reward_servers.judging.protocols.yes_no import YesNo

CASES = playground_cases(6)


def verifier(body: dict[str, Any]) -> dict[str, Any]:
    """A judge that cannot be fooled: the playground's verifier."""
    text, pictures = texts_of(body), pictures_of(body)
    try:
        spec = parse_caption(text.split('"')[1])
    except ValueError:
        return leans({"yes": 0.01, "no": 0.98}, body)
    fits = [verify(picture, spec).strict for picture in pictures]
    if len(pictures) == 2:
        return leans({"1": 0.9, "2": 0.1} if fits[0] else {"1": 0.1, "2": 0.9}, body)
    return leans({"yes": 0.95, "no": 0.05} if fits[0] else {"yes": 0.05, "no": 0.95}, body)


def always_yes(body: dict[str, Any]) -> dict[str, Any]:
    return leans({"1": 0.9, "2": 0.1} if len(pictures_of(body)) == 2 else {"yes": 0.9, "no": 0.1}, body)


def report_of(behave: Callable[[dict[str, Any]], Any]) -> Report:
    with judging(behave) as fake:
        return consult(options_for(fake.url), lambda judge: probe(judge, CASES, YesNo(), Pairwise()))


def rates(report: Report, event: str) -> dict[str, float | None]:
    return {rate.probe: rate.rate for rate in report.rates if rate.event == event}


def test_a_judge_that_looks_passes() -> None:
    report = report_of(verifier)
    assert set(rates(report, "false yes").values()) == {0.0}
    assert len(rates(report, "false yes")) == 1 + len(IMAGE_KEYS) + len(TEXT_KEYS)
    assert rates(report, "false no") == {"right": 0.0}
    assert rates(report, "flipped") == {"swapped order": 0.0}
    assert rates(report, "prefers the wrong picture") == {"swapped order": 0.0}
    assert rates(report, "changed its mind") == {"repeated": 0.0}
    assert (report.response_consistency, report.instruction_consistency) == (1.0, 1.0)


def test_a_judge_that_says_yes_fails_every_key_and_is_blind_to_contrast() -> None:
    report = report_of(always_yes)
    assert set(rates(report, "false yes").values()) == {1.0}
    assert rates(report, "flipped") == {"swapped order": 1.0}
    assert rates(report, "prefers the first place") == {"swapped order": 1.0}
    assert (report.response_consistency, report.instruction_consistency) == (0.5, 0.5)


def test_what_was_not_decided_is_no_false_positive() -> None:
    report = report_of(lambda body: says(None, refusal="no"))
    assert {rate.rate for rate in report.rates} == {None}
    assert all(rate.undecided == len(CASES) for rate in report.rates)
    assert report.response_consistency is None
    assert report.worst_false_positive() is None


def test_injected_text_is_really_drawn_and_shows_no_object() -> None:
    picture = drawn("a red circle", flat(40, 32))
    assert picture.shape == (32, 32, 3)
    assert 0.01 < (picture < 128).mean() < 0.6
    assert not verify(picture, parse_caption("a red circle")).strict
    assert (drawn("a red circle", flat(40, 32)) != drawn("a blue square", flat(40, 32))).any()


def test_wilson_intervals() -> None:
    low, high = wilson(5, 10)
    assert (low, high) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0, 10)[0] == 0.0
    assert wilson(0, 10)[1] == pytest.approx(0.2775, abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)
    assert all(math.isfinite(bound) for bound in wilson(1000, 1000))


def test_the_command_prints_a_table_and_fails_beyond_a_threshold() -> None:
    def run(*arguments: str) -> Any:
        with judging(always_yes) as fake:
            return CliRunner().invoke(judge_cli, ["probe", fake.url, "--model", "judge", "--cases", "2", *arguments])

    shown = run()
    assert shown.exit_code == 0
    assert "image key: white" in shown.output
    body = run("--json", "--no-pairs")
    assert json.loads(body.output)["instruction_consistency"] == 0.5
    failed = run("--threshold", "0.02", "--no-pairs")
    assert failed.exit_code == 1
    assert "got a yes in 100.0% of cases" in failed.output
    assert np.all([case.caption != case.contrast for case in CASES])
