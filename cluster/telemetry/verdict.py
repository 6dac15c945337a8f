"""Two lines that say what a run waits for and what to scale, from the seconds of its phases.

The learner's `wait_for_groups` against its working phases, the actors' `wait_for_prompt` against theirs:

| learner waits | actors wait | what is short                                                                    |
|---|---|---|
| no  | no  | nothing: both are busy                                                                               |
| no  | yes | the learner                                                                                          |
| yes | no  | the actors                                                                                           |
| yes | yes | what lies between them: the jury, where groups stand longest in scoring; else the staleness bound    |

Does not own: the phases (telemetry.py counts them), how long groups stand in a stage (cluster/ledger/facts.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

WAITS = 0.15
"""Share of its time that a role may wait before it counts as waiting."""

JURY = ("waiting for the jury", "scoring")


@dataclass(frozen=True)
class Verdict:
    """waited: what was waited for, with shares; scale: what to change."""

    waited: str
    scale: str

    @property
    def lines(self) -> tuple[str, str]:
        return self.waited, self.scale


def judge(
    phases: Mapping[str, float], stage_seconds: Mapping[str, float], max_staleness: int, cpu_only: bool = False
) -> Verdict:
    """phases: seconds by 'role/phase', summed over processes; stage_seconds: mean seconds of a group in each stage."""
    learner, actor = _of("learner", phases), _of("actor", phases)
    if not sum(learner.values()):
        return Verdict("Nothing to judge yet: no learner step has ended.", "Look again after a few steps.")
    starved = _share(learner, "wait_for_groups")
    blocked, fetching = _share(actor, "wait_for_prompt"), _share(actor, "wait_for_weights")
    waited = (
        f"The learner waited for groups {starved:.0%} of its time; "
        f"the actors waited for prompts {blocked:.0%} and for weights {fetching:.0%} of theirs."
    )
    return Verdict(waited, _scale(starved, blocked, fetching, learner, stage_seconds, max_staleness, cpu_only))


def _scale(
    starved: float, blocked: float, fetching: float, learner: Mapping[str, float], stage_seconds: Mapping[str, float],
    max_staleness: int, cpu_only: bool,
) -> str:  # fmt: skip
    devices = "CPUs" if cpu_only else "GPUs"
    if starved <= WAITS and blocked <= WAITS:
        slow = _slow_duty(learner)
        return slow or f"Learner and actors are both busy: more {devices} on both sides in this proportion go faster."
    if fetching > WAITS and starved > WAITS:
        return "Weights reach the actors late: look at weights.transport, and at the network between the nodes."
    if starved <= WAITS:
        return f"The learner is the bottleneck: more learner.ranks (or faster {devices}), or fewer rollout.actors."
    if blocked <= WAITS:
        return f"Painting is the bottleneck: more rollout.actors ({devices}), or fewer sampler.steps."
    return _between(stage_seconds, max_staleness)


def _slow_duty(learner: Mapping[str, float]) -> str | None:
    """A duty beside the update that takes a large part of the learner's time, or None."""
    for phase, advice in (
        ("save_state", "Checkpoints take much of the learner's time: write them less often (checkpoint.every_steps)."),
        ("publish", "Publishing weights takes much of the learner's time: larger steps, or model.tuning=lora."),
    ):
        if _share(learner, phase) > WAITS:
            return advice
    return None


def _between(stage_seconds: Mapping[str, float], max_staleness: int) -> str:
    """Both sides wait: what holds groups between them."""
    jury = sum(stage_seconds.get(stage, 0.0) for stage in JURY)
    if jury > 0.4 * sum(stage_seconds.values()):
        return (
            f"The jury is the bottleneck (a group stands there {jury:.3g} s): more reward servers (scorers[].urls), or "
            "a larger scorers[].max_batch."
        )
    if max_staleness == 0:
        return "They take turns, because pipeline.max_staleness is 0: allow 1 and they work side by side."
    return "Each waits for the other: a larger pipeline.max_staleness, or smaller steps (rollout.groups_per_step)."


def _of(role: str, phases: Mapping[str, float]) -> dict[str, float]:
    return {key.removeprefix(f"{role}/"): took for key, took in phases.items() if key.startswith(f"{role}/")}


def _share(phases: Mapping[str, float], phase: str) -> float:
    total = sum(phases.values())
    return phases.get(phase, 0.0) / total if total > 0 else 0.0
