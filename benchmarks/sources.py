"""Which sources are measured."""

import subprocess
from pathlib import Path

__all__ = ["commit"]

HERE = Path(__file__).parent


def commit() -> str:
    """Of the sources that are measured; with a `+` if they have been changed since. Empty where there is no git."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=HERE
        )
        changed = subprocess.run(
            ["git", "diff", "--quiet", "HEAD", "--", "../src"], capture_output=True, check=False, cwd=HERE
        )
    except OSError:
        return ""
    return found.stdout.strip() + "+" * bool(found.stdout and changed.returncode)
