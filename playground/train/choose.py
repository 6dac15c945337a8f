"""Owns the choice of the base: a snapshot's best settings, its figures, and its export.

    python -m playground.train.choose .cache/pretrain                       # compares snapshots
    python -m playground.train.choose .cache/pretrain --snapshot step-06000 # exports one
    python -m playground.train.choose --measure                             # looks for the base's settings again

Settings are chosen on validation prompts; test prompts are looked at once, for the figures.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from playground.train.pipeline import TEXT_TOKENS
from playground.train.sample import Settings, strict_by_kind
from playground.world.captions import Spec
from playground.world.prompts import held_out_prompts

SHIFTS, GUIDANCE, STEPS = (1.0, 2.0, 3.0, 4.5), (1.0, 1.5, 2.0, 3.0, 4.5), (8, 16, 28)
NUM_COARSE, NUM_FINE, NUM_TEST = 150, 400, 1_000
NUM_FINALISTS = 3


def load(folder: Path, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def rank(
    pipeline: DiffusionPipeline, settings: Iterable[Settings], specs: Sequence[Spec], seed: int
) -> list[tuple[float, Settings]]:
    """Strict accuracy and settings, the best first; among equals those with fewer steps."""
    rated = []
    for each in settings:
        rated.append((strict_by_kind(pipeline, specs, each, seed)["all"], each))
        print(f"  {rated[-1][0]:.3f} of {len(specs)} with {each}", flush=True)
    return sorted(rated, key=lambda pair: (-pair[0], pair[1].steps))


def best_settings(pipeline: DiffusionPipeline) -> list[dict[str, Any]]:
    """The finalists on validation prompts, the best first.

    Shift and guidance are swept at the fewest steps; the best of them compete at every number of steps. Steps are
    Euler's, as in the exported pipeline and in the evaluations that compare with it.
    """
    sweep = [Settings(min(STEPS), *each) for each in product(SHIFTS, GUIDANCE)]
    coarse = rank(pipeline, sweep, held_out_prompts("validation", NUM_COARSE, seed=1), seed=1_000)
    finalists = [replace(settings, steps=steps) for _, settings in coarse[:NUM_FINALISTS] for steps in STEPS]
    fine = rank(pipeline, finalists, held_out_prompts("validation", NUM_FINE, seed=2), seed=2_000)
    return [{**asdict(settings), "strict": round(accuracy, 4)} for accuracy, settings in fine]


def compare(folder: Path) -> None:
    """A line a snapshot, at a few settings."""
    specs = held_out_prompts("validation", NUM_COARSE, seed=1)
    for snapshot in sorted(folder.glob("step-*")):
        pipeline = load(snapshot)
        for settings in (Settings(8, 2.0, 1.0), Settings(8, 2.0, 3.0)):
            accuracy = strict_by_kind(pipeline, specs, settings, seed=1_000)
            shown = " ".join(f"{kind} {value:.2f}" for kind, value in accuracy.items())
            print(f"{snapshot.name} {settings}: {shown}", flush=True)


def export(snapshot: Path, out: Path) -> None:
    """Writes the snapshot in fp16, its best shift in the scheduler, and `salon.json`: settings, figures, provenance."""
    # What is measured is what is shipped: the weights after rounding to fp16.
    load(snapshot, torch.float16).save_pretrained(out)
    provenance = {
        "script": "playground.train.pretrain",
        "snapshot": snapshot.name,
        "weights": "exponential moving average, rounded to fp16",
        "run": json.loads((snapshot.parent / "run.json").read_text()),
        "torch": torch.__version__,
    }
    measure(out, provenance)


def measure(out: Path, provenance: dict[str, Any]) -> None:
    """Finds the best settings of a base and writes them, with its figures, to its `salon.json` and scheduler."""
    pipeline = load(out)
    finalists = best_settings(pipeline)
    chosen = Settings(*(finalists[0][key] for key in ("steps", "shift", "guidance_scale")))
    FlowMatchEulerDiscreteScheduler(shift=chosen.shift).save_pretrained(out / "scheduler")
    test = strict_by_kind(pipeline, held_out_prompts("test", NUM_TEST, seed=3), chosen, seed=3_000)
    measured = {
        "test_strict": {kind: round(value, 4) for kind, value in test.items()},
        "test_prompts": NUM_TEST,
        "validation_finalists": finalists,
        "validation_prompts": NUM_FINE,
    }
    card = {
        "eval": asdict(chosen),
        "max_sequence_length": TEXT_TOKENS,
        "measured": measured,
        "provenance": provenance,
    }
    (out / "salon.json").write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps(measured["test_strict"], indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "folder", type=Path, nargs="?", default=Path(".cache/pretrain"), help="what pretrain was given as --out"
    )
    parser.add_argument("--snapshot", help="the one to export, e.g. step-06000")
    parser.add_argument("--measure", action="store_true", help="find the settings of the base in --out again")
    parser.add_argument("--out", type=Path, default=Path("playground/base"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.measure:
        measure(args.out, json.loads((args.out / "salon.json").read_text())["provenance"])
    elif args.snapshot:
        export(args.folder / args.snapshot, args.out)
    else:
        compare(args.folder)


if __name__ == "__main__":
    main()
