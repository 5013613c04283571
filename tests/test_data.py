"""The images of the study: what is read, how it is split, and what is said of data that cannot be used."""

import gzip
import itertools
import math
import pickle
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sklearn")

from batchnorm.errors import InputError
from batchnorm.study.data import Dataset, Part, load, load_digits, read_cifar10, read_idx

CLASSES, PER_CLASS = 3, 30


def images_and_labels(per_class: int = PER_CLASS, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(CLASSES, dtype=np.uint8), per_class)
    return generator.integers(0, 256, (len(labels), 4, 5), dtype=np.uint8), labels


IMAGES, LABELS = images_and_labels()


def idx(array: np.ndarray, magic: int | None = None) -> bytes:
    header = struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim if magic is None else magic, *array.shape)
    return header + array.tobytes()


def write_pair(folder: Path, prefix: str, images: np.ndarray, labels: np.ndarray, zipped: bool = False) -> None:
    for name, array in ((f"{prefix}-images-idx3-ubyte", images), (f"{prefix}-labels-idx1-ubyte", labels)):
        path = folder / (f"{name}.gz" if zipped else name)
        path.write_bytes(gzip.compress(idx(array)) if zipped else idx(array))


def cifar10_file(labels: np.ndarray, seed: int = 0) -> tuple[bytes, np.ndarray]:
    """A file written byte by byte as the format's description has it, and its images as `(N, 3, 32, 32)`."""
    generator = np.random.default_rng(seed)
    red, green, blue = generator.integers(0, [[80], [160], [256]], (len(labels), 3, 1024)).swapaxes(0, 1)
    content = b"".join(
        bytes([label, *r, *g, *b]) for label, r, g, b in zip(labels.tolist(), red, green, blue, strict=True)
    )
    return content, np.stack([red, green, blue], axis=1).reshape(-1, 3, 32, 32)


def write_cifar10(folder: Path, *names: str) -> dict[str, np.ndarray]:
    """Files of 30 images each, in three classes; the images of each."""
    images = {}
    for seed, name in enumerate(names):
        content, images[name] = cifar10_file(LABELS[:: PER_CLASS // 10], seed)
        (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return images


def sizes(dataset: Dataset) -> list[int]:
    return [len(part.labels) for part in (dataset.train, dataset.validation, dataset.test)]


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
    assert (digits.inputs, digits.classes, digits.shape) == (64, 10, (1, 8, 8))
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
    assert (dataset.inputs, dataset.shape) == (20, (1, 4, 5))


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


def test_fashion_mnist_has_the_files_of_mnist(tmp_path: Path) -> None:
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    labels = np.repeat(np.arange(10, dtype=np.uint8), 12)
    images = np.random.default_rng(0).integers(0, 256, (120, 28, 28), dtype=np.uint8)
    for prefix in ("train", "t10k"):
        write_pair(folder, prefix, images, labels, zipped=True)
    dataset = load(folder)
    assert (dataset.name, dataset.shape, dataset.classes) == ("fashion-mnist", (1, 28, 28), 10)
    np.testing.assert_allclose(dataset.test.images * images.max(), images.reshape(120, 784), rtol=1e-6)


@pytest.mark.parametrize("zipped", [False, True])
def test_the_content_tells_what_is_gzipped_not_the_name(tmp_path: Path, zipped: bool) -> None:
    for name, array in (("train-images-idx3-ubyte", IMAGES), ("train-labels-idx1-ubyte", LABELS)):
        path = tmp_path / (name if zipped else f"{name}.gz")
        path.write_bytes(gzip.compress(idx(array)) if zipped else idx(array))
    assert sizes(load(tmp_path)) == [57, 15, 18]


@pytest.mark.parametrize("dot", [False, True])
def test_files_in_folders_of_their_own_names(tmp_path: Path, dot: bool) -> None:
    for name, array in (("train-images-idx3-ubyte", IMAGES), ("train-labels-idx1-ubyte", LABELS)):
        (tmp_path / name).mkdir()
        (tmp_path / name / (name.replace("-idx", ".idx") if dot else name)).write_bytes(idx(array))
    assert sizes(load(tmp_path)) == [57, 15, 18]


@pytest.mark.parametrize("given", ["", "MNIST", "MNIST/raw"])
def test_the_folders_of_torchvision(tmp_path: Path, given: str) -> None:
    (tmp_path / "MNIST/raw").mkdir(parents=True)
    write_pair(tmp_path / "MNIST/raw", "train", IMAGES, LABELS)
    write_pair(tmp_path / "MNIST/raw", "train", IMAGES, LABELS, zipped=True)  # as torchvision leaves it
    dataset = load(tmp_path / given)
    assert (dataset.name, sizes(dataset)) == ("MNIST", [57, 15, 18])


def test_several_data_sets_below_one_folder(tmp_path: Path) -> None:
    for place in ("MNIST/raw", "FashionMNIST/raw"):
        (tmp_path / place).mkdir(parents=True)
        write_pair(tmp_path / place, "train", IMAGES, LABELS)
    with pytest.raises(InputError) as error:
        load(tmp_path)
    assert_one_sentence(error, "contains MNIST and FashionMNIST; name the folder of one of them")


@pytest.mark.parametrize("validation", [False, True])
def test_npz_like_that_of_medmnist(tmp_path: Path, validation: bool) -> None:
    parts = {"train": (IMAGES, LABELS), "test": images_and_labels(4, 1), "val": images_and_labels(6, 2)}
    arrays = {f"{name}_images": images for name, (images, _) in parts.items()}
    arrays |= {f"{name}_labels": labels[:, None] for name, (_, labels) in parts.items()}
    kept = {name: array for name, array in arrays.items() if validation or not name.startswith("val")}
    np.savez(tmp_path / "pneumonia.npz", **kept)  # type: ignore[arg-type]
    dataset = load(tmp_path / "pneumonia.npz")
    assert sizes(dataset) == ([90, 18, 12] if validation else [72, 18, 12])
    for part, name in ((dataset.test, "test"), (dataset.validation, "val")):
        if name != "val" or validation:
            expected = parts[name][0].reshape(-1, 20) / np.float32(IMAGES.max())
            np.testing.assert_allclose(part.images, expected, rtol=1e-6)
            np.testing.assert_array_equal(part.labels, parts[name][1])


def test_labels_may_be_whole_numbers_stored_as_floats(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x_train=IMAGES, y_train=LABELS.astype(float), x_test=IMAGES, y_test=LABELS)
    dataset = load(tmp_path / "d.npz")
    assert dataset.train.labels.dtype == np.int64
    assert dataset.classes == CLASSES


# --- CIFAR-10 ---------------------------------------------------------------------------------------------------------

BATCHES = [f"data_batch_{number}.bin" for number in range(1, 6)]


def test_cifar10_with_all_its_files(tmp_path: Path) -> None:
    images = write_cifar10(tmp_path, *BATCHES, "test_batch.bin")
    dataset = load(tmp_path)
    assert (dataset.shape, dataset.inputs, sizes(dataset)) == ((3, 32, 32), 3072, [120, 30, 30])
    scale = max(images[name].max() for name in BATCHES)
    expected = images["test_batch.bin"] / np.float32(scale)
    np.testing.assert_allclose(dataset.test.images.reshape(-1, *dataset.shape), expected, rtol=1e-6)
    np.testing.assert_array_equal(dataset.test.labels, LABELS[::3])
    read = np.concatenate([dataset.train.images, dataset.validation.images]) * scale
    written = np.concatenate([images[name].reshape(-1, 3072) for name in BATCHES])
    assert sorted(map(bytes, read.round().astype(np.uint8))) == sorted(map(bytes, written.astype(np.uint8)))


def test_cifar10_in_any_order_of_planes_but_its_own_is_noticed(tmp_path: Path) -> None:
    content, images = cifar10_file(LABELS)
    (tmp_path / "test_batch.bin").write_bytes(content)
    read = read_cifar10(tmp_path / "test_batch.bin")[0]
    np.testing.assert_array_equal(read, images)
    assert read[:, 0].max() < 80 <= read[:, 1].max() < 160 <= read[:, 2].max()
    for order in itertools.permutations(range(3)):
        assert np.array_equal(read[:, order], images) == (order == (0, 1, 2))
    pixels_interleaved = read.reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2)
    assert not np.array_equal(pixels_interleaved, images)
    assert not np.array_equal(read.swapaxes(2, 3), images)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["data_batch_4.bin"], [19, 5, 6]),
        (["data_batch_2.bin.gz", "data_batch_5.bin"], [38, 10, 12]),
        (["test_batch.bin"], [19, 5, 6]),
        (["data_batch_3.bin", "test_batch.bin.gz"], [24, 6, 30]),
    ],
)
@pytest.mark.parametrize("below", [False, True])
def test_some_of_the_files_of_cifar10(tmp_path: Path, names: list[str], expected: list[int], below: bool) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    write_cifar10(folder, *names)
    dataset = load(tmp_path if below else folder)
    assert (dataset.name, dataset.shape, sizes(dataset)) == ("cifar-10-batches-bin", (3, 32, 32), expected)


CIFAR10 = cifar10_file(LABELS)[0]
CIFAR10_DAMAGED: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty": (b"", ("has 0 bytes", "images of 3073 bytes")),
    "cut short": (CIFAR10[:-1], ("has 276569 bytes",)),
    "too long": (CIFAR10 + b"more", ("has 276574 bytes",)),
    "another label": (CIFAR10[: 3073 * 7] + b"\x0a" + CIFAR10[3073 * 7 + 1 :], ("the label 10 at image 7",)),
    "of CIFAR-100": (b"\x01\x63" + b"\0" * 3072, ("has 3074 bytes",)),
    "gzip cut short": (gzip.compress(CIFAR10)[:-20], ("damaged gzip",)),
}


@pytest.mark.parametrize("damage", CIFAR10_DAMAGED)
def test_a_damaged_file_of_cifar10(tmp_path: Path, damage: str) -> None:
    content, parts = CIFAR10_DAMAGED[damage]
    write_cifar10(tmp_path, "data_batch_1.bin")
    (tmp_path / "data_batch_2.bin").write_bytes(content)
    with pytest.raises(InputError) as error:
        load(tmp_path)
    assert_one_sentence(error, str(tmp_path / "data_batch_2.bin"), "copy it again", *parts)


def python2_pickle(images: np.ndarray, labels: np.ndarray) -> bytes:
    """The pickle of `{"data": images, "labels": labels}` as Python 2 and NumPy 1 wrote CIFAR-10's, byte by byte."""

    def short(text: bytes) -> bytes:
        return b"U" + bytes([len(text)]) + text

    def small(number: int) -> bytes:
        return b"K" + bytes([number])

    dtype = b"cnumpy\ndtype\n(" + short(b"u1") + small(0) + small(1) + b"tR(" + small(3) + short(b"|") + b"NNN"
    dtype += b"J\xff\xff\xff\xff" * 2 + small(0) + b"tb"
    shape = b"".join(b"J" + struct.pack("<i", size) for size in images.shape)
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + small(0) + b"\x85" + short(b"b") + b"tR("
    array += small(1) + b"(" + shape + b"t" + dtype + b"\x89T" + struct.pack("<i", images.size) + images.tobytes()
    array += b"tb"
    listed = b"](" + b"".join(map(small, labels.tolist())) + b"e"
    return b"\x80\x02}(" + short(b"data") + array + short(b"labels") + listed + b"u."


def python3_pickle(images: np.ndarray, labels: np.ndarray) -> bytes:
    return pickle.dumps({"data": images, "labels": labels.tolist(), "batch_label": "training batch 1 of 5"}, protocol=4)


@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize("written", [python2_pickle, python3_pickle])
def test_the_python_version_of_cifar10(tmp_path: Path, written: Any, below: bool) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    _, images = cifar10_file(LABELS)
    content = written(images.astype(np.uint8).reshape(90, 3072), LABELS)
    (folder / "data_batch_1").write_bytes(content)
    (folder / "test_batch").write_bytes(gzip.compress(content))
    dataset = load(tmp_path if below else folder)
    assert (dataset.name, dataset.shape, sizes(dataset)) == ("cifar-10-batches-py", (3, 32, 32), [72, 18, 90])
    np.testing.assert_allclose(dataset.test.images * images.max(), images.reshape(90, 3072), rtol=1e-6)
    np.testing.assert_array_equal(dataset.test.labels, LABELS)


class Touch:
    """Its pickle makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda path: Touch(path), "it asks for pathlib"),
        (lambda path: {"data": Touch(path), "labels": []}, "it asks for pathlib"),
        (lambda path: [1], "it holds a list and not a dictionary"),
        (lambda path: {"labels": [1]}, "its data are not a matrix of bytes"),
        (lambda path: {"data": np.zeros((2, 3072)), "labels": [1, 2]}, "its data are not a matrix of bytes"),
        (lambda path: {"data": np.zeros((2, 3072), np.uint8), "labels": [1.5, 2]}, "its labels are not a list of"),
        (lambda path: {"data": np.zeros((2, 3072), np.uint8), "fine_labels": [1, 2]}, "its labels are not a list of"),
        (lambda path: {"data": np.zeros((2, 3072), np.uint8), "labels": [1]}, "it has 2 images and 1 labels"),
        (lambda path: {"data": np.zeros((2, 3000), np.uint8), "labels": [1, 2]}, "cannot reshape"),
    ],
)
def test_a_pickle_runs_nothing_and_is_checked(tmp_path: Path, content: Any, said: str) -> None:
    made = tmp_path / "made"
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(content(made), protocol=4))
    with pytest.raises(InputError) as error:
        load(tmp_path)
    assert_one_sentence(error, str(tmp_path / "data_batch_1"), said, "copy it again")
    assert not made.exists()


def test_a_pickle_cut_short(tmp_path: Path) -> None:
    images = np.zeros((90, 3072), np.uint8)
    (tmp_path / "data_batch_1").write_bytes(python2_pickle(images, LABELS)[:-2000])
    with pytest.raises(InputError) as error:
        load(tmp_path)
    assert_one_sentence(error, "data_batch_1 is damaged or no file of CIFAR-10's Python version")


# --- Shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "shape", "channels"),
    [
        ((20,), (20,), None),
        ((4, 5), (1, 4, 5), None),
        ((6, 5, 1), (1, 6, 5), "last"),
        ((6, 5, 3), (3, 6, 5), "last"),
        ((6, 5, 4), (4, 6, 5), "last"),
        ((1, 6, 5), (1, 6, 5), "first"),
        ((3, 6, 5), (3, 6, 5), "first"),
        ((4, 6, 5), (4, 6, 5), "first"),
        ((3, 6, 4), (3, 6, 4), "first"),
        ((2, 6, 5), (60,), None),
        ((6, 5, 2), (60,), None),
        ((3, 2, 6, 5), (180,), None),
    ],
)
@pytest.mark.parametrize("order", ["C", "F"])
def test_shapes_of_arrays(
    tmp_path: Path, stored: tuple[int, ...], shape: tuple[int, ...], channels: str | None, order: str
) -> None:
    images = np.arange(90 * math.prod(stored)).reshape(90, *stored)
    laid_out = np.asarray(images, order=order)  # type: ignore[call-overload]
    np.savez(tmp_path / "d.npz", x_train=laid_out, y_train=LABELS, x_test=laid_out, y_test=LABELS)
    dataset = load(tmp_path / "d.npz")
    assert dataset.shape == shape
    assert dataset.test.images.shape == (90, math.prod(shape))
    assert all(part.images.flags.c_contiguous for part in (dataset.train, dataset.validation, dataset.test))
    scale = dataset.test.images.max() / images.max()
    read = dataset.test.images.reshape(-1, *shape) / scale
    expected = images.transpose(0, 3, 1, 2) if channels == "last" else images.reshape(90, *shape)
    np.testing.assert_allclose(read, expected, rtol=1e-5)


def test_the_same_images_in_both_orders_and_as_cifar10_are_the_same(tmp_path: Path) -> None:
    write_cifar10(tmp_path, "data_batch_1.bin", "test_batch.bin")
    pairs = [read_cifar10(tmp_path / name) for name in ("data_batch_1.bin", "test_batch.bin")]
    expected = load(tmp_path)
    for axes, same in (((0, 1, 2, 3), True), ((0, 2, 3, 1), True), ((0, 3, 2, 1), False)):
        (x_train, y_train), (x_test, y_test) = [(images.transpose(axes), labels) for images, labels in pairs]
        np.savez(tmp_path / "d.npz", x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
        dataset = load(tmp_path / "d.npz")
        assert dataset.shape == (3, 32, 32)
        assert np.array_equal(dataset.train.images, expected.train.images) == same
        assert np.array_equal(dataset.test.images, expected.test.images) == same


# --- What tells data apart, and what they cost ------------------------------------------------------------------------


def test_the_fingerprint_is_that_of_the_data(tmp_path: Path) -> None:
    write_pair(tmp_path, "train", IMAGES, LABELS)
    dataset = load(tmp_path)
    assert dataset.fingerprint == load(tmp_path).fingerprint == pickle.loads(pickle.dumps(dataset)).fingerprint
    assert 0 <= dataset.fingerprint < 2**32


def test_the_fingerprint_does_not_depend_on_how_arrays_lie_in_memory() -> None:
    images = np.random.default_rng(0).random((90, 20), np.float32)
    a, b = (Part(np.asarray(images, order=order), LABELS.astype(np.int64)) for order in ("C", "F"))
    assert Dataset("d", a, a, a, (20,)).fingerprint == Dataset("d", b, b, b, (20,)).fingerprint


def test_the_fingerprint_changes_with_anything() -> None:
    def part(change: tuple[int, ...] = ()) -> Part:
        images = np.zeros((6, 4), np.float32)
        images[change[:1], change[1:]] = bool(change)
        return Part(images, np.arange(6))

    def first(part: Part, count: int) -> Part:
        return Part(part.images[:count], part.labels[:count])

    datasets = [Dataset("d", part(), part(), part(), (4,)), Dataset("e", part(), part(), part(), (4,))]
    datasets += [Dataset("d", part(), part(), part(), shape) for shape in ((1, 2, 2), (1, 1, 4), (1, 4, 1))]
    datasets += [
        Dataset("d", *parts, (4,))
        for place in range(3)
        for new in (part((5, 3)), part((0, 0)), part()._replace(labels=np.arange(6)[::-1]), first(part(), 5))
        for parts in [[new if place == at else part() for at in range(3)]]
    ]
    assert len({dataset.fingerprint for dataset in datasets}) == len(datasets) == 17


def test_the_fingerprint_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    digits = load_digits()
    expected = digits.fingerprint
    monkeypatch.setattr("batchnorm.study.data.zlib.crc32", None)
    assert digits.fingerprint == expected


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
@pytest.mark.parametrize("channels_last", [False, True])
def test_no_copy_but_the_result_is_made(tmp_path: Path, dtype: type, channels_last: bool) -> None:
    load_digits()  # imports
    images = np.random.default_rng(0).integers(0, 256, (6000, 3, 16, 16)).astype(dtype)
    images = np.ascontiguousarray(images.transpose(0, 2, 3, 1)) if channels_last else images
    np.savez(tmp_path / "d.npz", x=images, y=np.arange(6000) % 3)
    del images
    tracemalloc.start()
    try:
        dataset = load(tmp_path / "d.npz")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert dataset.shape == (3, 16, 16)
    least = 6000 * 768 * (np.dtype(dtype).itemsize + 4)
    assert peak < 1.1 * least


def test_arrays_that_are_not_needed_are_not_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=IMAGES, y=LABELS, z=np.array([{}], dtype=object))
    assert load(tmp_path / "d.npz").shape == (1, 4, 5)


@pytest.mark.parametrize("value", [-1000.0, 1000.0])
def test_the_scale_is_the_largest_magnitude_of_the_training_images(tmp_path: Path, value: float) -> None:
    images = np.where(IMAGES == 0, value, IMAGES)
    images[:, 0, 0] = value
    np.savez(tmp_path / "d.npz", x=images, y=LABELS)
    dataset = load(tmp_path / "d.npz")
    assert np.abs(dataset.train.images).max() == 1
    assert (dataset.test.images[:, 0] == np.sign(value)).all()


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
    names = [*BATCHES, "test_batch.bin", *(name.removesuffix(".bin") for name in BATCHES), "test_batch"]
    assert_one_sentence(error, *(f"{name}[.gz]" for name in names), "cifar-10-batches-bin", "MNIST/raw")


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
    path.write_bytes(b"Not a gzip file, and no images")
    with pytest.raises(InputError) as error:
        read_idx(path, axes=3)
    assert_one_sentence(error, str(path), "magic number", "so it is no IDX file")


def test_a_folder_in_place_of_a_file(tmp_path: Path) -> None:
    write_pair(tmp_path, "train", *images_and_labels())
    (tmp_path / "train-images-idx3-ubyte").unlink()
    (tmp_path / "train-images-idx3-ubyte").mkdir()
    with pytest.raises(InputError) as error:
        load(tmp_path)
    assert_one_sentence(error, "train-labels-idx1-ubyte is there without train-images-idx3-ubyte[.gz]")
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(IMAGES)))
    assert len(load(tmp_path).train.labels) == 57


def npz_error(tmp_path: Path, **arrays: Any) -> pytest.ExceptionInfo[InputError]:
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(InputError) as error:
        load(tmp_path / "data.npz")
    return error


def test_npz_without_the_keys(tmp_path: Path) -> None:
    error = npz_error(tmp_path, inputs=np.zeros(3), x_train=np.zeros(3))
    assert_one_sentence(
        error, "inputs, x_train", "x_train/y_train/x_test/y_test or train_images/", "or x/y or images/labels"
    )


def test_npz_with_pickled_objects_is_not_unpickled(tmp_path: Path) -> None:
    error = npz_error(tmp_path, x=np.array([{}], dtype=object), y=np.zeros(1, int))
    assert_one_sentence(error, "not a valid .npz file")


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
    assert_one_sentence(error, "not a valid .npz file")


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
    "nothing": (IMAGES[:0], LABELS[:0], ("(0, 4, 5) are empty",)),
    "images without pixels": (IMAGES[:, :0], LABELS, ("(90, 0, 5) are empty",)),
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
        (IMAGES[:, :3], LABELS, ("test images are of shape (1, 3, 5)", "training images of shape (1, 4, 5)")),
        (IMAGES.reshape(90, 20), LABELS, ("of shape (20,)", "of shape (1, 4, 5)")),
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
