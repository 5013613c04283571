"""Processes that `torchrun` started train together and give one report; and studies of planted networks."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for module in ("torch", "sklearn", "joblib", "plotly", "jinja2", "rich", "typer"):
    pytest.importorskip(module)

FILES = ["report.html", "report.md", "results.json", "runs.csv", "runs.jsonl"]


def start(
    folder: Path, *arguments: str, processes: int = 1, workers: int = 1, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """A study of processes that train together. Each may have workers, which import PyTorch once more."""
    run = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    return subprocess.run(
        [sys.executable, *run, "-m", "batchnorm", "study", *arguments, "--out", str(folder)],
        capture_output=True, text=True, check=False, timeout=900, cwd=cwd,
        env=os.environ | {"LOKY_MAX_CPU_COUNT": str(workers)},
    )  # fmt: skip


def study(folder: Path, *arguments: str, **how: Any) -> dict[str, Any]:
    done = start(folder, *arguments, **how)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Written:") == 1
    assert sorted(path.name for path in folder.iterdir()) == FILES
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return results


def by_task(results: dict[str, Any]) -> dict[str, Any]:
    """Every run by its task; those that are not wholly without chance in their training."""
    return {
        json.dumps({key: value for key, value in run.items() if key not in ("values", "finite")}): run
        for run in results["runs"]
    }


def test_two_processes_train_as_one_and_give_one_report(tmp_path: Path) -> None:
    """Statistics, gradients and batches are those of one process; dropout and noise are drawn by each."""
    claims = "paper,statistics,gradients,reduces-covariate-shift"
    small = ("--quick", "--seeds", "1", "--doublings", "1", "--epochs", "1", "--batch-size", "33")
    arguments = (*small, "--paper-steps", "30", "--claims", claims)
    alone, together = (study(tmp_path / str(n), *arguments, processes=n) for n in (1, 2))
    assert [claim["id"] for claim in alone["claims"]] == [claim["id"] for claim in together["claims"]]
    assert max(claim["seeds"] for claim in together["claims"]) == 2, "there was a second round"
    runs = by_task(together)
    compared = 0
    for key, run in by_task(alone).items():
        values, other = run["values"], runs[key]["values"]
        if run["variant"] in ("plain", "batch_norm") and run["steps"]:
            compared += 1
            # Rounding grows with the steps; the first of them are equal to it.
            np.testing.assert_allclose(other["loss"][:10], values["loss"][:10], rtol=2e-3, atol=2e-3, err_msg=key)
            np.testing.assert_allclose(other["loss"][:3], values["loss"][:3], rtol=1e-4, atol=1e-4, err_msg=key)
            np.testing.assert_allclose(other["test"][:3], values["test"][:3], atol=0.01, err_msg=key)
        for name in ("norms", "decades"):
            assert other.get(name) == values.get(name)
        if "change" in values and run["variant"] != "noisy_batch_norm":
            np.testing.assert_allclose(other["change"][0], values["change"][0], rtol=1e-2, err_msg=key)
    assert compared >= 10


def test_a_failure_of_processes_together_is_one_sentence(tmp_path: Path) -> None:
    arguments = ("--quick", "--seeds", "1", "--epochs", "1", "--claims", "gradients")
    (tmp_path / "runs.jsonl").write_text("{}\n")
    done = start(tmp_path, *arguments, "--resume", processes=2)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("batchnorm: ")]
    assert len(said) == 1
    assert "contains runs of another study" in said[0]
    assert done.stderr.count("Traceback") == 1, "that of torchrun itself"


PLANTED = """
    from torch import nn

    def deaf(inputs, classes):
        "Batch normalization whose weights are next to nothing and stay so: the other network has none of that."
        norm = nn.BatchNorm1d(64)
        nn.init.constant_(norm.weight, 1e-4)
        norm.weight.requires_grad_(False)
        return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 64, bias=False), norm, nn.ReLU(), nn.Linear(64, classes))

    def aside(inputs, classes):
        "Batch normalization that is there and changes next to nothing, at the side of a network without it."
        class Aside(nn.Module):
            def __init__(self):
                super().__init__()
                self.main = nn.Sequential(nn.Flatten(), nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, classes))
                self.side = nn.BatchNorm1d(classes, affine=False)
            def forward(self, x):
                scores = self.main(x)
                return scores + 1e-6 * self.side(scores)
        return Aside()
"""


@pytest.mark.parametrize(
    ("factory", "expected", "workers"),
    [
        ("deaf", {"faster-at-same-rate": "contradicted", "faster-at-best-rate": "contradicted"}, 2),
        ("aside", {"faster-at-same-rate": "not supported", "faster-at-best-rate": "not supported"}, 1),
    ],
)
def test_a_network_for_which_a_claim_is_false(
    tmp_path: Path, factory: str, expected: dict[str, str], workers: int
) -> None:
    (tmp_path / "planted.py").write_text(textwrap.dedent(PLANTED))
    arguments = ("--quick", "--model", f"planted:{factory}", "--claims", ",".join(expected), "--target", "0.8")
    results = study(tmp_path / "report", *arguments, workers=workers, cwd=tmp_path)
    assert {claim["id"]: claim["verdict"] for claim in results["claims"]} == expected
