"""What `examples` promise, run as a user runs it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.skipif(sys.platform == "win32", reason="needs gloo")
def test_training_in_two_processes() -> None:
    for module in ("torch", "sklearn"):
        pytest.importorskip(module)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = subprocess.run(
        [*command, str(EXAMPLES / "train_distributed.py"), "--epochs", "2"],
        capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert lines[0].startswith("epoch 1: loss ")
    assert lines[2].startswith("2 processes, 8 samples each: ")
    assert float(lines[2].split()[-2].rstrip("%")) > 90
    assert lines[3] == "running statistics are the same in all processes"


def said(example: str, *options: str) -> list[str]:
    """The lines that an example prints."""
    for module in ("torch", "sklearn"):
        pytest.importorskip(module)
    process = subprocess.run(
        [sys.executable, str(EXAMPLES / example), *options], capture_output=True, text=True, check=False, timeout=900
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


def percents(line: str) -> list[float]:
    return [float(number) for number in re.findall(r"([\d.]+)%", line)]


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_the_networks_of_introductions(model: str) -> None:
    assert percents(said("torch_digits.py", "--model", model, "--epochs", "2")[-1])[0] > 88


def test_a_frozen_backbone_still_knows_what_it_knew() -> None:
    before, half_frozen, frozen = map(percents, said("fine_tune.py"))
    assert before[0] > 98
    assert half_frozen[1] < 60
    assert frozen[0] > 85
    assert frozen[1] == before[0]


def test_small_batches() -> None:
    lines = said("small_batches.py", "--steps", "300")
    assert [line.partition(":")[0] for line in lines] == ["batch statistics", "Renorm"]
    assert min(percents(line)[1] for line in lines) > 40


def test_padded_sequences() -> None:
    without, masked = map(percents, said("padded_sequences.py"))
    assert masked[0] > 80
    assert masked[0] == masked[1]
    assert without[0] > 50


def test_sorted_data_are_found_and_shuffled() -> None:
    lines = said("sorted_data.py")
    assert any("correlated-batch" in line for line in lines)
    before, after = (percents(line)[0] for line in lines if "sorted batches: " in line or "shuffled batches: " in line)
    assert before < 85
    assert after > 92
    assert lines[-1].endswith("nothing is wrong.")


def test_from_training_to_a_file() -> None:
    for module in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(module)
    lines = said("ship.py")
    assert any(line.startswith("2 of 2 batch normalizations folded") for line in lines)
    assert percents(lines[-1])[0] > 93


def test_the_notebook(tmp_path: Path) -> None:
    for module in ("torch", "sklearn", "matplotlib"):
        pytest.importorskip(module)
    cells = json.loads((EXAMPLES / "learn.ipynb").read_text(encoding="utf-8"))["cells"]
    assert all(not cell["outputs"] for cell in cells if cell["cell_type"] == "code"), "kept without its pictures"
    program = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    (tmp_path / "notebook.py").write_text(program, encoding="utf-8")
    process = subprocess.run(
        [sys.executable, str(tmp_path / "notebook.py")], env=os.environ | {"MPLBACKEND": "agg"},
        capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("backend", ["tensorflow", "jax", "torch"])
def test_keras(backend: str) -> None:
    for module in ("keras", "sklearn", backend):
        pytest.importorskip(module)
    environment = os.environ | {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    process = subprocess.run(
        [sys.executable, str(EXAMPLES / "keras_mlp.py")],
        capture_output=True, text=True, env=environment, check=False, timeout=900,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("2 layers calibrated on 1347 samples"))
    assert lines[at + 1].startswith(f"{backend}: accuracy on 450 test images: ")
    assert float(lines[at + 1].split()[-1].rstrip("%")) > 95
    assert lines[at + 2].startswith("2 of 2 batch normalizations folded; outputs differ by ")


def test_tensorflow_as_it_is_written_today() -> None:
    for module in ("keras", "sklearn", "tensorflow"):
        pytest.importorskip(module)
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    process = subprocess.run(
        [sys.executable, str(EXAMPLES / "tensorflow_today.py")],
        capture_output=True, text=True, env=environment, check=False, timeout=900,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    last = process.stdout.splitlines()[-1]
    assert last.startswith("accuracy on 397 test images: ")
    assert float(last.split()[-1].rstrip("%")) > 95


@pytest.mark.parametrize("devices", [1, 4])
def test_jax(devices: int) -> None:
    for module in ("flax", "optax", "sklearn"):
        pytest.importorskip(module)
    # Optimized, as users have it: the other tests of JAX are not.
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    process = subprocess.run(
        [sys.executable, str(EXAMPLES / "jax_digits.py"), "--epochs", "10"],
        capture_output=True, text=True, env=environment, check=False, timeout=900,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    text = process.stdout
    for name, layers in (("MLP", 1), ("CNN", 2)):
        start = text.index(f"{name}, {devices} devices: accuracy on 450 test images: ")
        assert float(text[start:].splitlines()[0].split()[-1].rstrip("%")) > 90
        assert (
            f"{layers} of {layers} batch normalization{'s' * (layers > 1)} folded; outputs differ by " in text[start:]
        )
