"""How much the ledger and a vault carry: groups/s and bytes/s with 1 and with 16 producers.

- ledger: whole lives of groups, from admission through painting, scoring and claim to published weights (five
  transactions a group and three a step), in the controller's process; a producer is a thread that has one group in
  hand. Steps of 8 groups (16 with 16 producers), score tables of 8 images and 3 columns.
- put, get: a group of 8 samples through the vault's Ray actor, as rollout actors write it and learner ranks read it;
  a producer is a thread with one call in flight. Half of the reads come from memory.
- file: the same bytes written to a file and renamed, without Ray or a store: what the disk gives.

Cases are interleaved; each figure is the median over repeats with a 95 % interval of the median (order statistics).

    python -m benchmarks.ledger_vault [--json]
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measuring import local_ray, median
from cluster.admission import AdmissionRule
from cluster.ledger import Ledger
from contracts.scores import point_table
from contracts.wire import GroupHeader, PaintReceipt, PromptSpec

PRODUCERS = (1, 16)
GROUPS_PER_STEP = 8
GROUP_SIZE = 8
GROUP_BYTES = 4 * 2**20
MEMORY_GROUPS = 16  # decoded groups that fit into the vault's memory
STORED_GROUPS = 32


def run(repeats: int = 10, ledger_steps: int = 12, group_calls: int = 32) -> dict[str, Any]:
    """Rows by (what, producers): median, low and high in the row's unit, and the number of repeats.

    ledger_steps: learner steps of one ledger repeat; group_calls: groups of one vault repeat.
    """
    with local_ray(4, 512), tempfile.TemporaryDirectory() as folder:
        import ray

        from cluster.vault import Vault

        actor: Any = Vault
        vault = actor.remote(f"{folder}/vault", MEMORY_GROUPS * GROUP_BYTES)
        bench = VaultBench(ray, vault, Path(folder), group_calls)
        ledgers = (Path(folder) / f"ledger-{number}.sqlite" for number in itertools.count())
        cases: dict[tuple[str, int, str], Callable[[], float]] = {}
        for producers in PRODUCERS:
            cases["ledger", producers, "groups/s"] = partial(lives, ledgers, producers, ledger_steps)
            cases["vault put", producers, "bytes/s"] = partial(bench.rate, producers, bench.put_one)
            cases["vault get", producers, "bytes/s"] = partial(bench.rate, producers, bench.get_one)
            cases["file", producers, "bytes/s"] = partial(bench.rate, producers, bench.file_one)
        return _measure(cases, repeats)


def lives(paths: Iterator[Path], producers: int, steps: int) -> float:
    """Groups a second through their whole life, in a fresh ledger."""
    tables = {"judge": point_table("judge", "1", ["a", "b", "c"], np.random.default_rng(0).random((GROUP_SIZE, 3)))}
    prompt = PromptSpec(text="a red circle to the left of a blue square", metadata={"task": "position", "number": 7})
    size = max(GROUPS_PER_STEP, producers)
    ledger = Ledger(next(paths))
    ledger.govern(AdmissionRule(size, 1), max_attempts=3)
    ledger.published(0, 0)
    start = time.perf_counter()
    for step in range(1, steps + 1):
        for _ in range(size):
            ledger.admit(prompt, ledger.next_position(), GROUP_SIZE)
        _in_threads(producers, partial(_paint_and_score, ledger, tables))
        claimed = ledger.claim(size)
        assert claimed is not None
        ledger.trained(claimed, step, step - 1)
        ledger.published(step, step)
    seconds = time.perf_counter() - start
    ledger.close()
    return steps * size / seconds


def _paint_and_score(ledger: Ledger, tables: dict[str, Any]) -> None:
    while (task := ledger.lease_generating("actor", 60.0)) is not None:
        receipt = PaintReceipt(
            group_id=task.group_id, attempt=task.attempt, weight_version=task.min_version, vault="vault-0",
            num_bytes=GROUP_BYTES, paint_seconds=1.0, store_seconds=0.1,
        )  # fmt: skip
        ledger.generated(receipt)
        attempt = ledger.lease_scoring(task.group_id, 60.0)
        assert attempt is not None
        ledger.scored(task.group_id, attempt, tables)


class VaultBench:
    """Writes and reads of whole groups; `number` counts the groups written so far."""

    def __init__(self, ray: Any, vault: Any, folder: Path, group_calls: int) -> None:
        self.ray, self.vault, self.folder, self.group_calls = ray, vault, folder, group_calls
        elements = GROUP_BYTES // (GROUP_SIZE * 4)
        states = np.random.default_rng(0).standard_normal((GROUP_SIZE, elements), dtype=np.float32)
        self.arrays = {"states": states}
        self.blob = states.tobytes()
        self.numbers = itertools.count()
        self.lock = threading.Lock()
        for _ in range(STORED_GROUPS):
            self.put_one()

    def rate(self, producers: int, one: Callable[[], None]) -> float:
        """Bytes a second of `group_calls` calls, shared by the producers."""
        share = self.group_calls // producers

        def work() -> None:
            for _ in range(share):
                one()

        start = time.perf_counter()
        _in_threads(producers, work)
        return share * producers * GROUP_BYTES / (time.perf_counter() - start)

    def put_one(self) -> None:
        """Write a group; returns when it is acknowledged."""
        number = self._number()
        header = GroupHeader(
            group_id=number % STORED_GROUPS, attempt=0, prompt=PromptSpec(text="a red circle"), group_size=GROUP_SIZE,
            weight_version=0, prompt_digest="d",
        )  # fmt: skip
        self.ray.get(self.vault.put.remote(header, self.arrays))

    def get_one(self) -> None:
        """Read a group; half of those stored are in the vault's memory."""
        found = self.ray.get(self.vault.get.remote(self._number() % STORED_GROUPS))
        assert found["states"].nbytes == GROUP_BYTES

    def file_one(self) -> None:
        """Write the same bytes to a plain file."""
        path = self.folder / f"file-{self._number() % STORED_GROUPS}"
        path.with_suffix(f".{threading.get_ident()}").write_bytes(self.blob)
        os.replace(path.with_suffix(f".{threading.get_ident()}"), path)

    def _number(self) -> int:
        with self.lock:
            return next(self.numbers)


def _in_threads(number: int, work: Callable[[], None]) -> None:
    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def _measure(cases: dict[tuple[str, int, str], Callable[[], float]], repeats: int) -> dict[str, Any]:
    for case in cases.values():
        case()  # warm up
    rates: dict[tuple[str, int, str], list[float]] = {key: [] for key in cases}
    for _ in range(repeats):
        for key, case in cases.items():
            rates[key].append(case())
    rows = [
        {"what": what, "producers": producers, "unit": unit, **median(values)}
        for (what, producers, unit), values in rates.items()
    ]
    return {"repeats": repeats, "group_bytes": GROUP_BYTES, "rows": rows}


def table(result: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    lines = ["| what | producers | median | 95 % interval | unit |", "|---|---:|---:|---:|---|"]
    for row in sorted(result["rows"], key=lambda row: (row["unit"], row["what"], row["producers"])):
        scale, unit = (2**20, "MiB/s") if row["unit"] == "bytes/s" else (1, row["unit"])
        figures = [f"{row[key] / scale:.0f}" for key in ("median", "low", "high")]
        lines.append(f"| {row['what']} | {row['producers']} | {figures[0]} | {figures[1]} – {figures[2]} | {unit} |")
    return "\n".join(lines)


if __name__ == "__main__":
    result = run()
    print(json.dumps(result, indent=1) if "--json" in sys.argv else table(result))
