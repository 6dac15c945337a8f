"""Any number of ranks and actors loads a checkpoint: real runs of the miniature model, resumed with others.

The witness is the learner itself: what it loaded it saves at once, and that is compared with what was loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.controller import Parts
from contracts.config import RunConfig
from tests.cluster.whole_run import books_of, folder_of, weight_changes
from tests.laws.run_kit import events, run_on_cluster, state_tensors, tiny_config

FIRST, LAST = 2, 4


def witness(config: RunConfig, rank: int, world_size: int, **options: Any) -> Any:
    """The real learner, which saves what it has loaded. A function, so that this module imports no torch."""
    from learner.rank import RankLearner

    class Witness(RankLearner):
        def load_state(self, folder: str | Path) -> None:
            super().load_state(folder)
            self.save_state(loaded_by(self.config))

    return Witness(config, rank, world_size, **options)


def loaded_by(config: RunConfig) -> Path:
    return Path(config.runs_dir) / "loaded"


def config_of(model: Path, folder: Path, ranks: int, actors: int, steps: int) -> RunConfig:
    return tiny_config(
        model, folder, learner__ranks=ranks, rollout__actors=actors, learner__ema={"decay": 0.5},
        eval__num_prompts=1, stop__steps=steps,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.long  # test_engine_ranks.py loads what other ranks wrote, test_resume_from_url.py resumes a run
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("shared_ray")
@pytest.mark.parametrize(
    ("ranks", "actors"),
    [pytest.param((2, 1), (1, 2), id="2 to 1 rank"), pytest.param((1, 2), (2, 1), id="1 to 2 ranks")],
)
def test_a_run_goes_on_with_other_numbers_of_ranks_and_actors(
    ranks: tuple[int, int], actors: tuple[int, int], tiny_model_folder: Path, tmp_path: Path
) -> None:
    parts = Parts(learner="tests.cluster.test_resume_resized:witness")
    first = config_of(tiny_model_folder, tmp_path, ranks[0], actors[0], FIRST)
    assert run_on_cluster(first, parts)["outcome"] == "finished"
    assert not loaded_by(first).exists()
    config = config_of(tiny_model_folder, tmp_path, ranks[1], actors[1], LAST)
    summary = run_on_cluster(config, parts, resume=True)

    saved = state_tensors(folder_of(config) / "checkpoints" / f"step-{FIRST:06d}")
    loaded = state_tensors(loaded_by(config))
    assert {name.partition(".")[0] for name in saved} >= {"param", "exp_avg", "exp_avg_sq", "snapshot-ema"}
    assert loaded.keys() == saved.keys()
    assert [name for name in saved if not np.array_equal(loaded[name], saved[name])] == []
    assert any(value.any() for name, value in saved.items() if name.startswith("exp_avg"))

    names = [process["name"] for process in events(config, "started")[-1]["processes"]]
    assert sum(name.startswith("learner-") for name in names) == ranks[1]
    assert sum(name.startswith("actor-") for name in names) == actors[1]
    books = books_of(config)
    assert (summary["outcome"], summary["steps"], summary["learner_rebuilds"]) == ("finished", LAST, 0)
    assert books.balanced
    assert (books.alive, books.discarded, books.groups_trained) == (0, 0, 2 * LAST)
    final = state_tensors(folder_of(config) / "checkpoints" / f"step-{LAST:06d}")
    assert any(not np.array_equal(final[name], saved[name]) for name in saved if name.startswith("param"))
    assert max(weight_changes(config).values()) > 0
