"""The two lines: what was waited for and what to scale, on made-up phases."""

from __future__ import annotations

import pytest

from cluster.telemetry.verdict import judge

QUICK = {"waiting to be painted, and painting": 5.0, "scoring": 0.1, "waiting for the learner, and update": 1.0}
JURY = {"waiting to be painted, and painting": 1.0, "waiting for the jury": 1.0, "scoring": 4.0}


def phases(update: float, groups: float, paint: float, prompt: float, **more: float) -> dict[str, float]:
    known = {
        "learner/update": update, "learner/wait_for_groups": groups, "actor/paint": paint,
        "actor/wait_for_prompt": prompt, "rank/forward_backward": update,
    }  # fmt: skip
    return known | {name.replace("__", "/"): seconds for name, seconds in more.items()}


@pytest.mark.parametrize(
    ("spent", "stages", "staleness", "words"),
    [
        (phases(95, 5, 90, 10), QUICK, 1, "both busy"),
        (phases(99, 1, 50, 50), QUICK, 1, "The learner is the bottleneck: more learner.ranks"),
        (phases(40, 60, 99, 1), QUICK, 1, "Painting is the bottleneck: more rollout.actors"),
        (phases(40, 60, 40, 60), JURY, 1, "The jury is the bottleneck (a group stands there 5 s)"),
        (phases(50, 50, 50, 50), QUICK, 0, "pipeline.max_staleness is 0: allow 1"),
        (phases(50, 50, 50, 50), QUICK, 2, "a larger pipeline.max_staleness"),
        (phases(50, 50, 50, 0, actor__wait_for_weights=50), QUICK, 1, "weights.transport"),
        (phases(60, 0, 90, 10, learner__save_state=40), QUICK, 1, "checkpoint.every_steps"),
        (phases(60, 0, 90, 10, learner__publish=40), QUICK, 1, "Publishing weights"),
    ],
)  # fmt: skip
def test_what_to_scale(spent: dict[str, float], stages: dict[str, float], staleness: int, words: str) -> None:
    verdict = judge(spent, stages, staleness)
    assert words in verdict.scale
    assert verdict.lines == (verdict.waited, verdict.scale)


def test_shares_are_of_each_roles_own_time() -> None:
    waited = judge(phases(75, 25, 160, 40, actor__wait_for_weights=0.0), QUICK, 1).waited
    assert waited == "The learner waited for groups 25% of its time; the actors waited for prompts 20% and for " \
        "weights 0% of theirs."  # fmt: skip


def test_nothing_to_judge_before_the_first_step() -> None:
    assert judge({}, {}, 1).waited.startswith("Nothing to judge yet")
    assert "GPUs" in judge(phases(95, 5, 90, 10), QUICK, 1).scale
    assert "CPUs" in judge(phases(95, 5, 90, 10), QUICK, 1, cpu_only=True).scale
