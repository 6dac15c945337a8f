"""The admission rule's arithmetic, and admission of a source's prompts into a ledger."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.admission import Admission, AdmissionRule
from cluster.ledger import Ledger
from contracts.config import RunConfig
from contracts.config.load import config_from_tree
from contracts.errors import LedgerError
from contracts.wire import PromptSpec, Source


class Numbers:
    """A prompt source whose prompts are their positions."""

    def at(self, position: int) -> PromptSpec:
        return PromptSpec(text=str(position))


def config(groups_per_step: int = 2, max_staleness: int = 1, group_size: int = 4) -> RunConfig:
    return config_from_tree(
        {
            "name": "run",
            "model": {"path": "model"},
            "scorers": [{"name": "judge", "function": "judge:score"}],
            "objective": {"name": "grpo"},
            "rollout": {"groups_per_step": groups_per_step, "group_size": group_size, "micro_batch": 1},
            "pipeline": {"max_staleness": max_staleness},
            "stop": {"steps": 1},
        }
    )


@given(st.integers(1, 50), st.integers(0, 5), st.integers(0, 1000), st.integers(0, 1000))
def test_whatever_is_admitted_can_be_painted_with_published_weights(
    groups_per_step: int, max_staleness: int, published: int, live: int
) -> None:
    rule = AdmissionRule(groups_per_step, max_staleness)
    if rule.may_admit(live):
        assert 0 <= rule.min_version(published, live) <= published


@given(st.integers(1, 20), st.integers(0, 4), st.integers(0, 500))
def test_without_discards_staleness_is_bounded_by_construction(groups: int, max_staleness: int, index: int) -> None:
    rule = AdmissionRule(groups, max_staleness)
    trained_from = index // groups  # group `index` of the run trains in step index // P + 1, from this version
    for published in range(max(0, trained_from - max_staleness), trained_from + 1):
        before = index - published * groups
        assert trained_from - rule.min_version(published, before) <= max_staleness


def test_impossible_rules_are_refused() -> None:
    with pytest.raises(ValueError, match="groups_per_step"):
        AdmissionRule(0, 1)
    with pytest.raises(ValueError, match="max_staleness"):
        AdmissionRule(1, -1)


def test_prompts_are_admitted_in_order_up_to_the_bound_and_go_on_after_reopening(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    admission = Admission(ledger, config())
    assert admission.capacity == 4
    while admission.may_admit():
        admission.admit(Numbers())
    assert [ledger.prompt(row.group_id).text for row in ledger.rows()] == ["0", "1", "2", "3"]
    with pytest.raises(LedgerError):
        admission.admit(Numbers())
    ledger.close()

    ledger = Ledger(tmp_path / "ledger.sqlite")
    admission = Admission(ledger, config(max_staleness=2))
    assert admission.admit(Numbers()) == 4
    assert ledger.prompt(4).text == "4"
    ledger.close()


def test_a_pair_from_files_has_two_samples(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    group_id = Admission(ledger, config(), Source.FILES).admit(Numbers())
    row = ledger.row(group_id)
    assert (row.group_size, row.source) == (2, Source.FILES)
    ledger.close()
