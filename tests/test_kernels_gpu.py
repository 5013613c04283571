"""The checks in `gpu_cases`: on the GPU, or interpreted where there is none. Triton decides at import which it is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

HERE = Path(__file__).parent

CHECKS = {
    "interpreted": ("check_stages", "check_launch", "check_route", "check_memory"),
    "compiled": ("check_compiled",),
}
"""What shares a process: the interpreter may stand in for a GPU, or the compiler is needed."""


def test_every_check_is_run() -> None:
    files = {path.stem for path in (HERE / "gpu_cases").glob("check_*.py")}
    assert {name for names in CHECKS.values() for name in names} == files


@pytest.mark.parametrize("checks", CHECKS)
def test_kernels_gpu(checks: str) -> None:
    pytest.importorskip("triton")
    import torch

    command = [sys.executable, "-m", "pytest", *(f"gpu_cases/{name}.py" for name in CHECKS[checks])]
    command += ["--confcutdir=gpu_cases", "-x", "-p", "no:cacheprovider", "-o", "python_files=check_*.py"]
    interpreted = checks == "interpreted" and not torch.cuda.is_available()
    environment = os.environ | {"TRITON_INTERPRET": str(int(interpreted)), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(
        command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=1800, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
