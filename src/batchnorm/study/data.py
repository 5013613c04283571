"""The images that the study trains on: scikit-learn's digits, or the user's own.

Every data set has three parts. A network learns from `train`, its learning rate is chosen on `validation`, and the
results are measured on `test`, which is not used for any choice.

Until the parts are created, images keep the type of their file, which avoids a second copy of large data.
"""

import gzip
import math
import zipfile
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from batchnorm.errors import InputError
from batchnorm.study.pickles import read_pickled_batch

__all__ = ["Dataset", "Part", "load", "load_digits", "read_cifar10", "read_idx"]

HELD_OUT = 0.2
"""The share of the images that a split sets aside."""

FEWEST_PER_CLASS = 10
"""With fewer images of a class than this, a split may leave it out of a part."""

FILES = {
    prefix: (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte")
    for prefix in ("train", "t10k")
}  # fmt: skip
"""MNIST's names, and Fashion-MNIST's, of images and labels; each may end in `.gz`."""

CIFAR10_TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
CIFAR10_TEST = "test_batch"
CIFAR10_ENDS = (".bin", "")
"""CIFAR-10's names, and how they end in its binary and in its Python version; each file may end in `.gz`."""

FOLDERS = (
    "cifar-10-batches-bin", "cifar-10-batches-py", "raw", "MNIST/raw", "FashionMNIST/raw", "KMNIST/raw",
)  # fmt: skip
"""The folders in which archives and torchvision store the files, below the given folder."""

CIFAR10_SHAPE = (3, 32, 32)
CIFAR10_CLASSES = 10

PICKLE = b"\x80"
"""The first byte of a pickle."""

CHANNELS = (1, 3, 4)
"""The numbers of channels that an image may have; they distinguish the channel axis from height and width."""

KEYS = (
    ("x_train", "y_train", "x_test", "y_test"),
    ("train_images", "train_labels", "test_images", "test_labels", "val_images", "val_labels"),
    ("x", "y"),
    ("images", "labels"),
)
"""The names that arrays in an `.npz` file may have: Keras', MedMNIST's, and plain ones, which are split."""

AT_ONCE = 64
"""The number of images that are converted at once."""


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
    """A data set in its three parts.

    Attributes:
        name: The name of the data set.
        train: The images to learn from.
        validation: The images on which learning rates are chosen.
        test: The images on which results are reported.
        shape: The shape of one image in a network's input: `(C, H, W)`, or `(inputs,)` if the data are not images.
            `part.images.reshape(-1, *shape)` has this form.
    """

    name: str
    train: Part
    validation: Part
    test: Part
    shape: tuple[int, ...]

    @property
    def inputs(self) -> int:
        """The number of values in an image."""
        return int(self.train.images.shape[1])

    @property
    def classes(self) -> int:
        """The number of classes."""
        return len(np.unique(self.train.labels))

    @property
    def chance(self) -> float:
        """The accuracy of always naming the most frequent class of the test images."""
        return float(np.bincount(self.test.labels).max() / len(self.test.labels))

    @cached_property
    def fingerprint(self) -> int:
        """A checksum of all data, by which a resumed study recognizes them."""
        parts = (self.train, self.validation, self.test)
        checksum = zlib.crc32(repr((self.name, self.shape, [len(part.labels) for part in parts])).encode())
        for part in parts:
            for array in part:
                checksum = zlib.crc32(np.ascontiguousarray(array).data, checksum)
        return checksum


def load(path: Path | None = None) -> Dataset:
    """The data set at `path`, or scikit-learn's digits.

    Images in an `.npz` file may be

    - `(N, H, W)`: one channel;
    - `(N, C, H, W)` or `(N, H, W, C)`, with 1, 3 or 4 channels; if both are possible, `(N, C, H, W)` is assumed;
    - `(N, ...)` of any other shape: vectors, not images.

    Args:
        path: An `.npz` file, or a folder that contains `mnist.npz`, the IDX files of MNIST or Fashion-MNIST, or
            CIFAR-10's files, binary or Python's, all or some. A file may be gzipped, whatever its name is, and the
            folder may be the root folder of torchvision. If there are only training images, or only test images, they
            are split.

    Raises:
        InputError: If there are no such data, or they are damaged or inconsistent.
    """
    if path is None:
        return load_digits()
    try:
        path.stat()
        return _from_folder(path) if path.is_dir() else _from_npz(path)
    except OSError as error:
        where, why = error.filename or path, error.strerror or error
        raise InputError(
            f"{where} cannot be read ({why}); name a folder with MNIST's or CIFAR-10's files, or an .npz file."
        ) from error


def load_digits() -> Dataset:
    """scikit-learn's digits: 1,797 images of 8 x 8 pixels, ten classes."""
    import sklearn.datasets  # type: ignore[import-untyped]

    digits: Any = sklearn.datasets.load_digits()
    return _in_parts("scikit-learn digits", _checked(digits.images, digits.target, "scikit-learn's digits"), None)


# --- IDX files --------------------------------------------------------------------------------------------------------


def read_idx(path: Path, axes: int) -> NDArray[np.uint8]:
    """The array in an IDX file of unsigned bytes, gzipped or not, whatever its name is.

    The file begins with big-endian 32-bit integers: the magic number `0x0800 + axes`, then the length of every axis.

    Args:
        path: The file.
        axes: The number of axes that the array must have: 3 for images, 1 for labels.

    Raises:
        InputError: If the file is damaged, of another kind, or of another length than its header says.

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
            f"{axes} {'axis' if axes == 1 else 'axes'}; check that images and labels are not swapped."
        )
    expected = len(header) + int(np.prod(shape, dtype=object))
    if len(content) != expected:
        raise InputError(f"{path} has {len(content)} bytes where shape {tuple(shape)} takes {expected}; copy it again.")
    return np.frombuffer(content, dtype=np.uint8, offset=len(header)).reshape(shape)


def _content(path: Path) -> bytes:
    """The uncompressed content of a file. No file of images or labels begins with the first bytes of gzip."""
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (EOFError, RuntimeError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path} is a damaged gzip file ({error}); copy it again.") from error


def _idx_pair(folder: Path, prefix: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]] | None:
    images, labels = (_find(folder, name) for name in FILES[prefix])
    if images is None and labels is None:
        return None
    if images is None or labels is None:
        found, missing = (images, FILES[prefix][1]) if images else (labels, FILES[prefix][0])
        raise InputError(f"{found} is there without {missing}[.gz]; put both into {folder}.")
    return read_idx(images, axes=3), read_idx(labels, axes=1)


# --- CIFAR-10's files -------------------------------------------------------------------------------------------------


def read_cifar10(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The images, `(N, 3, 32, 32)`, and the labels in one of CIFAR-10's files, gzipped or not.

    In the binary version an image takes 3,073 bytes: its label, then its red, its green and its blue plane, each row by
    row. The Python version is a pickle, which begins with a byte that is no label.

    Args:
        path: The file.

    Raises:
        InputError: If the file is damaged or of another kind.

    Source: Krizhevsky, "The CIFAR-10 dataset", the sections on the binary and the Python version.
    """
    content = _content(path)
    record = 1 + math.prod(CIFAR10_SHAPE)
    if content[:1] == PICKLE:
        try:
            images, labels = read_pickled_batch(content)
            images = images.reshape(-1, *CIFAR10_SHAPE)
        except ValueError as error:
            raise InputError(
                f"{path} is damaged or no file of CIFAR-10's Python version ({error}); copy it again."
            ) from error
    else:
        if not content or len(content) % record:
            raise InputError(
                f"{path} has {len(content)} bytes, which is not a whole number of images of {record} bytes; copy it "
                "again."
            )
        records = np.frombuffer(content, dtype=np.uint8).reshape(-1, record)
        images, labels = records[:, 1:].reshape(-1, *CIFAR10_SHAPE), records[:, 0]
    if labels.max() >= CIFAR10_CLASSES:
        first = int((labels >= CIFAR10_CLASSES).argmax())
        raise InputError(
            f"{path} has the label {labels[first]} at image {first} where CIFAR-10 has labels from 0 to "
            f"{CIFAR10_CLASSES - 1}, so it is damaged or no file of CIFAR-10; copy it again."
        )
    return images, labels


def _from_cifar10(folder: Path) -> Dataset | None:
    train = [path for name in CIFAR10_TRAIN if (path := _find(folder, name, CIFAR10_ENDS))]
    test = _find(folder, CIFAR10_TEST, CIFAR10_ENDS)
    if not train and test is None:
        return None
    parts = []
    for paths in filter(None, (train, [test] if test else [])):
        images, labels = zip(*map(read_cifar10, paths), strict=True)
        where = f"{folder}, {' and '.join(path.name for path in paths)}"
        parts.append(_checked(np.concatenate(images), np.concatenate(labels), where))
    return _in_parts(_name(folder), *parts)


# --- .npz files -------------------------------------------------------------------------------------------------------


def _from_npz(path: Path) -> Dataset:
    arrays = _arrays(path)
    parts = [
        _checked(arrays[images], arrays[labels], f"{path}, {images} and {labels}")
        for images, labels in zip(list(arrays)[::2], list(arrays)[1::2], strict=True)
    ]
    return _in_parts(path.stem, *parts)


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of the first of `KEYS` that an `.npz` file contains, in that order, without unpickling."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            for keys in KEYS:
                given = [key for key in keys if key in archive.files]
                if given == list(keys) or (len(keys) == 6 and given == list(keys[:4])):  # validation is not needed
                    return {key: archive[key] for key in given}
            found = ", ".join(archive.files) or "(none)"
    except (EOFError, RuntimeError, ValueError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(
            f"{path} is not a valid .npz file of plain arrays; save it with numpy.savez, or name the folder of MNIST's "
            "or CIFAR-10's files."
        ) from error
    wanted = " or ".join("/".join(keys) for keys in KEYS)
    raise InputError(f"{path} contains the arrays {found}; it needs {wanted}.")


# --- Folders ----------------------------------------------------------------------------------------------------------


def _find(folder: Path, name: str, ends: tuple[str, ...] = ("",)) -> Path | None:
    """The file `name`, possibly gzipped, with a dot before its type, or in a folder of the same name.

    Some copies of MNIST have the dot, and unpacking some archives creates a folder for each file.
    """
    for end in ends:
        for spelling in (f"{name}{end}", f"{name}{end}".replace("-idx", ".idx")):
            for path in (folder / spelling, folder / f"{spelling}.gz"):
                if path.is_file():
                    return path
                if path.is_dir() and (inside := _find(path, name, ends)):
                    return inside
    return None


def _from_folder(folder: Path) -> Dataset:
    dataset = _in_place(folder)
    if dataset is not None:
        return dataset
    below = [each for each in (_in_place(folder / place) for place in FOLDERS if (folder / place).is_dir()) if each]
    if len(below) == 1:
        return below[0]
    if below:
        raise InputError(
            f"{folder} contains {' and '.join(each.name for each in below)}; name the folder of one of them."
        )
    names = [name for names in FILES.values() for name in names]
    names += [f"{name}{end}" for end in CIFAR10_ENDS for name in (*CIFAR10_TRAIN, CIFAR10_TEST)]
    raise InputError(
        f"{folder} contains no images; it should contain {', '.join(f'{name}[.gz]' for name in names)} or mnist.npz, "
        f"the files also in {', '.join(FOLDERS)}."
    )


def _in_place(folder: Path) -> Dataset | None:
    """The images in a folder itself."""
    pairs = [(prefix, pair) for prefix in FILES if (pair := _idx_pair(folder, prefix))]
    if pairs:
        return _in_parts(_name(folder), *(_checked(*pair, f"{folder}, {prefix} files") for prefix, pair in pairs))
    if (folder / "mnist.npz").is_file():
        return _from_npz(folder / "mnist.npz")
    return _from_cifar10(folder)


def _name(folder: Path) -> str:
    """The name of the data in a folder."""
    path = folder.resolve()
    return path.parent.name if path.name == "raw" else path.name


# --- Checks and parts -------------------------------------------------------------------------------------------------


class _Images(NamedTuple):
    """Images as `(N, *shape)`, of any type of numbers, and labels as `(N,)`."""

    images: NDArray[Any]
    labels: NDArray[np.int64]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.images.shape[1:]


def _checked(images: NDArray[Any], labels: NDArray[Any], where: str) -> _Images:
    """Check images and labels; `where` begins the error message."""
    if images.ndim < 2 or images.dtype.kind not in "buif":
        raise InputError(f"{where}: images must be numbers of shape (N, ...), got {images.dtype} {images.shape}.")
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    whole = labels.dtype.kind in "bui" or (labels.dtype.kind == "f" and (labels == np.round(labels)).all())
    if labels.ndim != 1 or not whole:
        raise InputError(f"{where}: labels must be integers of shape (N,), got {labels.dtype} {labels.shape}.")
    if len(images) != len(labels):
        raise InputError(f"{where}: {len(images)} images and {len(labels)} labels; their numbers must be equal.")
    if images.size == 0:
        raise InputError(f"{where}: images of shape {images.shape} are empty.")
    with np.errstate(over="ignore", invalid="ignore"):
        if not np.isfinite([np.float32(images.min()), np.float32(images.max())]).all():
            count = np.count_nonzero(~np.isfinite(images.astype(np.float32)))
            raise InputError(f"{where}: {count} values in the images are not finite.")
    return _Images(_channels_first(images), labels.astype(np.int64))


def _channels_first(images: NDArray[Any]) -> NDArray[Any]:
    """Images as `(N, C, H, W)`, where they are images, or as `(N, inputs)`; a view."""
    if images.ndim == 3:
        return images[:, np.newaxis]
    if images.ndim == 4 and images.shape[1] in CHANNELS:
        return images
    if images.ndim == 4 and images.shape[3] in CHANNELS:
        return np.moveaxis(images, 3, 1)
    return images.reshape(len(images), -1)


def _in_parts(name: str, train: _Images, test: _Images | None = None, validation: _Images | None = None) -> Dataset:
    """Split the data if necessary, and divide them by the largest magnitude in the training images."""
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
    kept = np.arange(len(train.labels))
    if test is not None:
        _check_fits(name, "test", train, test)
        reported = _part(test, np.arange(len(test.labels)))
    else:
        kept, held_out = _split(kept, train.labels)
        reported = _part(train, held_out)
    if validation is not None:
        _check_fits(name, "validation", train, validation)
        learned, chosen_on = _part(train, kept), _part(validation, np.arange(len(validation.labels)))
    else:
        learned, chosen_on = (_part(train, rows) for rows in _split(kept, train.labels))
    scale = max(learned.images.max(), -learned.images.min()) or np.float32(1)
    for part in (learned, chosen_on, reported):
        np.divide(part.images, scale, out=part.images)
    return Dataset(name, learned, chosen_on, reported, train.shape)


def _check_fits(name: str, part: str, train: _Images, other: _Images) -> None:
    if other.shape != train.shape:
        raise InputError(
            f"{name}: {part} images are of shape {other.shape} and training images of shape {train.shape}."
        )
    if other.labels.min() < 0 or other.labels.max() > train.labels.max():
        raise InputError(
            f"{name}: {part} labels go from {other.labels.min()} to {other.labels.max()}, "
            f"training labels from 0 to {train.labels.max()}."
        )


def _split(rows: NDArray[np.intp], labels: NDArray[np.int64]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Set a share of the rows aside, the same in every run, with every class in proportion."""
    from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]

    parts: Any = train_test_split(rows, test_size=HELD_OUT, stratify=labels[rows], random_state=0)
    return parts[0], parts[1]


def _part(source: _Images, rows: NDArray[np.intp]) -> Part:
    """The images in these rows, as `(N, inputs)` and float32, not scaled yet."""
    images = np.empty((len(rows), *source.shape), np.float32)
    for start in range(0, len(rows), AT_ONCE):
        images[start : start + AT_ONCE] = source.images[rows[start : start + AT_ONCE]]
    return Part(images.reshape(len(rows), -1), source.labels[rows])
