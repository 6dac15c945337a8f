"""Going on with a run that was stopped or killed: what may change, what is found, and the state it goes on from.

    open_run     the run folder, new or as it was left (or brought back from its URL), in the present format, with its
                 newest whole checkpoint
    bring_back   the ledger's leases are taken back and it is rolled back to the checkpoint; what vaults lost is painted
                 again, what the ledger does not know is deleted; groups that wait for their scores are returned

Invariant: after `bring_back` ledger, vaults and the learner's weights are of one step, so the run goes on as if it had
never been away: at max_staleness 0 to the last bit (law 6).
Does not own: the lock (lock.py), what a checkpoint is (checkpoints/), the loops (controller.py).
"""

from __future__ import annotations

import json
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec

from cluster.checkpoints.layout import LEDGER, Checkpoint, TornCheckpoint, folder_name, newest_whole, step_of
from cluster.checkpoints.remote import RemoteCheckpoints, url_of
from cluster.context import RunContext, Scored
from cluster.evaluate import EvalResult
from cluster.ledger import Ledger
from cluster.lock import RunLock, refuse_if_running
from cluster.migrate import RUN_FORMAT, check_format, migrate
from cluster.prompts_digest import prompts_digest
from cluster.refs import value
from cluster.run_folder import RunFolder, location_of
from cluster.vault_files import GROUP_FILE
from contracts.config import RunConfig, load_config, to_yaml
from contracts.config.rollout import EvalSampling
from contracts.errors import ConfigError, ConfigErrors, LedgerError
from contracts.wire import GroupState

FIXED = (
    "name", "seed", "runs_dir", "model.family", "model.path", "model.tuning", "model.lora", "model.warm_start",
    "objective.name", "prompts.source", "prompts.path", "prompts.column", "prompts.shuffle",
    "prompts.held_out_fraction", "prompts.options", "sampler", "rollout.group_size", "vault.count",
)  # fmt: skip
"""What a resumed run must keep: its weights, live groups and prompts would mean something else."""


@dataclass
class OpenRun:
    """A run folder that is open for writing, new or as it was left. notes: events to record once telemetry is up."""

    folder: RunFolder
    lock: RunLock
    checkpoint: Checkpoint | None = None
    resumed: bool = False
    notes: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def apply(self, context: RunContext) -> None:
        """Give the run what was before: its times, its evaluations, the scorers' versions."""
        for kind, fields in self.notes:
            context.telemetry.event(kind, **fields)
        context.scorer_versions.update(_json(self.folder.manifest).get("scorer_versions") or {})
        if self.checkpoint is not None:
            state = self.checkpoint.run_state()
            context.trained_before, context.before = state.train_seconds, state.before
            context.score, context.scored_step = state.score, state.scored_step


# ---- before anything is started ------------------------------------------------------------------------------------


class AlreadyFinished(ConfigError):
    """The run has reached its limits, so a resume has nothing to do."""


def has_begun(config: RunConfig) -> bool:
    """Whether the folder of `config` holds a run."""
    with _small_files(location_of(config), ("config.yaml",)) as files:
        return bool(files)


def resumed_config(
    run: str, overrides: Sequence[str] = (), *, given: RunConfig | None = None, accept_new_prompts: bool = False
) -> RunConfig:
    """The configuration a run goes on with: its own with overrides, or a `given` one of the same name and runs_dir.

    run: its folder, by path or fsspec URL. Raises ConfigError when there is none, when it has another format, when
    what a resumed run must keep has changed, or when the prompt file is another than at the start; AlreadyFinished.
    """
    location = run.rstrip("/") if "://" in run else str(Path(run).expanduser().absolute())
    with _small_files(location, ("config.yaml", "manifest.json", "summary.json")) as files:
        if "config.yaml" not in files:
            raise ConfigError("run", f"there is no run at {run}", "give the folder that holds its config.yaml")
        saved = load_config(files["config.yaml"])
        config = load_config(files["config.yaml"], overrides) if given is None else _at_home(given, saved)
        manifest = _json(files.get("manifest.json"))
        summary = _json(files.get("summary.json"))
    check_format(manifest, run)
    _refuse_changes(saved, config)
    parent, _, name = location.rpartition("/")
    config = config.model_copy(update={"runs_dir": parent, "name": name})
    _refuse_finished(summary, config, run)
    if not accept_new_prompts:
        _refuse_new_prompts(manifest, config)
    return config


def _at_home(given: RunConfig, saved: RunConfig) -> RunConfig:
    """The given one, whose folder this is, however the path was written when the run began."""
    return given.model_copy(update={"runs_dir": saved.runs_dir, "name": saved.name})


def _json(path: Path | None) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        found = json.loads(path.read_text()) if path is not None else {}
        return found if isinstance(found, dict) else {}
    return {}


@contextmanager
def _small_files(location: str, names: Sequence[str]) -> Iterator[dict[str, Path]]:
    """Those of the files that a run folder has, on this machine."""
    if "://" not in location:
        yield {name: Path(location) / name for name in names if (Path(location) / name).is_file()}
        return
    filesystem, path = fsspec.core.url_to_fs(location)
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            with suppress(FileNotFoundError):
                (Path(folder) / name).write_bytes(filesystem.cat_file(f"{path.rstrip('/')}/{name}"))
        yield {name: Path(folder) / name for name in names if (Path(folder) / name).is_file()}


def evaluation_before(context: RunContext) -> EvalResult | None:
    """The evaluation before training, as an earlier process made it."""
    kept = context.before
    return None if kept is None else EvalResult(**{**kept, "sampling": EvalSampling(**kept["sampling"])})


def _refuse_changes(saved: RunConfig, config: RunConfig) -> None:
    before, now = saved.model_dump(mode="json"), config.model_dump(mode="json")
    way_out = (
        "leave it as it was, or start a new run (model.warm_start can take over a LoRA of this one: export --lora)"
    )
    errors = [
        ConfigError(key, f"is {_at(before, key)!r} in this run and cannot become {_at(now, key)!r}", way_out)
        for key in FIXED
        if _at(before, key) != _at(now, key)
    ]
    if errors:
        raise ConfigErrors(errors)


def _at(tree: Mapping[str, Any], key: str) -> Any:
    found: Any = tree
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _refuse_finished(summary: Mapping[str, Any], config: RunConfig, run: str) -> None:
    """A finished run goes on only where its limits leave something to do."""
    if summary.get("outcome") != "finished":
        return
    stop = config.stop
    steps_left = stop.steps is None or summary.get("steps", 0) < stop.steps
    seconds_left = stop.seconds is None or summary.get("train_seconds", 0.0) < stop.seconds
    if not (steps_left and seconds_left):
        raise AlreadyFinished("stop", f"{run} is finished: there is nothing left to do", "raise stop.steps to train on")


def _refuse_new_prompts(manifest: Mapping[str, Any], config: RunConfig) -> None:
    before, now = manifest.get("prompts_digest"), prompts_digest(config)
    if before is not None and now is not None and before != now:
        raise ConfigError(
            "prompts.path", f"{config.prompts.path} has changed since the run began: its positions mean other prompts",
            "bring the old file back, or resume with --accept-new-prompts: what is admitted from now on is read from "
            "the new one",
        )  # fmt: skip


# ---- in the controller ---------------------------------------------------------------------------------------------


def open_run(config: RunConfig, resume: bool) -> OpenRun:
    """Create the run folder of `config`, or open it as it was left, and take its lock.

    Raises ConfigError when it cannot be written, is running, or (new) exists.
    """
    location = location_of(config)
    if not resume:
        refuse_if_running(location)
        digest = prompts_digest(config)
        folder = RunFolder.create(config)
        lock = RunLock.acquire(location)
        folder.update_manifest(format=RUN_FORMAT, prompts_digest=digest)
        note_workplace(folder)
        return OpenRun(folder, lock)
    lock = RunLock.acquire(location)
    try:
        return reopen(config, lock)
    except BaseException:
        lock.release()
        raise


def reopen(config: RunConfig, lock: RunLock) -> OpenRun:
    """Open the run folder of `config` for writing and find where to go on."""
    url = url_of(config)
    folder = RunFolder(Path(config.runs_dir) / config.name) if url is None else _working_folder(url)
    notes: list[tuple[str, dict[str, Any]]] = []
    if migrate(folder, _json(folder.manifest), config):
        notes.append(("migrated", {"format": RUN_FORMAT}))
    checkpoint, problems = newest_whole(folder.checkpoints)
    if url is not None and checkpoint is None:
        checkpoint, more = _fetch_newest(RemoteCheckpoints(url), folder.checkpoints)
        problems += more
    notes += [("checkpoint_torn", {"problem": problem}) for problem in problems]
    _set_torn_aside(folder.checkpoints, -1 if checkpoint is None else checkpoint.step)
    if not _ledger_fits(folder.ledger, checkpoint):
        if checkpoint is not None:
            restore(folder, checkpoint, config.vault.count)
            notes.append(("ledger_restored", {"step": checkpoint.step}))
        elif folder.ledger.exists():
            raise ConfigError(
                "run", f"{folder.ledger} cannot be read and there is no whole checkpoint", "start the run again"
            )
    for name in ("metrics.jsonl", "events.jsonl"):
        mend_lines(folder.root / name)
    folder.write_text("config.yaml", to_yaml(config))
    notes += _note_prompts(folder, config)
    note_workplace(folder)
    return OpenRun(folder, lock, checkpoint, True, notes)


def _note_prompts(folder: RunFolder, config: RunConfig) -> list[tuple[str, dict[str, Any]]]:
    """New prompts were accepted on the command line: record which."""
    before, now = _json(folder.manifest).get("prompts_digest"), prompts_digest(config)
    folder.update_manifest(prompts_digest=now)
    return [("prompts_changed", {"before": before, "now": now})] if before not in (None, now) else []


def _working_folder(url: str) -> RunFolder:
    """Where a run at a URL goes on: where it worked before, if that is this machine and still there; else a copy."""
    with _small_files(url, ("manifest.json",)) as files:
        workplace = _json(files.get("manifest.json")).get("workplace") or {}
    root = Path(str(workplace.get("path", "")))
    if workplace.get("host") == socket.gethostname() and (root / LEDGER).is_file() and (root / "config.yaml").is_file():
        return RunFolder(root, url)
    folder = RunFolder.open(url, leave_out=("checkpoints",))
    folder.ledger.unlink(missing_ok=True)  # the mirror's is not of a checkpoint: its groups' bytes were not mirrored
    return folder


def note_workplace(folder: RunFolder) -> None:
    """Say in a mirrored run's manifest where it works, so that a resume on this machine finds what is not mirrored."""
    if folder.url is not None:
        folder.update_manifest(workplace={"host": socket.gethostname(), "path": str(folder.root)})
        folder.sync()


def _fetch_newest(remote: RemoteCheckpoints, target: Path) -> tuple[Checkpoint | None, list[str]]:
    problems: list[str] = []
    for step in reversed(remote.steps()):
        try:
            remote.fetch(step, target / folder_name(step))
            return newest_whole(target)[0], problems
        except TornCheckpoint as torn:
            problems.append(str(torn))
            shutil.rmtree(target / folder_name(step), ignore_errors=True)
    return None, problems


def _set_torn_aside(checkpoints: Path, newest_whole_step: int) -> None:
    """Those newer than the newest whole one are torn: kept for whoever wants to look, but never counted again."""
    for folder in list(checkpoints.glob("step-*")):
        step = step_of(folder.name)
        if step is not None and step > newest_whole_step:
            shutil.rmtree(checkpoints / f"torn-{folder.name}", ignore_errors=True)
            folder.rename(checkpoints / f"torn-{folder.name}")


def _ledger_fits(path: Path, checkpoint: Checkpoint | None) -> bool:
    """Whether the run's own ledger can be read and knows every step of the checkpoint (a power failure may cost it
    its last transitions)."""
    if not path.is_file():
        return False
    try:
        with closing(Ledger(path)) as ledger:
            return checkpoint is None or ledger.trained_steps >= checkpoint.step
    except LedgerError:
        return False


def restore(folder: RunFolder, checkpoint: Checkpoint, vault_count: int) -> None:
    """Put a checkpoint's ledger and bytes where the run keeps its own. For a run whose ledger is gone or broken."""
    for leftover in folder.root.glob(f"{LEDGER}*"):
        if not leftover.name.endswith(".lock"):
            leftover.unlink()
    shutil.copyfile(checkpoint.path / LEDGER, folder.ledger)
    for index in range(vault_count):
        vault = folder.vault(index)
        for source in sorted(checkpoint.groups.glob("*.safetensors")):
            group = GROUP_FILE.match(source.name)  # an embedding otherwise, which every vault has
            if (group is None or int(group[1]) % vault_count == index) and not (vault / source.name).exists():
                shutil.copyfile(source, vault / f"{source.name}.tmp")
                (vault / f"{source.name}.tmp").rename(vault / source.name)


def mend_lines(path: Path) -> None:
    """End a file of lines that a killed process left in the middle of one."""
    if not path.is_file():
        return
    with path.open("rb+") as file:
        size = file.seek(0, 2)
        keep = size
        while keep and keep > size - 2**20:
            file.seek(keep - 1)
            if file.read(1) == b"\n":
                break
            keep -= 1
        file.truncate(keep)


async def bring_back(context: RunContext, step: int) -> list[int]:
    """Make ledger and vaults agree with the weights after `step`; returns the groups that wait for their scores."""
    ledger = context.ledger
    recovered = ledger.recover()
    again = ledger.rollback(step)
    lost = await _reconcile(context)
    context.step = step
    context.telemetry.event(
        "resumed", step=step, leases_taken_back=len(recovered), rolled_back=again, lost=lost,
        live=ledger.live, books_balanced=ledger.books().balanced,
    )  # fmt: skip
    waiting = [row for row in ledger.rows(state=GroupState.GENERATED) if row.live]
    for row in waiting:
        context.groups[row.group_id] = Scored(await value(context.vault(row.vault).header.remote(row.group_id)))
    return [row.group_id for row in waiting]


async def _reconcile(context: RunContext) -> list[int]:
    """Compare what vaults hold with what the ledger needs of them; returns the groups to be painted again."""
    needed = {row.group_id: row for row in context.ledger.needed_after(context.ledger.trained_steps)}
    held: dict[str, set[tuple[int, int]]] = {}
    for name, vault in context.vaults.items():
        held[name] = {(group_id, attempt) for group_id, attempt in await value(vault.stored.remote())}
    lost = [
        row.group_id
        for row in needed.values()
        if row.vault is None or (row.group_id, row.paint_attempt) not in held.get(row.vault, set())
    ]
    for group_id in lost:
        context.ledger.lost(group_id)
    for name, paintings in held.items():
        for group_id, attempt in paintings:
            row = needed.get(group_id)
            if row is None or group_id in lost or row.paint_attempt != attempt:
                await value(context.vaults[name].delete.remote(group_id, attempt))
    await _keep_embeddings(context)
    return lost


async def _keep_embeddings(context: RunContext) -> None:
    """Delete prompt embeddings that no painting uses: a vault alone cannot know about those of the others."""
    uses: dict[int, list[str]] = {}
    for vault in context.vaults.values():
        uses.update(await value(vault.embeddings_used.remote()))
    for vault in context.vaults.values():
        await value(vault.keep_embeddings_of.remote(uses))
