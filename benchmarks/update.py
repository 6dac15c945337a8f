"""What the learner's machinery costs: a rank's update against the bare loop over the same tensors.

- learner: `RankLearner.update` with one rank, on the plain engine and on DeepSpeed (learner.zero_stage as it is by
  default, which is the demo's): rows read from memory, micro-batches assembled, the objective, clipping, AdamW,
  snapshots, metrics, report.
- bare: the same forwards and backwards of the same inputs in a plain loop, one product with a fixed tensor in place
  of the objective, and a step. Of torch alone: clip_grad_norm_, AdamW, zero_grad. Of DeepSpeed alone: its engine's
  backward and step, which clips. The objective's own arithmetic counts as overhead; against torch alone so does all
  that DeepSpeed does besides, which its own loop shows to be DeepSpeed's.

`nft` makes two no-grad passes beside each differentiated one (old and reference policy); so does its bare loop. The
model is the playground's at full size with random weights, on one thread. Pairs are interleaved, the first of a pair in
turn; ratios are taken within pairs. Wall time, and CPU time of the process, which a busy machine disturbs less.

    python -m benchmarks.update [--json]
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measuring import interleaved, median, one_thread, ratios

TARGET = 1.08
GROUPS, GROUP_SIZE, MICRO_BATCH, STEPS = 2, 8, 8, 4
OBJECTIVES: dict[str, dict[str, Any]] = {"grpo": {"name": "grpo"}, "nft": {"name": "nft", "draws": 3}}
PAIRS = (("plain", "torch"), ("deepspeed", "deepspeed"), ("deepspeed", "torch"))
"""(the learner's engine, what the bare loop is made of)"""


@dataclass(frozen=True)
class Call:
    """Inputs of one forward and, where a backward follows, the tensor its output is multiplied with."""

    x: Any
    s: Any
    cond: Any
    cotangent: Any | None


def run(repeats: int = 15) -> dict[str, Any]:
    """Rows by engine, bare loop and objective: learner/bare, wall and CPU (median, low, high), seconds, target."""
    with one_thread(), tempfile.TemporaryDirectory() as folder:
        _save_model(Path(folder))
        rows = [_measure(name, engine, bare, folder, repeats) for engine, bare in PAIRS for name in OBJECTIVES]
    return {"repeats": repeats, "target": TARGET, "rows": rows}


def _measure(name: str, engine: str, made_of: str, folder: str, repeats: int) -> dict[str, Any]:
    update, bare, forwards = _pair(name, engine, made_of, folder)
    pairs = interleaved(update, bare, repeats)
    return {
        "objective": name,
        "engine": engine,
        "bare": made_of,
        "forwards": forwards,
        "wall": median(ratios(pairs["wall"])),
        "cpu": median(ratios(pairs["cpu"])),
        "update_seconds": median([ours for ours, _ in pairs["wall"]])["median"],
        "bare_seconds": median([theirs for _, theirs in pairs["wall"]])["median"],
    }


def _pair(name: str, engine: str, made_of: str, folder: str) -> tuple[Callable[[], None], Callable[[], None], int]:
    """(the learner's update, the bare loop over the calls it made, number of forwards)."""
    import torch

    from actors.painter import Painter
    from cluster.step import make_credit, make_job
    from contracts.wire import PromptSpec, PromptTask
    from learner.rank import RankLearner
    from learner.types import Rewards

    config = _config(name, engine, folder)
    painter, learner = Painter(config), RankLearner(config, 0, 1)
    headers, arrays, embeddings, rewards = {}, {}, {}, {}
    for number in range(GROUPS):
        task = PromptTask(
            group_id=number, attempt=0, prompt=PromptSpec(text="a red circle"), group_size=GROUP_SIZE, min_version=0,
            deadline_s=60.0,
        )  # fmt: skip
        group = painter.finish(painter.denoise(task))
        headers[number], arrays[number] = group.header, group.arrays
        embeddings.update(group.embeddings)
        values = np.random.default_rng(number).normal(size=GROUP_SIZE)
        rewards[number] = Rewards(values, np.ones(GROUP_SIZE, bool), np.zeros(GROUP_SIZE))
    job = make_job(1, 0, headers, rewards, config, make_credit(config))

    def fetch(group: int, names: tuple[str, ...], samples: slice) -> dict[str, np.ndarray]:
        return {array: arrays[group][array][samples] for array in names}

    def update() -> None:
        learner.update(job, fetch, embeddings.__getitem__)

    calls = _recorded(learner, update)
    twin = RankLearner(_config(name, "plain" if made_of == "torch" else made_of, folder), 0, 1)
    forward, backward, step = _of_torch(twin, config.learner.optimizer) if made_of == "torch" else _of_deepspeed(twin)

    def bare() -> None:
        for call in calls:
            if call.cotangent is None:
                with torch.no_grad():
                    forward(call.x, call.s, call.cond)
            else:
                backward((forward(call.x, call.s, call.cond) * call.cotangent).sum())
        step()

    return update, bare, len(calls)


def _of_torch(twin: Any, settings: Any) -> tuple[Callable[..., Any], Callable[[Any], Any], Callable[[], None]]:
    """(forward, backward, step) of torch alone."""
    import torch

    parameters = list(twin.policy.trainable().values())
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay, foreach=True)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, settings.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return twin.policy.velocity, torch.Tensor.backward, step


def _of_deepspeed(twin: Any) -> tuple[Callable[..., Any], Callable[[Any], Any], Callable[[], None]]:
    """(forward, backward, step) of DeepSpeed's engine alone; its step drops the gradients."""
    engine = twin.engine._deepspeed
    return partial(twin.policy.velocity, module=engine), engine.backward, engine.step


def _recorded(learner: Any, update: Callable[[], None]) -> list[Call]:
    """The forwards of one update, with their inputs."""
    import torch

    calls: list[Call] = []
    velocity = type(learner.policy).velocity

    def recording(self: Any, x: Any, s: Any, cond: Any, *rest: Any, **more: Any) -> Any:
        v = velocity(self, x, s, cond, *rest, **more)
        calls.append(Call(x.clone(), s.clone(), cond, torch.randn_like(v) * 1e-3 if torch.is_grad_enabled() else None))
        return v

    type(learner.policy).velocity = recording  # type: ignore[method-assign]
    try:
        update()
    finally:
        type(learner.policy).velocity = velocity  # type: ignore[method-assign]
    return calls


def _config(name: str, engine: str, folder: str) -> Any:
    from contracts.config.load import config_from_tree

    return config_from_tree(
        {
            "name": "bench",
            "model": {"path": folder, "device": "cpu"},
            "objective": OBJECTIVES[name],
            "scorers": [{"name": "given", "urls": ["http://127.0.0.1:1"]}],
            "stop": {"steps": 1},
            "rollout": {"groups_per_step": GROUPS, "group_size": GROUP_SIZE, "micro_batch": MICRO_BATCH},
            "sampler": {"steps": STEPS},
            "learner": {"engine": engine, "optimizer": {"lr": 1e-6}},  # every repeat does the same work
            "pipeline": {"max_staleness": 0},
        }
    )


def _save_model(folder: Path) -> None:
    from playground.train.pipeline import build_pipeline

    build_pipeline(size="base", seed=0).save_pretrained(folder)


def table(result: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    columns = ("engine", "bare loop", "objective", "forwards", "wall, update / bare", "95 % interval", "CPU",
               "95 % interval", "update, s", "bare, s")  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", f"|---|---|---|{'---:|' * 7}"]
    for row in result["rows"]:
        wall, cpu = row["wall"], row["cpu"]
        lines.append(
            f"| {row['engine']} | {row['bare']} | {row['objective']} "
            f"| {row['forwards']} | {wall['median']:.3f} | {wall['low']:.3f} – {wall['high']:.3f} "
            f"| {cpu['median']:.3f} | {cpu['low']:.3f} – {cpu['high']:.3f} "
            f"| {row['update_seconds']:.3f} | {row['bare_seconds']:.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    measured = run()
    print(json.dumps(measured, indent=1) if "--json" in sys.argv else table(measured))
