"""`python -m cluster eval`: held-out accuracy of a run's last weights or of a pipeline folder, without Ray.

A run is evaluated with the weights and the sampling of its own *after*, a folder with those of a run's *before*: its
salon.json, else the configuration's. Does not own: what is painted and how it counts (evaluate.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.checks.headers import read_model_card
from cluster.evaluate import EvalResult, base_sampling, evaluate_in_process, require_judged, rollout_sampling
from cluster.export import read_weights, weights_file
from cluster.run_folder import RunFolder
from cluster.validate import check_evaluation, refuse
from contracts.config import RunConfig, load_config
from contracts.errors import ConfigError
from contracts.startup import collector_paused
from playground.world.scenes import SIZE

if TYPE_CHECKING:
    from actors.painter import Painter

PLAYGROUND = Path(__file__).resolve().parent.parent / "configs" / "demo.yaml"
"""What a pipeline folder is evaluated by unless told otherwise, wherever the command is called from."""


def evaluate_target(target: str, overrides: Sequence[str] = (), config_path: str | None = None) -> EvalResult:
    """Paint and judge eval.num_prompts held-out prompts.

    target: run folder (path or fsspec URL), or diffusers pipeline folder, for which `config_path` gives prompts,
    scorers and the rest (None: the playground's, for models that paint its images). overrides: as for train
    (`eval.num_prompts=50`). Raises ConfigError(s) when it is neither or does not fit, ScoringError when nothing could
    be judged.
    """
    if _is_pipeline(target):
        if config_path is None:
            _refuse_other_images(Path(target))
        config = load_config(config_path or PLAYGROUND, [*overrides, f"model.path={target}"])
        refuse(check_evaluation(config))
        sampling = config.eval.sampling or base_sampling(config)
        painter = _make_painter(config)
        return require_judged(config, evaluate_in_process(config, painter, sampling, config.eval.num_prompts))
    folder = _open_run(target)
    config = load_config(folder.config, overrides)
    refuse(check_evaluation(config))
    file = weights_file(folder, config, "evaluated")
    painter = _make_painter(config)
    read_weights(painter.policy, file)
    return require_judged(
        config, evaluate_in_process(config, painter, rollout_sampling(config), config.eval.num_prompts)
    )


def _make_painter(config: RunConfig) -> Painter:
    with collector_paused():
        from actors.painter import Painter

        return Painter(config)


def _refuse_other_images(folder: Path) -> None:
    """The playground's prompts and judges say nothing of a model that paints anything else."""
    card = read_model_card(folder)
    if card is not None and card.image != (SIZE, SIZE):
        height, width = card.image
        raise ConfigError(
            "--config", f"{folder} paints {height} x {width} pixels, and without --config the playground's scenes of "
            f"{SIZE} x {SIZE} are asked for and judged",
            "give a configuration whose prompts and scorers fit this model (configs/ holds examples)",
        )  # fmt: skip


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
        what = "neither: it holds no config.yaml of a run and no model_index.json of a diffusers pipeline"
        way_out = "give the folder (or URL) of a run, or the folder of a pipeline"
        raise ConfigError("RUN_OR_MODEL", f"{target} is {what}", way_out) from error
