"""The images that the study trains on: scikit-learn's digits, or a folder of the user's own.

Every data set comes in three parts. A network learns from `train`, its learning rate is chosen on `validation`, and
what the study reports is measured on `test`, which chooses nothing.
"""

import gzip
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from batchnorm.errors import InputError

__all__ = ["Dataset", "Part", "load", "load_digits", "read_idx"]

HELD_OUT = 0.2
"""The share that a split sets aside."""

FEWEST_PER_CLASS = 10
"""With fewer images of a class than this, a split may leave it out of a part."""

FILES = {
    prefix: (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte")
    for prefix in ("train", "t10k")
}  # fmt: skip
"""MNIST's names, images and labels; each may end in `.gz`."""

KEYS = (("x_train", "y_train", "x_test", "y_test"), ("x", "y"), ("images", "labels"))
"""The names that arrays in an `.npz` file may have."""


class Part(NamedTuple):
    """Some of the images.

    Attributes:
        images: `(N, inputs)`, float32; the largest magnitude in the training images is 1.
        labels: `(N,)`, int64, from 0 to the number of classes less one.
    """

    images: NDArray[np.float32]
    labels: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in its three parts."""

    name: str
    train: Part
    validation: Part
    test: Part

    @property
    def inputs(self) -> int:
        """How many numbers an image has."""
        return int(self.train.images.shape[1])

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return len(np.unique(self.train.labels))

    @property
    def chance(self) -> float:
        """The accuracy of always naming the most frequent class of the test images."""
        return float(np.bincount(self.test.labels).max() / len(self.test.labels))


def load(path: Path | None = None) -> Dataset:
    """The data set at `path`, or scikit-learn's digits.

    Args:
        path: An `.npz` file, or a folder with one named `mnist.npz` or with MNIST's IDX files, gzipped or not.

    Raises:
        InputError: If there is no such data, or it is damaged or inconsistent.
    """
    if path is None:
        return load_digits()
    try:
        path.stat()
        return _from_folder(path) if path.is_dir() else _from_npz(path)
    except OSError as error:
        where, why = error.filename or path, error.strerror or error
        raise InputError(
            f"{where} cannot be read ({why}); name a folder with MNIST's files or an .npz file."
        ) from error


def load_digits() -> Dataset:
    """scikit-learn's digits: 1,797 images of 8 x 8 pixels, ten classes."""
    import sklearn.datasets  # type: ignore[import-untyped]

    digits: Any = sklearn.datasets.load_digits()
    return _in_parts("scikit-learn digits", _checked(digits.data, digits.target, "scikit-learn's digits"), None)


# --- IDX files --------------------------------------------------------------------------------------------------------


def read_idx(path: Path, axes: int) -> NDArray[np.uint8]:
    """The array in an IDX file of unsigned bytes, gzipped or not.

    The file begins with big-endian 32-bit integers: the magic number `0x0800 + axes`, then the length of every axis.

    Args:
        path: The file.
        axes: How many axes the array must have: 3 for images, 1 for labels.

    Raises:
        InputError: If the file is damaged, of another kind, or not as long as it says.

    Source: LeCun, Cortes & Burges, "The MNIST database of handwritten digits", the section on file formats.
    """
    content = _content(path)
    header = np.frombuffer(content[: 4 * (1 + axes)], dtype=np.uint8)
    if len(header) < 4 * (1 + axes):
        raise InputError(
            f"{path} is cut short: its header takes {4 * (1 + axes)} bytes, and it has {len(content)}; copy it again."
        )
    magic, *shape = (int(number) for number in header.view(">u4"))
    if magic != 0x0800 + axes:
        raise InputError(
            f"{path} has the magic number {magic} and not {0x0800 + axes}, so it is no IDX file of unsigned bytes with "
            f"{axes} {'axis' if axes == 1 else 'axes'}; see that images and labels are not exchanged."
        )
    expected = len(header) + int(np.prod(shape, dtype=object))
    if len(content) != expected:
        raise InputError(f"{path} has {len(content)} bytes where shape {tuple(shape)} takes {expected}; copy it again.")
    return np.frombuffer(content, dtype=np.uint8, offset=len(header)).reshape(shape)


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content[:2] == b"\x1f\x8b" or path.suffix == ".gz" else content
    except (EOFError, RuntimeError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path} is a damaged gzip file ({error}); copy it again.") from error


def _find(folder: Path, name: str) -> Path | None:
    """The file `name`, also gzipped, also with a dot before its type, as some copies of MNIST have it."""
    for spelling in (name, name.replace("-idx", ".idx")):
        for path in (folder / spelling, folder / f"{spelling}.gz"):
            if path.exists():
                return path
    return None


def _idx_pair(folder: Path, prefix: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]] | None:
    images, labels = (_find(folder, name) for name in FILES[prefix])
    if images is None and labels is None:
        return None
    if images is None or labels is None:
        found, missing = (images, FILES[prefix][1]) if images else (labels, FILES[prefix][0])
        raise InputError(f"{found} is there without {missing}[.gz]; put both into {folder}.")
    return read_idx(images, axes=3), read_idx(labels, axes=1)


def _from_folder(folder: Path) -> Dataset:
    pairs = [(prefix, pair) for prefix in FILES if (pair := _idx_pair(folder, prefix))]
    if pairs:
        parts = [_checked(*pair, f"{folder}, {prefix} files") for prefix, pair in pairs]
        return _in_parts(folder.resolve().name, parts[0], parts[1] if len(parts) == 2 else None)
    if (folder / "mnist.npz").is_file():
        return _from_npz(folder / "mnist.npz")
    names = ", ".join(f"{name}[.gz]" for names in FILES.values() for name in names)
    raise InputError(f"{folder} holds no images; looked for {names} and mnist.npz.")


# --- .npz files -------------------------------------------------------------------------------------------------------


def _from_npz(path: Path) -> Dataset:
    arrays = _arrays(path)
    keys = next((keys for keys in KEYS if all(key in arrays for key in keys)), None)
    if keys is None:
        wanted = " or ".join("/".join(keys) for keys in KEYS)
        raise InputError(f"{path} holds the arrays {', '.join(arrays) or '(none)'}; it needs {wanted}.")
    parts = [
        _checked(arrays[images], arrays[labels], f"{path}, {images} and {labels}")
        for images, labels in zip(keys[::2], keys[1::2], strict=True)
    ]
    return _in_parts(path.stem, parts[0], parts[1] if len(parts) == 2 else None)


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    """All that an `.npz` file holds; never unpickles."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except (EOFError, RuntimeError, ValueError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path} is not a sound .npz file of plain arrays; save it with numpy.savez.") from error


# --- Checks and parts -------------------------------------------------------------------------------------------------


def _checked(images: NDArray[Any], labels: NDArray[Any], where: str) -> Part:
    """Images as `(N, inputs)` and labels as `(N,)`; `where` begins the sentence that says why they are not."""
    if images.ndim < 2 or images.dtype.kind not in "buif":
        raise InputError(f"{where}: images must be numbers of shape (N, ...), got {images.dtype} {images.shape}.")
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.ndim != 1 or labels.dtype.kind not in "ui":
        raise InputError(f"{where}: labels must be integers of shape (N,), got {labels.dtype} {labels.shape}.")
    if len(images) != len(labels):
        raise InputError(f"{where}: {len(images)} images and {len(labels)} labels; there must be as many of each.")
    if images.size == 0:
        raise InputError(f"{where}: there is nothing in images of shape {images.shape}.")
    with np.errstate(over="ignore"):
        flat = images.reshape(len(images), -1).astype(np.float32)
    if not np.isfinite(flat).all():
        raise InputError(f"{where}: {np.count_nonzero(~np.isfinite(flat))} values in the images are not finite.")
    return Part(flat, labels.astype(np.int64))


def _in_parts(name: str, train: Part, test: Part | None) -> Dataset:
    """Split what is not split yet, and scale by the largest magnitude in the training images."""
    classes = np.unique(train.labels)
    if len(classes) < 2 or not np.array_equal(classes, np.arange(len(classes))):
        found = ", ".join(map(str, classes[:12])) + (", ..." if len(classes) > 12 else "")
        raise InputError(f"{name}: labels must be 0, 1, ..., with no class left out and at least two, found {found}.")
    rarest = int(np.bincount(train.labels).argmin())
    fewest = int(np.count_nonzero(train.labels == rarest))
    if fewest < FEWEST_PER_CLASS:
        raise InputError(
            f"{name}: class {rarest} has {fewest} images to train on; every class needs {FEWEST_PER_CLASS}."
        )
    if test is not None:
        _check_test(name, train, test)
    else:
        train, test = _split(train)
    train, validation = _split(train)
    scale = np.abs(train.images).max() or np.float32(1)
    parts = (Part(part.images / scale, part.labels) for part in (train, validation, test))
    return Dataset(name, *parts)


def _check_test(name: str, train: Part, test: Part) -> None:
    if test.images.shape[1] != train.images.shape[1]:
        raise InputError(
            f"{name}: test images have {test.images.shape[1]} values each and training images {train.images.shape[1]}."
        )
    if test.labels.min() < 0 or test.labels.max() > train.labels.max():
        raise InputError(
            f"{name}: test labels go from {test.labels.min()} to {test.labels.max()}, "
            f"training labels from 0 to {train.labels.max()}."
        )


def _split(part: Part) -> tuple[Part, Part]:
    """Set a share aside, the same in every run, with every class in proportion."""
    from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]

    kept, held_out = train_test_split(
        np.arange(len(part.labels)), test_size=HELD_OUT, stratify=part.labels, random_state=0
    )
    return Part(part.images[kept], part.labels[kept]), Part(part.images[held_out], part.labels[held_out])
