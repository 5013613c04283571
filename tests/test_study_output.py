"""Files of the study: written whole or not at all."""

import os
from pathlib import Path
from typing import Any

import pytest

from batchnorm.errors import InputError
from batchnorm.study import output

FILES = {"a.txt": "new a", "b.txt": "new b"}


def test_files_are_written_and_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "down"
    output.check_writable(folder, tuple(FILES))
    assert not folder.exists()
    for text in ("old", "new"):
        output.write(folder, {name: text for name in FILES})
    assert {path.name: path.read_text() for path in folder.iterdir()} == dict.fromkeys(FILES, "new")


@pytest.mark.parametrize("failing", ["a.txt", "b.txt"])
def test_a_failure_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    for name in FILES:
        (tmp_path / name).write_text("old")
    write_text = Path.write_text

    def full(self: Path, text: str, **options: Any) -> int:
        write_text(self, text[:2], **options)
        if failing in self.name:
            raise OSError(28, "No space left on device")
        return len(text)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InputError, match="No space left on device"):
        output.write(tmp_path, FILES)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(FILES, "old")


def test_an_interrupt_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        output.write(tmp_path, FILES)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError):
            output.check_writable(folder, ("a.txt",))


def test_a_folder_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(InputError, match=r"a\.txt is a folder"):
        output.check_writable(tmp_path, ("a.txt",))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="Permission denied"):
        output.check_writable(tmp_path / "new", ("a.txt",))
