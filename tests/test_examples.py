"""What `examples` promise, run as a user runs it."""

import os
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
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    process = subprocess.run(
        [sys.executable, str(EXAMPLES / "jax_digits.py"), "--epochs", "5"],
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
