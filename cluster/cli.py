"""The command line: train, resume, validate, eval, methods, export; report, status, ledger (cli_show.py);
jury (deployed/cli.py).

Parses, and imports what a command needs only when it runs, so that --help answers at once. A SalonError becomes one
message and its exit code (contracts.errors.ExitCode); `--debug` shows the traceback. Anything else is a bug and shows
its own. Does not own: the work (driver.py, validate.py, evaluate.py, export.py, methods.py).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cluster.cli_show import COMMANDS
from cluster.deployed.cli import jury
from learner.engines.compiled_op import path_with_environment

if TYPE_CHECKING:
    from cluster.checks.jury import Asked
    from cluster.export import Weights
    from contracts.config import RunConfig
    from contracts.errors import ConfigError

KINDS = ("family", "sampler", "objective", "credit", "aggregation", "guard", "engine", "scorer", "prompts")

_config = click.argument("config")
_overrides = click.argument("overrides", nargs=-1, metavar="[a.b=c ...]")


class _Salon(click.Group):
    """Turns a SalonError into one message and its exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            from contracts.errors import SalonError

            if not isinstance(error, SalonError) or ctx.params.get("debug"):
                raise
            click.echo(_message(error), err=True)
            sys.exit(int(error.exit_code))


EXIT_CODES = """\b
Exit codes of train and resume:
  0   finished
  1   failed; the message says why, and the run can usually be resumed
  2   the configuration cannot work, or the run cannot be resumed like this
  3   a guard stopped the run; a checkpoint was written
  75  stopped and resumable (SIGTERM, Ctrl-C): run `resume`, or the same `train` with exist=resume
"""


@click.group(cls=_Salon, context_settings={"help_option_names": ["-h", "--help"]}, epilog=EXIT_CODES)
@click.option("--debug", is_flag=True, help="Show tracebacks, and the workers' logs here.")
def main(debug: bool) -> None:
    """Post-train a text-to-image diffusion transformer with reinforcement learning."""
    _prepare_environment()
    if debug:
        os.environ["SALON_DEBUG"] = "1"


def _prepare_environment() -> None:
    """What child processes inherit: ninja on the path, and torch's extensions kept with the environment they fit."""
    os.environ["PATH"] = path_with_environment()
    if sys.prefix != sys.base_prefix and os.access(sys.prefix, os.W_OK):
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))


@main.command()
@_config
@_overrides
def train(config: str, overrides: Sequence[str]) -> None:
    """Train as CONFIG (a YAML file) says; a.b=c overrides a key.

    With exist=resume this goes on with the run where it has begun, so that a scheduler can repeat it until it exits
    with 0.
    """
    loaded = _load(config, overrides)
    go_on = loaded.exist == "resume" and _has_begun(loaded)
    if go_on:
        loaded = _as_left(loaded)
    _run(loaded, resume=go_on)


def _has_begun(config: RunConfig) -> bool:
    from cluster.resume import has_begun

    return has_begun(config)


def _as_left(config: RunConfig) -> RunConfig:
    """`config` fit to go on with its run. Ends the process well where that is finished."""
    from cluster.resume import AlreadyFinished, resumed_config
    from cluster.run_folder import location_of
    from contracts.errors import ExitCode

    try:
        return resumed_config(location_of(config), given=config)
    except AlreadyFinished as finished:
        click.echo(f"{finished.problem}; {finished.way_out}")
        sys.exit(int(ExitCode.FINISHED))


def _run(config: RunConfig, resume: bool) -> None:
    _refuse(_mismatches(config))
    from cluster.driver import train

    sys.exit(int(train(config, resume=resume)))


@main.command()
@click.argument("run")
@_overrides
@click.option(
    "--accept-new-prompts", is_flag=True, help="Go on although the prompt file is another than when the run began."
)
def resume(run: str, overrides: Sequence[str], accept_new_prompts: bool) -> None:
    """Go on with RUN (a run folder, by path or fsspec URL) where it stopped or was killed; a.b=c overrides a key."""
    from cluster.resume import resumed_config

    _run(resumed_config(run, overrides, accept_new_prompts=accept_new_prompts), resume=True)


@main.command()
@_config
@_overrides
@click.option("--offline", is_flag=True, help="Do not ask reward servers.")
def validate(config: str, overrides: Sequence[str], offline: bool) -> None:
    """List every mismatch of CONFIG, or print the plan of the run. Nothing is started, no model is loaded."""
    from cluster.validate import check, join_and_check, warnings

    loaded = _load(config, overrides)
    _refuse(check(loaded))
    infos = {}
    if not offline:
        by_url, by_name = _ask(loaded), join_and_check(loaded)
        _refuse([*by_url.errors, *by_name.errors])
        infos = {**by_url.infos, **by_name.infos}
    from cluster.plan import describe

    click.echo(describe(loaded, warnings(loaded), infos))


@main.command("eval")
@click.argument("target", metavar="RUN_OR_MODEL")
@_overrides
@click.option("--config", help="For a model folder: prompts, scorers and the rest; the playground's unless given.")
@click.option("--json", "as_json", is_flag=True, help="The result as JSON.")
def evaluate(target: str, overrides: Sequence[str], config: str | None, as_json: bool) -> None:
    """Held-out accuracy of a run's trained weights, or of a diffusers pipeline folder, in this process."""
    from cluster.evaluate_target import as_text, evaluate_target
    from cluster.summary import evaluation

    result = evaluate_target(target, overrides, config)
    click.echo(json.dumps(evaluation(result), indent=2) if as_json else as_text(result))


@main.command()
@click.option("--json", "as_json", is_flag=True, help="A list of rows: kind, name, slugs, paper, file, summary.")
@click.option("--kind", type=click.Choice(KINDS), help="Only this kind.")
def methods(as_json: bool, kind: str | None) -> None:
    """List every method: families, samplers, objectives, credit, aggregation, engines, scorers, prompt sources."""
    from cluster import methods as listing

    click.echo(listing.as_json(kind) if as_json else listing.as_text(kind))


@main.command()
@click.argument("run")
@click.option("--out", help="Folder to write; RUN/export unless given.")
@click.option("--lora", is_flag=True, help="The adapter alone, as safetensors, instead of a pipeline folder.")
@click.option(
    "--weights",
    type=click.Choice(["evaluated", "sampling", "current", "ema"]),
    default="evaluated",
    show_default=True,
    help="evaluated: what the run's last evaluation measured; sampling: what painted last; current: the newest; "
    "ema: learner.ema's average.",
)
def export(run: str, out: str | None, lora: bool, weights: Weights) -> None:
    """Write the trained weights of RUN as files that diffusers loads."""
    from cluster.export import export_run
    from contracts.startup import collector_paused

    with collector_paused():
        click.echo(export_run(run, out, lora=lora, weights=weights))


for command in (*COMMANDS, jury):
    main.add_command(command)


def _message(error: Exception) -> str:
    from contracts.errors import ConfigErrors

    if isinstance(error, ConfigErrors):
        number = len(error.errors)
        return "\n".join([f"{number} problem{'s' if number != 1 else ''}:", *(f"  {one}" for one in error.errors)])
    return f"error: {error}"


def _load(config: str, overrides: Sequence[str]) -> RunConfig:
    from contracts.config import load_config

    return load_config(config, overrides)


def _mismatches(config: RunConfig) -> list[ConfigError]:
    """What does not fit; running reward servers are asked too, unless there are other mismatches already."""
    from cluster.validate import check

    return check(config) or _ask(config).errors


def _ask(config: RunConfig) -> Asked:
    """What running reward servers given by URL say."""
    import asyncio

    from cluster.validate import check_scorers_live

    return asyncio.run(check_scorers_live(config))


def _refuse(errors: list[ConfigError]) -> None:
    if errors:
        from contracts.errors import ConfigErrors

        raise ConfigErrors(errors)
