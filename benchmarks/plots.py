"""The tables as SVG plots, in colours that are readable on white and on black."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt

from batchnorm.bench.clock import Record
from batchnorm.bench.summary import speedups
from benchmarks.goals import Tables, step_ratio
from benchmarks.verdicts import effects

GRAY, BLUE, ORANGE = "#8b949e", "#388bfd", "#e8702a"
LAYOUTS = {"channels-first": (BLUE, "o"), "channels-last": (ORANGE, "s"), "rows": (GRAY, "D")}
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "batchnorm",
    "font.size": 9,
    "font.family": "sans-serif",
    "text.color": GRAY,
    "axes.labelcolor": GRAY,
    "axes.edgecolor": GRAY,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": GRAY,
    "ytick.color": GRAY,
    "grid.color": GRAY,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "savefig.transparent": True,
}


NEEDS = {"overview": "training"}
"""The table without which there is no such picture, if it has another name."""


def draw(tables: Tables, folder: Path) -> list[str]:
    """Write a plot of each table that has records, and return the names of the files."""
    pictures = {
        "overview": _overview,
        "layers": _layers,
        "training": _training,
        "losses": _losses,
        "gpu_layers": _gpu_layers,
        "verdicts": _verdicts,
    }
    written = []
    with mpl.rc_context(STYLE):  # type: ignore[arg-type]
        for name, picture in pictures.items():
            if tables[NEEDS.get(name, name)]:
                figure = picture(tables)
                figure.savefig(folder / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
                plt.close(figure)
                written.append(f"{name}.svg")
    return written


def _overview(tables: Tables) -> Any:
    """Speed and memory at a glance: ratios to eager PyTorch, so that more than 1 is better."""
    cpu = _geometric_means(tables["layers"], speedups(tables["layers"], "eager", ("network",)))
    gpu_times = {
        candidate: {r["case"]: r["median_us"] for r in tables["gpu_layers"] if r["candidate"] == candidate}
        for candidate in ("eager", "batchnorm")
    }
    gpu_ratios = {case: gpu_times["eager"][case] / us for case, us in gpu_times["batchnorm"].items()}
    gpu = _geometric_means(tables["gpu_layers"], gpu_ratios)
    layouts = ("channels-first", "channels-last")
    models = list(dict.fromkeys(record["model"] for record in tables["training"]))
    steps = {
        layout: [step_ratio(tables["training"], model, layout) or float("nan") for model in models]
        for layout in layouts
    }
    peaks = {layout: [_peak_ratio(tables["memory"], model, layout) for model in models] for layout in layouts}
    panels = {
        "a layer, forward + backward: speed": (
            ["CPU", "GPU"], {layout: [part.get(layout, float("nan")) for part in (cpu, gpu)] for layout in layouts}
        ),
        "a training step on the CPU: speed": (models, steps),
        "a training step on the CPU: room in memory": (models, peaks),
    }  # fmt: skip
    figure, axes = plt.subplots(1, 3, figsize=(11, 2.4), width_ratios=(1, 2, 2))
    for axis, (title, (names, values)) in zip(axes, panels.items(), strict=True):
        for offset, layout in ((-0.2, "channels-first"), (0.2, "channels-last")):
            places = [i + offset for i in range(len(names))]
            drawn = axis.bar(places, values[layout], 0.36, color=LAYOUTS[layout][0], label=layout)
            axis.bar_label(drawn, ["" if math.isnan(v) else f"{v:.2f}" for v in values[layout]], fontsize=7, color=GRAY)
        axis.axhline(1, color=GRAY, linewidth=1)
        axis.set_xticks(range(len(names)), names, rotation=20, ha="right")
        axis.set_title(title)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=2, bbox_to_anchor=(0.5, -0.22))
    figure.suptitle("batchnorm, times as good as eager PyTorch", fontsize=9, y=1.04)
    return figure


def _geometric_means(records: Sequence[Record], ratios: dict[str, float]) -> dict[str, float]:
    """The mean ratio of each layout."""
    layouts = {record["case"]: record["layout"] for record in records}
    found: dict[str, list[float]] = {}
    for case, ratio in ratios.items():
        found.setdefault(layouts[case], []).append(ratio)
    return {layout: geometric_mean(part) for layout, part in found.items()}


def _peak_ratio(records: Sequence[Record], model: str, layout: str) -> float:
    peaks = {
        record["candidate"]: record["peak_mib"]
        for record in records
        if (record["model"], record["layout"]) == (model, layout)
    }
    return peaks["eager"] / peaks["converted"] if {"eager", "converted"} <= set(peaks) else float("nan")


def _layers(tables: Tables) -> Any:
    """Each case as a point: its speed-up over eager, in training and in evaluation."""
    layouts = {record["case"]: record["layout"] for record in tables["layers"] + tables["eval"]}
    names = {case: case.replace(f" {layout}", "") for case, layout in layouts.items()}
    rows = {name: i for i, name in enumerate(reversed(dict.fromkeys(names.values())))}
    figure, panels = plt.subplots(1, 2, figsize=(9, 0.9 + 0.19 * len(rows)), sharey=True)
    for panel, table, title in zip(panels, ("layers", "eval"), ("forward + backward", "evaluation"), strict=True):
        ratios = speedups(tables[table])
        for layout, (color, marker) in LAYOUTS.items():
            points = [(ratio, rows[names[case]]) for case, ratio in ratios.items() if layouts[case] == layout]
            if points:
                panel.scatter(*zip(*points, strict=True), s=22, color=color, marker=marker, label=layout)
        panel.axvline(1, color=GRAY, linewidth=1)
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:g}×")
        panel.set_title(f"{title}, times as fast as eager PyTorch")
        panel.grid(axis="both")
    panels[0].set_yticks(list(rows.values()), list(rows))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), bbox_to_anchor=(0.5, -0.06))
    return figure


def _training(tables: Tables) -> Any:
    """The speed-up of each model's training step by `convert`."""
    records = tables["training"]
    models = list(dict.fromkeys(record["model"] for record in records))
    figure, panel = plt.subplots(figsize=(7, 2.4))
    for offset, layout in ((-0.2, "channels-first"), (0.2, "channels-last")):
        found = {i: step_ratio(records, model, layout) for i, model in enumerate(models)}
        bars = {i: ratio for i, ratio in found.items() if ratio is not None}
        drawn = panel.bar([i + offset for i in bars], list(bars.values()), 0.36, color=LAYOUTS[layout][0], label=layout)
        panel.bar_label(drawn, fmt="%.2f", fontsize=8, color=GRAY)
    panel.axhline(1, color=GRAY, linewidth=1)
    panel.set_xticks(range(len(models)), models)
    panel.set_title("step of training, times as fast after convert")
    panel.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _losses(tables: Tables) -> Any:
    """The mean loss over seeds of each model before and after `convert`, with each seed as a faint line."""
    records = tables["losses"]
    models = list(dict.fromkeys(record["model"] for record in records))
    columns = min(3, len(models))
    lines = -(-len(models) // columns)
    figure, panels = plt.subplots(lines, columns, figsize=(3 * columns, 1.9 * lines), squeeze=False, sharex=True)
    for panel, model in zip(panels.flat, models, strict=False):
        for candidate, color, dashes in (("eager", ORANGE, "-"), ("converted", BLUE, "--")):
            chosen = [r for r in records if (r["model"], r["candidate"]) == (model, candidate)]
            for seed in dict.fromkeys(record["seed"] for record in chosen):
                curve = [(record["step"], record["loss"]) for record in chosen if record["seed"] == seed]
                panel.plot(*zip(*curve, strict=True), color=color, linewidth=0.7, alpha=0.4)
            panel.plot(*zip(*_mean_curve(chosen), strict=True), dashes, color=color, linewidth=1.5, label=candidate)
        panel.set_title(model)
        panel.grid()
    for panel in panels.flat[len(models) :]:
        panel.set_visible(False)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=2, bbox_to_anchor=(0.5, -0.08))
    figure.supxlabel("step", fontsize=9)
    figure.supylabel("loss", fontsize=9)
    return figure


def _verdicts(tables: Tables) -> Any:
    """Each claim as a row of points, the effects from each base seed, coloured by the verdict."""
    records = tables["verdicts"]
    rows = {claim: i for i, claim in enumerate(reversed(dict.fromkeys(r["claim"] for r in records)))}
    figure, panel = plt.subplots(figsize=(7, 0.9 + 0.19 * len(rows)))
    panel.axvspan(-1, 1, color=GRAY, alpha=0.15, linewidth=0)
    panel.axvline(0, color=GRAY, linewidth=1)
    styles = {
        "supported": (BLUE, "o"),
        "contradicted": (ORANGE, "s"),
        "not supported": (ORANGE, "x"),
        "undecided": (GRAY, "D"),
    }
    for verdict, (color, marker) in styles.items():
        chosen = [r for r in records if r["verdict"] == verdict and r["effect"] != ""]
        if chosen:
            places = [rows[r["claim"]] for r in chosen]
            panel.scatter(effects(chosen), places, s=18, color=color, marker=marker, label=verdict, alpha=0.7)
    panel.set_xscale("symlog", linthresh=1)
    panel.xaxis.set_major_formatter("{x:g}")
    panel.set_yticks(list(rows.values()), list(rows))
    panel.set_title("effect of each claim from each base seed, in smallest relevant effects")
    panel.grid(axis="y")
    panel.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _gpu_layers(tables: Tables) -> Any:
    """Each layer as a row: how many copies of its tensor forward and backward take together, by candidate."""
    last = tables["gpu_layers"][-1]["gpu"]
    records = tables["gpu_layers"]
    rows = {case: i for i, case in enumerate(reversed(dict.fromkeys(r["case"] for r in records)))}
    figure, panel = plt.subplots(figsize=(7, 0.9 + 0.19 * len(rows)))
    styles = {
        "eager": (ORANGE, "o"), "eager compiled": (ORANGE, "x"), "batchnorm": (BLUE, "o"),
        "batchnorm compiled": (BLUE, "x"), "kernels": (GRAY, "|"),
    }  # fmt: skip
    for candidate, (color, marker) in styles.items():
        points = [(r["copies"], rows[r["case"]]) for r in records if r["candidate"] == candidate]
        if points:
            across, down = zip(*points, strict=True)
            panel.scatter(across, down, s=26, color=color, marker=marker, label=candidate)
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter("{x:g}")
    panel.set_yticks(list(rows.values()), list(rows))
    panel.set_title(f"forward + backward on an {last}, in copies of the tensor")
    panel.grid()
    panel.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _mean_curve(records: Sequence[Record]) -> list[tuple[int, float]]:
    steps: dict[int, list[float]] = {}
    for record in records:
        steps.setdefault(record["step"], []).append(record["loss"])
    return [(step, fmean(losses)) for step, losses in steps.items()]
