"""Errors cross process boundaries and arrive as what they were; copying takes the same path (`__reduce__`)."""

from __future__ import annotations

import copy

import pytest

from contracts import errors
from contracts.errors import ConfigError, ConfigErrors, SalonError

ONE_ARGUMENT = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, SalonError) and kind not in (ConfigError, ConfigErrors)
]


@pytest.mark.parametrize("kind", ONE_ARGUMENT, ids=lambda kind: kind.__name__)
def test_an_error_arrives_as_it_was_sent(kind: type[SalonError]) -> None:
    arrived = copy.deepcopy(kind("what happened"))
    assert type(arrived) is kind
    assert str(arrived) == "what happened"
    assert arrived.exit_code == kind.exit_code


def test_a_config_error_keeps_field_problem_and_way_out() -> None:
    sent = ConfigErrors([ConfigError("a.b", "is wrong", "write c"), ConfigError("d", "is missing")])
    arrived = copy.deepcopy(sent)
    assert str(arrived) == str(sent)
    assert [(e.field, e.problem, e.way_out) for e in arrived.errors] == [
        ("a.b", "is wrong", "write c"),
        ("d", "is missing", ""),
    ]
