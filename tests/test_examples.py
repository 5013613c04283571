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
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [*command, str(EXAMPLES / "train_distributed.py"), "--epochs", "2"],
        capture_output=True, text=True, env=environment, check=False, timeout=300,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert lines[0].startswith("epoch 1: loss ")
    assert lines[2].startswith("2 processes, 8 samples each: ")
    assert float(lines[2].split()[-2].rstrip("%")) > 90
    assert lines[3] == "running statistics are the same in all processes"
