"""The CSVs as tables in the README: this file prints every number in it."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev

from batchnorm.bench import table
from batchnorm.bench.clock import Record
from batchnorm.bench.summary import copies, losses, others, speedups, summarize
from benchmarks import goals, memory, plots, verdicts
from benchmarks.goals import Tables
from benchmarks.gpu import report as gpu

NAMES = (
    "layers", "eval", "kernels", "compiled", "variants", "training", "inference", "folding", "memory", "gradients",
    "losses", "small", "keras", "jax", "verdicts", "watching",
    "healthy", *gpu.NAMES,
)  # fmt: skip
MODES = {"layers": "forward + backward", "eval": "evaluation"}
EMPTY = "Not measured.\n"


def write(out: Path, template: Path) -> None:
    """Draw the pictures and fill in the template's sections: `out/results/*.csv` to `out/README.md`."""
    everything: Tables = {name: table.read(out / "results" / f"{name}.csv") for name in NAMES}
    tables = {name: _of_last_machine(records) for name, records in everything.items()}
    plots.draw(tables, out / "results")
    text = template.read_text(encoding="utf-8")
    of_all = {"environment": _environment(everything), "goals": _goals(everything)}
    sections = {name: of_all.get(name) or section(tables) or EMPTY for name, section in SECTIONS.items()}
    for name, section in (sections | {"gpu": gpu.section(everything, markdown)}).items():
        text = _filled(text, name, section, template)
    (out / "README.md").write_text(text, encoding="utf-8")


def _filled(text: str, name: str, section: str, template: Path) -> str:
    """A page with one section filled in."""
    begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
    text, found = re.subn(f"{begin}.*?{end}", lambda _: f"{begin}{section}{end}", text, flags=re.DOTALL)
    if found != 1:
        raise ValueError(f"{template} must have one section between {begin.strip()} and {end}, not {found}")
    return text


def _of_last_machine(records: list[Record]) -> list[Record]:
    """The records of the machine, and of its GPU if it has one, that was measured last."""

    def machine(record: Record) -> object:
        return record["cpu"], record.get("gpu")

    return [record for record in records if machine(record) == machine(records[-1])]


def markdown(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text; empty without rows."""
    cells = [list(row) for row in rows]
    if not cells:
        return ""
    lines = [list(heading), ["---", *["---:"] * (len(heading) - 1)], *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _environment(tables: Tables) -> str:
    """One line for each environment of the files."""
    seen: dict[str, list[str]] = {}
    for name, records in tables.items():
        for record in [] if name in gpu.NAMES else records:  # they tell theirs in a section of their own
            versions = (
                f"{p} {record[p]}" for p in ("python", "torch", "numba", "numpy", "jax", "tensorflow") if record[p]
            )
            line = f"{record['cpu']}, {record['threads']} threads, {record['system']}; batchnorm {record['batchnorm']} "
            files = seen.setdefault(f"{line}at {record['commit']}; {', '.join(versions)}.", [])
            if name not in files:
                files.append(name)
    return "".join(f"- {', '.join(files)}: {line}\n" for line, files in seen.items())


def _goals(tables: Tables) -> str:
    """What each machine has met."""
    told = {True: "", False: ", **missed**", None: ""}
    machines = dict.fromkeys(r["cpu"] for name, records in tables.items() if name not in gpu.NAMES for r in records)
    found = [
        goals.judge({name: [r for r in records if r["cpu"] == machine] for name, records in tables.items()})
        for machine in machines or [""]
    ]
    rows = (
        (same[0].what, same[0].wanted, *(f"{goal.measured}{told[goal.met]}" for goal in same))
        for same in zip(*found, strict=True)
    )
    return markdown(("", "wanted", *(machines or ["measured"])), rows)


def _summary(tables: Tables) -> str:
    """Means and extremes of the layers' tables."""
    rows = []
    for name, mode in MODES.items():
        for other in others(tables[name]):
            everything, network = speedups(tables[name], other), speedups(tables[name], other, ("network",))
            found, mean = summarize(everything), summarize(network)
            if found:
                cells = f"{mean.mean:.2f}×" if mean else "—", f"{found.low:.2f}× ({found.lowest})"
                rows.append((f"{mode}, against {other}", *cells, f"{sum(r < 1 for r in everything.values())}"))
    text = markdown(("", "mean over the shapes of networks", "worst of all", "cases lost"), rows)
    large = []
    for name, mode in MODES.items():
        for layout in ("channels-first", "channels-last"):
            ours, theirs = (summarize(copies(tables[name], layout, c)) for c in ("batchnorm", "eager"))
            if ours and theirs:
                each = (f"{found.mean:.2f} ({found.low:.2f} to {found.high:.2f})" for found in (ours, theirs))
                large.append((f"{mode}, {layout}", *each))
    return text + ("\n" if large else "") + markdown(("large tensors, in copies", "batchnorm", "eager"), large)


def _layers(name: str) -> Callable[[Tables], str]:
    def section(tables: Tables) -> str:
        peers = others(tables[name])
        ratios = {other: speedups(tables[name], other) for other in peers}
        copy = {r["case"]: r["median_us"] for r in tables[name] if r["candidate"] == "copy"}
        rows = []
        for record in tables[name]:
            if record["candidate"] == "batchnorm":
                case = record["case"]
                cells = case, f"{copy[case]:.0f}", _time(record, 1), f"{record['copies']:.1f}"
                rows.append((*cells, *(f"{ratios[o][case]:.2f}" if case in ratios[o] else "" for o in peers)))
        return markdown(("case", "copy, µs", "batchnorm, µs", "in copies", *(f"× {other}" for other in peers)), rows)

    return section


def _time(record: Record, unit: float) -> str:
    """Median and quantiles, in units of some microseconds."""
    median, low, high = (record[column] / unit for column in ("median_us", "q10_us", "q90_us"))
    digits = 0 if low >= 100 else 1
    return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _models(name: str) -> Callable[[Tables], str]:
    def section(tables: Tables) -> str:
        rows = []
        for eager, converted in _pairs(tables[name]):
            times = _time(eager, 1e3), _time(converted, 1e3)
            share = (f"{eager['share']:.0%}", f"{converted['share']:.0%}") if "share" in eager else ()
            ratio = eager["median_us"] / converted["median_us"]
            rows.append((f"{eager['model']} {eager['layout']}", eager["shape"], *times, *share, f"{ratio:.2f}"))
        share = ("share of normalization", "share, converted") if name == "training" else ()
        text = markdown(("model", "batch", "eager, ms", "converted, ms", *share, "×"), rows)
        reused = _reused(tables[name])
        return text + "\n" * bool(reused) + reused

    return section


def _reused(records: Sequence[Record]) -> str:
    """The same steps where memory is reused, against eager PyTorch with and without that."""
    rows = []
    for eager, _ in _pairs(records):
        same = [r for r in records if (r["model"], r["layout"]) == (eager["model"], eager["layout"])]
        found = {r["candidate"]: r for r in same}
        if "converted, reused" in found:
            theirs, ours = found["eager, reused"], found["converted, reused"]
            ratios = (f"{time['median_us'] / ours['median_us']:.2f}" for time in (eager, theirs))
            rows.append((f"{eager['model']} {eager['layout']}", _time(theirs, 1e3), _time(ours, 1e3), *ratios))
    return markdown(("memory reused", "eager, ms", "converted, ms", "× eager as it is", "× eager, reused"), rows)


def _pairs(records: Sequence[Record]) -> list[tuple[Record, Record]]:
    """The records of eager and converted that belong together."""
    eager, converted = ([r for r in records if r["candidate"] == name] for name in ("eager", "converted"))
    return list(zip(eager, converted, strict=True))


def _gradients(tables: Tables) -> str:
    records = tables["gradients"]
    rows = []
    for name, ratio in goals.gradient_ratios(records).items():
        means = (
            fmean(
                r["distance"] for r in records if (f"{r['model']} {r['layout']}", r["candidate"]) == (name, candidate)
            )
            for candidate in ("eager", "converted")
        )
        rows.append((name, *(f"{mean:.1e}" for mean in means), f"{ratio:.2f}"))
    return markdown(("model", "eager", "converted", "converted / eager"), rows)


def _losses(tables: Tables) -> str:
    """The last tenth of the steps: mean over seeds, and how far the seeds lie apart."""
    records = tables["losses"]
    end = max((record["step"] for record in records), default=0)
    rows = []
    for model in dict.fromkeys(record["model"] for record in records):
        cells = []
        for candidate in ("eager", "converted"):
            last: dict[int, list[float]] = {}
            for r in records:
                if (r["model"], r["candidate"]) == (model, candidate) and r["step"] >= 0.9 * end:
                    last.setdefault(r["seed"], []).append(r["loss"])
            means = [fmean(values) for values in last.values()]
            cells.append(f"{fmean(means):.4f}" + (f" ± {stdev(means):.4f}" if len(means) > 1 else ""))
        rows.append((model, *cells))
    text = markdown(("loss at the end", "eager", "converted"), rows)
    return f"{text}\n![The loss of each model before and after convert](results/losses.svg)\n" if text else ""


def _lost(tables: Tables) -> str:
    """Every case in which another candidate is faster or takes less memory; worst first."""
    lines = []
    for name, mode in MODES.items():
        for other in others(tables[name]):
            lines += [f"{mode}, {case}: {r:.2f}× {other}" for case, r in losses(tables[name], other).items()]
    compiled = speedups(tables["compiled"], ours="batchnorm compiled")
    lines += [f"compiled, {case}: {r:.2f}× eager" for case, r in sorted(compiled.items(), key=lambda i: i[1]) if r < 1]
    for name, what in (("training", "step of training"), ("inference", "evaluation of the model")):
        for eager, converted in _pairs(tables[name]):
            ratio = eager["median_us"] / converted["median_us"]
            lines += [f"{what}, {eager['model']} {eager['layout']}: {ratio:.2f}× eager"] * (ratio < 1)
    for eager, converted in _pairs(tables["memory"]):
        ratio = converted["peak_mib"] / eager["peak_mib"]
        lines += [f"peak of memory, {eager['model']} {eager['layout']}: {ratio:.2f} of eager's"] * (ratio > 1)
    return "".join(f"- {line}\n" for line in lines) or ("Nowhere.\n" if any(tables.values()) else "")


def _folding(tables: Tables) -> str:
    """Latencies in milliseconds, and speed-ups over eager."""
    names = list(dict.fromkeys(r["candidate"] for r in tables["folding"]))
    rows: dict[tuple[str, str], dict[str, Record]] = {}
    for r in tables["folding"]:
        rows.setdefault((r["model"], r["layout"]), {})[r["candidate"]] = r
    lines = []
    for (model, layout), found in rows.items():
        some, eager = next(iter(found.values())), found["eager"]["median_us"]
        cells = (f"{r['median_us'] / 1e3:.1f} ({eager / r['median_us']:.2f})" for r in found.values())
        gone = f"{some['folded']} of {some['folded'] + some['skipped']}"
        lines.append((f"{model} {layout}", some["shape"], *cells, gone, f"{some['max_error']:.0e}"))
    return markdown(("model", "input", *(f"{name}, ms (×)" for name in names), "folded", "error"), lines)


def _kernels(tables: Tables) -> str:
    """A layer's time in copies: the kernels, fresh memory, and the whole layer with Python."""
    names = ("kernels", "fresh memory", "layer", "eager")
    rows: dict[str, dict[str, str]] = {}
    for r in tables["kernels"]:
        rows.setdefault(r["case"], {})[r["candidate"]] = f"{r['copies']:.2f}"
    text = markdown(("case, in copies", *names), ((case, *(row[n] for n in names)) for case, row in rows.items()))
    means, more = [], (*names, "layer, reused", "eager, reused")
    for layout in ("channels-first", "channels-last"):
        found = (summarize(copies(tables["kernels"], layout, name)) for name in more)
        means.append((layout, *(f"{f.mean:.2f}" if f else "—" for f in found)))
    return text + "\n" * bool(text) + markdown(("mean of the large ones", *more), means if text else ())


def _compiled(tables: Tables) -> str:
    """Both layers under `torch.compile`, as speed-ups over eager PyTorch."""
    records, ours = tables["compiled"], "batchnorm compiled"
    rows = []
    eager, theirs = (speedups(records, over, ours=ours) for over in ("eager", "compile"))
    for record in records:
        if record["candidate"] == ours:
            case = record["case"]
            rows.append((case, _time(record, 1), f"{eager[case]:.2f}", f"{theirs[case]:.2f}"))
    return markdown(("case", "batchnorm compiled, µs", "× eager", "× PyTorch's compiled"), rows)


def _variants(tables: Tables) -> str:
    """Each variant's time in units of the time with the batch's own statistics."""
    records = tables["variants"]
    names = [name for name in others(records) if name != "batch"]
    ratios = [speedups(records, name, ours="batch") for name in names]
    lines = [
        (r["case"], _time(r, 1), *(f"{each[r['case']]:.2f}" for each in ratios))
        for r in records
        if r["candidate"] == "batch"
    ]
    return markdown(("case", "batch, µs", *(f"{name}, in its time" for name in names)), lines)


def _small(tables: Tables) -> str:
    """The test error in percent: mean and standard deviation over seeds."""
    wrong: dict[tuple[str, str, str], list[float]] = {}
    for r in tables["small"]:
        wrong.setdefault((r["data"], str(r["samples"]), r["statistics"]), []).append(100 * r["wrong"])
    lines = [
        (statistics, samples, f"{fmean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else ""))
        for (_, samples, statistics), values in wrong.items()
    ]
    data = next(iter(wrong), ("",))[0]
    return markdown((f"statistics ({data})", "samples of a process", "wrong in evaluation, %"), lines)


def _verdicts(tables: Tables) -> str:
    """The range of each claim's effects over base seeds, and how often each verdict came out."""
    found: dict[str, list[Record]] = {}
    for r in tables["verdicts"]:
        found.setdefault(r["claim"], []).append(r)
    lines = []
    agree = sum(len({r["verdict"] for r in records}) == 1 for records in found.values())
    for claim, records in found.items():
        effects = [float(r["effect"]) for r in records if r["effect"] != ""]
        counts = Counter(r["verdict"] for r in records).most_common()
        span = f"{min(effects):.2f} to {max(effects):.2f} {records[0]['unit']}" if effects else "none"
        taken = sorted({int(r["seeds"]) for r in records})
        seeds = " to ".join(map(str, dict.fromkeys((taken[0], taken[-1]))))
        lines.append((claim, span, ", ".join(f"{count} {verdict}" for verdict, count in counts), seeds, _told(records)))
    bases = len({r["base_seed"] for r in tables["verdicts"]})
    told = f"{agree} of {len(found)} claims get the same verdict from all {bases} base seeds.\n\n" if found else ""
    heading = ("claim", "effect, over the base seeds", "verdicts", "seeds", "expected")
    return told + markdown(heading, lines)


def _told(records: list[Record]) -> str:
    """How studies are expected to end, as `96% supported, 4% undecided; 12 seeds`."""
    if not (expected := verdicts.expected(records)):
        return "—"
    shares, seeds = expected
    told = (
        f"{'over 99%' if share >= 0.995 else f'{share:.0%}'} {verdict}"
        for verdict, share in shares.items()
        if share >= 0.005
    )
    return f"{', '.join(told)}; {seeds:.0f} seeds"


def _keras(tables: Tables) -> str:
    """Milliseconds of a step, and ours relative to Keras'."""
    records = tables["keras"]
    ours, theirs = ([r for r in records if r["candidate"] == name] for name in ("batchnorm", "keras"))
    lines = [
        (
            f"{a['backend']} {a['backend_version']}", a["case"], a["batch"], _time(b, 1e3), _time(a, 1e3),
            f"{a['median_us'] / b['median_us']:.2f}",
        )
        for a, b in zip(ours, theirs, strict=True)
    ]  # fmt: skip
    heading = ("backend", "network", "batch", "Keras, ms", "batchnorm, ms", "ours / Keras")
    version = f"\nKeras {records[0]['keras']}.\n" if records else ""
    return markdown(heading, lines) + version


def _watching(tables: Tables) -> str:
    """Milliseconds of a step, of one that `watch` records, and what recording one in ten costs."""
    records = tables["watching"]
    recorded = [r for r in records if r["candidate"].endswith(", recorded")]
    lines = [
        (
            f"{a['model']}, {a['candidate']}", a["shape"], str(a["normalizations"]), _time(a, 1e3), _time(b, 1e3),
            f"{(b['median_us'] / a['median_us'] - 1) / a['every']:+.1%}",
        )
        for a, b in zip((r for r in records if r not in recorded), recorded, strict=True)
    ]  # fmt: skip
    every = records[0]["every"] if records else ""
    return markdown(("model", "batch", "layers", "step, ms", "recorded, ms", f"cost, every {every} steps"), lines)


def _healthy(tables: Tables) -> str:
    """The false alarms of each network, in all of its runs."""
    runs: dict[str, list[Record]] = {}
    for record in tables["healthy"]:
        runs.setdefault(record["network"], []).append(record)
    lines = [
        (
            network.replace("_", " "), str(len(found)), f"{min(r['accuracy'] for r in found):.1%}",
            str(sum(r["false_alarms"] for r in found)),
        )
        for network, found in runs.items()
    ]  # fmt: skip
    return markdown(("network", "seeds", "lowest accuracy", "false alarms"), lines)


def _jax(tables: Tables) -> str:
    """Times of our function, and how many times as long the others take."""
    records = tables["jax"]
    found: dict[tuple[str, str, int], dict[str, Record]] = {}
    for r in records:
        found.setdefault((r["what"], r["case"], r["axis"]), {})[r["candidate"]] = r
    lines = []
    for (what, case, axis), by in found.items():
        ours = by["batchnorm"]["median_us"]
        ratios = (
            f"{by[name]['median_us'] / ours:.2f}" if name in by else "—" for name in ("formula", "kernels", "flax")
        )
        lines.append((what, f"{case}, channels in axis {axis}", _time(by["batchnorm"], 1e3), *ratios))
    heading = ("BN + ReLU", "x", "batchnorm, ms", "× formula", "× kernels always", "× Flax")
    versions = f"\nJAX {records[0]['jax']}, Flax {records[0]['flax']}.\n" if records else ""
    return markdown(heading, lines) + versions


SECTIONS: dict[str, Callable[[Tables], str]] = {
    "environment": _environment,
    "goals": _goals,
    "summary": _summary,
    "lost": _lost,
    "training": _models("training"),
    "inference": _models("inference"),
    "folding": _folding,
    "memory": lambda tables: memory.section(tables["memory"], markdown),
    "gradients": _gradients,
    "losses": _losses,
    "layers": _layers("layers"),
    "eval": _layers("eval"),
    "kernels": _kernels,
    "compiled": _compiled,
    "variants": _variants,
    "small": _small,
    "verdicts": _verdicts,
    "keras": _keras,
    "watching": _watching,
    "healthy": _healthy,
    "jax": _jax,
}
