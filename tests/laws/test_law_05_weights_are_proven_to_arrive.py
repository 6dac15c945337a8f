"""Law 5: weights are proven to arrive: digest of live tensors, and a canary closer to version v than to v-1.

Found within one step: a load that does nothing, keys that lost a prefix, LoRA scale 0, one stale actor of four.
"""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from actors import painter as painter_module
from cluster.inprocess import InProcessRun, start_in_process
from cluster.ledger.reader import LedgerReader
from contracts.config import RunConfig
from contracts.errors import WeightsError, WeightsNotProven
from policy.weights import load_arrays
from tests.laws.run_kit import controller_of, events, tiny_config


@pytest.fixture
def run(tiny_model_folder: Path, tmp_path: Path) -> InProcessRun:
    return start_in_process(tiny_config(tiny_model_folder, tmp_path))


@pytest.fixture
def lora_run(tiny_model_folder: Path, tmp_path: Path) -> InProcessRun:
    lora = {"rank": 4, "alpha": 8}
    return start_in_process(
        tiny_config(
            tiny_model_folder, tmp_path, model__tuning="lora", model__lora=lora, learner__optimizer={"lr": 1e-2}
        )
    )


@pytest.mark.parametrize("kind", ["run", "lora_run"])
def test_an_honest_load_is_proven(kind: str, request: pytest.FixtureRequest) -> None:
    run = request.getfixturevalue(kind)
    proofs = record_proofs(run)
    run.step()
    run.step()
    assert [proof.version for proof in proofs] == [1, 2]
    assert all(proof.canary_to_current < proof.canary_to_previous for proof in proofs)


@pytest.mark.parametrize("kind", ["run", "lora_run"])
def test_a_load_that_does_nothing_is_found_at_the_next_version(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = request.getfixturevalue(kind)
    monkeypatch.setattr(painter_module, "load_arrays", lambda *_: None)
    with pytest.raises(WeightsNotProven, match="digest"):
        run.step()


def test_keys_that_lost_a_prefix_are_refused_by_name(run: InProcessRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(painter_module, "load_arrays", lambda p, a, d: load_arrays(p, without_prefix(a), d))
    with pytest.raises(WeightsError):
        run.step()


def test_a_loader_that_skips_unknown_keys_is_found(run: InProcessRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def forgiving(policy: Any, arrays: Any, dtypes: Any) -> None:
        known = policy.trainable()
        live = {name: known[name].detach().numpy() for name in known}
        renamed = without_prefix(arrays)
        load_arrays(policy, {name: renamed.get(name, live[name]) for name in known}, dtypes)

    monkeypatch.setattr(painter_module, "load_arrays", forgiving)
    with pytest.raises(WeightsNotProven, match="digest"):
        run.step()


def test_lora_scale_zero_is_found_by_the_canary(lora_run: InProcessRun) -> None:
    lora_run.step()  # B is no longer zero, so the adapter matters
    scaled = 0
    for module in lora_run.painter.policy.module.modules():
        for name in getattr(module, "scaling", {}):
            module.scaling[name], scaled = 0.0, scaled + 1
    assert scaled
    with pytest.raises(WeightsNotProven, match="canary"):
        lora_run.step()


@pytest.mark.usefixtures("shared_ray")
def test_one_stale_actor_of_four_is_found_and_replaced(tiny_model_folder: Path, tmp_path: Path) -> None:
    import ray

    from cluster.controller import Parts

    config = tiny_config(
        tiny_model_folder, tmp_path, rollout__actors=4, rollout__groups_per_step=8, rollout__cpus_per_actor=0.25,
        stop__steps=1000, prompts__options={"stale_mark": str(tmp_path / "stale")},
    )  # fmt: skip
    controller = controller_of(config, Parts(painter="tests.laws.faulty_painters:OneStale"))
    result = controller.run.remote()
    deadline = time.monotonic() + 240
    while not stale_actors(config) or not stale_actors(config) <= painted_trained_weights(config):
        assert not ray.wait([result], timeout=0.5)[0], "the run ended first"
        assert time.monotonic() < deadline, "the replaced actor never painted again"
    ray.get(controller.stop.remote())
    summary = ray.get(result)
    found = events(config, "weights_not_proven")
    assert found[0]["step"] == 1  # the first version it did not load
    (stale,) = stale_actors(config)  # of four
    proven = {event["version"] for event in events(config, "weights_proven") if event["actor"] == stale}
    assert max(proven) >= 1, "what it ignored at first it has loaded in the end"
    assert summary["images_trained"] == summary["steps"] * 8 * 4


def stale_actors(config: RunConfig) -> set[str]:
    """Those found to hold other weights than those published."""
    return {event["actor"] for event in events(config, "weights_not_proven")}


def painted_trained_weights(config: RunConfig) -> set[str]:
    """Actors of groups that were painted with a version that training made: proven first, or they would not count."""
    with closing(LedgerReader(Path(config.runs_dir) / config.name / "ledger.sqlite")) as ledger:
        return {row.actor for row in ledger.rows() if (row.weight_version or 0) >= 1 and row.actor is not None}


def record_proofs(run: InProcessRun) -> list[Any]:
    proofs: list[Any] = []
    load = run.painter.load

    def recording(*args: Any) -> Any:
        proofs.append(load(*args))
        return proofs[-1]

    run.painter.load = recording
    return proofs


def without_prefix(arrays: Any) -> dict[str, Any]:
    return {name.partition(".")[2]: array for name, array in arrays.items()}
