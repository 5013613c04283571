"""What `pyproject.toml` asks for, and the two files of pins that go with it."""

import tomllib
from pathlib import Path

import pytest

pytest.importorskip("typer")
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from batchnorm import cli

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
OURS = ("test", "lint", "docs")
"""The extras of those who work on the package; the others are for those who use it."""

COMMANDS = {"study": "study", "bench": "bench", "fold": "onnx"}
"""The extra that each command needs."""


def requirements(extra: str) -> list[Requirement]:
    """What an extra brings, extras in it included."""
    found = []
    for requirement in map(Requirement, EXTRAS[extra]):
        if requirement.name == "batchnorm":
            found += [each for inner in sorted(requirement.extras) for each in requirements(inner)]
        else:
            found.append(requirement)
    return found


def pins(file: str) -> dict[str, Version]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return {canonicalize_name(name): Version(version) for name, version in (line.split("==") for line in lines)}


def test_floors_are_the_oldest_versions_admitted() -> None:
    """`make floors` installs `floors.txt`."""
    floors = pins("floors.txt")
    used = [each for extra in EXTRAS if extra not in OURS for each in requirements(extra)]
    for requirement in [*map(Requirement, PROJECT["dependencies"]), *used]:
        (bound,) = requirement.specifier
        assert bound.operator == ">=", requirement
        assert floors[canonicalize_name(requirement.name)] == Version(bound.version), requirement


def test_everything_that_is_asked_for_is_pinned() -> None:
    pinned = pins("constraints.txt")
    for requirement in [
        *map(Requirement, PROJECT["dependencies"]),
        *(each for e in EXTRAS for each in requirements(e)),
    ]:
        assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_every_command_has_an_extra_that_brings_the_command_line() -> None:
    commands = {command.name or command.callback.__name__ for command in cli.app.registered_commands}  # type: ignore[union-attr]
    assert commands == set(COMMANDS)
    for extra in COMMANDS.values():
        assert "typer" in {requirement.name for requirement in requirements(extra)}, extra
