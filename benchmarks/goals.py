"""The goals, and whether the records meet them."""

from collections.abc import Sequence
from math import exp, log, prod
from typing import NamedTuple

from batchnorm.bench.cases import CASES
from batchnorm.bench.clock import Record
from batchnorm.bench.summary import Range, copies, others, speedups, summarize

SIZES = {case.name: prod(case.shape) for case in CASES}
"""The number of values of each case."""

TINY = {32 * 64, 128 * 128, 4 * 32 * 4 * 4}
"""The sizes of the cases in which all time is overhead."""

Tables = dict[str, list[Record]]
"""The records of each CSV, by name."""

STEPS = {
    "mobilenet_v2": (1.8, 1.5),
    "resnet18": (1.2, 1.1),
    "densenet121": (1.2, 1.1),
    "efficientnet_b0": (1.25, 1.2),
}
"""The wanted speed-up of a training step by `convert`, channels-first and channels-last."""

KEPT = {"mobilenet_v2": 0.45, "efficientnet_b0": 0.45, "resnet18": 0.65, "resnet50": 0.65, "densenet121": 0.70}
"""The share of eager's bytes for the backward pass that `save_memory` may keep."""


class Goal(NamedTuple):
    """One row: `met` is None where it was not measured."""

    what: str
    wanted: str
    measured: str
    met: bool | None


def _judge(what: str, wanted: float, value: float | None, note: str = "", *, most: bool = False) -> Goal:
    sign, unit = ("≤", "") if most else ("≥", "×")
    told = f"{sign} {wanted:g}{unit}"
    if value is None:
        return Goal(what, told, "not measured", None)
    return Goal(what, told, f"{value:.2f}{unit}{note}", value <= wanted if most else value >= wanted)


def _between(found: Range | None) -> str:
    return "" if found is None else f" ({found.low:.2f} to {found.high:.2f})"


def _mean(found: Range | None) -> float | None:
    return None if found is None else found.mean


def step_ratio(records: Sequence[Record], model: str, layout: str) -> float | None:
    """The time of the eager model's step divided by that of the converted model."""
    times = {r["candidate"]: r["median_us"] for r in records if (r["model"], r["layout"]) == (model, layout)}
    return times["eager"] / times["converted"] if times else None


def step_share(records: Sequence[Record], model: str, layout: str) -> float | None:
    """The share of normalizations and activations in the eager model's step."""
    for r in records:
        if (r["model"], r["layout"], r["candidate"]) == (model, layout, "eager") and r.get("share") not in (None, ""):
            return float(r["share"])
    return None


def fusion_ratios(records: Sequence[Record]) -> dict[str, float]:
    """The latency of a model fused by `torch.fx` divided by that of the one that we folded."""
    times: dict[str, dict[str, float]] = {}
    for r in records:
        times.setdefault(f"{r['model']} {r['layout']}", {})[r["candidate"]] = r["median_us"]
    return {name: by["torch.fx fuse"] / by["folded"] for name, by in times.items() if "torch.fx fuse" in by}


def gradient_ratios(records: Sequence[Record]) -> dict[str, float]:
    """The gradient error of the converted model divided by that of the eager model: geometric mean over seeds."""
    ratios: dict[str, list[float]] = {}
    for record in records:
        if record["candidate"] == "converted":
            ratios.setdefault(f"{record['model']} {record['layout']}", []).append(log(record["over_eager"]))
    return {name: exp(sum(logs) / len(logs)) for name, logs in ratios.items()}


def judge(tables: Tables) -> list[Goal]:
    layers, evaluation, training = tables["layers"], tables["eval"], tables["training"]
    network = ("network",)
    over_eager = summarize(speedups(layers, "eager", network))
    sized = [(case, SIZES.get(case, 0), ratio) for case, ratio in speedups(layers).items()]
    larger = summarize({case: ratio for case, size, ratio in sized if size >= 1 << 17})
    tiny = summarize({case: ratio for case, size, ratio in sized if size in TINY})
    over_compile = summarize(speedups(layers, "compile", network))
    goals = [
        _judge("BN + ReLU, forward + backward against eager: mean over the shapes of networks, both layouts",
               2.5, _mean(over_eager), _between(over_eager)),
        _judge("the same: worst case of 2^17 values and more, all types included",
               1.1, larger and larger.low, f" ({larger.lowest})" if larger else ""),
        _judge("the same: worst case of the tiny ones",
               0.97, tiny and tiny.low, f" ({tiny.lowest})" if tiny else ""),
    ]  # fmt: skip
    for layout, wanted, reused in (("channels-first", 3.2, 4.5), ("channels-last", 5.0, 6.0)):
        large = summarize(copies(tables["kernels"], layout, "layer, reused"))
        goals.append(
            _judge(f"large tensors, {layout}, in copies, memory reused: mean", reused, _mean(large), _between(large),
                   most=True)
        )  # fmt: skip
        alone = summarize({r["case"]: r["copies"] for r in tables["kernels"]
                           if (r["layout"], r["candidate"]) == (layout, "kernels")})  # fmt: skip
        goals.append(
            _judge(f"kernels alone, {layout}, in copies: mean", wanted, _mean(alone), _between(alone), most=True)
        )
    goals.append(
        _judge("forward + backward against torch.compile: mean", 8.0, _mean(over_compile), _between(over_compile))
    )
    compiled = summarize(speedups(tables["compiled"], ours="batchnorm compiled"))
    goals.append(
        _judge("forward + backward of a compiled graph against eager: worst case", 1.0, compiled and compiled.low,
               f" ({compiled.lowest})" if compiled else "")
    )  # fmt: skip
    found = summarize(speedups(evaluation, "eager", network))
    goals.append(_judge("evaluation against eager: mean", 1.5, _mean(found), _between(found)))
    found = summarize(speedups(evaluation, "compile"))
    goals.append(_judge("evaluation against torch.compile: worst case", 0.95, found and found.low,
                        f" ({found.lowest})" if found else ""))  # fmt: skip
    for model, (first, last) in STEPS.items():
        for layout, wanted in (("channels-first", first), ("channels-last", last)):
            ratio, share = step_ratio(training, model, layout), step_share(training, model, layout)
            note = "" if share is None else f" (normalizations and activations: {share:.0%} of eager's step)"
            goals.append(_judge(f"step of training, {model}, {layout}", wanted, ratio, note))
    fusion = summarize(fusion_ratios(tables["folding"]))
    goals.append(_judge("a folded model, latency against torch.fx's fusion: worst model", 1.0, fusion and fusion.low,
                        f" ({fusion.lowest})" if fusion else ""))  # fmt: skip
    slower = {
        f"{name}, {case}": ratio
        for name in others(tables["variants"])
        for case, ratio in speedups(tables["variants"], name, ours="batch").items()
    }
    worst_variant = summarize(slower)
    goals.append(
        _judge("a variant, in the time of the batch's own statistics: worst case", 1.3,
               worst_variant and worst_variant.high, f" ({worst_variant.highest})" if worst_variant else "", most=True)
    )  # fmt: skip
    gradient = summarize(gradient_ratios(tables["gradients"]))
    goals.append(
        _judge("gradient, distance from a float64 run, in eager's distances: worst model", 2.0,
               gradient and gradient.high, f" ({gradient.highest})" if gradient else "", most=True)
    )  # fmt: skip
    return [*goals, *_in_jax(tables["jax"]), *judge_memory(tables["memory"])]


def _in_jax(records: Sequence[Record]) -> list[Goal]:
    """Those of `batchnorm.jax`, in whose ratios the others' times are the numerators."""
    times: dict[tuple[str, str, int], dict[str, float]] = {}
    for r in records:
        times.setdefault((r["what"], r["case"], r["axis"]), {})[r["candidate"]] = r["median_us"]

    def over(name: str, wanted: str, least: int = 0) -> Range | None:
        return summarize({
            f"{what}, {case}, axis {axis}": by[name] / by["batchnorm"]
            for (what, case, axis), by in times.items()
            if name in by and what.startswith(wanted) and prod(map(int, case.split(" x "))) >= least
        })  # fmt: skip

    goals = []
    for what, wanted, found in (
        ("forward + backward against the formula: worst case of 2^22 values and more", 4.0,
         over("formula", "forward + backward", 1 << 22)),
        ("forward + backward against the formula: worst case of all sizes", 1.0, over("formula", "forward + backward")),
        ("step of training of a small residual network against Flax's layer: worst case", 1.3, over("flax", "step")),
        ("a layer against Flax's, without a backward pass too: worst case", 1.0, over("flax", "forward")),
    ):  # fmt: skip
        goals.append(_judge(f"JAX, {what}", wanted, found and found.low, f" ({found.lowest})" if found else ""))
    return goals


def judge_memory(records: Sequence[Record]) -> list[Goal]:
    """The goals of `save_memory`."""
    by_model: dict[str, dict[str, Record]] = {}
    for record in records:
        if record.get("kept_of_eager") not in (None, ""):
            by_model.setdefault(record["model"], {})[record["candidate"]] = record
    goals = [
        _judge(f"share of eager's bytes for the backward pass that save_memory keeps: {model}", wanted,
               by_model[model]["save_memory"]["kept_of_eager"] if model in by_model else None, most=True)
        for model, wanted in KEPT.items()
    ]  # fmt: skip
    fallen, slower = {}, {}
    for model, found in by_model.items():
        eager, saving = found["eager"], found["save_memory"]
        fallen[model] = (eager["peak_mib"] - saving["peak_mib"]) / (eager["kept_mib"] - saving["kept_mib"])
        slower[model] = saving["step_of_converted"]
    least, most = (
        extreme(ratios, key=lambda model: ratios[model], default="")
        for extreme, ratios in ((min, fallen), (max, slower))
    )
    return [
        *goals,
        _judge("fall of a step's peak for each byte that save_memory no longer keeps: worst model", 0.67,
               fallen.get(least), f" ({least})"),
        _judge("a step with save_memory, in the time of one without: worst model", 1.05, slower.get(most),
               f" ({most})", most=True),
    ]  # fmt: skip
