"""What the compiler makes of the kernels for an H100, which need not be there: whole vectors, no spills."""

import pytest
import torch

from batchnorm.kernels.gpu import stages
from batchnorm.kernels.gpu.ahead import Compiled, compile_ahead


def compiled(direction: str, shape: tuple[int, int, int]) -> Compiled:
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    channel = torch.empty(shape[1], device="meta")
    number: torch.Tensor | None = torch.empty((), dtype=torch.int64, device="meta")
    measured = direction != "constants"
    variant = stages.Variant(measured, True, "relu", shape, 1, None, None, False, direction == "forward")
    if direction != "backward":
        number = number if measured else None
        tensors = (x, x, None, x, *(channel,) * 6, None, channel, channel, number, number)
        launch, _ = stages.forward_launch(variant, tensors, aligned=True)
        return compile_ahead(launch, tensors, 3)
    tensors = (x, x, x, None, x, x, *(channel,) * 7, None)
    launch, _ = stages.backward_launch(variant, tensors, aligned=True)
    return compile_ahead(launch, tensors, 2)


@pytest.mark.parametrize(
    ("direction", "shape"),
    [
        ("forward", (64, 256, 3136)),
        ("backward", (64, 512, 196)),
        ("forward", (12544, 256, 1)),
        ("constants", (64, 512, 196)),
    ],
    ids=["channel", "row", "last", "constants by row"],
)
def test_vectors_are_loaded_whole_and_nothing_spills(direction: str, shape: tuple[int, int, int]) -> None:
    made = compiled(direction, shape)
    assert made.spills == 0
    assert made.registers <= 128  # or fewer than 16 warps share a multiprocessor
    assert 2 not in made.loads  # no value of bfloat16 is loaded alone
    assert made.loads[16] >= 3
    assert 2 not in made.stores
    assert made.stores[16] >= 1
