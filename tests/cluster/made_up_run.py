"""A run folder as a run leaves it, written without one: a real ledger, vault files, rows, events, samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from cluster.evaluate import EvalPlan
from cluster.ledger import Ledger
from cluster.report.samples import keep_samples
from cluster.run_folder import RunFolder
from contracts import codec
from contracts.config import RunConfig
from contracts.config.load import config_from_tree
from contracts.config.rollout import EvalSampling
from contracts.digests import digest_images
from contracts.scores import point_table
from contracts.wire import DiscardReason, GroupHeader, PaintReceipt, PromptSpec

BEGAN = 1_700_000_000.0
STEP_S = 2.0
GROUP = 4
HOSTILE = "<script>alert('x')</script> & a \"red\" $circle"
"""A prompt that a page must show as text."""


def config_of(folder: Path, name: str = "made-up", **changes: Any) -> RunConfig:
    tree: dict[str, Any] = {
        "name": name,
        "seed": 3,
        "runs_dir": str(folder),
        "model": {"path": "none"},
        "rollout": {"groups_per_step": 2, "group_size": GROUP, "micro_batch": 2},
        "scorers": [
            {"name": "given", "urls": ["http://127.0.0.1:1"]},
            {"name": "judge", "urls": ["http://127.0.0.1:2"], "held_out": True, "required": False},
        ],
        "objective": {"name": "nft"},
        "telemetry": {"tensorboard": False},
        "stop": {"steps": 10},
        **changes,
    }
    return config_from_tree(tree)


def make_run(folder: Path, name: str = "made-up", steps: int = 4, ended: bool = True, **changes: Any) -> RunFolder:
    """A run of `steps` steps; ended: with its last evaluation, summary and word."""
    run = RunFolder.create(config_of(folder, name, **changes))
    _write_ledger(run, steps)
    _write_lines(run.metrics, [_row(step) for step in range(1, steps + 1)])
    _write_lines(run.events, _events(steps, ended))
    keep(run, "before", 0, [0.0, 0.0])
    if ended:
        keep(run, "after", steps, [1.0, 0.5])
        run.write_json("summary.json", {"name": name, "outcome": "finished", "train_seconds": steps * STEP_S})
    return run


def keep(run: RunFolder, tag: str, step: int, scores: Sequence[float]) -> None:
    """Images of an evaluation: two prompts, one of them hostile."""
    prompts = (PromptSpec(text=HOSTILE), PromptSpec(text="two blue squares"))
    plan = EvalPlan(prompts, (11, 12), EvalSampling(steps=4, shift=1.0, guidance_scale=1.0))
    images = np.full((2, 8, 8, 3), 40 * step + 10, np.uint8)
    keep_samples(
        run, tag, step, "test", plan, images, {"given": point_table("given", "1", ["strict"], np.array(scores))}
    )


def images_of(group_id: int) -> np.ndarray:
    return np.random.default_rng(group_id).integers(0, 256, (GROUP, 8, 8, 3), dtype=np.uint8)


def _write_ledger(run: RunFolder, steps: int) -> None:
    """Two groups a step, the last two of them discarded and alive; the newest painting is still in its vault."""
    moment = [BEGAN]

    def now() -> float:
        moment[0] += 0.1
        return moment[0]

    with closing(Ledger(run.ledger, now=now)) as ledger:
        ledger.published(0, 0)
        for step in range(1, steps + 1):
            claimed = [_scored_group(run, ledger, step - 1) for _ in range(2)]
            assert ledger.claim(2) == claimed
            ledger.trained(claimed, step, step - 1)
            ledger.published(step, step)
        _scored_group(run, ledger, steps, DiscardReason.ZERO_VARIANCE)
        alive = _painted_group(run, ledger, steps)
        header, arrays = _painting(alive, steps)
        path = run.vault(0) / f"group-{alive:08d}-0.safetensors"
        path.write_bytes(codec.encode(header, arrays))


def _painted_group(run: RunFolder, ledger: Ledger, version: int) -> int:
    number = ledger.next_position()
    group_id = ledger.admit(PromptSpec(text=f"picture {number}"), number, GROUP)
    task = ledger.lease_generating("actor-0", 60.0)
    assert task is not None
    ledger.generated(
        PaintReceipt(
            group_id=group_id, attempt=task.attempt, weight_version=version, vault="vault-0", num_bytes=100,
            paint_seconds=0.5, store_seconds=0.01, actor="actor-0", images_digest=digest_images(images_of(group_id)),
        )
    )  # fmt: skip
    return group_id


def _scored_group(run: RunFolder, ledger: Ledger, version: int, discard_as: DiscardReason | None = None) -> int:
    group_id = _painted_group(run, ledger, version)
    attempt = ledger.lease_scoring(group_id, 60.0)
    assert attempt is not None
    values = np.array([[0.0], [0.5], [np.nan], [1.0]])
    table = point_table("given", "1", ["strict"], values, reasons=("", "nearly", "no answer", ""))
    ledger.scored(group_id, attempt, {"given": table}, {"values": [0.0, 0.5, None, 1.0]}, discard_as=discard_as)
    return group_id


def _painting(group_id: int, version: int) -> tuple[GroupHeader, dict[str, np.ndarray]]:
    header = GroupHeader(
        group_id=group_id, attempt=0, prompt=PromptSpec(text=f"picture {group_id}"), group_size=GROUP,
        weight_version=version, prompt_digest="0", seeds=[1, 2, 3, 4], micro_batches=[2, 2], sigmas=[1.0, 0.5, 0.0],
    )  # fmt: skip
    return header, {"images": images_of(group_id)}


def _row(step: int) -> dict[str, Any]:
    return {
        "time": BEGAN + 10 + step * STEP_S, "step": float(step), "reward_mean/given/strict": 0.1 * step,
        "reward_std/given/strict": 0.05, "reward_mean/judge/score": 0.2, "train_metric/loss": 1.0 / step,
        "images_per_second": 4.0, "images_per_second_per_gpu": 2.0, "weight_version": float(step),
        "phase_seconds_total/learner/update": 1.8 * step, "phase_seconds_total/learner/wait_for_groups": 0.2 * step,
        "phase_seconds_total/actor/paint": 1.0 * step, "phase_seconds_total/actor/wait_for_prompt": 1.0 * step,
        "staleness_steps/count": 2.0 * step, "staleness_steps/mean": 0.0, "groups/ready": 2.0,
        "queue_capacity_groups": 4.0, "weight_publish_seconds/count": step + 1.0, "weight_publish_seconds/mean": 0.1,
        "process_memory_bytes/actor-0": 3e8,
    }  # fmt: skip


def _events(steps: int, ended: bool) -> list[dict[str, Any]]:
    def evaluation(at: float, tag: str, step: int, accuracy: float) -> dict[str, Any]:
        result = {
            "accuracy": accuracy, "standard_error": 0.02, "by_task": {"colour": accuracy, "shape": accuracy / 2},
            "columns": {"given/strict": accuracy, "judge/score": 0.3}, "sampling": {"steps": 4},
        }  # fmt: skip
        return {"time": at, "event": "evaluation", "tag": tag, "step": step, "result": result}

    began, end = BEGAN + 10, BEGAN + 10 + steps * STEP_S
    events = [
        {"time": BEGAN, "event": "started", "seconds": 5.0},
        evaluation(BEGAN + 9, "before", 0, 0.25),
        {"time": began, "event": "phase", "phase": "training"},
        {"time": began + 1, "event": "weights_proven", "actor": "actor-0", "version": 0, "load_seconds": 0.1},
        {"time": began + 2, "event": "actor_restart", "actor": "actor-0", "killed": True},
        {"time": began + 3, "event": "guard_warned", "guard": "kl", "value": 0.5},
    ]
    if ended:
        events += [evaluation(end + 1, "after", steps, 0.5), {"time": end + 2, "event": "finished"}]
    return events


def _write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
