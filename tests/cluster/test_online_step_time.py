"""ONI's check: a judge that takes 10 seconds, or for ever, changes no learner step.

The controller's side of online reward models (cluster/online.py) is the real one; the trainer behind it answers every
call only after as long as its judge takes. Time is the event loop's own and passes only while everybody waits, so steps
take exactly what they wait for, whatever the machine does.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cluster.online import OnlineModels
from contracts import versions
from contracts.config import RunConfig
from contracts.config.load import config_from_tree
from contracts.wire import GroupHeader, PromptSpec

STEPS, GROUPS, UPDATE_S, QUEUE = 120, 4, 0.25, 16


class OwnTime(asyncio.SelectorEventLoop):
    """A loop whose clock jumps to the next timer when nothing is left to do; threads work in no time."""

    def __init__(self) -> None:
        self.now, self.threads = 0.0, 0
        super().__init__(selectors.DefaultSelector())
        self.really_select = self._selector.select
        self._selector.select = self.select

    def time(self) -> float:
        return self.now

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None or (self.threads and timeout > 0):
            return self.really_select(None)
        found = self.really_select(0)
        if not found:
            self.now += max(0.0, timeout)
        return found

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:
        self.threads += 1
        future = super().run_in_executor(executor, func, *args)
        future.add_done_callback(self._returned)
        return future

    def _returned(self, _: Any) -> None:
        self.threads -= 1


class SlowTrainer:
    """A handle whose every call answers after `judge_s`, None for never; a new version comes with each answer."""

    def __init__(self, judge_s: float | None) -> None:
        self.judge_s, self.number = judge_s, 1

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *_: asyncio.ensure_future(self.answer(name)))

    async def answer(self, name: str) -> Any:
        if self.judge_s is None:
            await asyncio.get_running_loop().create_future()
        await asyncio.sleep(self.judge_s or 0.0)
        if name != "candidate":
            return None
        self.number += 1
        return version_of(self.number)


def version_of(number: int) -> tuple[versions.Version, versions.Files]:
    return versions.pack(number, {"a": np.array([number])}, {}, {})


def config_of(folder: Path) -> RunConfig:
    judge = {"name": "judge", "function": "m:slow"}
    return config_from_tree(
        {
            "name": "oni", "runs_dir": str(folder), "model": {"path": "none"}, "objective": {"name": "nft"},
            "scorers": [{"name": "fast", "serve": "distilled", "options": {"model": "clip"}}],
            "online": [{"name": "distilled", "scorer": "fast", "judge": judge, "queue_groups": QUEUE}],
            "stop": {"steps": STEPS},
        }
    )  # fmt: skip


async def run_steps(folder: Path, judge_s: float | None) -> tuple[np.ndarray, Any]:
    """Seconds of each step, and what the controller knows of the trainer in the end."""
    online = OnlineModels(config_of(folder), folder, {}, lambda *_, **__: None)
    model = online.models["fast"]
    model.handle = SlowTrainer(judge_s)
    version, files = version_of(0)
    versions.place(model.folder, version, files)
    await online._use(model, version.name)
    online.tasks = [asyncio.create_task(online._collect(model))]
    header = GroupHeader(group_id=0, attempt=0, prompt=PromptSpec(text="p"), group_size=4, weight_version=0,
                         prompt_digest="d")  # fmt: skip
    seconds = []
    for step in range(STEPS):
        began = asyncio.get_running_loop().time()
        for _ in range(GROUPS):
            online.offer(header, "vault-0")
        await asyncio.sleep(UPDATE_S)
        await online.boundary(step)
        seconds.append(asyncio.get_running_loop().time() - began)
    for task in (*online.tasks, *model.offers):
        task.cancel()
    return np.array(seconds), model


@pytest.mark.parametrize("judge_s", [0.0, 10.0, None], ids=["no wait", "10 s", "for ever"])
def test_the_99th_percentile_of_a_learner_step_does_not_know_how_slow_the_judge_is(
    judge_s: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with asyncio.Runner(loop_factory=OwnTime) as runner:
        monkeypatch.setattr("cluster.online.time", SimpleNamespace(monotonic=runner.get_loop().time))
        seconds, model = runner.run(run_steps(tmp_path, judge_s))
    assert np.quantile(seconds, 0.99, method="higher") == pytest.approx(UPDATE_S)
    assert seconds.max() == pytest.approx(UPDATE_S)
    offered, took_s = STEPS * GROUPS, STEPS * UPDATE_S
    if judge_s == 0.0:
        assert model.dropped == 0
        assert len(model.used) > STEPS / 4, "versions flip all the time, and cost no step"
    elif judge_s is None:
        assert model.dropped == offered - QUEUE
        assert len(model.used) == 1
    else:
        assert model.dropped == pytest.approx(offered - QUEUE * took_s / judge_s, rel=0.1)
        assert 1 < len(model.used) <= 1 + took_s / judge_s
