"""The figures of the report: one thin line per seed, a bold one for their median.

Colours of text, axes and grids are left to the page, which knows whether it is light, dark or printed.
"""

from itertools import zip_longest
from statistics import median
from typing import Any

import plotly.graph_objects as go  # type: ignore[import-untyped]

from batchnorm.study.claims import final_accuracy, training_threshold
from batchnorm.study.experiments import NETWORKS, RATES, Network, Records

__all__ = ["NAMES", "accuracy_by_rate", "learning_curves", "same_rate_curves"]

NAMES: dict[Network, str] = {"plain": "without", "batch_norm": "with batch normalization"}

LINES: dict[Network, dict[str, str]] = {
    "plain": {"color": "#d9730d", "dash": "6px,3px"},
    "batch_norm": {"color": "#2f7de1", "dash": "solid"},
}
"""Blue and orange differ to every eye, and dashes from solid lines in grey print. Both show on white and on
near-black."""


FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, sans-serif'


def same_rate_curves(records: Records) -> dict[str, list[list[float]]]:
    """For every learning rate, the accuracies of all lines of `learning_curves`, in its order."""
    return {
        f"{rate:g}": [line for network in NETWORKS for line in _seeds_and_median(_curves(records, network, rate))]
        for rate in RATES
    }


def learning_curves(records: Records, rates: dict[Network, float]) -> go.Figure:
    """Test accuracy against the logarithm of the step, so that a horizontal distance is a ratio of steps."""
    figure = _figure("steps of the optimizer", "test accuracy")
    for network in NETWORKS:
        name = f"{NAMES[network]}, rate {rates[network]:g}" if len(set(rates.values())) > 1 else NAMES[network]
        _add_lines(figure, network, name, records.checks, _curves(records, network, rates[network]))
    return _with_line(figure, records.settings.target, f"target {records.settings.target:.0%}")


def accuracy_by_rate(records: Records) -> go.Figure:
    """Final test accuracy against the learning rate."""
    figure = _figure("learning rate", "test accuracy after the last step")
    for network in NETWORKS:
        by_rate = [[final_accuracy(run, run.test) for run in records.of(network, rate)] for rate in RATES]
        _add_lines(figure, network, NAMES[network], RATES, [list(line) for line in zip(*by_rate, strict=True)])
    return _with_line(figure, training_threshold(records.dataset.chance), "trains above this line")


def _curves(records: Records, network: Network, rate: float) -> list[list[float]]:
    return [run.test for run in records.of(network, rate)]


def _seeds_and_median(lines: list[list[float]]) -> list[list[float]]:
    """The lines and, last, their median; where some have ended, that of the others."""
    columns = zip_longest(*lines)
    return [*lines, [median(value for value in column if value is not None) for column in columns]]


def _axis(title: str, **more: Any) -> dict[str, Any]:
    """An axis without a line; its invisible ticks keep the numbers off the plot."""
    ticks = {"ticks": "outside", "ticklen": 7, "tickcolor": "rgba(0,0,0,0)"}
    heading = {"text": title, "standoff": 12, "font": {"size": 13}}
    return {"title": heading, "zeroline": False, "automargin": True, **ticks, **more}


def _figure(x: str, y: str) -> go.Figure:
    return go.Figure(
        layout={
            "template": "none",
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"family": FONT, "size": 13},
            "height": 400,
            "margin": {"l": 8, "r": 8, "t": 36, "b": 8},
            "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"},
            "hovermode": "x unified",
            "dragmode": False,
            "xaxis": _axis(x, type="log", dtick=1, exponentformat="none"),
            "yaxis": _axis(y, range=[0, 1.02], tickformat=".0%"),
        }
    )


def _add_lines(figure: go.Figure, network: Network, name: str, x: Any, lines: list[list[float]]) -> None:
    """All seeds thin, their median bold; the legend shows and hides them together."""
    *seeds, middle = _seeds_and_median(lines)
    shared = {"x": list(x), "mode": "lines", "legendgroup": network}
    for line in seeds:
        style = {"color": LINES[network]["color"], "width": 1}
        figure.add_scatter(y=line, line=style, opacity=0.4, hoverinfo="skip", showlegend=False, **shared)
    style = {**LINES[network], "width": 3}
    figure.add_scatter(y=middle, line=style, name=name, hovertemplate="%{y:.1%}", **shared)


def _with_line(figure: go.Figure, y: float, text: str) -> go.Figure:
    """A thin horizontal line with its name at the left end."""
    figure.add_hline(y, line={"width": 1, "dash": "dot"})
    figure.add_annotation(
        x=0, y=y, xref="paper", text=text, showarrow=False, xanchor="left", yanchor="bottom", font_size=12
    )
    return figure
