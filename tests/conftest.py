import os
from collections.abc import Iterator

# Before anything loads OpenMP: one thread per worker, and threads that wait do so without spinning. Workers with two
# threads each on two cores wait for one another most of the time, and beside another process they hardly advance.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import contextlib

import pytest

with contextlib.suppress(ImportError):
    # Before a test brings TensorFlow: the other way round, LLVM finds its options registered twice and aborts.
    import triton  # noqa: F401

collect_ignore = ["gpu_cases", "keras_cases"]
"""Run by `test_kernels_gpu` and `test_keras`, in processes of their own."""


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
