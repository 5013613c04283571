from collections.abc import Iterator

import pytest

collect_ignore = ["keras_cases"]
"""Run by `test_keras`, in a process for each backend."""


@pytest.fixture(autouse=True)
def the_same_numbers_every_time() -> None:
    """A test draws what it draws, whatever ran before it."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def kernels_for_small_tensors_too() -> Iterator[None]:
    """Tests are of small tensors, and most are of the kernels."""
    from cases import KERNEL_ROUTES

    from batchnorm.torch import route

    with route(*KERNEL_ROUTES):
        yield
