import pytest


@pytest.fixture(autouse=True)
def kernels_for_small_tensors_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests are of small tensors, and most are of the kernels."""
    from batchnorm.torch import functional

    monkeypatch.setattr(functional, "SMALL", 0)
    monkeypatch.setattr(functional, "SMALL_EVALUATION", 0)
    monkeypatch.setattr(functional, "SMALL_COMPILED", 0)
