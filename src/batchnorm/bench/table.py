"""Write records as CSV, and read them back."""

import csv
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from batchnorm.bench.clock import Record
from batchnorm.errors import InputError

__all__ = ["read", "write"]


def check_writable(path: Path) -> None:
    """Raise an error, before minutes of timing, if a file cannot be written. Its folders are created.

    Raises:
        InputError: If it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        path.open("a").close()
        if new:
            path.unlink()
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}.") from error


def write(path: Path, records: Sequence[Record], environment: Mapping[str, Any]) -> None:
    """Write records, each with the environment.

    Raises:
        InputError: If the file cannot be written.
    """
    columns = dict.fromkeys(column for record in records for column in record) | dict(environment)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(columns), lineterminator="\n")
            writer.writeheader()
            writer.writerows(record | dict(environment) for record in records)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}.") from error


def read(path: Path) -> list[Record]:
    """The records of a file, with numbers parsed; no records if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{column: _value(text) for column, text in row.items()} for row in csv.DictReader(file)]


def _value(text: str) -> Any:
    for convert in (int, float):
        with suppress(ValueError):
            return convert(text)
    return text
