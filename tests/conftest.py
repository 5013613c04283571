import pytest

collect_ignore = ["gpu_cases", "keras_cases"]
"""Run by `test_kernels_gpu` and `test_keras`, in processes of their own."""


@pytest.fixture(autouse=True)
def the_same_numbers_every_time() -> None:
    """A test draws what it draws, whatever ran before it."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def kernels_for_small_tensors_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests are of small tensors, and most are of the kernels."""
    from batchnorm.torch import functional

    monkeypatch.setattr(functional, "SMALL", 0)
    monkeypatch.setattr(functional, "SMALL_EVALUATION", 0)
    monkeypatch.setattr(functional, "SMALL_COMPILED", 0)
