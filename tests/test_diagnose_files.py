"""`batchnorm diagnose`: files of weights, read without running code from them, and files that are not."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

typer_testing = pytest.importorskip("typer.testing")

from batchnorm import cli  # noqa: E402
from batchnorm.checkpoints.command import diagnose_checkpoint  # noqa: E402


def run(*arguments: object) -> Any:
    return typer_testing.CliRunner().invoke(cli.app, ["diagnose", *map(str, arguments)])


def trained() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))
    for _ in range(3):
        model(torch.randn(4, 3, 8, 8))
    return model


def to_pt(model: nn.Module, path: Path) -> None:
    torch.save(model.state_dict(), path)


def to_nested(model: nn.Module, path: Path) -> None:
    torch.save({"epoch": 3, "models": [{"state_dict": model.state_dict()}], "best": 0.5}, path)


def to_old_pt(model: nn.Module, path: Path) -> None:
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False)


TYPES = {torch.float32: "F32", torch.int64: "I64", torch.bfloat16: "BF16", torch.float16: "F16"}


def to_safetensors(model: nn.Module, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """As the format's description says."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    whole = b""
    for name, tensor in model.state_dict().items():
        tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
        values = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": TYPES[tensor.dtype], "shape": [*tensor.shape],
                        "data_offsets": [len(whole), len(whole) + len(values)]}  # fmt: skip
        whole += values
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole)


def to_bf16(model: nn.Module, path: Path) -> None:
    to_safetensors(model, path, torch.bfloat16)


FORMATS: dict[str, Callable[[nn.Module, Path], None]] = {
    "a.pt": to_pt, "b.pth": to_nested, "c.pt": to_old_pt, "d.safetensors": to_safetensors, "e.safetensors": to_bf16,
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_healthy_and_sick_files(name: str, tmp_path: Path) -> None:
    model: Any = trained()
    path = tmp_path / name
    FORMATS[name](model, path)
    result = run(path)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("2 batch normalizations, without data: nothing is wrong.")
    layer = diagnose_checkpoint(path).layers[1]
    assert layer.name == "4"
    np.testing.assert_allclose(layer.var, model[4].running_var.numpy(), rtol=0 if name < "e" else 2.0**-7)
    model[4].weight.data[2] = 0.0
    FORMATS[name](model, path)
    result = run(path)
    assert result.exit_code == 0, "a warning is no error"
    assert "dead-channel" in result.stdout
    model[1].running_mean[0] = torch.nan
    FORMATS[name](model, path)
    result = run(path, "--html", tmp_path / "r.html", "--json", tmp_path / "r.json", "--quiet")
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", "")
    found = json.loads((tmp_path / "r.json").read_text())["findings"]
    assert [(f["layer"], f["check"], f["severity"]) for f in found] == [
        ("1", "non-finite-statistics", "error"),
        ("4", "dead-channel", "warning"),
    ]
    assert "<svg" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_files_of_keras(tmp_path: Path) -> None:
    """As Keras 3 writes them; the model's own files are read in the checks of Keras."""
    h5py = pytest.importorskip("h5py")
    import zipfile

    values = {"first": [[1, 1], [0, 0], [0.5, 0.1], [1, 2]], "second": [[0, 0], [0.0, 1.0], [2e-3, 3]]}
    with h5py.File(tmp_path / "m.weights.h5", "w") as file:
        for i, (name, variables) in enumerate(values.items()):
            group = file.create_group(f"layers/batch_normalization{f'_{i}' if i else ''}/vars")
            group.attrs["name"] = name
            for number, variable in enumerate(variables):
                group[str(number)] = np.float32(variable)
    assert run(tmp_path / "m.weights.h5").exit_code == 0
    layers = [
        {"class_name": "BatchNormalization", "config": {"name": name, "epsilon": 0.01, "scale": name == "first"}}
        for name in values
    ]
    with zipfile.ZipFile(tmp_path / "m.keras", "w") as archive:
        archive.writestr("config.json", json.dumps({"config": {"layers": layers}}))
        archive.write(tmp_path / "m.weights.h5", "model.weights.h5")
    report = diagnose_checkpoint(tmp_path / "m.keras")
    assert [layer.name for layer in report.layers] == ["first", "second"]
    assert [None if layer.weight is None else layer.weight.tolist() for layer in report.layers] == [[1, 1], None]
    (found,) = report.findings
    assert (found.layer, found.check) == ("second", "eps-dominates"), "the eps is that of the config"
    assert found.remedy.startswith("model.get_layer('second').epsilon = ")


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("this must not run",))


def test_bad_files_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def file(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    torch.save(nn.BatchNorm1d(2), tmp_path / "whole.pt")
    torch.save({"weight": torch.ones(2)}, tmp_path / "none.pt")
    to_safetensors(trained(), tmp_path / "good.safetensors")
    good = (tmp_path / "good.safetensors").read_bytes()
    cases = [
        (tmp_path / "missing.pt", "cannot be read (No such file or directory)"),
        (tmp_path, "is not a known file of weights"),
        (file("notes.txt", b"hello"), "is not a known file of weights"),
        (file("empty.pt", b""), "is not a valid checkpoint of PyTorch"),
        (file("text.pt", b"hello, world"), "checkpoint of PyTorch"),
        (tmp_path / "whole.pt", "neither tensors nor plain values"),
        (file("evil.pth", pickle.dumps({"a": Evil()}, protocol=2)), "neither tensors nor plain values"),
        (tmp_path / "none.pt", "has no batch normalization with running statistics"),
        (file("empty.safetensors", b""), "its header is longer than the file"),
        (file("text.safetensors", b"\x05" + b"\0" * 7 + b"hello"), "its header is not readable"),
        (file("short.safetensors", good[:-40]), "is not where the header says"),
        (file("text.keras", b"hello"), "is not a valid .keras file"),
        (file("text.weights.h5", b"hello"), "is not a valid file of Keras' weights"),
    ]
    for path, words in cases:
        result = run(path)
        assert (result.exit_code, result.stdout) == (2, ""), path
        assert words in result.stderr, (path, result.stderr)
        assert result.stderr.startswith("batchnorm: ")
        assert result.stderr.endswith(".\n")
        assert result.stderr.count("\n") == 1
        assert "this must not run" not in capsys.readouterr().out
    to_pt(trained(), tmp_path / "good.pt")
    result = run(tmp_path / "good.pt", "--html", tmp_path / "none" / "report.html")
    assert (result.exit_code, "cannot be written" in result.stderr) == (2, True)


def test_a_bug_is_no_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script that stops on 1 must not take a bug for a sick file."""
    to_pt(trained(), tmp_path / "good.pt")
    monkeypatch.setattr("batchnorm.checkpoints.command.diagnose_checkpoint", lambda source: 1 / 0)
    result = run(tmp_path / "good.pt")
    assert (result.exit_code, result.stdout) == (3, "")
    assert result.stderr.startswith("Traceback")
    assert result.stderr.endswith("ZeroDivisionError: division by zero\n")
