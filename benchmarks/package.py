"""`python -m benchmarks.package`: the wheel's size and what imports cost, measured and written to the README.

Every import is timed in a process of its own. The processes take turns, and the unit is the import of the framework
alone.
"""

import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from batchnorm.bench import table
from batchnorm.bench.clock import Record
from batchnorm.bench.terminal import watch
from batchnorm.environment import columns
from benchmarks.sources import commit

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks/results/package.csv"
ALONE = {
    "batchnorm": "numpy",
    "batchnorm.torch": "torch",
    "batchnorm.keras": "keras",
    "batchnorm.jax": "flax.nnx",
    "batchnorm.onnx": "onnx",
}
"""The parts of the package, each with what it would be slow to import without us."""
TIMED = "import time; begin = time.perf_counter(); import {}; print(time.perf_counter() - begin)"
SECTION = re.compile(r"(?<=<!-- begin package -->\n).*?(?=<!-- end package -->)", re.DOTALL)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def wheel() -> int:
    """The size of the wheel in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        [file] = Path(folder).iterdir()
        return file.stat().st_size


def seconds(module: str) -> float:
    """The time that a new process takes to import a module."""
    command = [sys.executable, "-c", TIMED.format(module)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def measure(rounds: int, parts: Sequence[str] = tuple(ALONE)) -> list[Record]:
    """One record for each part. A first round, which fills the caches of the system, does not count."""
    size, modules = wheel(), [module for part in parts for module in (part, ALONE[part])]
    timed = ([{module: seconds(module) for module in modules}] for _ in range(rounds + 1))
    found = watch(timed, rounds + 1, "imports")
    median = {module: statistics.median(times[module] for times in found[1:]) for module in modules}
    return [
        {
            "import": part,
            "alone": ALONE[part],
            "import_ms": round(median[part] * 1e3, 1),
            "alone_ms": round(median[ALONE[part]] * 1e3, 1),
            "rounds": rounds,
            "wheel_bytes": size,
        }
        for part in parts
    ]


def section(records: Sequence[Record]) -> str:
    """The lines of the README."""
    listed = ""
    for r in records:
        ratio = r["import_ms"] / r["alone_ms"]
        times = f"about {ratio:.1f}" if ratio >= 0.1 else "less than 0.1"
        listed += f"- `import {r['import']}` takes {times} times as long as `import {r['alone']}`\n"
    return f"The wheel is {records[0]['wheel_bytes'] / 1000:.0f} kB.\n\n{listed}"


@app.command()
def main(rounds: Annotated[int, typer.Option(min=1, help="How often everything is imported.")] = 11) -> None:
    """Measure, and write the README and the records."""
    sources = columns() | {"commit": commit()}
    table.write(RESULTS, [record | sources for record in measure(rounds)], {})
    text, sections = SECTION.subn(section(table.read(RESULTS)), README.read_text(encoding="utf-8"))
    assert sections == 1, "the README must have one section for the package"
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    app()
