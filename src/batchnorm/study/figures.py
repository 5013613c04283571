"""The figures of the report: one thin line per seed, a bold line for their median.

The page sets the colours of text, axes and grids, because only it knows whether it is light, dark or printed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from statistics import median
from typing import Any, Literal, NamedTuple

import plotly.graph_objects as go  # type: ignore[import-untyped]

__all__ = ["Effect", "Line", "Plot", "Slider", "bars", "forest", "lines", "seeds_and_median", "strip"]

Curves = Sequence[Sequence[float | None]]

STYLES: dict[str, tuple[str, str]] = {
    "plain": ("#d9730d", "6px,3px"),
    "batch_norm": ("#2f7de1", "solid"),
    "renorm": ("#12978f", "10px,3px"),
    "ghost": ("#8a8f98", "2px,3px"),
    "group_norm": ("#9a5bd6", "8px,3px,2px,3px"),
    "layer_norm": ("#d24b8f", "3px,3px"),
    "weight_norm": ("#5f8a1f", "12px,4px"),
    "input_norm": ("#b08900", "4px,2px"),
    "output_norm": ("#8a8f98", "2px,4px"),
    "noisy_batch_norm": ("#12978f", "10px,3px"),
    "dropout": ("#d24b8f", "3px,3px"),
    "batch_norm+dropout": ("#12978f", "10px,3px"),
}
"""The colour and dash of each variant. Any two lines of one plot differ in lightness or hue, also for colour-blind
readers, and in their dashes in grey print; all are visible on white and on near-black."""

FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, sans-serif'


class Line(NamedTuple):
    """One variant's curves, one for every seed.

    Attributes:
        style: A variant of `STYLES`.
        name: Its name in the legend.
        x: The horizontal positions of the values; a shorter curve ended early.
        curves: One curve per seed.
        dash: A dash to use instead of the variant's own.
    """

    style: str
    name: str
    x: Sequence[float]
    curves: Curves
    dash: str = ""


class Effect(NamedTuple):
    """An effect in units of its margin, as one row of a forest plot.

    Attributes:
        name: The row's name.
        group: Effects of one group have one colour, and one entry in the legend.
        value: The effect.
        low, high: The ends of its interval.
        said: The text shown when the reader points at it.
    """

    name: str
    group: str
    value: float
    low: float
    high: float
    said: str


@dataclass(frozen=True)
class Slider:
    """A choice that changes the curves of a plot.

    Attributes:
        label: The name of the choice.
        choices: The texts of the choices.
        start: The index of the first choice shown.
        curves: For every choice the lines of the plot, in its order.
    """

    label: str
    choices: list[str]
    start: int
    curves: list[list[list[float | None]]]


@dataclass(frozen=True)
class Plot:
    """A figure with its texts on the page.

    Attributes:
        id: A name that is unique in the report.
        title: The title above it.
        figure: The figure.
        caption: The caption below it, which screen readers read instead of the figure.
        slider: Its slider, if it has one.
    """

    id: str
    title: str
    figure: Any
    caption: str
    slider: Slider | None = None


def lines(
    x: str,
    y: str,
    drawn: Sequence[Line],
    *,
    log: bool = True,
    percent: bool = True,
    mark: tuple[float, str] | None = None,
    thin: bool = True,
    ticks: Sequence[float] = (),
) -> Any:
    """Lines against each other.

    Args:
        x, y: The titles of the axes.
        drawn: The lines.
        log: Whether the horizontal axis is logarithmic, so that a distance is a ratio.
        percent: Whether the values are accuracies, from 0 to 1.
        mark: A horizontal line and its name.
        thin: Whether each seed is drawn too.
        ticks: The numbers on the horizontal axis, if not powers of ten.
    """
    figure = _figure(x, y, log, percent)
    if ticks:
        figure.update_xaxes(tickvals=list(ticks), ticktext=[f"{tick:g}" for tick in ticks])
    form: Literal[".1%", ".3g"] = ".1%" if percent else ".3g"
    for line in drawn:
        color, dash = STYLES[line.style]
        *seeds, middle = seeds_and_median(line.curves)
        shared = {"x": [_short(value) for value in line.x], "mode": "lines", "legendgroup": line.name}
        for curve in seeds if thin else []:
            style = {"color": color, "width": 1}
            figure.add_scatter(y=curve, line=style, opacity=0.4, hoverinfo="skip", showlegend=False, **shared)
        style = {"color": color, "dash": line.dash or dash, "width": 3}
        figure.add_scatter(y=middle, line=style, name=line.name, hovertemplate=f"%{{y:{form}}}", **shared)
    if mark:
        figure.add_hline(mark[0], line={"width": 1, "dash": "dot"})
        figure.add_annotation(
            x=0, y=mark[0], xref="paper", text=mark[1], showarrow=False, xanchor="left", yanchor="bottom", font_size=12
        )
    return figure


def bars(x: str, values: dict[str, list[float]]) -> Any:
    """Horizontal bars from zero: the median of each list, with whiskers over its range."""
    names = list(values)[::-1]
    middle = [_short(median(values[name])) for name in names]
    above = [_short(max(values[name]) - value) for name, value in zip(names, middle, strict=True)]
    below = [_short(value - min(values[name])) for name, value in zip(names, middle, strict=True)]
    figure = _figure(x, "", log=False, percent=False)
    figure.add_bar(
        x=middle,
        y=names,
        orientation="h",
        width=0.5,
        marker={"color": STYLES["batch_norm"][0]},
        error_x={"type": "data", "array": above, "arrayminus": below, "thickness": 1.5, "color": "#8a8f98"},
        hovertemplate="%{x:.3g}",
        name="",
    )
    figure.update_layout(hovermode="closest", height=260, xaxis_rangemode="tozero")
    return figure


def strip(
    unit: str,
    effects: Sequence[float],
    mean: float | None,
    interval: tuple[float, float] | None,
    marks: tuple[float, float, float],
) -> Any:
    """Every seed's effect as a point on one line, their mean and its interval, and marks at no effect and the margins.

    Args:
        unit: The unit of the effects; ratios are drawn on a logarithmic axis.
        effects: One effect per seed.
        mean, interval: The mean of the effects and its interval, if there are any.
        marks: The margin on the other side, no effect, the margin.
    """
    ratio = unit == "ratio"
    figure = _figure(f"effect, {unit}", "", log=False, percent=False)
    figure.add_scatter(
        x=[_short(effect) for effect in effects],
        y=[0.0] * len(effects),
        mode="markers",
        marker={"size": 9, "color": "#8a8f98", "opacity": 0.7},
        hovertemplate="%{x:.3g}",
        name="a seed",
    )
    if mean is not None and interval is not None:
        low, high = (_short(abs(end - mean)) for end in interval)
        figure.add_scatter(
            x=[_short(mean)],
            y=[0.0],
            mode="markers",
            marker={"size": 13, "color": STYLES["batch_norm"][0], "symbol": "diamond"},
            error_x={"type": "data", "array": [high], "arrayminus": [low], "thickness": 3, "width": 8},
            hovertemplate="%{x:.3g}",
            name="mean",
        )
    for value, dash in zip(marks, ("dot", "solid", "dot"), strict=True):
        figure.add_vline(value, line={"width": 1, "dash": dash})
    figure.update_layout(height=130, showlegend=False, hovermode="closest", margin={"l": 8, "r": 8, "t": 8, "b": 8})
    figure.update_yaxes(visible=False, range=[-1, 1], fixedrange=True)
    if ratio:
        ticks = [digit * 10.0**power for power in range(-3, 4) for digit in (1, 2, 5)]
        figure.update_xaxes(type="log", tickvals=ticks, ticktext=[f"{tick:g}×" for tick in ticks])
    return figure


GROUPS = {
    "supported": ("#1f8a4f", "circle"),
    "not supported": ("#b08900", "circle-open"),
    "contradicted": ("#d1453b", "x"),
    "undecided": ("#8a8f98", "diamond-open"),
}
"""The colour and the symbol of each verdict; any two also differ in grey print."""


def forest(effects: Sequence[Effect]) -> Any:
    """A row for each effect: a point, and its interval as a line, from top to bottom.

    The axis is linear up to the margin and logarithmic beyond it (the inverse hyperbolic sine), so that an effect of
    twice its margin and one of fifty times it both can be read.

    Args:
        effects: In units of their margins: 0 is no effect, positive is as claimed.
    """
    figure = _figure("effect, in units of the smallest that matters", "", log=False, percent=False)
    for group, (color, symbol) in GROUPS.items():
        rows = [effect for effect in effects if effect.group == group]
        if not rows:
            continue
        at, low, high = (
            [_short(math.asinh(value)) for value in values]
            for values in ([row.value for row in rows], [row.low for row in rows], [row.high for row in rows])
        )
        figure.add_scatter(
            x=at,
            y=[row.name for row in rows],
            mode="markers",
            marker={"size": 10, "color": color, "symbol": symbol, "line": {"width": 2, "color": color}},
            error_x={
                "type": "data",
                "array": [max(end - value, 0.0) for value, end in zip(at, high, strict=True)],
                "arrayminus": [max(value - end, 0.0) for value, end in zip(at, low, strict=True)],
                "thickness": 2,
                "width": 0,
                "color": color,
            },
            text=[row.said for row in rows],
            hovertemplate="%{text}",
            name=group,
        )
    for value, dash in ((-1.0, "dot"), (0.0, "solid"), (1.0, "dot")):
        figure.add_vline(math.asinh(value), line={"width": 1, "dash": dash})
    ticks = (-100, -10, -1, 0, 1, 10, 100)
    figure.update_xaxes(tickvals=[_short(math.asinh(tick)) for tick in ticks], ticktext=[f"{tick:g}" for tick in ticks])
    figure.update_yaxes(autorange="reversed", categoryorder="array", categoryarray=[effect.name for effect in effects])
    figure.update_layout(hovermode="closest", height=110 + 24 * len(effects))
    return figure


def seeds_and_median(curves: Curves) -> list[list[float | None]]:
    """The curves and, last, their median, which ends where half of them have ended."""
    columns = (tuple(value for value in column if value is not None) for column in zip_longest(*curves))
    middle = [_short(median(column)) if 2 * len(column) > len(curves) else None for column in columns]
    return [*([_short(value) if value is not None else None for value in curve] for curve in curves), middle]


def _short(value: float) -> float:
    """The number, rounded to the digits that a plot can show."""
    return float(f"{value:.4g}")


def _axis(title: str, **more: Any) -> dict[str, Any]:
    """An axis without a line; its invisible ticks keep the numbers off the plot."""
    ticks = {"ticks": "outside", "ticklen": 7, "tickcolor": "rgba(0,0,0,0)"}
    heading = {"text": title, "standoff": 12, "font": {"size": 13}}
    return {"title": heading, "zeroline": False, "automargin": True, **ticks, **more}


def _figure(x: str, y: str, log: bool, percent: bool) -> Any:
    return go.Figure(
        layout={
            "template": "none",
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"family": FONT, "size": 13},
            "height": 400,
            "margin": {"l": 8, "r": 20, "t": 36, "b": 8},
            "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"},
            "hovermode": "x unified",
            "dragmode": False,
            "xaxis": _axis(x, type="log", dtick=1, exponentformat="none") if log else _axis(x),
            "yaxis": _axis(y, range=[0, 1.02], tickformat=".0%") if percent else _axis(y),
        }
    )
