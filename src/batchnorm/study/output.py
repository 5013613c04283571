"""Write the study's files: all or none, and never a part of one."""

import os
import tempfile
from pathlib import Path

from batchnorm.errors import InputError

__all__ = ["check_nothing_lost", "check_writable", "write"]


def check_writable(folder: Path, names: tuple[str, ...]) -> None:
    """Raise an error, before hours of training, unless `folder` can be created and written to. Nothing is left behind.

    Raises:
        InputError: If it cannot be written.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} is a file, but the study writes a folder; choose another name.")
        for name in names:
            if (folder / name).is_dir():
                raise InputError(
                    f"{folder / name} is a folder, but the study writes a file of that name; move it away."
                )
        there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}.") from error


def check_nothing_lost(folder: Path, names: tuple[str, ...], runs: str) -> None:
    """Raise an error if files of an earlier study would be replaced.

    Args:
        folder: The folder of the files.
        names: Their names.
        runs: The name of the file of runs, with one run on each line after the first.

    Raises:
        InputError: If there is an earlier study.
    """
    try:
        found = [name for name in names if (folder / name).is_file()]
        if runs in found and (folder / runs).read_bytes().count(b"\n") <= 1:
            found.remove(runs)
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}.") from error
    if found:
        raise InputError(
            f"{folder} contains an earlier study ({', '.join(found)}); keep its runs and train the rest with --resume, "
            "or begin anew in another folder with --out, or remove this one."
        )


def write(folder: Path, files: dict[str, str]) -> None:
    """Write `files`, name to text, into `folder`.

    Each file is written under a temporary name; when all are complete, they are renamed.

    Raises:
        InputError: If this fails. Then no file has changed, unless the renaming itself was interrupted.
    """
    parts = {folder / f".{name}.{os.getpid()}.part": folder / name for name in files}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for part, path in parts.items():
            part.write_text(files[path.name], encoding="utf-8")
        for part, path in parts.items():
            part.replace(path)
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}.") from error
    finally:
        for part in parts:
            part.unlink(missing_ok=True)
