"""The wheel and the source distribution, built, checked, and used where there is no source tree."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("hatchling")
ROOT = Path(__file__).parents[1]


def run(*command: str | Path, **options: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "--directory", folder, cwd=ROOT)
    return folder


def test_an_index_would_take_them(built: Path) -> None:
    pytest.importorskip("twine")
    files = sorted(built.iterdir())
    assert [file.suffix for file in files] == [".whl", ".gz"]
    said = run(sys.executable, "-m", "twine", "check", "--strict", *files)
    assert said.count("PASSED") == 2


def test_what_they_contain(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "batchnorm/py.typed" in names
    assert {name.split("/")[0] for name in names} == {"batchnorm", wheel.name.split("-py3")[0] + ".dist-info"}
    assert all(name.endswith((".py", ".typed", ".html", ".j2", ".md")) or ".dist-info/" in name for name in names)
    (source,) = built.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        inside = {name.split("/", 1)[1] for name in archive.getnames()}
    assert {
        "README.md",
        "LICENSE",
        "pyproject.toml",
        "hatch_build.py",
        "src/batchnorm/definition.py",
        "tests/cases.py",
    } <= inside


def test_the_description_leads_nowhere_that_an_index_does_not_have(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    [name] = (name for name in archive.namelist() if name.endswith("METADATA"))
    said = archive.read(name).decode()
    assert "convert(model, statistics=Renorm())" in said
    assert "Description-Content-Type: text/markdown" in said
    assert [target for target in re.findall(r"\]\(([^)]*)\)", said) if "://" not in target] == []
    assert "The picture" not in said


PROGRAM = """
import sys
from pathlib import Path
import numpy as np
import batchnorm
from batchnorm import definition
assert Path(batchnorm.__file__).is_relative_to(sys.prefix), batchnorm.__file__
y, _ = definition.forward(np.arange(8.0).reshape(4, 2))
assert np.allclose(y.mean(0), 0)
from batchnorm.torch import BatchNorm1d
import torch
layer = BatchNorm1d(8, activation="relu")
assert layer(torch.randn(512, 8, 64)).min() == 0
"""


def test_an_installed_wheel_works_outside_the_source_tree(built: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    (wheel,) = built.glob("*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv/bin/python"
    (packages,) = (tmp_path / "venv/lib").glob("*/site-packages")
    # Its requirements are those of this environment; its own files are the wheel's.
    (packages / "requirements.pth").write_text(str(Path(pytest.__file__).parents[1]) + "\n")
    run(
        sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index",
        "--disable-pip-version-check", wheel,
    )  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    run(python, "-c", PROGRAM, cwd=tmp_path, env=environment)
    command = tmp_path / "venv/bin/batchnorm"
    assert "study" in run(command, "--help", cwd=tmp_path, env=environment)
