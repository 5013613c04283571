"""The checks in `keras_cases`, for each backend of Keras in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

FILTERS = [
    # Keras 3.15 turns variables into arrays with NumPy's protocol of before 2.0, wherever it hands out weights.
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning",
]


CHECKS = {
    "layer": ("check_layer", "check_sync"),
    "tools": ("check_tools", "check_fold", "check_port", "check_diagnose"),
}
"""What shares a process: a backend takes seconds to start."""

XLA = {
    "tensorflow": "--xla_force_host_platform_device_count=2",
    "jax": f"--xla_force_host_platform_device_count=2 {os.environ['XLA_FLAGS']}",
    "torch": "",
}


def test_every_check_is_run() -> None:
    files = {path.stem for path in (HERE / "keras_cases").glob("check_*.py")}
    assert {name for names in CHECKS.values() for name in names} == files


@pytest.mark.parametrize("backend", XLA)
@pytest.mark.parametrize("checks", CHECKS)
def test_keras(backend: str, checks: str) -> None:
    for module in ("keras", backend):
        pytest.importorskip(module)
    command = [sys.executable, "-m", "pytest", *(f"keras_cases/{name}.py" for name in CHECKS[checks])]
    command += ["--confcutdir=keras_cases", "-x", "-p", "no:cacheprovider", "-o", "python_files=check_*.py"]
    for said in FILTERS:
        command += ["-W", said]
    environment = os.environ | {
        "KERAS_BACKEND": backend,
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "XLA_FLAGS": XLA[backend],
    }
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(
        command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=1800, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
