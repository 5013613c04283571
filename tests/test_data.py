"""The images of the study: what is read, how it is split, and what is said of data that cannot be used."""

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sklearn")

from batchnorm.errors import InputError
from batchnorm.study.data import Dataset, load, load_digits, read_idx

CLASSES, PER_CLASS = 3, 30


def images_and_labels(per_class: int = PER_CLASS, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(CLASSES, dtype=np.uint8), per_class)
    return generator.integers(0, 256, (len(labels), 4, 5), dtype=np.uint8), labels


def idx(array: np.ndarray, magic: int | None = None) -> bytes:
    header = struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim if magic is None else magic, *array.shape)
    return header + array.tobytes()


def write_pair(folder: Path, prefix: str, images: np.ndarray, labels: np.ndarray, zipped: bool = False) -> None:
    for name, array in ((f"{prefix}-images-idx3-ubyte", images), (f"{prefix}-labels-idx1-ubyte", labels)):
        path = folder / (f"{name}.gz" if zipped else name)
        path.write_bytes(gzip.compress(idx(array)) if zipped else idx(array))


def assert_one_sentence(error: pytest.ExceptionInfo[InputError], *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    for part in parts:
        assert part in message


# --- What is read -----------------------------------------------------------------------------------------------------


def test_digits_in_three_parts() -> None:
    digits = load_digits()
    assert [len(part.labels) for part in (digits.train, digits.validation, digits.test)] == [1149, 288, 360]
    assert (digits.inputs, digits.classes) == (64, 10)
    assert digits.train.images.dtype == np.float32
    assert digits.train.images.max() == 1
    assert 0.1 < digits.chance < 0.11


def test_a_split_loses_and_repeats_nothing_and_keeps_classes_in_proportion() -> None:
    digits = load_digits()
    parts = (digits.train, digits.validation, digits.test)
    rows = np.concatenate([np.column_stack([part.images, part.labels]) for part in parts])
    import sklearn.datasets

    whole = sklearn.datasets.load_digits()
    expected = np.column_stack([whole.data / 16, whole.target]).astype(np.float32)
    np.testing.assert_array_equal(rows[np.lexsort(rows.T)], expected[np.lexsort(expected.T)])
    for part in parts:
        share = np.bincount(part.labels) / len(part.labels)
        np.testing.assert_allclose(share, np.bincount(whole.target) / len(whole.target), atol=0.01)


def test_the_split_is_the_same_every_time() -> None:
    a, b = load_digits(), load_digits()
    np.testing.assert_array_equal(a.test.images, b.test.images)
    np.testing.assert_array_equal(a.validation.labels, b.validation.labels)


@pytest.mark.parametrize("zipped", [False, True])
def test_one_pair_of_idx_files_is_split(tmp_path: Path, zipped: bool) -> None:
    write_pair(tmp_path, "t10k", *images_and_labels(), zipped=zipped)
    dataset = load(tmp_path)
    assert [len(part.labels) for part in (dataset.train, dataset.validation, dataset.test)] == [57, 15, 18]
    assert dataset.inputs == 20


def test_two_pairs_keep_their_test_images(tmp_path: Path) -> None:
    write_pair(tmp_path, "train", *images_and_labels())
    images, labels = images_and_labels(per_class=5, seed=1)
    write_pair(tmp_path, "t10k", images, labels, zipped=True)
    dataset = load(tmp_path)
    scale = images_and_labels()[0].max()
    np.testing.assert_allclose(dataset.test.images * scale, images.reshape(15, -1), rtol=1e-6)
    np.testing.assert_array_equal(dataset.test.labels, labels)
    assert len(dataset.train.labels) == 72


def test_names_with_a_dot(tmp_path: Path) -> None:
    images, labels = images_and_labels()
    (tmp_path / "train-images.idx3-ubyte").write_bytes(idx(images))
    (tmp_path / "train-labels.idx1-ubyte").write_bytes(idx(labels))
    assert len(load(tmp_path).train.labels) == 57


@pytest.mark.parametrize("keys", [("x", "y"), ("images", "labels")])
def test_npz_with_one_pair(tmp_path: Path, keys: tuple[str, str]) -> None:
    images, labels = images_and_labels()
    np.savez(tmp_path / "some.npz", **dict(zip(keys, (images, labels.reshape(-1, 1)), strict=True)))  # type: ignore[arg-type]
    dataset = load(tmp_path / "some.npz")
    assert dataset.name == "some"
    assert len(dataset.test.labels) == 18


def test_npz_like_that_of_keras_also_in_a_folder(tmp_path: Path) -> None:
    (x_train, y_train), (x_test, y_test) = images_and_labels(), images_and_labels(per_class=4, seed=1)
    np.savez(tmp_path / "mnist.npz", x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    for path in (tmp_path, tmp_path / "mnist.npz"):
        assert len(load(path).test.labels) == 12


def test_black_images_are_not_divided_by_zero(tmp_path: Path) -> None:
    images, labels = images_and_labels()
    np.savez(tmp_path / "black.npz", x=images * 0, y=labels)
    assert not load(tmp_path / "black.npz").train.images.any()


# --- What cannot be read ----------------------------------------------------------------------------------------------


def test_a_path_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        load(tmp_path / "nowhere")
    assert_one_sentence(error, "nowhere", "No such file or directory")


def test_an_empty_folder_is_told_the_names(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        load(tmp_path)
    assert_one_sentence(error, "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte", "[.gz]", "mnist.npz")


@pytest.mark.parametrize("missing", ["t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_half_a_pair(tmp_path: Path, missing: str) -> None:
    write_pair(tmp_path, "train", *images_and_labels())
    write_pair(tmp_path, "t10k", *images_and_labels())
    (tmp_path / missing).unlink()
    with pytest.raises(InputError) as error:
        load(tmp_path)
    assert_one_sentence(error, f"without {missing}")


IDX_IMAGES = idx(images_and_labels()[0])
DAMAGED: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty": (b"", ("header takes 16 bytes", "has 0")),
    "header only in part": (IDX_IMAGES[:10], ("header takes 16 bytes", "has 10")),
    "cut short": (IDX_IMAGES[:-7], ("has 1809 bytes", "(90, 4, 5)", "takes 1816")),
    "too long": (IDX_IMAGES + b"more", ("has 1820 bytes", "takes 1816")),
    "says it is huge": (IDX_IMAGES[:4] + b"\xff" * 12, ("has 16 bytes",)),
    "labels": (idx(np.zeros(90, np.uint8)), ("magic number 2049 and not 2051",)),
    "floats": (idx(images_and_labels()[0], magic=0x0D03), ("magic number 3331 and not 2051",)),
    "text": (b"<html>not found, sorry</html>", ("magic number 1013478509 and not 2051",)),
    "gzip cut short": (gzip.compress(IDX_IMAGES)[:-20], ("damaged gzip",)),
    "gzip with other bytes": (gzip.compress(IDX_IMAGES)[:300] + b"x" * 500, ("damaged gzip",)),
    "gzip header only": (b"\x1f\x8b", ("damaged gzip",)),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_idx_file(tmp_path: Path, damage: str) -> None:
    content, parts = DAMAGED[damage]
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_idx(path, axes=3)
    assert_one_sentence(error, str(path), *parts)


def test_a_file_named_gz_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(b"Not a gzip file")
    with pytest.raises(InputError) as error:
        read_idx(path, axes=3)
    assert_one_sentence(error, "damaged gzip")


def test_a_folder_in_place_of_a_file(tmp_path: Path) -> None:
    write_pair(tmp_path, "train", *images_and_labels())
    (tmp_path / "train-images-idx3-ubyte").unlink()
    (tmp_path / "train-images-idx3-ubyte").mkdir()
    with pytest.raises(InputError) as error:
        load(tmp_path)
    assert_one_sentence(error, "train-images-idx3-ubyte cannot be read")


def npz_error(tmp_path: Path, **arrays: Any) -> pytest.ExceptionInfo[InputError]:
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(InputError) as error:
        load(tmp_path / "data.npz")
    return error


def test_npz_without_the_keys(tmp_path: Path) -> None:
    error = npz_error(tmp_path, inputs=np.zeros(3), x_train=np.zeros(3))
    assert_one_sentence(error, "inputs, x_train", "x_train/y_train/x_test/y_test or x/y or images/labels")


def test_npz_with_pickled_objects_is_not_unpickled(tmp_path: Path) -> None:
    error = npz_error(tmp_path, x=np.array([{}], dtype=object), y=np.zeros(1, int))
    assert_one_sentence(error, "not a sound .npz file")


@pytest.mark.parametrize("kind", ["text", "npy", "cut short", "empty", "member damaged"])
def test_what_is_no_npz(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "data.npz"
    images, labels = images_and_labels()
    np.savez(path, x=images, y=labels)
    content = path.read_bytes()
    if kind == "npy":
        np.save(tmp_path / "data.npy", images)
        content = (tmp_path / "data.npy").read_bytes()
    damaged = content[:300] + b"\0" * 200 + content[500:]
    path.write_bytes(
        {"text": b"hello", "cut short": content[:-40], "empty": b"", "member damaged": damaged}.get(kind, content)
    )
    with pytest.raises(InputError) as error:
        load(path)
    assert_one_sentence(error, "not a sound .npz file")


IMAGES, LABELS = images_and_labels()
REJECTED: dict[str, tuple[Any, Any, tuple[str, ...]]] = {
    "counts differ": (IMAGES, LABELS[:-1], ("90 images", "89 labels")),
    "images are a vector": (LABELS, LABELS, ("shape (N, ...)", "(90,)")),
    "images are text": (IMAGES.astype(str), LABELS, ("must be numbers",)),
    "images are complex": (IMAGES.astype(complex), LABELS, ("complex128",)),
    "labels are one-hot": (IMAGES, np.eye(CLASSES, dtype=int)[LABELS], ("shape (N,)", "(90, 3)")),
    "labels are floats": (IMAGES, LABELS + 0.5, ("integers", "float64")),
    "labels from 1": (IMAGES, LABELS + 1, ("0, 1, ...", "found 1, 2, 3")),
    "labels with a gap": (IMAGES, LABELS * 2, ("found 0, 2, 4",)),
    "labels below 0": (IMAGES, LABELS.astype(int) - 1, ("found -1, 0, 1",)),
    "labels all different": (IMAGES, np.arange(5, 95), ("found 5, 6,", "...")),
    "one class": (IMAGES, LABELS * 0, ("at least two", "found 0")),
    "a class too rare": (IMAGES, np.repeat([0, 1], [85, 5]), ("class 1 has 5 images", "needs 10")),
    "nothing": (IMAGES[:0], LABELS[:0], ("nothing",)),
    "images without pixels": (IMAGES[:, :0], LABELS, ("nothing", "(90, 0, 5)")),
    "not finite": (np.where(IMAGES == 7, np.nan, IMAGES), LABELS, ("not finite",)),
    "too large for float32": (IMAGES * 1e300, LABELS, ("not finite",)),
}  # fmt: skip


@pytest.mark.parametrize("case", REJECTED)
def test_arrays_that_cannot_be_studied(tmp_path: Path, case: str) -> None:
    images, labels, parts = REJECTED[case]
    assert_one_sentence(npz_error(tmp_path, x=images, y=labels), *parts)


@pytest.mark.parametrize(
    ("x_test", "y_test", "parts"),
    [
        (IMAGES[:, :3], LABELS, ("15 values each", "training images 20")),
        (IMAGES, LABELS + 1, ("from 1 to 3", "from 0 to 2")),
        (IMAGES, LABELS.astype(int) - 1, ("from -1 to 1",)),
    ],
)
def test_test_images_that_do_not_fit(tmp_path: Path, x_test: Any, y_test: Any, parts: tuple[str, ...]) -> None:
    assert_one_sentence(npz_error(tmp_path, x_train=IMAGES, y_train=LABELS, x_test=x_test, y_test=y_test), *parts)


def test_counts_that_differ_between_idx_files(tmp_path: Path) -> None:
    write_pair(tmp_path, "t10k", IMAGES, LABELS[:-1])
    with pytest.raises(InputError) as error:
        load(tmp_path)
    assert_one_sentence(error, "t10k", "90 images and 89 labels")


def test_chance_is_that_of_the_most_frequent_class(tmp_path: Path) -> None:
    images, labels = images_and_labels()
    np.savez(tmp_path / "d.npz", x_train=images, y_train=labels, x_test=images[:40], y_test=labels[:40])
    dataset: Dataset = load(tmp_path / "d.npz")
    assert dataset.chance == 0.75
