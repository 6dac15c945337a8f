"""Admission: when a prompt may enter the pipeline, and the oldest weights its group may be painted with.

Invariant: in admission order no group is ever trained by weights more than `max_staleness` steps ahead of those that
painted it, and the pipeline can always go on.

Notation. P groups a step, M = max_staleness. Step s (counted from 1) trains version s-1 into version s. V is the
latest published version, S >= V the steps trained. A group is live from admission until the weights of its step are
published or it is discarded; a step trained but not yet published holds exactly P live groups. For a group g let
before(g) be the number of live groups older than g, and

    forecast(g) = V + floor(before(g) / P).

1. The forecast is exact at the claim. Groups are claimed oldest first and P at once, so a claimed group has
   before(g) = P (S - V) + i with 0 <= i < P, hence forecast(g) = S, the version its step trains.
2. The forecast never rises. Admission adds younger groups only. Training changes neither V nor what is live.
   Publishing a step raises V by 1 and takes P older groups. Rolling back n published steps lowers V by n and revives
   their n P groups, all older. Expired leases and repeated paintings change nothing that is counted. A discard lowers
   before(g) or leaves it. (That is why a claim is trained whole or released whole: a step of fewer than P groups
   would break the balance.)
3. So a group painted with a version v >= forecast(g) - M, the forecast taken when its task was handed out, is trained
   with staleness S - v = forecast at the claim - v <= forecast at hand-over - v <= M.
4. No wait for weights at admission: live < (M+1) P gives forecast <= V + M, so min_version <= V is already published.
   After a roll-back V is lower and a task may have to wait for its version; it is handed out once min_version <= V.
   The groups that the next step waits for have forecast S, and S - M <= V as soon as at most M steps await
   publication, which asks nothing of any group: no deadlock. Discards pull groups forward; since min_version is taken
   anew at each hand-over, it comes down with the forecast.
5. After a roll-back to step S, version v > S names weights that are no longer in the lineage. A result painted with
   them that arrives now is refused and painted again. A group acknowledged before keeps them: re-training the same
   groups makes that version again before the group is claimed. Where discards pulled it forward to a step that trains
   a version below v, the ledger discards it as `stale`.

With claim_order `ready` 1 does not hold: the bound on live groups stays, the bound on staleness does not.
Does not own: the counts (cluster/ledger), prompts (actors/prompts), who is asked to paint (rollout_loop.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from contracts.wire import PromptSpec, Source

if TYPE_CHECKING:
    from cluster.ledger import Ledger
    from contracts.config import RunConfig


@dataclass(frozen=True)
class AdmissionRule:
    """The rule as numbers. groups_per_step: P > 0; max_staleness: M >= 0, in learner steps."""

    groups_per_step: int
    max_staleness: int

    def __post_init__(self) -> None:
        if self.groups_per_step < 1 or self.max_staleness < 0:
            raise ValueError(f"need groups_per_step >= 1 and max_staleness >= 0, got {self}")

    @property
    def capacity(self) -> int:
        """Groups that may be live at once: (M + 1) P."""
        return (self.max_staleness + 1) * self.groups_per_step

    def may_admit(self, live: int) -> bool:
        """Whether one more group may enter beside `live` live ones."""
        return live < self.capacity

    def min_version(self, published: int, live_before: int) -> int:
        """Lowest weight version a group may be painted with: max(0, V + floor(before / P) - M)."""
        return max(0, published + live_before // self.groups_per_step - self.max_staleness)


class Prompts(Protocol):
    """What admission needs of a prompt source (actors/prompts/base.py)."""

    def at(self, position: int) -> PromptSpec: ...


class Admission:
    """Admits the next prompt of a source into a ledger, which applies the rule from then on."""

    def __init__(self, ledger: Ledger, config: RunConfig, source: Source = Source.ACTORS) -> None:
        self.rule = AdmissionRule(config.rollout.groups_per_step, config.pipeline.max_staleness)
        self._ledger, self._source = ledger, source
        self._group_size = 2 if source is Source.FILES else config.rollout.group_size  # a pair read from files is two
        ledger.govern(self.rule, config.rollout.max_attempts)

    @property
    def capacity(self) -> int:
        """Groups that may be live at once."""
        return self.rule.capacity

    def may_admit(self) -> bool:
        """Whether the rule lets one more group in now."""
        return self.rule.may_admit(self._ledger.live)

    def admit(self, prompts: Prompts) -> int:
        """Admit the prompt after the last one admitted; returns its group id. Raises LedgerError beyond the bound."""
        position = self._ledger.next_position()
        return self._ledger.admit(prompts.at(position), position, self._group_size, source=self._source)
