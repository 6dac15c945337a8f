"""What tracing and telemetry cost a learner step, against the time of the step (at most 2 % for both together).

A step's calls are replayed on a real Telemetry with its files, TensorBoard's among them: receipts of its groups with
their spans and proofs, scores of three scorers, the ranks' spans, phases, one row. The processor time of all its
threads counts. With the trace and without it, interleaved; actors, groups and seconds of a step are those of the
pipeline benchmark, whose models are timers far faster than real ones. The last row is what an actor does for a group of
16 images of 512 x 512, beside the painting of its next one: four spans and the fingerprint of the images.

    python -m benchmarks.trace
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measuring import interleaved, median
from cluster.telemetry import Telemetry
from contracts.config.load import config_from_tree
from contracts.digests import digest_images
from contracts.spans import SpanLog, wall_clock
from contracts.wire import Span

TARGET = 0.02
STEPS = {1: 2.0, 8: 2.0, 64: 8.0, 512: 8.0}
"""Actors, and the seconds of a step: groups_per_step / actors * painting, as in the pipeline benchmark."""
SCORERS = ("quality", "alignment", "text")
RANKS = 8
STEPS_A_CALL = 5


def run(repeats: int = 20) -> dict[str, Any]:
    """Rows by number of actors: milliseconds a step of telemetry, of the trace in it, and their share of the step."""
    return {
        "repeats": repeats, "target": TARGET, "rows": [measure(actors, repeats) for actors in STEPS],
        "actor": measure_actor(repeats),
    }  # fmt: skip


def measure(actors: int, repeats: int) -> dict[str, Any]:
    """One size of run."""
    groups = max(4, actors)
    with tempfile.TemporaryDirectory() as folder:
        traced, plain = (_telemetry(Path(folder) / name, megabytes) for name, megabytes in (("on", 32.0), ("off", 0.0)))
        pairs = interleaved(lambda: _replay(traced, actors, groups), lambda: _replay(plain, actors, groups), repeats)[
            "cpu"
        ]
        bytes_a_step = (Path(folder) / "on" / "trace.json").stat().st_size / (STEPS_A_CALL * (repeats + 2))
        for telemetry in (traced, plain):
            telemetry.close()
    step_s = STEPS[actors]
    whole = median([with_trace / STEPS_A_CALL for with_trace, _ in pairs])
    trace = median([(with_trace - without) / STEPS_A_CALL for with_trace, without in pairs])
    return {
        "actors": actors, "groups": groups, "step_s": step_s, "telemetry_s": whole, "trace_s": trace,
        "share": whole["median"] / step_s, "bytes_a_step": bytes_a_step,
    }  # fmt: skip


def measure_actor(repeats: int) -> dict[str, Any]:
    """Seconds an actor spends on spans and the fingerprint of a group of 16 images of 512 x 512."""
    images = np.random.default_rng(0).integers(0, 256, (16, 512, 512, 3), dtype=np.uint8)

    def with_all() -> None:
        log = SpanLog("actor-0")
        for name in ("take weights", "paint", "decode", "store"):
            with log.span(name):
                pass
        digest_images(images)

    pairs = interleaved(with_all, lambda: None, repeats)["cpu"]
    return {"megabytes": images.nbytes / 2**20, "seconds": median([ours for ours, _ in pairs])}


def _telemetry(folder: Path, trace_mb: float) -> Telemetry:
    tree = {
        "name": "trace", "model": {"path": "none"}, "objective": {"name": "nft"}, "stop": {"steps": 1},
        "scorers": [{"name": name, "urls": ["http://127.0.0.1:1"]} for name in SCORERS],
        "telemetry": {"trace_mb": trace_mb},
    }  # fmt: skip
    return Telemetry(config_from_tree(tree), folder, serve=False)


def _replay(telemetry: Telemetry, actors: int, groups: int) -> None:
    for step in range(1, STEPS_A_CALL + 1):
        for group in range(groups):
            _receive(telemetry, f"actor-{group % actors}", group)
        spans = [
            _span(f"learner-{r}", name) for r in range(RANKS) for name in ("fetch", "forward_backward", "optimizer")
        ]
        telemetry.phase("learner", "update", 1.0, lane="learner")
        telemetry.spans(spans, step=step)
        telemetry.phase("learner", "publish", 0.1, lane="publish")
        telemetry.phase("learner", "wait_for_groups", 0.1, lane="learner")
        rewards = {f"{name}/score": {"mean": 0.5, "std": 0.1} for name in SCORERS}
        telemetry.step(
            step=step, images=groups * 16, seconds=1.0, staleness=[1] * groups, rewards=rewards,
            metrics={"loss": 0.1, "kl": 0.01, "grad_norm": 1.0, "clip_fraction": 0.1}, phases={"fetch": 0.1},
        )  # fmt: skip
        while telemetry.rows_waiting():  # the sink's thread is part of the cost
            time.sleep(0.001)


def _receive(telemetry: Telemetry, actor: str, group: int) -> None:
    """What the controller does with telemetry for one group, from receipt to scores."""
    telemetry.phase("actor", "wait_for_prompt", 0.01, lane=actor)
    telemetry.observe("salon_paint_seconds", 1.0, actor=actor)
    telemetry.count("salon_images_painted_total", 16)
    for phase in ("paint", "store", "wait_for_weights"):
        telemetry.phase("actor", phase, 0.5)
    of_actor = [_span(actor, name) for name in ("take weights", "paint", "decode", "store")]
    telemetry.spans([*of_actor, _span("vault-0", "store")], group=group, version=1)
    telemetry.event("weights_proven", actor=actor, version=1, digest="0" * 32, canary_to_current=0.0, load_seconds=0.1)
    for name in SCORERS:
        telemetry.observe("salon_score_seconds", 0.1, scorer=name)
        telemetry.count("salon_score_outcomes_total", 16, scorer=name, outcome="ok")
    of_scorers = [_span(f"scorer {name}", "score") for name in SCORERS]
    telemetry.spans([_span("dispatcher", "score group"), *of_scorers], group=group)


def _span(lane: str, name: str) -> Span:
    return Span(lane=lane, name=name, start=wall_clock() - 0.1, seconds=0.1)


def table(result: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    lines = [
        "| who | groups a step | step, s | telemetry, ms a step | of it trace, ms | share of the step | trace, kB |",
        "|:---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| controller of {row['actors']} actors | {row['groups']} | {row['step_s']:g} "
            f"| {1e3 * row['telemetry_s']['median']:.2f} | {1e3 * row['trace_s']['median']:.2f} "
            f"| {row['share']:.2%} | {row['bytes_a_step'] / 1e3:.1f} |"
        )
    actor = result["actor"]
    lines.append(
        f"| an actor, {actor['megabytes']:.0f} MB of images | 1 |  | {1e3 * actor['seconds']['median']:.2f} |  |  |  |"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    print(json.dumps(run(), indent=1))
