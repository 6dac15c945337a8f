"""A run's context for tests of single loops: real ledger, admission and bell; telemetry that remembers; fake vaults.

Does not own: what is asserted.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from cluster.admission import Admission
from cluster.context import RunContext
from cluster.ledger import Ledger
from contracts.config import RunConfig
from contracts.config.load import config_from_tree
from contracts.wire import GroupHeader, PaintReceipt, PromptSpec, PromptTask


class Remembers:
    """Telemetry as a list of events and a dict of counters."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.counted: dict[str, float] = {}

    def event(self, kind: str, **fields: Any) -> None:
        self.events.append((kind, fields))

    def count(self, name: str, number: float = 1, **labels: str) -> None:
        key = "/".join([name, *labels.values()])
        self.counted[key] = self.counted.get(key, 0) + number

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.events]

    def __getattr__(self, name: str) -> Any:
        return lambda *_args, **_fields: None


class Remote:
    """An actor's handle: every attribute has `.remote`, which awaits the method of `actor`, or raises its error."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._actor, name)

        class Method:
            @staticmethod
            def remote(*args: Any) -> Any:
                async def call() -> Any:
                    return method(*args)

                return asyncio.ensure_future(call())

        return Method


class Prompts:
    def at(self, position: int) -> PromptSpec:
        return PromptSpec(text=str(position))


def config_of(folder: Path, **changes: dict[str, Any]) -> RunConfig:
    """Two groups of four a step, no staleness; changes: sections."""
    tree: dict[str, Any] = {
        "name": "house", "runs_dir": str(folder), "model": {"path": "none"},
        "scorers": [{"name": "given", "urls": ["http://127.0.0.1:1"]}], "objective": {"name": "nft"},
        "rollout": {"actors": 1, "groups_per_step": 2, "group_size": 4, "micro_batch": 4},
        "pipeline": {"max_staleness": 0}, "stop": {"steps": 3}, **changes,
    }  # fmt: skip
    return config_from_tree(tree)


def context_of(config: RunConfig, folder: Path, vaults: dict[str, Any], store: Any = None) -> RunContext:
    """The context of a run whose version 0 is published."""
    ledger = Ledger(folder / "ledger.sqlite")
    ledger.published(0, 0)
    telemetry: Any = Remembers()
    nothing: Any = None
    return RunContext(
        config, nothing, ledger, Admission(ledger, config), store, telemetry, Prompts(), vaults
    )  # fmt: skip


def header_of(task: PromptTask) -> GroupHeader:
    return GroupHeader(
        group_id=task.group_id, attempt=task.attempt, prompt=task.prompt, group_size=task.group_size,
        weight_version=0, prompt_digest="d",
    )  # fmt: skip


def receipt_of(task: PromptTask) -> PaintReceipt:
    return PaintReceipt(
        group_id=task.group_id, attempt=task.attempt, weight_version=0, vault="vault-0", num_bytes=1,
        paint_seconds=0.0, store_seconds=0.0,
    )  # fmt: skip


def admit_and_lease(context: RunContext, lease_s: float = 60.0) -> PromptTask:
    """The next prompt, handed to an actor."""
    context.admission.admit(context.source)
    task = context.ledger.lease_generating("actor-0", lease_s)
    assert task is not None
    return task
