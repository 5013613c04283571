"""The documentation: every program in it runs, every command exists, and the site builds with working links."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^( *)```(\w+)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in one language, without the indentation of the list that they are in."""
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [re.sub(f"^{indent}", "", code, flags=re.MULTILINE) for indent, kind, code in found if kind == language]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name)
def test_programs_run(page: Path, tmp_path: Path) -> None:
    """The blocks of a page are one program, from top to bottom."""
    program = "\n\n".join(blocks(page, "python"))
    for module in ("torch", "keras", "sklearn", "jax"):
        if module in program:
            pytest.importorskip(module)
    file = tmp_path / "page.py"
    file.write_text(program, encoding="utf-8")
    environment = os.environ | {"KERAS_BACKEND": "torch", "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:__main__", str(file)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def commands(page: Path) -> list[list[str]]:
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "bash")], ids=name)
def test_commands_exist(page: Path) -> None:
    """Subcommands and options of `batchnorm`, targets of the Makefile, programs of this repository, extras."""
    typer = pytest.importorskip("typer")
    from batchnorm import cli

    known = typer.main.get_command(cli.app).commands
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for command in commands(page):
        if command[:1] == ["batchnorm"]:
            options = {option for parameter in known[command[1]].params for option in parameter.opts}
            assert {word.split("=")[0] for word in command if word.startswith("--")} <= options | {"--help"}, command
        elif command[:1] == ["make"]:
            assert re.search(f"^{command[1]}:", makefile, re.MULTILINE), command
        elif command[:2] == ["pip", "install"]:
            for extra in re.findall(r"\[(.+?)\]", " ".join(command)):
                assert re.search(f"^{extra} = ", project, re.MULTILINE), command
        for word in command:
            if word.endswith(".py") and "/" in word:
                assert (ROOT / word).exists(), command


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", re.sub(BLOCK, "", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md"], ids=name
)
def test_links_lead_somewhere(page: Path) -> None:
    """Those of the pages that the site does not contain."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), target
        if anchor:
            assert anchor in anchors(there), target


def test_the_site_builds(tmp_path: Path) -> None:
    """A link without an end, or a name without documentation, is a warning, and warnings are errors."""
    pytest.importorskip("mkdocs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "index.html").exists()
    assert "BatchNorm2d" in (tmp_path / "reference/torch.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("framework", ["torch", "keras", "onnx"])
def test_the_reference_has_every_public_name(framework: str) -> None:
    source = (ROOT / f"src/batchnorm/{framework}/__init__.py").read_text(encoding="utf-8")
    public = set(re.findall(r'^    "(\w+)",$|__all__ = \["(\w+)"\]', source, re.MULTILINE))
    names = {one or other for one, other in public}
    page = (ROOT / f"docs/reference/{framework}.md").read_text(encoding="utf-8")
    assert names
    assert names == set(re.findall(r"^::: \S+\.(\w+)$", page, re.MULTILINE))
