"""Weights across a process boundary: export, strict load, digest, canary."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from contracts.digests import digest_arrays
from contracts.errors import WeightsError
from policy.policy import Policy
from policy.weights import canary, export_arrays, live_digest, load_arrays

Load = Callable[..., Policy]
Disturb = Callable[..., Policy]


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_weights_arrive_bit_for_bit(load_policy: Load, disturb: Disturb, tuning: str, dtype: str) -> None:
    learner = disturb(load_policy(tuning, dtype=dtype))
    actor = load_policy(tuning, dtype=dtype, trainable=False)
    arrays, dtypes = export_arrays(learner.trainable())
    assert set(dtypes.values()) == ({"bfloat16"} if dtype == "bf16" else set())
    for array in arrays.values():
        array.flags.writeable = False  # as arrays read from an object store are
    digest = digest_arrays(arrays, dtypes)
    assert live_digest(learner) == digest
    assert live_digest(actor) != digest
    load_arrays(actor, arrays, dtypes)
    assert live_digest(actor) == digest
    np.testing.assert_array_equal(canary(actor), canary(learner))


def test_an_export_is_a_copy(load_policy: Load, disturb: Disturb) -> None:
    learner = load_policy()
    arrays, _ = export_arrays(learner.trainable())
    before = {name: array.copy() for name, array in arrays.items()}
    disturb(learner)
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, before[name])


@pytest.mark.parametrize("fault", ["missing", "unknown", "prefix", "shape", "dtype"])
def test_what_does_not_fit_is_refused_and_changes_nothing(load_policy: Load, disturb: Disturb, fault: str) -> None:
    learner, actor = disturb(load_policy("lora")), load_policy("lora", trainable=False)
    arrays, dtypes = export_arrays(learner.trainable())
    last = sorted(arrays)[-1]
    if fault == "missing":
        del arrays[last]
    elif fault == "unknown":
        arrays["extra"] = arrays[last]
    elif fault == "prefix":
        arrays[f"module.{last}"] = arrays.pop(last)
    elif fault == "shape":
        arrays[last] = arrays[last][:-1]
    else:
        arrays[last] = arrays[last].astype(np.float64)
    before = live_digest(actor)
    with pytest.raises(WeightsError, match="extra" if fault == "unknown" else last.replace(".", r"\.")):
        load_arrays(actor, arrays, dtypes)
    assert live_digest(actor) == before


def test_the_canary_sees_adapters_that_are_off(load_policy: Load, disturb: Disturb) -> None:
    learner = disturb(load_policy("lora"))
    alive = canary(learner)
    assert alive.dtype == np.float32
    assert np.isfinite(alive).all()
    np.testing.assert_array_equal(canary(learner), alive)
    with learner.reference():
        assert np.abs(canary(learner) - alive).max() > 1e-3
    for module in learner.module.modules():
        if hasattr(module, "scaling"):
            module.scaling["default"] = 0.0
    assert np.abs(canary(learner) - alive).max() > 1e-3


def test_the_canary_draws_nothing_from_the_global_generator(load_policy: Load) -> None:
    policy = load_policy()
    torch.manual_seed(1)
    first = canary(policy)
    torch.manual_seed(2)
    np.testing.assert_array_equal(canary(policy), first)
