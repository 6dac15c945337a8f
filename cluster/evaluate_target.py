"""`python -m cluster eval`: held-out accuracy of a run's last weights or of a pipeline folder, without Ray.

A run is evaluated with the weights and the sampling of its own *after*, a folder with those of a run's *before*: its
salon.json, else the configuration's. Does not own: what is painted and how it counts (evaluate.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cluster.evaluate import EvalResult, base_sampling, evaluate_in_process, rollout_sampling
from cluster.export import read_weights, weights_file
from cluster.run_folder import RunFolder
from cluster.validate import check, refuse
from contracts.config import load_config
from contracts.errors import ConfigError


def evaluate_target(target: str, overrides: Sequence[str] = (), config_path: str = "configs/demo.yaml") -> EvalResult:
    """Paint and judge eval.num_prompts held-out prompts.

    target: run folder (path or fsspec URL), or diffusers pipeline folder, for which `config_path` gives prompts,
    scorers and the rest. overrides: as for train (`eval.num_prompts=50`). Raises ConfigError(s) when it is neither or
    does not fit.
    """
    from actors.painter import Painter

    if _is_pipeline(target):
        config = load_config(config_path, [*overrides, f"model.path={target}"])
        refuse(check(config))
        sampling = config.eval.sampling or base_sampling(config)
        return evaluate_in_process(config, Painter(config), sampling, config.eval.num_prompts)
    folder = _open_run(target)
    config = load_config(folder.config, overrides)
    file = weights_file(folder, config, "sampling")
    painter = Painter(config)
    read_weights(painter.policy, file)
    return evaluate_in_process(config, painter, rollout_sampling(config), config.eval.num_prompts)


def as_text(result: EvalResult) -> str:
    """Accuracy with its standard error, by task and by column."""
    sampling = result.sampling
    lines = [
        f"accuracy {result.accuracy:.1%} (standard error {result.standard_error:.1%}), "
        f"{result.num_valid} of {result.num_images} images judged",
        f"sampling {sampling.steps} steps, shift {sampling.shift:g}, guidance {sampling.guidance_scale:g}",
    ]
    lines += [f"  {task:<24} {value:.1%}" for task, value in result.by_task.items()]
    lines += [f"  {column:<24} {value:.4g}" for column, value in result.columns.items()]
    return "\n".join(lines)


def _is_pipeline(target: str) -> bool:
    return "://" not in target and (Path(target) / "model_index.json").is_file()


def _open_run(target: str) -> RunFolder:
    try:
        return RunFolder.open(target)
    except ConfigError as error:
        way_out = "give a run folder, or a diffusers pipeline folder"
        raise ConfigError("RUN_OR_MODEL", f"{target} is neither", way_out) from error
