"""The report: one HTML file of one run or of several beside each other, with nothing to fetch and no script.

Invariants: every text that comes from a run (prompts, names, errors) is escaped by the template, whose
Content-Security-Policy forbids scripts and requests besides; missing data is named on the page.
Does not own: reading (view.py), plots (panels.py, plots.py), layout (page.html.j2).
"""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from cluster.durations import duration
from cluster.report.faults import Fault, counts, faults, guard_events
from cluster.report.panels import SECTIONS, Panel
from cluster.report.samples import Sample, SampleSet, same_images
from cluster.report.view import RunView, open_run, read_run
from cluster.run_folder import RunFolder
from contracts.errors import ConfigError, StorageError

MAX_PROMPTS = 16
MAX_SETS = 4
"""Columns of images of one run: the first, the last, and the latest between."""
MAX_FAULTS = 60
THUMBNAIL = 256
"""Larger images are shown this wide; the originals stay in samples/."""


@dataclass(frozen=True)
class Shown:
    """One image as the page has it. scores: short text; missing: that this evaluation did not paint it."""

    label: str
    uri: str = ""
    scores: str = ""
    small: bool = True


@dataclass(frozen=True)
class Card:
    """One prompt and seed. strips: by run, its image at each evaluation."""

    prompt: str
    seed: int
    strips: dict[str, tuple[Shown, ...]]


def write_report(locations: Sequence[str], out: str | None = None, runs_dir: str = "runs") -> str:
    """Write the report of a run, or the comparison of several; returns where it stands.

    out: file to write; None: report.html in the run's folder, for several runs report-<names>.html in the first's.
    Raises ConfigError when a run does not exist or `out` cannot be written.
    """
    folders = [open_run(location, runs_dir) for location in locations]
    views = [read_run(folder) for folder in folders]
    text = render(views)
    if out is not None:
        try:
            Path(out).write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError("--out", f"{out} cannot be written: {error.strerror}", "name another file") from error
        return out
    return _write_to_run(folders[0], _file_name(views), text)


def write_own_report(folder: RunFolder) -> None:
    """report.html of the run that this process works on; the caller mirrors it."""
    view = read_run(folder)
    view.running = False
    folder.write_text("report.html", render([view]))


def _file_name(views: Sequence[RunView]) -> str:
    return "report.html" if len(views) == 1 else f"report-{'-'.join(view.name for view in views)[:120]}.html"


def _write_to_run(folder: RunFolder, name: str, text: str) -> str:
    try:
        path = folder.write_text(name, text)
        folder.send(name)
    except (StorageError, OSError) as error:
        why = error.__cause__ if isinstance(error, StorageError) else error
        told = getattr(why, "strerror", None) or why
        raise ConfigError("RUN", f"{folder.location} cannot be written: {told}", "give --out FILE") from error
    return f"{folder.url.rstrip('/')}/{name}" if folder.url else str(path)


def render(views: Sequence[RunView]) -> str:
    """The page as text."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(number=_number, duration=duration, when=_when, percent=_percent)
    return environment.get_template("page.html.j2").render(
        views=views,
        names=_distinct_names(views),
        several=len(views) > 1,
        verdicts=[view.verdict() for view in views],
        cards=image_cards(views),
        sections={title: _panels(make(views)) for title, make in SECTIONS.items()},
        faults=[_newest(faults(view.events)) for view in views],
        fault_counts=[counts(faults(view.events)) for view in views],
        guards=[_newest(guard_events(view.events)) for view in views],
        differences=config_differences(views),
        facts=[provenance(view) for view in views],
        tiles=[key_figures(view) for view in views],
        weights=[_weight_sync(view) for view in views],
        written=time.time(),
    )


def _panels(panels: Sequence[Panel]) -> list[dict[str, Any]]:
    return [{"title": p.title, "note": p.note, "tag": p.tag, "legend": p.legend, "svg": Markup(p.svg)} for p in panels]


def _newest(found: Sequence[Fault]) -> list[Fault]:
    return list(found[-MAX_FAULTS:])[::-1]


def _distinct_names(views: Sequence[RunView]) -> list[str]:
    """Names of the runs; two of one name get their place too."""
    names = [view.name for view in views]
    return [
        name if names.count(name) == 1 else f"{name} ({view.folder.location})"
        for name, view in zip(names, views, strict=True)
    ]


# ---- figures --------------------------------------------------------------------------------------------------------


def key_figures(view: RunView) -> dict[str, str]:
    """What a reader wants to know first, by name."""
    tiles = {}
    evaluations = [e for e in view.evaluations if e["result"].get("accuracy") is not None]
    if evaluations:
        last = evaluations[-1]["result"]
        name = "held-out accuracy" if view.judged_by_share else "held-out score"
        tiles[name] = view.held_out(last["accuracy"])
        if len(evaluations) > 1:
            first = evaluations[0]["result"]["accuracy"]
            tiles[name] = f"{view.held_out(first)} → {view.held_out(last['accuracy'])}"
            gain = last["accuracy"] - first
            tiles["gain"] = f"{100 * gain:+.1f} points" if view.judged_by_share else f"{gain:+.3g}"
    tiles["steps"] = str(view.step)
    seconds = view.train_seconds()
    tiles["training"] = duration(seconds)
    if view.books is not None:
        tiles["images trained"] = f"{view.books.trained:,}"
        if seconds:
            tiles["images a second"] = f"{view.books.trained / seconds:.3g}"
        seen = view.books.max_staleness_seen
        tiles["largest staleness"] = "–" if seen is None else f"{seen} of {view.max_staleness}"
    tiles["faults"] = str(len(faults(view.events)))
    return tiles


def _weight_sync(view: RunView) -> dict[str, str]:
    """How weights reached the actors."""
    proofs = view.of_kind("weights_proven")
    loads = [float(event["load_seconds"]) for event in proofs if event.get("load_seconds") is not None]
    current = [float(e["canary_to_current"]) for e in proofs if e.get("canary_to_current") is not None]
    table = {
        "versions published": str(int(view.last.get("weight_version") or 0) + 1) if view.rows else "–",
        "loads proven": str(len(proofs)),
        "loads not proven": str(len(view.of_kind("weights_not_proven"))),
    }
    if view.last.get("weight_publish_seconds/mean") is not None:
        table["mean seconds to publish"] = f"{view.last['weight_publish_seconds/mean']:.3g}"
    if loads:
        table["seconds to load and prove"] = f"mean {sum(loads) / len(loads):.3g}, longest {max(loads):.3g}"
    if current:
        table["largest distance of a canary to its version"] = f"{max(current):.3g}"
    return table


def provenance(view: RunView) -> dict[str, str]:
    """Where the run comes from: code, packages, machine, what scored and what was loaded."""
    manifest = view.manifest
    facts = {
        "folder": view.folder.location,
        "Salon": f"{manifest.get('salon') or 'unknown'}, commit {manifest.get('commit') or 'unknown'}"
        + (", with uncommitted changes" if manifest.get("uncommitted_changes") else ""),
        "seed": str(view.settings.get("seed", "–")),
        "model": str(view.settings.get("model.path", "–")),
        "Python": str(manifest.get("python", "–")),
        "platform": str(manifest.get("platform", "–")),
    }
    shown = ("name", "seed", "salon", "commit", "uncommitted_changes", "python", "platform")
    for key, value in manifest.items():
        if key == "scorers":
            facts[key] = "; ".join(f"{name} {_of_scorer(said)}" for name, said in value.items())
        elif key not in shown:
            facts[key.replace("_", " ")] = (
                ", ".join(f"{name} {what}" for name, what in value.items()) if isinstance(value, dict) else str(value)
            )
    return facts


def _of_scorer(said: Mapping[str, Any]) -> str:
    """What a scorer said of itself, in words."""
    low, high = ("∞" if end is None else f"{end:g}" for end in said["value_range"])
    span = f"{'-∞' if low == '∞' else low} to {high}"
    better = "higher is better" if said["higher_is_better"] else "lower is better"
    weights = f", weights {said['weight_digest']}" if said["weight_digest"] else ", no weights"
    return f"{said['version']} ({span}, {better}{weights})"


def config_differences(views: Sequence[RunView]) -> dict[str, list[str]]:
    """Settings in which the runs differ, a value a run; '–' where a run lacks one. Empty for one run."""
    keys = dict.fromkeys(key for view in views for key in view.settings)
    rows = {key: [str(view.settings.get(key, "–")) for view in views] for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


# ---- images ---------------------------------------------------------------------------------------------------------


def image_cards(views: Sequence[RunView]) -> list[Card]:
    """Images of the same prompt and seed side by side: of several evaluations, and of several runs."""
    names = _distinct_names(views)
    sets = [(name, one) for name, view in zip(names, views, strict=True) for one in _chosen(view.samples)]
    cards = []
    for (prompt, seed), row in same_images([one for _, one in sets])[:MAX_PROMPTS]:
        strips: dict[str, tuple[Shown, ...]] = {}
        for (name, one), sample in zip(sets, row, strict=True):
            strips[name] = (*strips.get(name, ()), _show(one.tag, sample))
        cards.append(Card(prompt, seed, strips))
    return cards


def _chosen(sets: Sequence[SampleSet]) -> list[SampleSet]:
    return list(sets) if len(sets) <= MAX_SETS else [sets[0], *sets[-MAX_SETS + 1 :]]


def _show(label: str, sample: Sample | None) -> Shown:
    if sample is None:
        return Shown(label)
    scores = ", ".join(f"{key.partition('/')[2]} {value:.3g}" for key, value in list(sample.scores.items())[:3])
    try:
        uri, small = _data_uri(sample.path)
    except (OSError, ValueError, Image.DecompressionBombError):
        return Shown(label)
    return Shown(label, uri, scores, small)


def _data_uri(path: Path) -> tuple[str, bool]:
    """(data URI, whether it is so small that it is enlarged pixel by pixel)."""
    with Image.open(path) as image:
        if max(image.size) <= THUMBNAIL:
            return _encoded(path.read_bytes(), "png"), max(image.size) < THUMBNAIL // 2
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, format="WEBP", quality=90)
    return _encoded(buffer.getvalue(), "webp"), False


def _encoded(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


# ---- formats --------------------------------------------------------------------------------------------------------


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _when(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(at))
