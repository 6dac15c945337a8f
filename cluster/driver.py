"""The driver: validates, starts or joins Ray, starts the controller, shows progress, ends what it started.

It never holds a batch. A controller that dies or hangs is replaced by one that resumes the run. Ctrl-C or SIGTERM ask
the controller to stop at the next boundary; a second one ends at once.
Does not own: the run (controller.py), the display's look (telemetry/progress.py).
"""

from __future__ import annotations

import io
import os
import secrets
import signal
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import awake
from cluster.durations import duration
from cluster.losses import Losses
from cluster.telemetry.progress import ProgressDisplay
from contracts.config import RunConfig
from contracts.errors import ConfigError, ConfigErrors, ExitCode, SalonError
from contracts.stacks import STACKS_ENV, install

if TYPE_CHECKING:
    from cluster.controller import Parts


_RAY_ALONE = {"RAY_task_events_report_interval_ms": "0", "RAY_prestart_worker_first_driver": "0"}
"""Nobody asks a Ray of the run's own for the history of its tasks, of which Ray would keep 100,000: 240 MB. And of the
workers that it would start in advance, one a CPU, none has the environment of the run's actors."""

REACH_S = 5.0
"""Time the cluster's port has to answer."""

START_S = 600.0
"""Shortest time a controller has to answer for the first time: its process starts, and may wait for a machine."""


def train(config: RunConfig, show: bool = True, resume: bool = False, parts: Parts | None = None) -> ExitCode:
    """Run `config` to its end. Raises SalonError with one clear message when it cannot.

    resume: go on with its run folder; parts: other classes for those that hold a model (tests, benchmarks).
    """
    from cluster.lock import refuse_if_running, wait_for_release
    from cluster.run_folder import location_of
    from cluster.validate import check, check_cluster, check_deployed

    if parts is None:
        _refuse(check(config))
    if resume:  # a driver that was killed takes its run along, but not at once
        wait_for_release(location_of(config), lambda text: print(text, file=sys.stderr, flush=True))
    else:
        refuse_if_running(location_of(config))
    started_here = start_ray(config)
    import ray

    try:
        _refuse([*check_cluster(config, ray.cluster_resources()), *check_deployed(config).errors])
        _tell_stacks(config)
        inherited = started_here and not cluster_address(config)
        return _follow(config, show, resume, parts, controller_options(config, inherited))
    finally:
        if started_here:
            ray.shutdown()


def _tell_stacks(config: RunConfig) -> None:
    """The watchdog asks the driver where it stands too."""
    from cluster.processes import stacks_folder

    with suppress(OSError):
        install(Path(stacks_folder(config), f"driver-{os.getpid()}.txt"))


def _refuse(errors: list[ConfigError]) -> None:
    if errors:
        raise ConfigErrors(errors)


def start_ray(config: RunConfig) -> bool:
    """Join the cluster of cluster.address or RAY_ADDRESS, or start a local Ray. True if it was started here.

    Without an address a cluster that happens to run on this machine is left alone.
    """
    address = cluster_address(config)
    if not address:
        _ensure_token()  # before Ray is imported: it reads the mode then, and never again
    import ray

    if ray.is_initialized():
        return False
    options: dict[str, Any] = {
        "log_to_driver": bool(os.environ.get("SALON_DEBUG")), "logging_level": "WARNING",
    }  # fmt: skip
    if address:
        if not _listens(address):
            raise _no_cluster(address)
        try:
            ray.init(address=address, **options)
        except ConnectionError as error:
            raise _no_cluster(address) from error
        return "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ
    with _environment(worker_environment(config) | _RAY_ALONE):  # inherited by Ray's processes and all they start
        ray.init(
            address="local", num_cpus=config.cluster.num_cpus or local_cpus(config), include_dashboard=False,
            object_store_memory=config.cluster.object_store_mb * 2**20, **options,
        )  # fmt: skip
    return True


def cluster_address(config: RunConfig) -> str | None:
    """Of the cluster to join; None: a Ray of the run's own."""
    return config.cluster.address or os.environ.get("RAY_ADDRESS") or None


def _listens(address: str) -> bool:
    """Whether anything answers at host:port; Ray itself would try for two minutes, and then end the process."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return True  # `auto` and the like, which Ray looks up itself
    from ray.util import get_node_ip_address

    here = (get_node_ip_address(),) if host in ("127.0.0.1", "localhost") else ()  # where Ray looks for it instead
    for each in (host.strip("[]"), *here):
        with suppress(OSError, ValueError, OverflowError), socket.create_connection((each, int(port)), REACH_S):
            return True
    return False


def _no_cluster(address: str) -> ConfigError:
    return ConfigError("cluster.address", f"no Ray cluster answers at {address}", "start it (`ray start`), or mend it")


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """This process's environment with `variables` for a while."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, old in before.items():
            os.environ.pop(name) if old is None else os.environ.update({name: old})


def worker_environment(config: RunConfig) -> dict[str, str]:
    """Environment of every process of the run; children of the controller inherit it.

    In a submitted job Ray itself puts the uploaded working directory on the import path, on every node its own.
    """
    threads = str(max(config.rollout.threads, config.learner.threads))
    tokens = {scorer.token_env for scorer in config.jurors}
    kept = {name: os.environ[name] for name in tokens if name in os.environ}
    path = {} if in_job() else {"PYTHONPATH": import_path()}
    from cluster.processes import stacks_folder

    seen = {"SALON_METRICS_HOST": config.telemetry.metrics_host}
    return {
        "OMP_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        STACKS_ENV: stacks_folder(config),
        **path,
        **seen,
        **kept,
    }


def import_path() -> str:
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
    if "RAY_AUTH_MODE" not in os.environ and "ray" in sys.modules:
        raise ConfigError(
            "RAY_AUTH_MODE", "Ray was imported before it was set, so this process would start a Ray it cannot talk to",
            "set it to 'token', and RAY_AUTH_TOKEN, before importing ray; or ray.init() first",
        )  # fmt: skip
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if os.environ["RAY_AUTH_MODE"] == "token" and not (
        os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    ):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def controller_options(config: RunConfig, inherited: bool = False) -> dict[str, Any]:
    """How Ray starts the controller, a replaced one too: on this node unless it is lost, where the driver's metrics
    are looked for; inherited: its processes have the run's environment already (a runtime_env starts each twice)."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    environment = {} if inherited else {"runtime_env": {"env_vars": worker_environment(config)}}
    return {"scheduling_strategy": here, **environment}


def _follow(
    config: RunConfig, show: bool, resume: bool, parts: Parts | None, options: Mapping[str, Any]
) -> ExitCode:  # fmt: skip
    """Show the run's progress until it ends; a controller that is lost is replaced by one that resumes the run."""
    from cluster.learner_group import remove_leftover_placements
    from cluster.run_folder import location_of

    losses = Losses(config.cluster.controller_restarts)
    with _Interrupts() as interrupts, _display(config, show) as display:
        while True:
            try:
                summary = _one_controller(config, resume, parts, options, interrupts, display)
                break
            except _ControllerLost as lost:
                if not lost.had_begun or interrupts.received or not losses.one_more(lost.step):
                    raise SalonError(
                        f"{lost}; resume the run with `python -m cluster resume {location_of(config)}`"
                    ) from lost
                remove_leftover_placements()
                resume = True
    if show:
        print_summary(config, summary)
    return ExitCode.FINISHED if summary["outcome"] == "finished" else ExitCode.STOPPED_RESUMABLE


class _ControllerLost(Exception):
    """The controller died or hung. had_begun: its run folder exists, so another can resume it; step: as last told."""

    def __init__(self, why: str, resumed: bool, status: Mapping[str, Any]) -> None:
        super().__init__(why)
        self.had_begun, self.step = resumed or status.get("has_folder", False), int(status.get("step", 0))


def _one_controller(
    config: RunConfig, resume: bool, parts: Parts | None, options: Mapping[str, Any], interrupts: _Interrupts,
    display: ProgressDisplay,
) -> dict[str, Any]:  # fmt: skip
    """The summary, from one controller's whole life. Raises _ControllerLost."""
    import ray

    from cluster.controller import ControllerActor
    from cluster.deaths import ActorGone, how

    controller = ControllerActor.options(**options).remote(config, parts, resume)
    interrupts.begin(controller)
    result, asked = controller.run.remote(), controller.status.remote()
    answered, limit, status = awake.clock(), max(START_S, config.cluster.hang_timeout_s), {}
    while not ray.wait([result], timeout=0.5)[0]:
        interrupts.act()
        found, asked = _status(controller, asked)
        if found:
            answered, limit, status = awake.clock(), config.cluster.hang_timeout_s, found
            display.update(found)
        elif awake.clock() - answered > limit:
            _kill(controller, status)
            raise _ControllerLost(f"the controller did not answer for {limit:g} s", resume, status)
    try:
        return _result(result)
    except ActorGone as error:
        _kill(controller, status)  # unless it only could not be reached
        raise _ControllerLost(f"the controller died: {how(error)}", resume, status) from error


def _kill(controller: Any, status: dict[str, Any]) -> None:
    """End a controller, a stopped (SIGSTOP) one too, where it is on this machine."""
    import ray

    ray.kill(controller, no_restart=True)
    if status.get("host") == socket.gethostname():
        with suppress(ProcessLookupError):
            os.kill(int(status["pid"]), signal.SIGKILL)


def _display(config: RunConfig, show: bool) -> ProgressDisplay:
    return ProgressDisplay(f"run {config.name}", stream=None if show else io.StringIO())


def _status(controller: Any, asked: Any) -> tuple[dict[str, Any], Any]:
    """What the controller answered, and the next question; nothing, and the same one, while it has not."""
    import ray

    if not ray.wait([asked], timeout=0)[0]:
        return {}, asked
    try:
        found = ray.get(asked)
    except ray.exceptions.RayError:
        found = {}
    return found, controller.status.remote()


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


class _Interrupts:
    """Turns SIGINT and SIGTERM into one polite stop; the second signal acts as usual."""

    def __init__(self) -> None:
        self.controller: Any = None
        self.received, self.told = 0, False
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

    def begin(self, controller: Any) -> None:
        """Whom to tell from now on."""
        self.controller, self.told = controller, False

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
    table.add_row("training time", duration(summary["train_seconds"]))
    folder = Path(config.runs_dir) / config.name if "://" not in config.runs_dir else f"{config.runs_dir}/{config.name}"
    table.add_row("pictures", f"{folder}/samples/")
    table.add_row("summary", f"{folder}/summary.json")
    if config.telemetry.report:
        table.add_row("report", f"{folder}/report.html")
    Console().print(table)
