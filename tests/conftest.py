import os
from collections.abc import Iterator

# Before anything loads OpenMP: one thread per worker, and threads that wait do so without spinning. Workers with two
# threads each on two cores wait for one another most of the time, and beside another process they hardly advance.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Compiling is most of what JAX does here.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

import contextlib
import gc

import pytest

with contextlib.suppress(ImportError):
    # Before a test brings TensorFlow: the other way round, LLVM finds its options registered twice and aborts.
    import triton  # noqa: F401

# Compilers make many objects, and what the frameworks keep in memory is large: with Python's own thresholds, its search
# for cycles is a fifth of the time in which a kernel is compiled.
gc.set_threshold(50_000, 20, 20)

collect_ignore = ["gpu_cases", "keras_cases"]
"""Run by `test_kernels_gpu` and `test_keras`, in processes of their own."""

LONG = ("test_keras", "test_study_together", "test_examples", "test_docs", "test_cli", "test_kernels_gpu")
"""The files with the longest tests, in the order in which they are begun."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first. A long one that begins last runs alone, while the other workers have nothing left to do."""
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))


@pytest.fixture(autouse=True)
def the_same_numbers_every_time() -> None:
    """A test draws what it draws, whatever ran before it."""
    import torch

    torch.manual_seed(0)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """For tests whose subject is threads. All others run on one."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def kernels_for_small_tensors_too() -> Iterator[None]:
    """Tests are of small tensors, and most are of the kernels."""
    from cases import KERNEL_ROUTES

    from batchnorm.torch import route

    with route(*KERNEL_ROUTES):
        yield


@pytest.fixture(autouse=True)
def recipes_for_small_outputs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """`save_memory` would keep them."""
    monkeypatch.setattr("batchnorm.torch.recipes.LEAST", 1)
