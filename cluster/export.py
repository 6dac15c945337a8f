"""From a run folder to files that diffusers loads: the weights of its last learner state, as a pipeline or a LoRA.

Reads <run>/config.yaml and the newest folder under <run>/checkpoints/ (learner/state.py: fp32 safetensors by canonical
name) and leaves the writing to policy.export. Does not own: what a learner state holds, when it is written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cluster.run_folder import RunFolder
from contracts.config import RunConfig, load_config
from contracts.errors import ConfigError
from contracts.needs import objective_needs

if TYPE_CHECKING:
    from policy.policy import Policy

Weights = Literal["evaluated", "sampling", "current", "ema"]
"""sampling: what the actors painted with last; ema: learner.ema's average; evaluated: what the evaluation at the end of
a run measures, ema where there is one, else sampling."""

_STATE = "state.json"


def export_run(run: str, out: str | None = None, *, lora: bool = False, weights: Weights = "evaluated") -> Path:
    """Write a pipeline folder, or with `lora` the adapter alone, to `out` (by default <run>/export); returns it.

    run: a run folder by local path or fsspec URL (then `out` is required). Raises ConfigError naming what is missing.
    """
    if out is None and "://" in run:
        raise ConfigError("--out", f"{run} is remote", "name a local folder to write to")
    target = Path(out) if out is not None else Path(run) / "export"
    if target.exists():
        raise ConfigError("--out", f"{target} exists", "name another folder")
    folder = RunFolder.open(run)
    config = load_config(folder.config)
    if lora and config.model.tuning != "lora":
        raise ConfigError("--lora", f"{run} trained full weights", "leave --lora out to get a pipeline folder")
    policy = load_policy(config, weights_file(folder, config, weights))
    from policy.export import export_lora, export_pipeline

    return export_lora(policy, target) if lora else export_pipeline(policy, target)


def latest_state(folder: RunFolder) -> Path:
    """The newest complete learner state of a run."""
    states = [path.parent for path in folder.checkpoints.glob(f"step-*/{_STATE}")]
    if not states:
        raise ConfigError(
            "RUN", f"{folder.location} has no checkpoint", "a run writes one every checkpoint.every_steps, and last"
        )
    return max(states, key=lambda state: state.name)


def weights_file(folder: RunFolder, config: RunConfig, weights: Weights) -> Path:
    """The safetensors file of the asked-for weights in the newest state."""
    return weights_in(latest_state(folder), config, weights)


def weights_in(state: Path, config: RunConfig, weights: Weights) -> Path:
    """The same in a given state."""
    if weights == "evaluated":
        weights = "sampling" if config.learner.ema is None else "ema"
    held = json.loads((state / _STATE).read_text())["snapshots"]
    if weights == "ema" and "ema" not in held:
        raise ConfigError("--weights", "the run kept no average", "set learner.ema in its configuration")
    if weights == "ema":
        return state / "snapshot-ema.safetensors"
    from_snapshot = weights == "sampling" and objective_needs(config).paints_with == "sampling"
    return state / ("snapshot-old.safetensors" if from_snapshot else "param.safetensors")


def load_policy(config: RunConfig, file: Path) -> Policy:
    """The run's policy on the CPU with the weights of a learner state's file."""
    from policy.policy import Policy

    policy = Policy.load(config.model.model_copy(update={"device": "cpu"}), config.seed, trainable=False)
    read_weights(policy, file)
    return policy


def read_weights(policy: Policy, file: Path) -> None:
    """Copy the weights of a learner state's file into a live policy. Raises ConfigError when they are another's."""
    import torch
    from safetensors import safe_open

    live = policy.trainable()
    with safe_open(file, framework="pt") as tensors, torch.no_grad():
        missing = set(live) - set(tensors.keys())
        if missing:
            raise ConfigError("model", f"{file} lacks {sorted(missing)[0]}", "it belongs to another model or tuning")
        for name, parameter in live.items():
            parameter.copy_(tensors.get_tensor(name))
