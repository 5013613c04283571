"""What was measured on a GPU, as a section of the README."""

import math
from collections.abc import Callable, Iterable, Sequence

from batchnorm.bench.clock import Record
from batchnorm.bench.summary import speedups, summarize
from benchmarks.gpu.goals import are_told_by, goals

__all__ = ["NAMES", "section"]

NAMES = (
    "gpu_checks", "gpu_copies", "gpu_layers", "gpu_host", "gpu_models", "gpu_sizes", "gpu_ahead", "gpu_sweep",
)  # fmt: skip
"""Of the CSVs."""

Tables = dict[str, list[Record]]
Markdown = Callable[[Sequence[str], Iterable[Sequence[str]]], str]

ABOUT = """
## On a GPU

`python -m benchmarks.gpu`, on a machine that has one. Times of layers are those of the GPU alone: replays of a CUDA
graph of many calls, forward and backward apart, on tensors that take turns and do not fit into the L2 cache together.
The unit is a copy of the layer's tensor at the bandwidth of a large copy. `kernels` are ours on memory that is there
already; a layer in a graph also clears its counters, which takes a microsecond. On the wall means forward + backward,
called one right after the other.
"""


def section(tables: Tables, markdown: Markdown) -> str:
    """What each card did; nothing if nothing was measured."""
    cards = dict.fromkeys(r["gpu"] for name in NAMES for r in tables[name])
    of_each = [_card(card, {n: [r for r in tables[n] if r["gpu"] == card] for n in NAMES}, markdown) for card in cards]
    pictured = bool(tables["gpu_layers"])
    picture = ["![Layers on the card that was measured last, in copies](results/gpu_layers.svg)\n"] if pictured else []
    return "\n".join([ABOUT, *of_each, *picture]).lstrip("\n") if cards else ""


def _card(card: str, tables: Tables, markdown: Markdown) -> str:
    """Everything that was measured on one card."""
    parts: tuple[str, ...] = (f"### {card}\n", _where(tables), _checks(tables["gpu_checks"], markdown))
    parts += (_goals(tables, markdown), _layers(tables["gpu_layers"], markdown))
    parts += (_models(tables["gpu_models"], markdown), _host(tables["gpu_host"], markdown))
    parts += (_sizes(tables["gpu_sizes"], markdown), _ahead(tables["gpu_ahead"], markdown))
    return "\n".join(part for part in (*parts, _sweep(tables["gpu_sweep"], markdown)) if part)


def _where(tables: Tables) -> str:
    """The versions, and the card's bandwidth."""
    lines: dict[str, list[str]] = {}
    for name in NAMES:
        for r in tables[name]:
            cuda = f", CUDA {r['cuda']}" if r["cuda"] else ""
            line = f"torch {r['torch']}, Triton {r['triton']}{cuda}, commit {r['commit']}"
            files = lines.setdefault(line, [])
            if name not in files:
                files.append(name)
    text = "".join(f"- {line}: {', '.join(files)}.\n" for line, files in lines.items())
    if tables["gpu_copies"]:
        best = max(r["bytes_per_second"] for r in tables["gpu_copies"])
        text += f"- A large copy reads and writes {best / 1e12:.2f} TB/s.\n"
    return text


def _checks(records: list[Record], markdown: Markdown) -> str:
    """How many checks hold, and the largest errors of each route."""
    if not records:
        return ""
    bad = [r for r in records if not r["ok"]]
    text = f"{len(records)} checks against float64 on the GPU, of which {len(bad)} failed.\n\n"
    rows = []
    for route in dict.fromkeys(r["route"] for r in records):
        for what in ("y", "d_x", "d_weight", "d_bias"):
            # A row of the CSV that has no limit is a promise, not a value.
            found = [r for r in records if (r["route"], r["what"]) == (route, what) and _number(r["limit"])]
            ratios = [r["value"] / r["eager"] for r in found if _number(r["eager"])]
            if found:
                largest = max(r["value"] / r["limit"] for r in found)
                rows.append((f"{route}, {what}", f"{largest:.2f}", f"{max(ratios):.2f}" if ratios else "—"))
    text += markdown(("largest error", "in its limit", "in that of PyTorch's operations"), rows)
    return text + "".join(f"- failed: {r['check']}, {r['route']}, {r['what']}: {r['detail']}\n" for r in bad)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and value > 0


def _layers(records: list[Record], markdown: Markdown) -> str:
    """Forward + backward of each layer, in copies, and how many times as fast as eager."""
    if not records:
        return ""
    names = list(dict.fromkeys(r["candidate"] for r in records))
    ratios = speedups(records)
    rows = []
    for case in dict.fromkeys(r["case"] for r in records):
        by = {r["candidate"]: r for r in records if r["case"] == case}
        cells = [f"{by[n]['forward_copies']:.2f} + {by[n]['backward_copies']:.2f}" if n in by else "" for n in names]
        walls = [f"{by[n]['wall_us']:.0f}" if n in by else "" for n in ("eager", "batchnorm")]
        rows.append((case, *cells, f"{ratios[case]:.2f}" if case in ratios else "", *walls))
    heading = ("forward + backward, in copies", *names, "× eager", "on the wall, µs: eager", "batchnorm")
    text = markdown(heading, rows)
    means = summarize(ratios)
    if means:
        text += f"\nOn the GPU {means.mean:.2f}× as fast as eager in the geometric mean; worst {means.low:.2f}× "
        text += f"({means.lowest}).\n"
    return text


def _models(records: list[Record], markdown: Markdown) -> str:
    """Steps of training."""
    rows = []
    for network in dict.fromkeys(r["network"] for r in records):
        by = {r["candidate"]: r for r in records if r["network"] == network}
        for name, r in by.items():
            over = by.get("eager" if not name.endswith("compiled") else "eager compiled")
            ratio = f"{over['step_ms'] / r['step_ms']:.2f}" if over else ""
            more = (str(r.get(column, "")) for column in ("busy_ms", "peak_mib"))
            rows.append((f"{network} {name}", f"{r['step_ms']:.1f}", ratio, *more))
    heading = ("step of training, bfloat16", "ms", "× eager, or compiled eager", "GPU busy, ms", "peak, MiB")
    return markdown(heading, rows)


def _host(records: list[Record], markdown: Markdown) -> str:
    """Microseconds of the host."""
    pieces = list(dict.fromkeys(r["piece"] for r in records))
    by: dict[str, dict[str, float]] = {}
    for r in records:
        by.setdefault(f"{r['case']} {r['candidate']}", {})[r["piece"]] = r["us"]
    rows = ((name, *(f"{us[piece]:.1f}" if piece in us else "" for piece in pieces)) for name, us in by.items())
    return markdown(("time of the host, µs", *pieces), rows)


def _goals(tables: Tables, markdown: Markdown) -> str:
    """What was hoped for, and what was found."""
    records = {name.removeprefix("gpu_"): found for name, found in tables.items()}
    rows = []
    for goal in goals(records):
        limit = f"{'at most' if goal.at_most else 'at least'} {goal.limit:g}"
        found = "" if math.isnan(goal.found) else f"{goal.found:.2f}"
        rows.append((goal.what, limit, found, goal.verdict, goal.where))
    return markdown(("goal", "", "found", "", "worst case"), rows) if are_told_by(records) else ""


def _sweep(records: list[Record], markdown: Markdown) -> str:
    """The table's setting and the best one."""
    rows = []
    for name in dict.fromkeys((r["walk"], r["direction"], r["case"]) for r in records):
        found = [r for r in records if (r["walk"], r["direction"], r["case"]) == name]
        best = min(found, key=lambda r: r["us"])
        table = [r for r in found if r["setting"] == "the table's"]
        if table:
            rows.append((" ".join(name), f"{table[0]['copies']:.2f}", f"{best['copies']:.2f}", best["setting"]))
    return markdown(("tuning: walk, direction, layer", "the table's, copies", "best", "best setting"), rows)


def _sizes(records: list[Record], markdown: Markdown) -> str:
    """From which size on the kernels take less time than PyTorch's operation, by GPU time and on the wall."""
    rows = []
    for case in dict.fromkeys(r["case"] for r in records):
        by = {r["candidate"]: r for r in records if r["case"] == case}
        if {"eager", "batchnorm"} <= set(by):
            ratios = (by["eager"][column] / by["batchnorm"][column] for column in ("median_us", "wall_us"))
            rows.append((case, str(by["eager"]["values"]), *(f"{ratio:.2f}" for ratio in ratios)))
    return markdown(("sizes: BN + ReLU, forward + backward", "values", "× eager, GPU time", "on the wall"), rows)


def _ahead(records: list[Record], markdown: Markdown) -> str:
    """What the compiler made of the kernels, and how many programs a processor of the GPU holds."""
    columns = ("programs", "warps", "registers", "spills", "shared", "resident", "rounds")
    rows = ((f"{r['direction']} {r['case']}", *(f"{r[column]:g}" for column in columns)) for r in records)
    return markdown(
        ("kernel", "programs", "warps", "registers", "spilled bytes", "shared bytes", "at once", "rounds"), rows
    )
