"""The commands that show a run: report, status, ledger. All of them read run folders; none starts or asks anything.

Does not own: what they show (report/, status.py, ledger_cli.py). cli.py puts these beside its own commands.
"""

from __future__ import annotations

import json
from pathlib import Path

import click

STATES = ("admitted", "generating", "generated", "scoring", "ready", "claimed", "trained", "discarded")
REASONS = (
    "late", "zero_variance", "too_few_valid", "no_pair", "stale", "attempts", "run_end", "lost", "weight_sync",
)  # fmt: skip

_runs_dir = click.option(
    "--runs-dir", default="runs", show_default=True, help="Where a run given by name is looked for."
)


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN [RUN2 ...]")
@click.option("--out", help="File to write; report.html in the run's folder unless given.")
@_runs_dir
def report(runs: tuple[str, ...], out: str | None, runs_dir: str) -> None:
    """Write what RUN did as one HTML page that needs nothing else; several runs beside each other on one page.

    RUN is a folder, an fsspec URL, or a name under --runs-dir; it may be going on, ended or crashed.
    """
    from cluster.report.page import write_report

    click.echo(write_report(runs, out, runs_dir))


@click.command()
@click.argument("run", required=False)
@click.option("--once", is_flag=True, help="Show it once, also on a terminal.")
@click.option("--json", "as_json", is_flag=True, help="Once, as JSON.")
@click.option("--every", default=2.0, show_default=True, type=click.FloatRange(min=0.2), help="Seconds between looks.")
@_runs_dir
def status(run: str | None, once: bool, as_json: bool, every: float, runs_dir: str) -> None:
    """Show what RUN does now, or did: stages, rates, staleness, books, faults, time left. Default: the newest run."""
    from cluster.status_view import show

    show(run, runs_dir=runs_dir, once=once, as_json=as_json, every_s=every)


@click.command()
@click.argument("run")
@click.argument("group", required=False, type=click.Choice(["group"]))
@click.argument("group_id", required=False, type=int, metavar="ID")
@click.option("--state", type=click.Choice(STATES), help="Only groups in this state.")
@click.option("--reason", type=click.Choice(REASONS), help="Only groups discarded for this reason.")
@click.option("--step", type=int, help="Only groups trained in this step.")
@click.option("--version", type=int, help="Only groups painted with this weight version.")
@click.option("--actor", help="Only groups painted by this actor.")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(min=1), help="At most so many groups.")
@click.option("--oldest-first", is_flag=True, help="From the first group on, not from the newest back.")
@click.option("--repaint", "again", is_flag=True, help="Of one group: paint it again from its seeds and compare.")
@click.option("--out", type=click.Path(path_type=Path), help="Of one group: folder for its images.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@_runs_dir
def ledger(
    run: str, group: str | None, group_id: int | None, state: str | None, reason: str | None, step: int | None,
    version: int | None, actor: str | None, limit: int, oldest_first: bool, again: bool, out: Path | None,
    as_json: bool, runs_dir: str,
) -> None:  # fmt: skip
    """Show where each group of RUN is or went, and why.

    `ledger RUN group ID` shows one group: its prompt, images, scores, seeds, weights and its way.
    """
    from cluster.ledger_view import print_group, print_groups
    from cluster.report.view import open_run

    if (group is None) != (group_id is None):
        raise click.UsageError("write `ledger RUN group ID` for one group")
    if again and group_id is None:
        raise click.UsageError("--repaint is for one group: `ledger RUN group ID --repaint`")
    folder = open_run(run, runs_dir, whole=again)
    if group_id is None:
        from cluster.ledger_cli import list_groups

        listing = list_groups(
            folder, state=state, reason=reason, step=step, version=version, actor=actor, limit=limit,
            newest_first=not oldest_first,
        )  # fmt: skip
        click.echo(json.dumps(listing, indent=2)) if as_json else print_groups(listing)
        return
    from cluster.ledger_cli import show_group, write_images

    shown = show_group(folder, group_id, out)
    if again:
        from cluster.repaint import repaint

        done = repaint(folder, group_id)
        target = out or folder.root / "samples" / "groups" / f"{group_id:08d}"
        shown["repainted"] = {
            "words": done.words, "version": done.version, "painted_with_version": done.used, "equal": done.equal,
            "images": [str(path) for path in write_images(target, done.images, prefix="again-")],
        }  # fmt: skip
    click.echo(json.dumps(shown, indent=2)) if as_json else print_group(shown)


COMMANDS = (report, status, ledger)
