"""Checkpoints of a training: weights and optimizer as safetensors, the rest as JSON; whole, or not there.

Invariant: a checkpoint appears by one rename, after all its files are on disk, so a killed training finds the last
whole one. The order of data and every random number follow from seed and step: the step is all the position there is.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from contracts.errors import ConfigError

_STEP = "step-{:08d}"


def save_state(
    folder: Path, step: int, named: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer,
    facts: Mapping[str, Any],
) -> None:  # fmt: skip
    """Write the state after `step` steps, then drop the ones before it. facts: what the training was (settings)."""
    partial = folder / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file({name: parameter.detach().cpu().contiguous() for name, parameter in named.items()},
              partial / "weights.safetensors")  # fmt: skip
    moments = {
        f"{kind}/{name}": optimizer.state[parameter][kind].detach().cpu().contiguous()
        for name, parameter in named.items()
        if parameter in optimizer.state
        for kind in ("exp_avg", "exp_avg_sq", "step")
    }
    save_file(moments, partial / "optimizer.safetensors")
    (partial / "state.json").write_text(json.dumps({"step": step, "facts": dict(facts)}, indent=2))
    _sync(partial)
    target = folder / _STEP.format(step)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    for older in _states(folder):
        if older != target:
            shutil.rmtree(older, ignore_errors=True)


def load_state(
    folder: Path, named: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, facts: Mapping[str, Any]
) -> int:
    """Load the newest state into parameters and optimizer; the number of steps it holds, 0 when there is none.

    Raises ConfigError when it belongs to a training with other settings.
    """
    states = _states(folder)
    if not states:
        return 0
    newest = states[-1]
    written = json.loads((newest / "state.json").read_text())
    now = json.loads(json.dumps(dict(facts)))
    different = sorted(key for key in now.keys() | written["facts"].keys() if now.get(key) != written["facts"].get(key))
    if different:
        raise ConfigError(
            ", ".join(different), f"differ from the training that {newest} belongs to",
            "write them as they were, or give another `out`",
        )  # fmt: skip
    weights, moments = load_file(newest / "weights.safetensors"), load_file(newest / "optimizer.safetensors")
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(weights[name])
            if f"step/{name}" in moments:
                optimizer.state[parameter] = {
                    kind: moments[f"{kind}/{name}"].to("cpu" if kind == "step" else parameter.device)
                    for kind in ("exp_avg", "exp_avg_sq", "step")
                }
    return int(written["step"])


def _states(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if (path / "state.json").is_file())


def _sync(folder: Path) -> None:
    """Everything in the folder is on disk when this returns."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
