"""The threads of a trainer's process: label where there is a judge, learn, and hold out the newest version.

    offer --> inbox --> [label threads --> labelled inbox] --> learn thread --> candidate (packed when asked for)

Invariants: `offer` returns at once whatever the threads do; at most updates_per_step updates are made between two
`tick`s; an error in one update costs that update, MAX_ERRORS in a row end the loop with the last one.
Does not own: what an update is (trainer.py), the use of a candidate (cluster/online.py).
"""

from __future__ import annotations

import logging
import threading
from typing import Any

from contracts import versions
from contracts.errors import ConfigError
from reward_servers.online.inbox import FedGroup, Inbox
from reward_servers.online.trainer import OnlineTrainer

log = logging.getLogger(__name__)

WAIT_S = 0.5
MAX_ERRORS = 20


class OnlineLoop:
    """One trainer at work. Every method may be called from any thread."""

    def __init__(
        self, trainer: OnlineTrainer, queue_groups: int, updates_per_step: int, label_threads: int = 1
    ) -> None:
        self.trainer, self._updates_per_step, self._label_threads = trainer, updates_per_step, label_threads
        self.inbox: Inbox[FedGroup] = Inbox(queue_groups)
        self._labelled: Inbox[Any] = Inbox(queue_groups) if trainer.labels_first else self.inbox
        self._changed = threading.Condition()
        self._learning = threading.Lock()
        self._budget = updates_per_step
        self._stopping = False
        self._number = self._packed = 0
        self._threads: list[threading.Thread] = []
        self.metrics: dict[str, float] = {}
        self.unused = self.errors = self._errors_in_a_row = 0
        self.failure: Exception | None = None

    def start(self, files: versions.Files | None) -> tuple[versions.Version, versions.Files]:
        """Load, go on from a version's files if given, begin the threads; the version that it starts from."""
        self.trainer.load()
        started = self._pack() if files is None else (self._restore(files), files)
        work = [self._learn, *([self._label] * self._label_threads if self.trainer.labels_first else [])]
        self._threads = [threading.Thread(target=each, daemon=True, name=f"online-{i}") for i, each in enumerate(work)]
        for thread in self._threads:
            thread.start()
        return started

    def roll_back(self, files: versions.Files) -> None:
        """Go back to a version; what was learnt since is forgotten."""
        with self._learning:
            self._restore(files)

    def offer(self, group: FedGroup) -> None:
        """A copy of a group. Returns at once."""
        self.inbox.put(group)

    def tick(self) -> None:
        """A learner step has ended: the next updates may be made."""
        with self._changed:
            self._budget = self._updates_per_step
            self._changed.notify_all()

    def candidate(self, timeout_s: float) -> tuple[versions.Version, versions.Files] | None:
        """A version of all updates so far if there are new ones, waiting for one; None when none comes in time.

        Raises what ended the learning.
        """

        def there() -> bool:
            return self.trainer.updates != self._packed or self._stopping or self.failure is not None

        with self._changed:
            self._changed.wait_for(there, timeout_s)
            if self.failure is not None:
                raise self.failure
        if self.trainer.updates == self._packed or not self._learning.acquire(timeout=timeout_s):
            return None
        try:
            return self._pack()
        finally:
            self._learning.release()

    def figures(self) -> dict[str, float]:
        """Newest metrics and the counts since the start."""
        waits = self._labelled.dropped if self.trainer.labels_first else 0
        return {
            **self.metrics, **self.trainer.counts(), "updates": float(self.trainer.updates),
            "offered": float(self.inbox.offered), "dropped": float(self.inbox.dropped + waits),
            "waiting": float(len(self.inbox)), "unused": float(self.unused), "errors": float(self.errors),
        }  # fmt: skip

    def stop(self) -> None:
        """End the threads; one that hangs in a judge or a network is left behind as a daemon."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self.inbox.close()
        self._labelled.close()
        for thread in self._threads:
            thread.join(timeout=2.0)
        self.trainer.close()

    # ---- threads -----------------------------------------------------------------------------------------------

    def _label(self) -> None:
        while not self._stopping:
            group = self.inbox.take(WAIT_S)
            if group is None:
                continue
            try:
                labelled = self.trainer.label(group)
            except Exception as error:
                self._failed(error)
                continue
            if labelled is None:
                self.unused += 1
            else:
                self._labelled.put(labelled)

    def _learn(self) -> None:
        while not self._stopping and self.failure is None:
            with self._changed:
                if not self._changed.wait_for(lambda: self._budget > 0 or self._stopping, WAIT_S):
                    continue
            item = self._labelled.take(WAIT_S)
            if item is not None:
                self._update(item)

    def _update(self, item: Any) -> None:
        try:
            with self._learning:
                metrics = self.trainer.learn(item)
                if metrics is None:
                    self.unused += 1
                    return
                self.metrics = metrics
                self.trainer.updates += 1
            with self._changed:
                self._budget -= 1
                self._changed.notify_all()
            self._errors_in_a_row = 0
        except Exception as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        log.warning("an online update failed: %s: %s", type(error).__name__, error)
        self.errors += 1
        self._errors_in_a_row += 1
        if self._errors_in_a_row >= MAX_ERRORS:
            with self._changed:
                self.failure = error
                self._changed.notify_all()

    def _pack(self) -> tuple[versions.Version, versions.Files]:
        weights, state, facts = self.trainer.pack()
        packed = versions.pack(self._number, weights, state, {**facts, "updates": self.trainer.updates})
        self._number += 1
        self._packed = self.trainer.updates
        return packed

    def _restore(self, files: versions.Files) -> versions.Version:
        version, weights, state = versions.unpack(files)
        try:
            self.trainer.restore(weights, state)
        except (KeyError, ValueError, RuntimeError) as error:
            raise ConfigError(
                "online", f"{version.name} of the run's checkpoint belongs to another model ({error})",
                "write the trainer's settings as they were, or start a new run",
            ) from error  # fmt: skip
        self.trainer.updates = self._packed = int(version.facts["updates"])
        self._number = version.number + 1
        return version
