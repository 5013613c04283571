"""The benchmarks: that what is timed computes the same, that records are whole, and that the arithmetic is right."""
# ruff: noqa: E402  (what is optional is asked for before it is imported)

import csv
import faulthandler
import math
import re
from collections import Counter
from functools import partial
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
typer_testing = pytest.importorskip("typer.testing")
for module in ("rich", "matplotlib"):
    pytest.importorskip(module)

from benchmarks import __main__ as command
from benchmarks import goals, package, report, verdicts
from benchmarks.gpu import goals as gpu_goals
from benchmarks.gpu.__main__ import main as gpu_main
from benchmarks.gpu.ahead import resident
from benchmarks.gpu.session import Session
from benchmarks.gpu.sizes import crossing

from batchnorm import cli
from batchnorm.bench import clock, layers, peers, summary, table, terminal
from batchnorm.bench.cases import CASES, Case
from batchnorm.bench.clock import Record
from batchnorm.environment import columns
from batchnorm.errors import InputError
from batchnorm.torch import route

TINY = "4x32x4x4"
README = Path(__file__).parents[1] / "benchmarks/README.md"

# --- The registry -----------------------------------------------------------------------------------------------------


def test_names_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


def test_every_group_has_cases_and_networks_have_both_layouts() -> None:
    assert {case.group for case in CASES} == {"network", "rows", "small", "type"}
    for case in CASES:
        if len(case.shape) > 3:
            other = Case(case.shape, not case.channels_last, case.activation, case.residual, case.dtype)
            assert other.name in {case.name for case in CASES}


@pytest.mark.parametrize("case", [case for case in CASES if not case.large], ids=lambda case: case.name)
def test_tensors_are_what_the_case_says(case: Case) -> None:
    x = case.tensor()
    assert (x.shape, x.dtype) == (case.shape, case.dtype)
    assert x.is_contiguous(memory_format=case.memory_format)


# --- What is timed ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", layers.MODES)
@pytest.mark.parametrize(
    "case",
    [
        Case((8, 4, 3, 3)),
        Case((8, 4, 3, 3), channels_last=True, residual=True),
        Case((4, 3, 2, 3, 4), channels_last=True, activation="silu"),
        Case((8, 4, 6), dtype=torch.float64, activation=None),
        Case((16, 4), activation="silu"),
        Case((8, 4, 3, 3), dtype=torch.bfloat16),
    ],
    ids=lambda case: case.name,
)
def test_all_candidates_compute_the_same(case: Case, mode: layers.Mode) -> None:
    torch.manual_seed(0)
    candidates: dict[str, Any] = layers.candidates(case, mode, others=True)
    expected = candidates["eager"]()
    tolerance = 0.1 if case.dtype is torch.bfloat16 else 1e-5
    assert set(candidates) == {"copy", "eager", "eager in place", "batchnorm", *peers.installed()}
    for name in ("eager in place", "batchnorm"):
        torch.testing.assert_close(candidates[name](), expected, rtol=tolerance, atol=tolerance)
    for name in peers.installed():
        found = torch.tensor(candidates[name]().tolist(), dtype=case.dtype)
        found = found.movedim(-1, 1) if case.channels_last else found
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, check_stride=False)


def test_rounds_are_interleaved() -> None:
    """In each round every candidate is called once, and over the rounds after each of the others equally often."""
    for names, rounds in ("ab", 2), ("abc", 6), ("abcd", 4), ("abcde", 10):
        calls: list[str] = []
        candidates = {name: partial(calls.append, name) for name in names}
        samples = clock.interleave(candidates, 0.0, fewest=rounds)
        assert {name: len(times) for name, times in samples.items()} == dict.fromkeys(names, rounds)
        n = len(names)
        orders = [calls[start : start + n] for start in range(2 * n, len(calls), n)]
        assert all(sorted(order) == list(names) for order in orders)
        after = Counter(pair for order in orders for pair in pairwise(order))
        assert after == dict.fromkeys(permutations(names, 2), rounds // n)


def test_records_of_samples() -> None:
    eager, ours = clock.records({"eager": [4e-6, 2e-6, 6e-6], "ours": [1e-6, 1e-6, 2e-6]})
    assert (eager["median_us"], eager["speedup_over_eager"], eager["rounds"]) == (4.0, 1.0, 3)
    assert (ours["candidate"], ours["median_us"], ours["speedup_over_eager"]) == ("ours", 1.0, 4.0)
    assert eager["q10_us"] <= eager["median_us"] <= eager["q90_us"]


@pytest.mark.parametrize("mode", layers.MODES)
def test_the_records_of_a_case(mode: layers.Mode) -> None:
    [records] = layers.run(terminal.select(f"{TINY} channels-first"), mode, 0.0)
    assert [record["candidate"] for record in records] == ["copy", "eager", "eager in place", "batchnorm"]
    for record in records:
        assert (record["mode"], record["group"], record["large"]) == (mode, "small", 0)
        assert record["rounds"] >= clock.FEWEST
        assert 0 < record["q10_us"] <= record["median_us"] <= record["q90_us"]
    assert records[0]["copies"] == records[1]["speedup_over_eager"] == 1.0


# --- Files ------------------------------------------------------------------------------------------------------------


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    records = [{"case": "a, b", "median_us": 1.5, "rounds": 7}, {"case": "c", "median_us": 2.0, "rounds": 8}]
    path = tmp_path / "new" / "x.csv"
    table.write(path, records, {"torch": "2.13.0+cpu", "threads": 2})
    assert table.read(path) == [record | {"torch": "2.13.0+cpu", "threads": 2} for record in records]
    assert table.read(tmp_path / "other.csv") == []


def test_a_table_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be written"):
        table.write(tmp_path / "file" / "x.csv", [{"case": "a"}], {})


# --- The command ------------------------------------------------------------------------------------------------------


def run(*arguments: object) -> Any:
    return typer_testing.CliRunner().invoke(cli.app, ["bench", *map(str, arguments)])


def test_the_command_prints_and_writes(tmp_path: Path) -> None:
    out = tmp_path / "layers.csv"
    result = run("--only", TINY, "--seconds", 0.01, "--out", out)
    assert result.exit_code == 0, result.output
    assert result.stderr == "", "no progress bar where nobody watches"
    for words in ("forward + backward", "running statistics", "geometric mean", "worst", "Written:"):
        assert words in result.stdout
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 4
    assert {row["mode"] for row in rows} == set(layers.MODES)
    for row in rows:
        assert row.items() >= {name: str(value) for name, value in columns().items()}.items()
    assert str(tmp_path) not in out.read_text()


def test_without_a_file_the_command_only_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("--only", f"{TINY} channels-last", "--seconds", 0).exit_code == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seconds", [-1, "nan"])
def test_seconds_that_are_none(seconds: object) -> None:
    result = run("--only", TINY, "--seconds", seconds)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"batchnorm: seconds must be 0 or more, got {seconds}.\n"


def test_a_folder_that_is_missing_is_made_and_a_file_that_cannot_be_is_said_before_timing(tmp_path: Path) -> None:
    out = tmp_path / "missing" / "layers.csv"
    assert run("--only", f"{TINY} channels-last", "--seconds", 0, "--out", out).exit_code == 0
    assert out.is_file()
    for path in (out.parent, out / "below.csv"):
        result = run("--only", TINY, "--seconds", 0, "--out", path)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith(f"batchnorm: {path} cannot be written: ")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["layers.csv", "missing"]


def test_a_case_that_is_not_there() -> None:
    result = run("--only", "nonsense")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("batchnorm: no case has 'nonsense' in its name")


def test_other_frameworks_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "installed", list)
    result = run("--jax", "--only", TINY)
    assert (result.exit_code, result.stderr) == (
        2,
        "batchnorm: neither jax nor tensorflow is installed; install one of them, or leave out --jax.\n",
    )


# --- What follows from records ----------------------------------------------------------------------------------------


def timed(case: str, group: str = "network", layout: str = "channels-first", **times: float) -> list[Record]:
    """Records of one case: microseconds by candidate."""
    return [
        {
            "case": f"{case} {layout}",
            "group": group,
            "layout": layout,
            "large": 1,
            "candidate": name,
            "rounds": 7,
            "median_us": time,
            "q10_us": time,
            "q90_us": time,
            "copies": time / times["copy"],
            "speedup_over_eager": times["eager"] / time,
        }
        for name, time in times.items()
    ]


RECORDS = [
    *timed("a", copy=1, eager=6, compile=20, batchnorm=2),
    *timed("b", copy=1, eager=48, compile=32, batchnorm=4),
    *timed("b", layout="channels-last", copy=2, eager=24, batchnorm=8),
    *timed("c", group="small", copy=1, eager=1, compile=4, batchnorm=2),
]


def test_speedups() -> None:
    assert summary.speedups(RECORDS) == {
        "a channels-first": 3,
        "b channels-first": 12,
        "b channels-last": 3,
        "c channels-first": 0.5,
    }
    assert summary.speedups(RECORDS, "compile", ["network"]) == {"a channels-first": 10, "b channels-first": 8}
    assert summary.speedups(RECORDS, "jax") == {}


def test_summary_of_ratios() -> None:
    found = summary.summarize(summary.speedups(RECORDS, groups=("network",)))
    assert found is not None
    assert found.mean == pytest.approx((3 * 12 * 3) ** (1 / 3))
    assert found[1:] == (3, 12, "a channels-first", "b channels-first")
    assert summary.summarize({}) is None


def test_copies_and_losses() -> None:
    assert summary.copies(RECORDS, "channels-first") == {"a channels-first": 2, "b channels-first": 4}
    assert summary.copies(RECORDS, "channels-last", "eager") == {"b channels-last": 12}
    assert summary.losses(RECORDS) == {"c channels-first": 0.5}


# --- The report -------------------------------------------------------------------------------------------------------


def trained(eager: float, converted: float, **about: Any) -> list[Record]:
    """Records of one model, before and after `convert`."""
    return [
        {
            "model": "mobilenet_v2",
            "layout": "channels-first",
            "shape": "2x3x4x4",
            "candidate": name,
            "median_us": time,
            "q10_us": time,
            "q90_us": time,
            "share": 0.25,
            "peak_mib": time,
            "eager_over_this": eager / time,
            "seed": 0,
            "distance": time * 1e-6,
            "over_eager": time / eager,
            **about,
        }
        for name, time in (("eager", eager), ("converted", converted))
    ]


def curves() -> list[Record]:
    return [
        record | {"seed": seed, "step": step, "loss": 1 / (1 + step + seed)}
        for seed in (0, 1)
        for step in (0, 5, 10)
        for record in trained(1, 1)
    ]


TABLES: goals.Tables = {
    "layers": RECORDS,
    "eval": RECORDS,
    "training": [*trained(3200, 2000, share=0.5), *trained(1000, 1250, layout="channels-last")],
    "inference": trained(1000, 1000),
    "memory": [
        *trained(300, 200, kept_mib=100.0, kept_of_eager=1.0),
        trained(300, 110, kept_mib=36.0, kept_of_eager=0.36, step_of_converted=1.08)[1] | {"candidate": "save_memory"},
    ],
    "kernels": timed("b", copy=1, kernels=3, **{"fresh memory": 4}, layer=5, eager=9),
    "compiled": timed("c", group="small", copy=1, eager=1, compile=4, batchnorm=3, **{"batchnorm compiled": 2}),
    "variants": [
        {"case": "a", "candidate": name, "median_us": time, "q10_us": time, "q90_us": time}
        | {"layout": "channels-first", "large": 1, "rounds": 7}
        for name, time in (("batch", 10.0), ("renorm", 12.0), ("mask", 15.0))
    ],
    "small": [
        {"data": "digits", "samples": 2, "statistics": "renorm", "seed": seed, "wrong": 0.1 + 0.1 * seed}
        for seed in (0, 1)
    ],
    "watching": [
        {"model": "mlp", "shape": "256x64", "normalizations": 3, "every": 10, "candidate": f"eager{more}", "rounds": 7}
        | {"median_us": time, "q10_us": time, "q90_us": time}
        for more, time in (("", 1000.0), (", recorded", 1200.0))
    ],
    "healthy": [
        {"network": "two_layers", "seed": seed, "accuracy": 0.9 + 0.05 * seed, "false_alarms": 2 * seed, "checks": ""}
        for seed in (0, 1)
    ],
    "verdicts": [
        {"claim": "faster-at-same-rate", "base_seed": seed, "verdict": verdict, "effect": effect, "unit": "ratio"}
        | {"seeds": 6 * 2**seed}
        for seed, (verdict, effect) in enumerate((("undecided", 1.25), ("supported", 2.5), ("supported", "")))
    ],
    "keras": [
        {"backend": "jax", "backend_version": "0.10.2", "keras": "3.15.1", "case": "mlp", "batch": "32 x 784"}
        | {"candidate": name, "median_us": time, "q10_us": time, "q90_us": time}
        for name, time in (("batchnorm", 900.0), ("keras", 1000.0))
    ],
    "jax": [
        {"what": what, "case": case, "axis": 1, "candidate": name, "flax": "0.12"}
        | {"median_us": time, "q10_us": time, "q90_us": time}
        for what, case, times in (
            ("forward + backward", "16 x 4", (1000.0, 4000.0, 3000.0)),
            ("forward + backward", "2048 x 2048", (1000.0, 3000.0, 2000.0)),
            ("forward", "16 x 4", (1000.0, 500.0, 800.0)),
        )
        for name, time in zip(("batchnorm", "formula", "flax"), times, strict=True)
    ],
    "folding": [
        *trained(1000, 500, folded=1, skipped=0, max_error=1e-7),
        *(
            trained(1000, time)[1] | {"candidate": name, "folded": 1, "skipped": 0, "max_error": 1e-7}
            for name, time in (("folded", 400), ("torch.fx fuse", 500))
        ),
    ],
    "gradients": [*trained(2, 2), *trained(2, 8, seed=1)],
    "losses": curves(),
}

CARD = {"gpu": "NVIDIA H100", "torch": "2.11.0+cu130", "triton": "3.6.0", "cuda": "13.0", "commit": "abc"}
GPU: goals.Tables = {
    "gpu_checks": [
        {"check": "3x4", "route": "triton", "what": "y", "value": 2e-7, "limit": 1e-6, "eager": 1e-7, "ok": 1}
        | {"detail": ""},
        {"check": "strides", "route": "triton", "what": "y", "value": math.nan, "limit": math.nan, "eager": math.nan}
        | {"ok": 0, "detail": "[1], not [2]"},
    ],
    "gpu_copies": [{"mib": 64, "bytes_per_second": 3.0e12, "us": 45.0}],
    "gpu_layers": [
        {"case": case, "layout": "rows", "dtype": "bfloat16", "candidate": name, "residual": 0, "mib": 98.0}
        | {"forward_copies": 1.5, "backward_copies": time - 1.5, "copies": time, "median_us": 10 * time}
        | {"wall_us": 99.0, "host_us": 98.0}
        for case, times in (("a", (8.0, 4.0, 3.0)), ("b", (2.0, 4.0)))
        for name, time in zip(("eager", "batchnorm", "kernels"), times, strict=False)
    ],
    "gpu_host": [{"case": "8x16", "candidate": "eager", "piece": "forward", "us": 30.0}],
    "gpu_models": [
        {"network": "resnet50 128 channels-last", "model": "resnet50", "batch": 128, "layout": "channels-last"}
        | {"candidate": name, "step_ms": time, "busy_ms": 9.0, "peak_mib": 7}
        for name, time in (("eager", 12.0), ("converted", 10.0))
    ],
    "gpu_sizes": [
        {"case": "a", "values": 2048, "candidate": name, "median_us": us, "wall_us": 2 * us}
        for name, us in (("eager", 3.0), ("batchnorm", 2.0))
    ],
    "gpu_ahead": [
        {"case": "a", "direction": "forward", "programs": 792, "warps": 4, "registers": 80, "spills": 0, "shared": 2048}
        | {"resident": 6, "rounds": 1.0}
    ],
    "gpu_sweep": [
        {"walk": "last", "direction": "forward", "case": "a", "setting": setting, "us": us, "copies": us / 10}
        for setting, us in (("warps=4", 15.0), ("the table's", 18.0))
    ],
}


def test_goals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(goals.SIZES, "a channels-first", 32 * 64)
    monkeypatch.setitem(goals.SIZES, "c channels-first", 1 << 17)
    found = {(goal.what, goal.measured): goal.met for goal in goals.judge(TABLES)}
    mean = (3 * 12 * 3) ** (1 / 3)
    assert found == {
        (
            "BN + ReLU, forward + backward against eager: mean over the shapes of networks, both layouts",
            f"{mean:.2f}× (3.00 to 12.00)",
        ): True,
        ("the same: worst case of 2^17 values and more, all types included", "0.50× (c channels-first)"): False,
        ("the same: worst case of the tiny ones", "3.00× (a channels-first)"): True,
        ("large tensors, channels-first, in copies, memory reused: mean", "not measured"): None,
        ("kernels alone, channels-first, in copies: mean", "3.00 (3.00 to 3.00)"): True,
        ("large tensors, channels-last, in copies, memory reused: mean", "not measured"): None,
        ("kernels alone, channels-last, in copies: mean", "not measured"): None,
        ("forward + backward against torch.compile: mean", f"{math.sqrt(80):.2f}× (8.00 to 10.00)"): True,
        ("forward + backward of a compiled graph against eager: worst case", "0.50× (c channels-first)"): False,
        ("evaluation against eager: mean", f"{mean:.2f}× (3.00 to 12.00)"): True,
        ("evaluation against torch.compile: worst case", "2.00× (c channels-first)"): True,
        (
            "step of training, mobilenet_v2, channels-first",
            "1.60× (normalizations and activations: 50% of eager's step)",
        ): False,
        (
            "step of training, mobilenet_v2, channels-last",
            "0.80× (normalizations and activations: 25% of eager's step)",
        ): False,
        ("a folded model, latency against torch.fx's fusion: worst model", "1.25× (mobilenet_v2 channels-first)"): True,
        **{
            (f"step of training, {model}, {layout}", "not measured"): None
            for model in ("resnet18", "densenet121", "efficientnet_b0")
            for layout in ("channels-first", "channels-last")
        },
        ("a variant, in the time of the batch's own statistics: worst case", "1.50 (mask, a)"): False,
        (
            "gradient, distance from a float64 run, in eager's distances: worst model",
            "2.00 (mobilenet_v2 channels-first)",
        ): True,
        (
            "JAX, forward + backward against the formula: worst case of 2^22 values and more",
            "3.00× (forward + backward, 2048 x 2048, axis 1)",
        ): False,
        (
            "JAX, forward + backward against the formula: worst case of all sizes",
            "3.00× (forward + backward, 2048 x 2048, axis 1)",
        ): True,
        ("JAX, step of training of a small residual network against Flax's layer: worst case", "not measured"): None,
        (
            "JAX, a layer against Flax's, without a backward pass too: worst case",
            "0.80× (forward, 16 x 4, axis 1)",
        ): False,
        ("share of eager's bytes for the backward pass that save_memory keeps: mobilenet_v2", "0.36"): True,
        **{
            (f"share of eager's bytes for the backward pass that save_memory keeps: {model}", "not measured"): None
            for model in ("efficientnet_b0", "resnet18", "resnet50", "densenet121")
        },
        (
            "fall of a step's peak for each byte that save_memory no longer keeps: worst model",
            "2.97× (mobilenet_v2)",
        ): True,
        ("a step with save_memory, in the time of one without: worst model", "1.08 (mobilenet_v2)"): False,
    }


def test_nothing_measured_is_no_goal_met() -> None:
    assert {goal.met for goal in goals.judge({name: [] for name in report.NAMES})} == {None}


def section(text: str, name: str) -> str:
    return text.partition(f"<!-- begin {name} -->\n")[2].partition(f"<!-- end {name} -->")[0]


def test_studies_of_a_clear_effect_agree_soon_and_of_one_at_its_margin_never() -> None:
    """Means of six seeds that are 3% off are those of seeds that are 7.5% off: three quarters of the margin."""
    near = [
        {"claim": "faster-at-same-rate", "effect": 1.1 * off, "seeds": 6} for off in (0.97, 1 / 0.97, 0.97, 1 / 0.97)
    ]
    shares, seeds = verdicts.expected(near) or ({}, 0.0)
    assert next(iter(shares)) == "undecided"
    assert 0.93 < shares["undecided"] < 1
    assert seeds > 170
    clear = [record | {"effect": 2 * record["effect"]} for record in near]
    assert verdicts.expected(clear) == ({"supported": 1.0}, 6.0)
    assert verdicts.expected(near[:1]) is None
    assert re.fullmatch(r"\d\d% undecided, .*; 1\d\d seeds", told := report._told(near))
    assert "." not in told, "no more digits than a simulation gives"
    assert report._told(clear) == "over 99% supported; 6 seeds"


def test_the_report(tmp_path: Path) -> None:
    for name, records in TABLES.items():
        table.write(tmp_path / "results" / f"{name}.csv", records, columns() | {"commit": "abc"})
    report.write(tmp_path, README)
    text = (tmp_path / "README.md").read_text()
    assert "**missed**" in section(text, "goals")
    assert section(text, "lost").splitlines() == [
        "- forward + backward, c channels-first: 0.50× eager",
        "- evaluation, c channels-first: 0.50× eager",
        "- compiled, c channels-first: 0.50× eager",
        "- step of training, mobilenet_v2 channels-last: 0.80× eager",
    ]
    assert section(text, "environment").count("\n") == 1
    assert "| mobilenet_v2 channels-first | 2x3x4x4 | 300 | 200 | 110 | 1.50 |" in section(text, "memory")
    assert "| mobilenet_v2 channels-first | 2.0e-06 | 5.0e-06 | 2.00 |" in section(text, "gradients")
    assert (
        "| mobilenet_v2 channels-first | 2x3x4x4 | 1.0 (1.00) | 0.5 (2.00) | 0.4 (2.50) | 0.5 (2.00) | 1 of 1 | 1e-07 |"
        in section(text, "folding")
    )
    assert "| b channels-first | 3.00 | 4.00 | 5.00 | 9.00 |" in section(text, "kernels")
    assert "| a | 10.0 (10.0 to 10.0) | 1.20 | 1.50 |" in section(text, "variants")
    assert "| jax 0.10.2 | mlp | 32 x 784 | 1.0 (1.0 to 1.0) | 0.9 (0.9 to 0.9) | 0.90 |" in section(text, "keras")
    assert "| mlp, eager | 256x64 | 3 | 1.0 (1.0 to 1.0) | 1.2 (1.2 to 1.2) | +2.0% |" in section(text, "watching")
    assert "| two layers | 2 | 90.0% | 2 |" in section(text, "healthy")
    assert "| forward + backward | 16 x 4, channels in axis 1 | 1.0 (1.0 to 1.0) | 4.00 | — | 3.00 |" in section(
        text, "jax"
    )
    assert "| renorm | 2 | 15.00 ± 7.07 |" in section(text, "small")
    assert "| faster-at-same-rate | 1.25 to 2.50 ratio | 2 supported, 1 undecided | 6 to 24 | " in section(
        text, "verdicts"
    )
    assert "| c channels-first | 2.0 (2.0 to 2.0) | 0.50 | 2.00 |" in section(text, "compiled")
    assert "| mobilenet_v2 | 0.0871 ± 0.0054 | 0.0871 ± 0.0054 |" in section(text, "losses")
    for name in report.SECTIONS:
        assert section(text, name).strip() not in ("", report.EMPTY.strip())
    for picture in ("layers", "training", "losses"):
        svg = (tmp_path / "results" / f"{picture}.svg").read_text()
        assert f"results/{picture}.svg" in text
        assert "channels-first" in svg or "converted" in svg
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    report.write(tmp_path, tmp_path / "README.md")
    assert {path: path.read_bytes() for path in before} == before, "written anew from the same numbers, it is the same"


def test_machines_stand_side_by_side(tmp_path: Path) -> None:
    here = columns() | {"commit": "abc"}
    for name, records in TABLES.items():
        elsewhere = [record | here | {"cpu": "another"} for record in records]
        slower = [
            record | here | ({"median_us": 2 * record["median_us"]} if record.get("candidate") == "batchnorm" else {})
            for record in records
        ]
        table.write(tmp_path / "results" / f"{name}.csv", elsewhere + (slower if name == "layers" else []), {})
    report.write(tmp_path, README)
    text = (tmp_path / "README.md").read_text()
    mean = next(line for line in section(text, "goals").splitlines() if line.startswith("| BN + ReLU"))
    assert f"|  | wanted | another | {here['cpu']} |" in section(text, "goals")
    assert re.fullmatch(r"\| .* \| ≥ 2.5× \| 4.76× .* \| 2.38× .*, \*\*missed\*\* \|", mean), mean
    assert section(text, "environment").count("\n") == 2


def test_the_report_of_a_gpu(tmp_path: Path) -> None:
    for name, records in GPU.items():
        other = [r | {"bytes_per_second": 2.0e12, "gpu": "NVIDIA H200"} for r in records if name == "gpu_copies"]
        both = [columns() | CARD | record for record in (*other, *records)]
        table.write(tmp_path / "results" / f"{name}.csv", both, {})
    report.write(tmp_path, README)
    text = (tmp_path / "README.md").read_text()
    assert section(text, "environment") == report.EMPTY, "the GPU's tables tell theirs themselves"
    found = section(text, "gpu")
    assert found.startswith("## On a GPU")
    assert found.count("### NVIDIA H") == 2
    assert found.count("- torch 2.11.0+cu130, Triton 3.6.0, CUDA 13.0, commit abc") == 2
    assert "2.00 TB/s" in found, "the other card's"
    assert "3.00 TB/s" in found
    assert "2 checks against float64 on the GPU, of which 1 failed." in found
    assert "| triton, y | 0.20 | 2.00 |" in found
    assert "- failed: strides, triton, y: [1], not [2]" in found
    assert "| a | 1.50 + 6.50 | 1.50 + 2.50 | 1.50 + 1.50 | 2.00 | 99 | 99 |" in found
    assert "| b | 1.50 + 0.50 | 1.50 + 2.50 |  | 0.50 | 99 | 99 |" in found
    assert "1.00× as fast as eager in the geometric mean; worst 0.50× (b)" in found
    assert "| resnet50 128 channels-last converted | 10.0 | 1.20 | 9.0 | 7 |" in found
    assert "| 8x16 eager | 30.0 |" in found
    assert "× eager | at least 1.2 | 1.20 | met | resnet50 128 channels-last, of 1 |" in found
    assert "| ResNet-50 step, wall, batch 256 channels-last, × eager | at least 1.3 |  | not measured |  |" in found
    assert "| a | 2048 | 1.50 | 1.50 |" in found
    assert "| forward a | 792 | 4 | 80 | 0 | 2048 | 6 | 1 |" in found
    assert "| last forward a | 1.80 | 1.50 | warps=4 |" in found
    assert "results/gpu_layers.svg" in found
    assert "batchnorm" in (tmp_path / "results/gpu_layers.svg").read_text()


def test_without_a_gpu_there_is_no_section_of_it(tmp_path: Path) -> None:
    report.write(tmp_path, README)
    assert section((tmp_path / "README.md").read_text(), "gpu") == ""


def test_healthy_networks_have_more_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    names = [command.Name.HEALTHY, command.Name.LOSSES]
    for name in names:
        monkeypatch.setitem(command.BENCHMARKS, name, lambda s: (0, iter(asked.append(s.seeds) or ())))
    command.main(names, out=tmp_path)
    command.main(names, seeds=3, out=tmp_path)
    command.main(names, quick=True, out=tmp_path)
    assert asked == [20, 2, 3, 3, 1, 1]


def test_a_report_of_nothing(tmp_path: Path) -> None:
    report.write(tmp_path, README)
    text = (tmp_path / "README.md").read_text()
    assert all(section(text, name) for name in report.SECTIONS)
    assert "not measured" in section(text, "goals")


# --- The run on a GPU -------------------------------------------------------------------------------------------------


def measured_on_a_gpu() -> goals.Tables:
    """Layers twice as fast as eager and 1.1 times as fast as compiled, but for one; steps and the host."""
    layers: list[dict[str, object]] = []
    for case, times in (("a", (2.0, 1.0, 1.1)), ("b", (2.8, 2.0, 1.8))):
        for name, time in zip(("eager", "batchnorm", "eager compiled"), times, strict=True):
            of = {"case": case, "candidate": name, "layout": "channels-first", "residual": 0, "mib": 98.0}
            layers.append(of | {"median_us": time, "copies": 3.0 * time})
    models: list[dict[str, object]] = []
    for name, time, peak in (("eager", 30.0, 5000), ("converted", 24.0, 5100), ("converted save_memory", 26.0, 4000)):
        of = {"network": "resnet50 128 channels-last", "model": "resnet50", "batch": 128, "layout": "channels-last"}
        models.append(of | {"candidate": name, "step_ms": time, "peak_mib": peak})
    host = [
        {"case": "8x16", "candidate": name, "piece": "forward + backward", "us": us}
        for name, us in (("eager", 200.0), ("batchnorm", 300.0))
    ]
    return {"layers": layers, "models": models, "host": host}


def test_goals_on_a_gpu() -> None:
    found = {
        goal.what: (goal.verdict, round(goal.found, 2), goal.where) for goal in gpu_goals.goals(measured_on_a_gpu())
    }
    assert found["layer, GPU time, × eager, every case"] == ("missed", 1.4, "b, of 2")
    assert found["layer, GPU time, × torch.compile, geometric mean"] == ("missed", 0.99, "of 2")
    assert found["layer, GPU time, × torch.compile, worst"] == ("missed", 0.9, "b, of 2")
    assert found["tensors over 100 MB, channels-first, copies"] == ("missed", 6.0, "b, of 2")
    assert found["tensors over 100 MB, channels-last, copies"][0] == "not measured"
    step = found["ResNet-50 step, wall, batch 128 channels-last, × eager"]
    assert step == ("met", 1.25, "resnet50 128 channels-last, of 1")
    assert found["ResNet-50 step, wall, batch 256 channels-last, × eager"][0] == "not measured"
    assert found["peak memory of a step, of eager's"][:2] == ("missed", 1.02)
    assert found["peak memory with save_memory, of that without"][:2] == ("met", 0.78)
    assert found["host time of a layer, of eager's BN + ReLU"][:2] == ("missed", 1.5)


def test_the_run_on_a_gpu_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tried on the CPU, on small tensors; what takes long to compile is left out, and so are the CPU's kernels."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    arguments = ["--quick", "--device", "cpu", "--workers", "0", "--only", "host,models", "--out", str(tmp_path)]
    with route("native"):
        assert gpu_main(arguments) == 0
    faulthandler.cancel_dump_traceback_later()
    told = capsys.readouterr().out
    assert "FAILED" not in told
    assert "--- models took" in told
    candidates = [(r["network"].split()[0], r["candidate"]) for r in table.read(tmp_path / "gpu_models.csv")]
    networks = "resnet50", "mobilenet_v2", "efficientnet_b0"
    assert set(candidates) == {
        *((name, candidate) for name in networks for candidate in ("eager", "converted")),
        ("resnet50", "converted save_memory"),
    }
    assert "in a chain" in {r["piece"] for r in table.read(tmp_path / "gpu_host.csv")}
    assert told.count("not measured") + told.count(" met ") + told.count(" missed ") == 14


def test_a_run_on_a_gpu_keeps_to_its_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    arguments = ["--quick", "--device", "cpu", "--workers", "0", "--only", "models", "--seconds", "0"]
    assert gpu_main([*arguments, "--out", str(tmp_path)]) == 0
    faulthandler.cancel_dump_traceback_later()
    assert "out of time: 7 of 7 skipped" in capsys.readouterr().out


def test_a_run_that_is_interrupted_tells_what_it_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another card has done stays in its file."""

    def stop(session: Session) -> None:
        session.add("host", [{"case": "a", "candidate": "eager", "piece": "forward", "us": 30.0}])
        raise KeyboardInterrupt

    table.write(tmp_path / "gpu_host.csv", GPU["gpu_host"], CARD)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("benchmarks.gpu.host.host", stop)
    with pytest.raises(KeyboardInterrupt):
        gpu_main(["--quick", "--device", "cpu", "--workers", "0", "--only", "host", "--out", str(tmp_path)])
    faulthandler.cancel_dump_traceback_later()
    assert "not measured" in capsys.readouterr().out
    assert [r["case"] for r in table.read(tmp_path / "gpu_host.csv")] == ["8x16", "a"]


def test_sizes_and_what_a_processor_holds() -> None:
    records = [
        {"case": str(values), "values": values, "candidate": name, "us": us}
        for values, times in ((2048, (1.0, 2.0)), (4096, (3.0, 2.0)), (8192, (3.0, 3.5)), (16384, (9.0, 3.0)))
        for name, us in zip(("eager", "batchnorm"), times, strict=True)
    ]
    assert crossing(records, "us") == 8193
    assert crossing(records[-2:], "us") == 0
    assert [resident(8, 80, 4096), resident(8, 96, 4096), resident(8, 168, 0), resident(1, 16, 0)] == [3, 2, 1, 32]
    assert resident(4, 32, 100 << 10) == 2, "shared memory"


# --- The package ------------------------------------------------------------------------------------------------------


def test_the_readme_says_what_was_measured_of_the_package() -> None:
    [said] = package.SECTION.findall(package.README.read_text(encoding="utf-8"))
    assert said == package.section(table.read(package.RESULTS))


def test_the_package_is_measured() -> None:
    pytest.importorskip("hatchling")
    [record] = package.measure(1, ["batchnorm"])
    assert record.items() >= {"import": "batchnorm", "alone": "numpy", "rounds": 1}.items()
    assert 0 < record["import_ms"] < record["alone_ms"], "the package itself imports nothing"
    assert 100_000 < record["wheel_bytes"] < 2_000_000
