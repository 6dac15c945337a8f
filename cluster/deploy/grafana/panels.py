"""What a panel is, as plain data, and the Grafana JSON of it.

Plain data first, so that tests and the offline check read the same expressions that Grafana runs.
Does not own: which panels there are (dashboards.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from grafana_foundation_sdk.builders import bargauge, common, dashboard, prometheus, table, timeseries
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

DATASOURCE = models.DataSourceRef(type_val="prometheus", uid="salon-prometheus")
COLUMNS = 24


@dataclass(frozen=True)
class Query:
    """A PromQL expression ($run, $scorer and $__rate_interval are Grafana's) and the legend of its series."""

    expr: str
    legend: str = "{{run}}"


@dataclass(frozen=True)
class Panel:
    """kind: lines over time, shares of a whole stacked over time, one bar for each series now, or a table of now.

    columns: of a table, label (or 'Value') -> heading, in the order they are shown.
    """

    title: str
    text: str
    queries: tuple[Query, ...]
    unit: str = "short"
    kind: Literal["lines", "shares", "bars", "table"] = "lines"
    width: int = 12
    height: int = 8
    columns: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Board:
    """One dashboard; variables: name -> the series whose label of that name it lists. Of a series that another variable
    chooses, "All" is what is listed; of any other, everything."""

    uid: str
    title: str
    text: str
    panels: tuple[Panel, ...]
    variables: dict[str, str]


def build(board: Board) -> models.Dashboard:
    """The dashboard as the SDK's model."""
    made = (
        dashboard.Dashboard(board.title)
        .uid(board.uid)
        .description(board.text)
        .tags(["salon"])
        .timezone("browser")
        .refresh("10s")
        .time("now-1h", "now")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .link(dashboard.DashboardLink("Salon").type(models.DashboardLinkType.DASHBOARDS).tags(["salon"])
              .include_vars(True).keep_time(True))
    )  # fmt: skip
    for name, series in board.variables.items():
        made.with_variable(_variable(name, series))
    for number, panel in enumerate(board.panels, 1):
        made.with_panel(_panel(panel).id(number))
    return made.build()


def _variable(name: str, series: str) -> dashboard.QueryVariable:
    everything = models.VariableOption(selected=True, text="All", value="$__all")
    made = (
        dashboard.QueryVariable(name)
        .label(name)
        .datasource(DATASOURCE)
        .query({"query": f"label_values({series}, {name})", "refId": name})
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .current(everything)
    )
    return made if "$" in series else made.all_value(".*")


def _panel(panel: Panel) -> timeseries.Panel | bargauge.Panel | table.Panel:
    make = {"lines": _lines, "shares": _shares, "bars": _bars, "table": _table}[panel.kind]
    return make(panel)


def _lines(panel: Panel) -> timeseries.Panel:
    made = timeseries.Panel().fill_opacity(0).line_width(1).span_nulls(False).axis_soft_min(0)
    made.legend(_legend())
    return _fill(made, panel)


def _shares(panel: Panel) -> timeseries.Panel:
    made = timeseries.Panel().fill_opacity(60).line_width(0).min(0).max(1)
    made.stacking(common.StackingConfig().mode(common_models.StackingMode.NORMAL)).legend(_legend())
    return _fill(made, panel)


def _bars(panel: Panel) -> bargauge.Panel:
    made = bargauge.Panel().min(0).orientation(common_models.VizOrientation.HORIZONTAL)
    return _fill(made, panel, instant=True)


def _table(panel: Panel) -> table.Panel:
    """Rows of all queries under each other, with the named columns alone."""
    names = list(panel.columns)
    shown = {
        "includeByName": dict.fromkeys(names, True),
        "indexByName": {name: index for index, name in enumerate(names)},
        "renameByName": panel.columns,
    }
    made = table.Panel().with_transformation(models.DataTransformerConfig(id_val="merge", options={}))
    made.with_transformation(models.DataTransformerConfig(id_val="organize", options=shown))
    return _fill(made, panel, instant=True)


def _fill(made: timeseries.Panel, panel: Panel, instant: bool = False) -> timeseries.Panel:
    made.title(panel.title).description(panel.text).datasource(DATASOURCE)
    made.unit(panel.unit).span(panel.width).height(panel.height)
    for index, query in enumerate(panel.queries):
        target = prometheus.Dataquery().expr(query.expr).legend_format(query.legend).ref_id(chr(ord("A") + index))
        if panel.kind == "table":
            target.format(PromQueryFormat.TABLE)
        made.with_target(target.instant() if instant else target.range())
    return made


def _legend() -> common.VizLegendOptions:
    return (
        common.VizLegendOptions()
        .show_legend(True)
        .display_mode(common_models.LegendDisplayMode.LIST)
        .placement(common_models.LegendPlacement.BOTTOM)
    )
