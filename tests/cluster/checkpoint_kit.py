"""A run without Ray for the tests of checkpoints: real ledger, vault store and run folder; a learner of one file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from cluster.admission import Admission
from cluster.checkpoints import CheckpointKeeper
from cluster.checkpoints.layout import Checkpoint
from cluster.context import RunContext
from cluster.ledger import Ledger
from cluster.run_folder import RunFolder
from cluster.vault import GroupStore
from contracts.config import RunConfig
from contracts.config.load import config_from_tree
from contracts.wire import GroupHeader, PaintReceipt, PromptSpec
from learner.state_writer import FileDigests, StateWriter


def make_config(runs_dir: str | Path, **fields: Any) -> RunConfig:
    """Two groups of two a step, staleness 1."""
    return config_from_tree(
        {
            "name": "run",
            "runs_dir": str(runs_dir),
            "model": {"path": "model"},
            "rollout": {"groups_per_step": 2, "group_size": 2, "micro_batch": 2},
            "scorers": [{"name": "judge", "function": "judge:score"}],
            "objective": {"name": "grpo"},
            "stop": {"steps": 100},
            **fields,
        }
    )


class FakeTelemetry:
    """Remembers events."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def event(self, kind: str, /, **fields: Any) -> None:
        self.events.append((kind, fields))

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.events]

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_args, **_fields: None


class _Call:
    def __init__(self, work: Callable[..., Any]) -> None:
        self.work = work

    def remote(self, *args: Any) -> Any:
        return _Answer(self.work, args)


class _Answer:
    """What a Ray call returns, as far as it is awaited; the work is done at once."""

    def __init__(self, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.result = work(*args)

    def __await__(self) -> Any:
        yield from ()
        return self.result


class FakeVault:
    """A GroupStore behind calls that look like Ray's."""

    def __init__(self, store: GroupStore) -> None:
        self.store = store

    def __getattr__(self, name: str) -> _Call:
        return _Call(getattr(self.store, name))


class OneFileLearner:
    """Stands for the ranks: its state is one file that holds the step."""

    def __init__(self) -> None:
        self.context: Any = None
        self.pending: StateWriter | None = None
        self.fail: BaseException | None = None
        self.gate: Any = None  # an asyncio.Event that finish_save waits for

    async def begin_save(self, folder: Path) -> None:
        self.pending = StateWriter(folder, 2**20)
        step = np.full(4, self.context.step, np.float32)
        self.pending.tensors("param.safetensors", {"w": (4,)}, lambda _: step)
        self.pending.text("state.json", "{}")

    async def finish_save(self, step: int) -> FileDigests:
        if self.gate is not None:
            await self.gate.wait()
        assert self.pending is not None
        if self.fail is not None:
            self.pending.abandon()  # a rank that is lost, or failed, writes no more
            raise self.fail
        return self.pending.finish()


class SmallRun:
    """Paints and trains groups by hand."""

    def __init__(
        self, config: RunConfig, folder: RunFolder | None = None, checkpoint: Checkpoint | None = None
    ) -> None:
        self.config = config
        self.folder = folder or RunFolder.create(config)
        self.ledger = Ledger(self.folder.ledger)
        self.store = GroupStore(self.folder.vault(0), 2**20, min_free_bytes=0)
        self.telemetry = FakeTelemetry()
        self.admission = Admission(self.ledger, config)
        weights = SimpleNamespace(version=0)
        self.context = RunContext(
            config, self.folder, self.ledger, self.admission, weights, self.telemetry,  # type: ignore[arg-type]
            self, {"vault-0": FakeVault(self.store)},
        )  # fmt: skip
        self.learner = OneFileLearner()
        self.learner.context = self.context
        self.credit: dict[str, Any] = {"rows": 0}
        self.keeper = CheckpointKeeper(self.context, self.learner, lambda: dict(self.credit), dict, checkpoint)

    def at(self, position: int) -> PromptSpec:
        return PromptSpec(text=f"prompt {position}")

    def paint(self, number: int, stop_at: str = "ready") -> list[int]:
        """Admit and paint so many groups, and score them unless told otherwise."""
        painted = []
        for _ in range(number):
            self.admission.admit(self)
            task = self.ledger.lease_generating("actor", 600.0)
            assert task is not None
            painted.append(task.group_id)
            if stop_at == "generating":
                continue
            num_bytes = self._store(task.group_id, task.attempt)
            self.ledger.generated(
                PaintReceipt(
                    group_id=task.group_id, attempt=task.attempt, weight_version=self.ledger.published_version,
                    vault="vault-0", num_bytes=num_bytes, paint_seconds=0.0, store_seconds=0.0,
                )
            )  # fmt: skip
            if stop_at == "ready":
                attempt = self.ledger.lease_scoring(task.group_id, 600.0)
                assert attempt is not None
                self.ledger.scored(task.group_id, attempt, {})
        return painted

    def _store(self, group_id: int, attempt: int) -> int:
        header = GroupHeader(
            group_id=group_id, attempt=attempt, prompt=self.at(group_id), group_size=2, weight_version=0,
            prompt_digest=f"digest{group_id}",
        )  # fmt: skip
        self.store.put_embedding(header.prompt_digest, {"text": np.zeros((1, 2), np.float32)})
        return self.store.put(header, {"images": np.full((2, 4, 4, 3), group_id, np.uint8)})

    def step(self) -> None:
        """Train the two oldest ready groups and publish."""
        ids = self.ledger.claim(2)
        assert ids is not None
        number = self.context.step + 1
        self.ledger.trained(ids, number, number - 1)
        self.ledger.published(number, number)
        self.context.step = number
        self.credit = {"rows": self.credit["rows"] + 1}

    def steps(self, number: int) -> None:
        for _ in range(number):
            missing = 2 - sum(1 for row in self.ledger.rows() if row.live and row.state == "ready")
            self.paint(missing)
            self.step()

    def kinds(self) -> list[str]:
        return self.telemetry.kinds()

    def close(self) -> None:
        self.ledger.close()


def saved_steps(folders: Iterable[Path]) -> list[int]:
    """Steps of checkpoint folders by name."""
    return sorted(int(folder.name.removeprefix("step-")) for folder in folders if folder.name.startswith("step-"))
