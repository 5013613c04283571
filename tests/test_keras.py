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


@pytest.mark.parametrize("backend", ["tensorflow", "jax", "torch"])
@pytest.mark.parametrize("checks", sorted(path.stem for path in (HERE / "keras_cases").glob("check_*.py")))
def test_keras(backend: str, checks: str) -> None:
    for module in ("keras", backend):
        pytest.importorskip(module)
    command = [sys.executable, "-m", "pytest", f"keras_cases/{checks}.py", "--confcutdir=keras_cases", "-x"]
    command += ["-p", "no:cacheprovider", "-o", "python_files=check_*.py"]
    for said in FILTERS:
        command += ["-W", said]
    environment = os.environ | {
        "KERAS_BACKEND": backend,
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "OMP_NUM_THREADS": "1",  # there are others beside this one, and threads that wait for each other take long
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(
        command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=550, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
