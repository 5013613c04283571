"""What `watch` records is what happened, and it leaves nothing behind."""

import csv
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import batchnorm.torch as bn
from batchnorm.errors import InputError
from batchnorm.torch import Record, watch


def network() -> Any:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(inplace=True), nn.Linear(5, 3), nn.BatchNorm1d(3))


def steps(model: Any, number: int) -> None:
    for _ in range(number):
        model.zero_grad()
        (model(torch.randn(16, 4)) ** 3).sum().backward()


@pytest.mark.parametrize("ours", [False, True])
def test_a_record_is_what_happened(ours: bool) -> None:
    model = network()
    if ours:
        bn.convert(model)
    seen: dict[str, Tensor] = {}
    model[4].register_forward_pre_hook(lambda layer, args: seen.update(x=args[0].detach()))
    model[4].register_full_backward_hook(lambda layer, gx, gy: seen.update(gx=gx[0], gy=gy[0]))
    with watch(model, live=False) as found:
        steps(model, 3)
    last = [record for record in found.records if record.layer == "4"][-1]
    assert [(r.step, r.layer) for r in found.records] == [(s, n) for s in (1, 2, 3) for n in ("1", "4")]
    x = seen["x"].double()
    mean, var = model[4].running_mean.double(), model[4].running_var.double()
    shift = (x.mean(0) - mean) / (var + 1e-5).sqrt()
    scale = ((x.var(0, correction=0) + 1e-5) / (var + 1e-5)).sqrt() - 1
    expected = Record(
        3, "4", float(x.mean()), float(x.var(0, correction=0).mean()), float(mean.mean()), float(var.mean()),
        float((shift**2 + scale**2).mean().sqrt()), float(seen["gy"].norm()), float(seen["gx"].norm()), 0.0, 0,
    )  # fmt: skip
    np.testing.assert_allclose(np.float64(last[2:]), np.float64(expected[2:]), rtol=1e-4, atol=1e-6)


def test_dead_channels_and_skipped_batches() -> None:
    model = bn.convert(network())
    model[1].bias.data[:2] = -100.0
    with watch(model, live=False) as found:
        steps(model, 1)
        model(torch.full((4, 4), torch.nan))
    first, last = (next(r for r in found.records if (r.step, r.layer) == (step, "1")) for step in (1, 2))
    assert (first.dead, first.skipped, last.skipped) == (pytest.approx(0.4), 0, 1)
    assert str(found).startswith("step 2; largest gap ")
    assert str(found).endswith("1 batches skipped")


def test_every_tenth_step_and_bounded_memory() -> None:
    model = network()
    with watch(model, every=10, keep=5, live=False) as found:
        steps(model, 9)
        assert all(not layer._forward_hooks for layer in model.modules()), "between recorded steps there are no hooks"
        steps(model, 26)
    assert found.steps == 35
    assert [record.step for record in found.records] == [11, 21, 21, 31, 31]


def test_only_training_counts_and_nothing_stays() -> None:
    model = network()
    model.eval()
    with watch(model, live=False) as found:
        model(torch.randn(2, 4))
        model.train()
        with torch.no_grad():
            model(torch.randn(4, 4))
    assert found.steps == 1
    assert found.records[0].grad_in is None
    assert all(not (m._forward_hooks or m._forward_pre_hooks or m._backward_hooks) for m in model.modules())
    model[3].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), watch(model, live=False):
        model(torch.randn(4, 4))
    model[3]._forward_hooks.clear()
    assert all(not (m._forward_hooks or m._forward_pre_hooks) for m in model.modules())


def test_the_same_training_with_and_without() -> None:
    results = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = network()
        if watched:
            with watch(model, live=False):
                steps(model, 5)
        else:
            steps(model, 5)
        results.append([*model.state_dict().values(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_checkpoints() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = bn.convert(network())

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.net, x, use_reentrant=False)

    model = Checkpointed()
    with watch(model, live=False) as found:
        model(torch.randn(8, 4)).square().sum().backward()
    assert [record.layer for record in found.records] == ["net.1", "net.4"]


def test_where_records_go(tmp_path: Path) -> None:
    class Board:
        def __init__(self) -> None:
            self.scalars: list[tuple[str, float, int]] = []

        def add_scalar(self, name: str, value: float, step: int) -> None:
            self.scalars.append((name, value, step))

    model, called, board = network(), [], Board()
    for to in (tmp_path / "seen.csv", called.append, board):
        with watch(model, to=to, live=False) as found:
            steps(model, 2)
    rows = list(csv.DictReader((tmp_path / "seen.csv").read_text().splitlines()))
    assert [(row["step"], row["layer"]) for row in rows] == [("1", "1"), ("1", "4"), ("2", "1"), ("2", "4")]
    assert all(float(row["grad_out"]) > 0 for row in rows)
    assert [record.step for record in called] == [1, 1, 2, 2]
    assert ("4/gap", found.records[-1].gap, 2) in board.scalars


def test_a_second_training_is_appended(tmp_path: Path) -> None:
    model = network()
    seen = watch(model, to=tmp_path / "seen.csv", live=False)
    for number in (1, 2):
        with seen:
            steps(model, number)
    rows = list(csv.DictReader((tmp_path / "seen.csv").read_text().splitlines()))
    assert [(row["step"], row["layer"]) for row in rows] == [(step, layer) for step in "123" for layer in "14"]
    (tmp_path / "seen.csv").unlink()
    with seen:
        steps(model, 1)
    rows = list(csv.DictReader((tmp_path / "seen.csv").read_text().splitlines()))
    assert [row["step"] for row in rows] == ["4", "4"]


def test_infinities_of_both_signs_are_no_warning() -> None:
    x = torch.ones(4, 2)
    x[0] = torch.tensor([torch.inf, -torch.inf])
    model = nn.BatchNorm1d(2)
    with watch(model, live=False) as found:
        model(x)
    assert math.isnan(found.records[-1].running_mean)


@pytest.mark.parametrize("by", ["folder", "writer"])
def test_tensorboard(by: str, tmp_path: Path) -> None:
    """Read back from the file by TensorBoard itself."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray
    from torch.utils.tensorboard import SummaryWriter

    model = network()
    model[:2].requires_grad_(False)
    writer = None if by == "folder" else SummaryWriter(str(tmp_path / "run"))
    with watch(model, 2, to=writer or tmp_path / "run", live=False) as found:
        steps(model, 5)
    if writer is not None:
        writer.close()
    (file,) = (tmp_path / "run").iterdir()
    seen = {
        (value.tag, event.step): float(make_ndarray(value.tensor))
        for event in EventFileLoader(str(file)).Load()
        for value in event.summary.value
    }
    expected = {
        (f"{record.layer}/{name}", record.step): float(np.float32(value))
        for record in found.records
        for name, value in record._asdict().items()
        if name not in ("step", "layer") and value is not None
    }
    assert {step for _, step in seen} == {1, 3, 5}
    assert ("1/grad_in", 1) not in seen, "what has no gradient has no curve"
    assert seen == expected


def test_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", shown)
    model = network()
    with watch(model):
        steps(model, 3)
    assert "largest gap" in shown.getvalue()


def test_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    with pytest.raises(ValueError, match="there is nothing to watch"):
        watch(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="every must be positive, got 0"):
        watch(model, 0)
    with pytest.raises(ValueError, match="keep must be positive, got 0"):
        watch(model, keep=0)
    with pytest.raises(TypeError, match="or a function, got int"):
        watch(model, to=3)
    with pytest.raises(InputError, match=r"neither a \.csv file nor a folder"):
        watch(model, to="seen.txt")
    with pytest.raises(InputError, match="cannot be written"), watch(model, to=tmp_path / "none" / "seen.csv"):
        pass
    (tmp_path / "file").touch()
    monkeypatch.setattr("batchnorm.whole.recording.find_spec", lambda name: True)
    with pytest.raises(InputError, match=r"cannot be written \(File exists\)"), watch(model, to=tmp_path / "file"):
        pass
    monkeypatch.setattr("batchnorm.whole.recording.find_spec", lambda name: None)
    with pytest.raises(InputError, match="TensorBoard, which is not installed"):
        watch(model, to=tmp_path)
    with pytest.warns(UserWarning, match="watch saw no training step"), watch(model, live=False):
        model.eval()(torch.randn(2, 4))
