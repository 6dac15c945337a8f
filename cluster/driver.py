"""The driver: validates, starts or joins Ray, starts the controller, shows progress, ends what it started.

It never holds a batch. Ctrl-C or SIGTERM ask the controller to stop at the next boundary; a second one ends at once.
Does not own: the run (controller.py), the display's look (telemetry/progress.py).
"""

from __future__ import annotations

import io
import os
import secrets
import signal
import time
from pathlib import Path
from typing import Any

from cluster.telemetry.progress import ProgressDisplay
from contracts.config import RunConfig
from contracts.errors import ConfigError, ConfigErrors, ExitCode, SalonError


def train(config: RunConfig, show: bool = True) -> ExitCode:
    """Run `config` to its end. Raises SalonError with one clear message when it cannot."""
    from cluster.validate import check, check_cluster

    _refuse(check(config))
    started_here = start_ray(config)
    import ray

    try:
        _refuse(check_cluster(config, ray.cluster_resources()))
        return _follow(config, show)
    finally:
        if started_here:
            ray.shutdown()


def _refuse(errors: list[ConfigError]) -> None:
    if errors:
        raise ConfigErrors(errors)


def start_ray(config: RunConfig) -> bool:
    """Join the cluster of cluster.address or RAY_ADDRESS, or start a local Ray. True if it was started here.

    Without an address a cluster that happens to run on this machine is left alone.
    """
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    if not address:
        _ensure_token()  # before Ray is imported: it reads the mode then, and never again
    import ray

    if ray.is_initialized():
        return False
    options: dict[str, Any] = {
        "log_to_driver": bool(os.environ.get("SALON_DEBUG")), "logging_level": "WARNING",
    }  # fmt: skip
    if address:
        ray.init(address=address, **options)
        return "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ
    ray.init(
        address="local", num_cpus=config.cluster.num_cpus or local_cpus(config), include_dashboard=False,
        object_store_memory=config.cluster.object_store_mb * 2**20, **options,
    )  # fmt: skip
    return True


def worker_environment(config: RunConfig) -> dict[str, str]:
    """Environment of every process of the run; children of the controller inherit it.

    In a submitted job Ray itself puts the uploaded working directory on the import path, on every node its own.
    """
    threads = str(max(config.rollout.threads, config.learner.threads))
    kept = {name: os.environ[name] for name in {s.token_env for s in config.scorers} if name in os.environ}
    path = {} if in_job() else {"PYTHONPATH": _import_path()}
    stacks = {"SALON_STACKS": f"{config.runs_dir}/{config.name}/stacks"} if "://" not in config.runs_dir else {}
    seen = {"SALON_METRICS_HOST": config.telemetry.metrics_host}
    return {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false", **path, **stacks, **seen, **kept}


def _import_path() -> str:
    """Where workers look for modules: the user's working directory, Salon's own root, what was set already."""
    root = str(Path(__file__).resolve().parent.parent)
    return os.pathsep.join(dict.fromkeys([os.getcwd(), root, *filter(None, [os.environ.get("PYTHONPATH")])]))


def in_job() -> bool:
    """Whether this driver was started by `ray job submit`."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def local_cpus(config: RunConfig) -> int:
    """CPUs a local Ray announces: what actors and ranks ask for (everything else asks for none)."""
    rollout, learner = config.rollout, config.learner
    wanted = rollout.actors * rollout.cpus_per_actor + learner.ranks * learner.cpus_per_rank
    return max(int(wanted + 0.999), 1)


def _ensure_token() -> None:
    """Token authentication for the local Ray, with a token of this run alone unless the user has set one."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if os.environ["RAY_AUTH_MODE"] == "token" and not (
        os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    ):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _follow(config: RunConfig, show: bool) -> ExitCode:
    """Start the controller and show its progress until it ends."""
    import ray

    from cluster.controller import ControllerActor

    controller = ControllerActor.options(runtime_env={"env_vars": worker_environment(config)}).remote(config)
    result = controller.run.remote()
    interrupts = _Interrupts(controller)
    with interrupts, _display(config, show) as display:
        while not ray.wait([result], timeout=0.5)[0]:
            interrupts.act()
            display.update(_status(controller))
    summary = _result(result)
    if show:
        print_summary(config, summary)
    return ExitCode.FINISHED if summary["outcome"] == "finished" else ExitCode.STOPPED_RESUMABLE


def _display(config: RunConfig, show: bool) -> ProgressDisplay:
    return ProgressDisplay(f"run {config.name}", stream=None if show else io.StringIO())


def _status(controller: Any) -> dict[str, Any]:
    import ray

    try:
        return ray.get(controller.status.remote(), timeout=5)
    except (ray.exceptions.GetTimeoutError, ray.exceptions.RayError):
        return {}


def _result(reference: Any) -> dict[str, Any]:
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause: BaseException = error
        while isinstance(cause, ray.exceptions.RayTaskError):  # one layer for each actor it passed through
            cause = cause.cause
        if isinstance(cause, SalonError):
            raise cause from None
        raise
    except ray.exceptions.RayActorError as error:
        raise SalonError(f"the controller died: {error}") from error


class _Interrupts:
    """Turns SIGINT and SIGTERM into one polite stop; the second signal acts as usual."""

    def __init__(self, controller: Any) -> None:
        self.controller, self.received, self.told = controller, 0, False
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> _Interrupts:
        for number in (signal.SIGINT, signal.SIGTERM):
            self.previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: Any) -> None:
        self.received += 1
        if self.received > 1:
            raise KeyboardInterrupt

    def act(self) -> None:
        if self.received and not self.told:
            self.controller.stop.remote()
            self.told = True


def print_summary(config: RunConfig, summary: dict[str, Any]) -> None:
    """Held-out accuracy before and after, books and where the pictures are."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"run {summary['name']} ({summary['outcome']})", show_header=False)
    before, after = summary["held_out_strict_before"], summary["held_out_strict_after"]
    if before is not None:
        table.add_row("held-out accuracy before", f"{before:.1%}")
    if after is not None:
        table.add_row("held-out accuracy after", f"{after:.1%}")
    if before is not None and after is not None:
        table.add_row("gain", f"{100 * (after - before):+.1f} points")
    table.add_row("steps", str(summary["steps"]))
    table.add_row("images painted / trained", f"{summary['images_painted']} / {summary['images_trained']}")
    discarded = ", ".join(f"{k} {v}" for k, v in summary["images_discarded"].items()) or "none"
    table.add_row("images discarded", discarded)
    table.add_row("max staleness", str(summary["max_staleness_seen"]))
    table.add_row("training time", time.strftime("%M:%S", time.gmtime(summary["train_seconds"])))
    folder = Path(config.runs_dir) / config.name if "://" not in config.runs_dir else f"{config.runs_dir}/{config.name}"
    table.add_row("pictures", f"{folder}/samples/")
    table.add_row("summary", f"{folder}/summary.json")
    if config.telemetry.report:
        table.add_row("report", f"{folder}/report.html")
    Console().print(table)
