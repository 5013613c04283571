"""How kernels are started: the same bits every time, scratch memory left clean, any alignment, clear errors."""

import math

import pytest
import torch
from check_stages import DEVICE, SMALL, assert_backward, assert_forward, layer

from batchnorm.kernels import gpu
from batchnorm.kernels.gpu import launch
from batchnorm.kernels.gpu.tiling import TUNING, tiling


def outputs(shape: tuple[int, int, int], tuning: gpu.Tuning) -> list[torch.Tensor]:
    drawn = layer(shape, tuning=tuning, residual=True)
    drawn.forward()
    drawn.backward()
    return [drawn.y, drawn.mean, drawn.var, drawn.rstd, drawn.dx, drawn.d_residual, drawn.sum_dz, drawn.sum_dz_xhat]


@pytest.mark.parametrize("shape", [(3, 2, 67), (9, 5, 7), (9, 20, 1)])
def test_the_same_bits_every_time_and_with_wide_offsets(shape: tuple[int, int, int]) -> None:
    first = outputs(shape, SMALL)
    for others in (outputs(shape, SMALL), outputs(shape, SMALL._replace(wide=True))):
        for one, other in zip(first, others, strict=True):
            assert torch.equal(one, other)


def test_counters_are_left_zero() -> None:
    outputs((9, 20, 1), SMALL)
    assert launch._scratch
    for scratch in launch._scratch.values():
        assert not scratch.state.any()


def test_scratch_of_ones_own_grows() -> None:
    drawn = layer((9, 20, 1))
    scratch = gpu.Scratch(DEVICE, counters=1, numbers=1)
    drawn.forward(scratch=scratch)
    assert_forward(drawn)
    assert scratch.state.numel() > 1
    assert scratch.parts.numel() > 1
    assert not scratch.state.any()


@pytest.mark.parametrize("shape", [(3, 2, 64), (9, 5, 8), (9, 20, 1)])
def test_any_alignment(shape: tuple[int, int, int]) -> None:
    drawn = layer(shape, torch.bfloat16)
    room = torch.empty(drawn.x.numel() + 1, dtype=drawn.x.dtype, device=DEVICE)
    drawn.x = room[1:].view(shape).copy_(drawn.x)
    assert drawn.x.data_ptr() % 16 == 2
    drawn.forward()
    assert_forward(drawn)
    drawn.backward()
    assert_backward(drawn)


def test_in_place() -> None:
    drawn = layer((9, 5, 7))
    before = drawn.x.clone()
    drawn.y = drawn.x
    drawn.forward()
    drawn.x = before
    assert_forward(drawn)


@pytest.mark.parametrize("shape", [(64, 256, 3136), (64, 512, 196), (64, 2048, 49), (200704, 64, 1), (32, 64, 1)])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_vectors_are_whole_wherever_they_can_be(shape: tuple[int, int, int], itemsize: int) -> None:
    for direction in ("forward", "backward"):
        cut = tiling(shape, itemsize, 1, direction, True)
        assert cut.vec * itemsize == 16
        assert cut.blocks * cut.width >= shape[1]
        assert cut.rows * cut.columns <= max(tuning.block for tuning in TUNING.values())


def test_every_value_is_in_one_tile() -> None:
    for shape in ((3, 7, 13), (300, 5, 49), (1000, 200, 1), (5, 3, 5000), (1, 1, 1)):
        for groups in (1, 2, 3):
            if groups > shape[0]:
                continue
            cut = tiling(shape, 4, 1, "forward", True, groups)
            assert cut.small * groups + cut.larger * cut.extra == shape[0]
            rows = (cut.small + (cut.extra if cut.larger else 0)) * (1 if cut.positions else cut.row_vectors)
            assert cut.part_count * cut.part_tiles * cut.rows >= rows
            assert cut.waves * cut.wave_units >= cut.units


def test_errors() -> None:
    x = torch.ones(4, 3, 5, device=DEVICE, dtype=torch.float64)
    mean, var = torch.empty(3, device=DEVICE), torch.empty(3, device=DEVICE)
    with pytest.raises(TypeError, match=r"x must be float32, float16 or bfloat16, got torch\.float64"):
        gpu.moments(x, None, mean, var)
    with pytest.raises(ValueError, match=r"x must have shape \(N, C, L\), got \(4, 15\)"):
        gpu.moments(x.float().flatten(1), None, mean, var)
    with pytest.raises(ValueError, match="groups must be from 1 to the number of samples, got 5 groups of 4 samples"):
        gpu.moments(x.float(), None, mean, var, groups=5)
    with pytest.raises(ValueError, match="4 rows, which cannot be shared out evenly among 3 samples"):
        gpu.moments(x.float(), None, mean, var, samples=3)
    with pytest.raises(ValueError, match=r"fewer than 2\^31 - 2\^16 values"):
        tiling((1, 1, 1 << 31), 2, 1, "forward", True)
    drawn = layer((9, 5, 7), groups=2)
    drawn.forward()
    with pytest.raises(ValueError, match=r"groups may differ in size: count must be None or a tensor.*got 63"):
        drawn.backward(63)
    with pytest.raises(ValueError, match="needs batches_tracked"):
        drawn.forward(running=gpu.Running(mean, var, None))
    assert math.isfinite(drawn.mean.sum().item())


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_streams_and_graphs() -> None:
    drawn = layer((9, 20, 1))
    for _ in range(3):
        drawn.forward()
        drawn.backward()
    expected = drawn.y.clone(), drawn.dx.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    drawn.y.fill_(math.nan)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        drawn.forward()
        drawn.backward()
    stream.synchronize()
    assert torch.equal(drawn.y, expected[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn.forward()
        drawn.backward()
    for _ in range(3):
        drawn.y.fill_(math.nan)
        drawn.dx.fill_(math.nan)
        graph.replay()
        drawn_y, drawn_dx = drawn.y.clone(), drawn.dx.clone()
        assert torch.equal(drawn_y, expected[0])
        assert torch.equal(drawn_dx, expected[1])
    drawn.forward()
    assert torch.equal(drawn.y, expected[0])
