"""What is said of where the package runs, and of what is not installed."""
# ruff: noqa: E402  (what is optional is asked for before it is imported)

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

typer_testing = pytest.importorskip("typer.testing")

import batchnorm
from batchnorm import cli, environment
from batchnorm.extras import EXTRAS, missing, require
from batchnorm.kernels import disk


def run(*arguments: str) -> Any:
    return typer_testing.CliRunner().invoke(cli.app, ["env", *arguments])


def in_new_process(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | variables, check=False
    )


def test_as_json() -> None:
    torch = pytest.importorskip("torch")
    result = run("--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["batchnorm"] == batchnorm.__version__
    assert found["python"] == platform.python_version()
    assert found["packages"]["numpy"] == np.__version__
    assert found["packages"]["torch"] == torch.__version__
    assert found["torch threads"] == torch.get_num_threads()
    assert found["routes"][-1] == "composed"
    assert ("triton" in found["routes"]) <= torch.cuda.is_available()
    assert found["devices"][0] == "cpu"


def test_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    result = run()
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert len(lines) == len(environment.environment())
    starts = {line.partition("  ")[0] for line in lines}
    assert starts >= {"batchnorm", "python", "cpu", "packages", "numba threads", "compiled kernels"}
    assert any(line.startswith("variables") and "OMP_NUM_THREADS 3" in line for line in lines)


def test_a_folder_below_home_does_not_say_whose_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(disk, "folder", lambda: tmp_path / "kept")
    assert environment.environment()["compiled kernels"] == "~/kept"
    monkeypatch.setattr(disk, "folder", lambda: None)
    assert environment.environment()["compiled kernels"] == "nowhere: no writable folder"


def test_where_compiled_kernels_are_kept(tmp_path: Path) -> None:
    code = "from batchnorm.kernels import disk; print(disk.folder())"
    done = in_new_process(code, NUMBA_CACHE_DIR=str(tmp_path))
    assert Path(done.stdout.strip()).is_relative_to(tmp_path), done.stderr


def test_without_pytorch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from batchnorm.environment import environment, text\n"
        "print(text(environment()))"
    )
    done = in_new_process(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split(maxsplit=1) == ["routes", "none: torch is not installed"]


# --- What is not installed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["torch", "keras", "onnx", "study", "bench"])
def test_a_part_says_which_extra_installs_what_it_needs(part: str) -> None:
    for package in EXTRAS[part]:
        code = f"import sys; sys.modules[{package!r}] = None; import batchnorm.{part}"
        done = in_new_process(code)
        assert done.stderr.splitlines()[-1] == (
            f"ModuleNotFoundError: batchnorm.{part} needs {package}, which is not installed; "
            f'install it with pip install "batchnorm[{part}]".'
        )


def test_every_part_that_needs_something_asks_for_it() -> None:
    folder = Path(batchnorm.__file__).parent
    asking = {path.parent.name for path in folder.glob("*/__init__.py") if "require(" in path.read_text()}
    assert asking == {part for part in EXTRAS if (folder / part).is_dir()}


def test_what_is_there_is_not_complained_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXTRAS, "some", ("json", "numpy"))
    require("some")
    monkeypatch.setitem(EXTRAS, "some", ("json", "no_such_package"))
    with pytest.raises(ModuleNotFoundError) as error:
        require("some")
    assert error.value.name == "no_such_package"
    assert str(error.value) == missing("batchnorm.some", "no_such_package", "some")
