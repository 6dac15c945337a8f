"""The panels of the report: which series of one or several runs stand in which plot, with what is worth a word.

Does not own: how a plot is drawn (plots.py), where it stands on the page (page.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from cluster.report import plots
from cluster.report.plots import Bars, Line
from cluster.report.view import Row, RunView, histogram_increments

PHASE_NAMES = {
    "wait_for_groups": "waiting for groups", "wait_for_prompt": "waiting for prompts",
    "wait_for_weights": "waiting for weights", "save_state": "checkpoint", "forward_backward": "forward, backward",
}  # fmt: skip
MAX_METRICS = 18
HIDDEN_METRICS = ("lr", "reward", "reward_std", "valid_fraction")
"""Metrics of the objective that repeat another panel or hardly move; everything is in metrics.jsonl."""


@dataclass(frozen=True)
class Panel:
    """One plot. tag: a word beside the title, such as 'held out'; legend: (colour, name); svg: safe markup."""

    title: str
    svg: str
    note: str = ""
    tag: str = ""
    legend: tuple[tuple[int, str], ...] = ()


def reward_panels(views: Sequence[RunView]) -> list[Panel]:
    """One panel a scorer and column: training groups as a curve, evaluations as points; held-out scorers after those
    that train, marked.
    """
    keys = _keys(views, "reward_mean/")
    evaluated = dict.fromkeys(key for view in views for e in view.evaluations for key in e["result"].get("columns", {}))
    keys += [f"reward_mean/{key}" for key in evaluated if f"reward_mean/{key}" not in keys]
    panels = []
    for key in sorted(keys, key=lambda key: (_scorer(key) in _held_out(views), keys.index(key))):
        column = key.removeprefix("reward_mean/")
        lines = [_reward_line(views, index, column) for index in range(len(views))]
        held_out = _scorer(key) in _held_out(views)
        note = "points: held-out prompts" if any(line.points for line in lines) else ""
        panels += _curve(column.replace("/", " · "), lines, note=note, tag="held out" if held_out else "")
    return panels


def _reward_line(views: Sequence[RunView], index: int, column: str) -> Line:
    view = views[index]
    x, y = view.series(f"reward_mean/{column}")
    spread_x, spread = view.series(f"reward_std/{column}")
    points = [
        (
            float(event.get("step") or 0),
            float(event["result"]["columns"][column]),
            _error(event["result"], column),
        )
        for event in view.evaluations
        if event["result"].get("columns", {}).get(column) is not None
    ]
    return Line(index, x, y, _name(views, index), spread if spread_x == x and len(views) == 1 else None, tuple(points))


def _error(result: Row, column: str) -> float:
    """The evaluation's standard error, which is that of the judging column alone."""
    judged = result.get("accuracy") is not None and math.isclose(
        result["accuracy"], result["columns"][column], abs_tol=1e-4
    )
    return float(result.get("standard_error") or 0.0) if judged else 0.0


def evaluation_panels(views: Sequence[RunView]) -> list[Panel]:
    """Accuracy by evaluation, and by task before and after."""
    lines = []
    for index, view in enumerate(views):
        points = tuple(
            (float(event.get("step") or 0), float(event["result"]["accuracy"]),
             float(event["result"].get("standard_error") or 0))
            for event in view.evaluations if event["result"].get("accuracy") is not None
        )  # fmt: skip
        lines.append(Line(index, (), (), _name(views, index), points=points))
    share = all(view.judged_by_share for view in views)
    what = "held-out accuracy" if share else "held-out score"
    panels = _curve(what, lines, note="bars: standard error", percent=share)
    tasks = _by_task(views)
    if len(tasks[1]) > 1 and len(tasks[0]) > 1:
        panels.append(Panel(f"{what} by task", plots.grouped_rows(tasks[0], percent=share), legend=_numbered(tasks[1])))
    return panels


def _by_task(views: Sequence[RunView]) -> tuple[dict[str, list[float | None]], list[str]]:
    """(task -> value in each column, names of the columns): first and last evaluation of each run."""
    chosen = [(view, event) for view in views for event in _first_and_last(view.evaluations)]
    names = [f"{view.name} {event['tag']}" if len(views) > 1 else str(event["tag"]) for view, event in chosen]
    tasks = dict.fromkeys(task for _, event in chosen for task in event["result"].get("by_task", {}))
    return {task: [event["result"].get("by_task", {}).get(task) for _, event in chosen] for task in tasks}, names


def _first_and_last(events: list[Row]) -> list[Row]:
    return events if len(events) < 2 else [events[0], events[-1]]


def learning_panels(views: Sequence[RunView]) -> list[Panel]:
    """Metrics of the objective and what guards the off-policy step."""
    keys = [key for key in _keys(views, "train_metric/") if key.split("/", 1)[1] not in HIDDEN_METRICS]
    keys += [key for key in ("log_prob_mismatch", "effective_sample_size", "drift_nats") if _has(views, key)]
    panels = []
    for key in [key for key in keys if _moves(views, key)][:MAX_METRICS]:
        panels += _curve(key.removeprefix("train_metric/").replace("_", " "), _lines(views, key))
    return panels


def speed_panels(views: Sequence[RunView]) -> list[Panel]:
    """Throughput, where the time went, staleness, queue, weight synchronisation, memory."""
    panels = _curve("trained images a second", _lines(views, "images_per_second"))
    panels += _curve(
        "the same per device", _lines(views, "images_per_second_per_gpu"),
        note="over all GPUs: actors, learner, reward servers (CPU slots without any)",
    )  # fmt: skip
    panels += _phase_panels(views)
    panels += _staleness_panels(views)
    if len(views) == 1:
        panels += _queue_panel(views[0])
    panels += _curve(
        "publishing weights, s", _increments(views, "weight_publish_seconds"), note="mean since the row before"
    )
    panels += _curve("learner step, s", _increments(views, "update_seconds"), note="mean since the row before")
    if len(views) == 1:
        panels += _actor_panels(views[0])
    return panels


def _phase_panels(views: Sequence[RunView]) -> list[Panel]:
    panels = []
    for role, title in (("learner", "learner's time"), ("actor", "actors' time"), ("rank", "time within the update")):
        totals = [view.totals(f"phase_seconds_total/{role}") for view in views]
        known = [index for index, total in enumerate(totals) if sum(total.values()) > 0]
        if not known:
            continue
        phases = sorted({phase for index in known for phase in totals[index]}, key=_phase_order)
        parts = {
            PHASE_NAMES.get(phase, phase.replace("_", " ")): [
                totals[index].get(phase, 0.0) / sum(totals[index].values()) for index in known
            ]
            for phase in phases
        }
        labels = [_name(views, index) or role for index in known]
        svg, note = plots.shares(Bars(labels, parts)), "share of wall time by phase"
        panels.append(Panel(title, svg, note, legend=_numbered(parts)))
    return panels


def _phase_order(phase: str) -> tuple[int, str]:
    """Work first, then waiting, then the rest, so that the same colour means much the same in every bar."""
    work = ("update", "paint", "forward_backward")
    return (0 if phase in work else 1 if phase.startswith("wait") else 2, phase)


def _staleness_panels(views: Sequence[RunView]) -> list[Panel]:
    if len(views) > 1:
        return _curve("mean staleness, steps", _increments(views, "staleness_steps"))
    counts = views[0].staleness
    if not counts:
        return []
    bars = plots.columns({str(steps): float(groups) for steps, groups in sorted(counts.items())}, "steps behind")
    return [Panel("trained groups by staleness", bars)]


def _queue_panel(view: RunView) -> list[Panel]:
    states = [key for key in _keys([view], "groups/") if key.split("/")[1] not in ("trained", "discarded")]
    lines = [
        Line(index, *view.series(key), name=key.split("/")[1])
        for index, key in enumerate(states)
        if any(view.series(key)[1])
    ]
    return _curve("groups by state", lines, note="at the end of each step")


def _actor_panels(view: RunView) -> list[Panel]:
    loads = [key for key in _keys([view], "weight_load_seconds/") if key.endswith("/mean")]
    lines = [
        Line(index, *_mean_increments(view, key.removesuffix("/mean")), name=key.split("/")[1])
        for index, key in enumerate(loads[:8])
    ]
    panels = _curve("loading and proving weights, s", lines, note="by actor" if len(loads) > 1 else "")
    memory = [
        Line(index, x, [value / 2**20 for value in y], name=key.split("/")[1])
        for index, key in enumerate(_keys([view], "process_memory_bytes/")[:8])
        for x, y in [view.series(key)]
    ]
    return panels + _curve("memory by process, MiB", memory)


def _curve(title: str, lines: Sequence[Line], note: str = "", tag: str = "", percent: bool = False) -> list[Panel]:
    """A panel of curves; none where no line has anything to show."""
    shown = [line for line in lines if line.x or line.points]
    legend = tuple((line.run % len(plots.RUN_COLOURS), line.name) for line in shown if line.name)
    return [Panel(title, plots.curves(shown, percent=percent), note, tag, legend)] if shown else []


def _numbered(names: Iterable[str]) -> tuple[tuple[int, str], ...]:
    return tuple((index % len(plots.RUN_COLOURS), name) for index, name in enumerate(names))


def _lines(views: Sequence[RunView], key: str) -> list[Line]:
    return [Line(index, *view.series(key), name=_name(views, index)) for index, view in enumerate(views)]


def _increments(views: Sequence[RunView], histogram: str) -> list[Line]:
    return [Line(i, *_mean_increments(view, histogram), name=_name(views, i)) for i, view in enumerate(views)]


def _mean_increments(view: RunView, histogram: str) -> tuple[list[float], list[float]]:
    """(steps, means) of a histogram's observations between rows."""
    found = histogram_increments(view.rows, histogram)
    return [float(row["step"]) for row, _, _ in found], [mean for _, _, mean in found]


def _keys(views: Sequence[RunView], prefix: str) -> list[str]:
    return list(dict.fromkeys(key for view in views for key in _row_keys(view) if key.startswith(prefix)))


def _row_keys(view: RunView) -> list[str]:
    """Keys of the newest row, then those that only older rows have."""
    return list(dict.fromkeys([*view.last, *(key for row in view.rows for key in row)]))


def _has(views: Sequence[RunView], key: str) -> bool:
    """Whether any run has a value that is not always zero (a gauge that nobody sets is)."""
    return any(any(view.series(key)[1]) for view in views)


def _moves(views: Sequence[RunView], key: str) -> bool:
    """Whether a metric changes within any run, beyond rounding: a flat line is worth no panel."""
    for view in views:
        values = view.series(key)[1]
        if values and max(values) - min(values) > 1e-6 * max(map(abs, values)):
            return True
    return False


def _held_out(views: Sequence[RunView]) -> set[str]:
    return {name for view in views for name in view.held_out_scorers}


def _scorer(key: str) -> str:
    return key.split("/")[1]


def _name(views: Sequence[RunView], index: int) -> str:
    return views[index].name if len(views) > 1 else ""


PanelMaker = Callable[[Sequence[RunView]], list[Panel]]
SECTIONS: dict[str, PanelMaker] = {
    "Rewards": reward_panels,
    "Held-out evaluation": evaluation_panels,
    "Learning": learning_panels,
    "Speed, and where the time went": speed_panels,
}
