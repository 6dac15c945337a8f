"""The evaluation card of a trained reward model: card.json and a README.md that people read. Owns no figure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reward_servers.training.evaluation import Evaluation


def write_card(folder: Path, facts: Mapping[str, Any], before: Evaluation, after: Evaluation) -> None:
    """facts: model, settings, counts, digests, anchor; before, after: held-out figures of the start and the end."""
    body = {**facts, "before": before.as_json(), "after": after.as_json()}
    (folder / "card.json").write_text(json.dumps(body, indent=2) + "\n")
    (folder / "README.md").write_text(render(facts, before, after))


def render(facts: Mapping[str, Any], before: Evaluation, after: Evaluation) -> str:
    """The card as Markdown."""
    rows = [
        ("accuracy", before.accuracy, after.accuracy), ("loss", before.loss, after.loss),
        ("Brier score", before.brier, after.brier),
        ("expected calibration error", before.calibration_error, after.calibration_error),
        ("mean gap of tied pairs", before.tie_gap, after.tie_gap), ("AUROC passed/failed", before.auroc, after.auroc),
        ("mean reward", before.reward_mean, after.reward_mean), ("spread of rewards", before.reward_std,
                                                                after.reward_std),
    ]  # fmt: skip
    lines = [
        "# Reward model", "",
        f"Trained from `{facts['model']}` for {facts['steps']} steps; weights {facts['weight_digest']}. Serve it with",
        f"`python -m reward_servers serve trained --option model={facts['out']}`.", "",
        f"Trained on {facts['train_pairs']} pairs and {facts['train_items']} single images; measured on "
        f"{after.pairs} held-out pairs of prompts it never saw.",
        f"Anchor {facts['anchor']:.6g}: {facts['anchored_on']}.", "",
        "| held out | before | after |", "|---|---|---|",
        *(f"| {name} | {_figure(first)} | {_figure(last)} |" for name, first, last in rows), "",
        "## Calibration", "", "| probability given | pairs | said | right |", "|---|---|---|---|",
        *(f"| {b.low:.2f} to {b.high:.2f} | {b.pairs} | {b.confidence:.3f} | {b.accuracy:.3f} |" for b in after.bins),
        "", "## Settings", "", "```json", json.dumps(facts["settings"], indent=2), "```",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _figure(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"
