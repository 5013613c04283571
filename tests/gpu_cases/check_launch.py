"""How kernels are started: the same bits every time, scratch memory left clean, any alignment, clear errors."""

import inspect
import math

import pytest
import torch
import triton
import triton.language as tl
from check_stages import ALONE, DEVICE, SMALL, assert_backward, assert_forward, layer
from triton.language import constexpr, tensor

from batchnorm.kernels import gpu
from batchnorm.kernels import launch as cpu
from batchnorm.kernels.gpu import launch, stages, tiles
from batchnorm.kernels.gpu.tiling import TUNING, factor_of, tiling


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


@triton.jit(do_not_specialize=list(tiles.Walk._fields))
def last_offset_kernel(
    out: tensor, C: tensor, L: tensor, width: tensor, row_vectors: tensor, width_vectors: tensor, run_factor: tensor,
    blocks: tensor, small: tensor, larger: tensor, extra: tensor, part_tiles: tensor, part_count: tensor,
    units: tensor, wave_units: tensor, waves: tensor, wave_factor: tensor, stage_factor: tensor, ROWS: constexpr,
    COLUMNS: constexpr, SLICES: constexpr, VEC: constexpr, CHANNELS: constexpr, POSITIONS: constexpr,
    WHOLE: constexpr, GROUPED: constexpr, WIDE: constexpr,
) -> None:  # fmt: skip
    """The largest offset of any value in the last tile of each unit, and the largest of a count's."""
    walk = tiles.Walk(
        C, L, width, row_vectors, width_vectors, run_factor, blocks, small, larger, extra, part_tiles, part_count,
        units, wave_units, waves, wave_factor, stage_factor,
    )  # fmt: skip
    S: constexpr = tiles.Shape(ROWS, COLUMNS, SLICES, VEC, CHANNELS, POSITIONS, WHOLE, GROUPED, WIDE)
    unit = tl.program_id(0)
    end = tiles._rows(walk, unit, S)
    offset, position, there, mask = tiles.tile(walk, unit, end - ROWS, end, ROWS, True, S)
    tl.store(out + 2 * unit, tl.max(tl.max(tl.where(mask, offset, -1).to(tl.int64), 1), 0))
    position = tl.where(there, position, -1).to(tl.int64)
    tl.store(out + 2 * unit + 1, tl.max(tl.max(position, 1), 0))


@pytest.mark.parametrize(
    ("shape", "samples"),
    [
        ((33, 16, 1 << 22), 33), ((33 << 20, 64, 1), 33), ((1 << 20, 64, 49), 1 << 20), ((31, 16, 1 << 22), 31),
        ((1 << 30, 3, 1), 1 << 30), ((9, 16, (1 << 24) + 1), 9),
    ],
)  # fmt: skip
@pytest.mark.parametrize("groups", [1, 3])
def test_offsets_beyond_32_bits(shape: tuple[int, int, int], samples: int, groups: int) -> None:
    """The last value's offset, which the kernel computes without having so much memory."""
    cut = tiling(shape, 2, 1, "forward", True, groups, samples)
    assert cut.wide is (math.prod(shape) >= 1 << 31)
    out = torch.zeros(cut.units, 2, dtype=torch.int64, device=DEVICE)
    constants = stages._constants(cut, groups)
    del constants["STREAM"], constants["MERGE"]
    last_offset_kernel[(cut.units,)](out, *stages._walk(shape, cut, True), **constants)
    assert out[:, 0].max().item() == math.prod(shape) - 1
    assert out[:, 1].max().item() == shape[0] * shape[2] - 1


def test_the_launches_that_are_kept_are_not_ever_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "_launches", {})
    monkeypatch.setattr(stages, "MOST_LAUNCHES", 2)
    for samples in (2, 3, 4, 5):
        layer((samples, 3, 4)).forward()
    assert len(stages._launches) == 2


@pytest.mark.parametrize("stage", ["moments", "normalize", "forward", "grad_sums", "grad_input", "backward"])
def test_stages_have_the_arguments_of_the_cpus(stage: str) -> None:
    ours, theirs = (list(inspect.signature(getattr(module, stage)).parameters) for module in (gpu, cpu))
    shared = [name for name in theirs if name in ours and name != "of_output"]
    assert ours[: len(shared)] == theirs[: len(shared)] == shared
    assert {"of_output"} & set(ours) == {"of_output"} & set(theirs)


def clean(scratch: gpu.Scratch) -> bool:
    """No ticket drawn, no unit settled, no part arrived; how many launches there were, and what flags say, stays."""
    tickets, settled, *units = scratch.state.tolist()
    return tickets % (1 << 32) == 0 and settled == 0 and not any(units[::2])


def test_counters_are_left_zero() -> None:
    outputs((9, 20, 1), SMALL)
    assert launch._scratch
    for scratch in launch._scratch.values():
        assert clean(scratch)


def test_scratch_of_ones_own_grows() -> None:
    drawn = layer((9, 20, 1))
    scratch = gpu.Scratch(DEVICE, counters=1, numbers=1)
    before = scratch.state, scratch.parts
    drawn.forward(scratch=scratch)
    assert scratch._replaced == [before]  # a kernel may still be started with their addresses
    assert_forward(drawn)
    assert scratch.state.numel() > 1
    assert scratch.parts.numel() > 1
    assert clean(scratch)


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
        assert cut.rows * cut.columns * itemsize <= max(tuning.tile_bytes for tuning in TUNING.values())


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


def test_addresses_are_those_of_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is started with addresses alone gets the same ones as what is started with tensors."""
    started: list[tuple[int | None, ...]] = []

    def with_tensors(self: launch.Launch, tensors: tuple[torch.Tensor | None, ...], *_arguments: object) -> None:
        started.append(tuple(None if tensor is None else tensor.data_ptr() for tensor in tensors))
        self._fast = lambda *_arguments: None

    monkeypatch.setattr(launch.Launch, "__call__", with_tensors)
    monkeypatch.setattr(launch.Launch, "start", lambda _launch, _device, addresses, *_rest: started.append(addresses))
    drawn = layer((9, 20, 1), residual=True, mask=True, groups=3, tuning=ALONE)  # for keys of its own
    statistics = torch.empty(4, 3, 20, device=DEVICE)
    number = torch.tensor(0, device=DEVICE)
    for running in (None, gpu.Running(statistics[0, 0], statistics[1, 0], 0.1, True, number, None)):
        for full in (True, False):
            residual, d_residual = (drawn.residual, drawn.d_residual) if full else (None, None)
            at = [None if t is None else t.data_ptr() for t in (drawn.x, residual, drawn.counts)]
            again = gpu.forward_packed(
                drawn.x, residual, drawn.counts, *drawn.affine, 1e-3, "relu", drawn.y, statistics,
                shape=(9, 20, 1), running=running, groups=3, tuning=ALONE,
            )  # fmt: skip
            again.forward(*at, *drawn.affine, 1e-3, drawn.y, statistics, running)
            count = drawn.count if full else None
            sums = drawn.sum_dz, drawn.sum_dz_xhat, drawn.dx, d_residual
            again = gpu.backward_packed(
                drawn.dy, drawn.x, residual, drawn.counts, drawn.weight, statistics, count, "relu", *sums,
                shape=(9, 20, 1), tuning=ALONE,
            )  # fmt: skip
            again.backward(drawn.dy.data_ptr(), *at, drawn.weight, statistics, count, *sums)
    assert len(started) == 16
    for first in range(0, 16, 2):
        assert started[first] == started[first + 1]


def test_what_begins_elsewhere_is_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel was compiled for vectors that begin where they may."""
    monkeypatch.setattr(launch.Launch, "takes_addresses", True)
    drawn = layer((9, 20, 1))
    statistics = torch.empty(4, 1, 20, device=DEVICE)
    room = torch.empty(181, device=DEVICE)
    for x, wanted in ((drawn.x, True), (room[1:].view(9, 20, 1).copy_(drawn.x), False)):
        again = gpu.forward_packed(
            x, None, None, *drawn.affine, 1e-3, "relu", drawn.y, statistics, shape=(9, 20, 1)
        )  # fmt: skip
        assert (again is not None) is wanted


# --- Triton's launchers ----------------------------------------------------------------------------------------------


class Launcher:
    """As in Triton 3.9: the kernel's arguments come last, in a tuple."""

    scratch = 0

    def __init__(self, told: list[tuple[object, ...]]) -> None:
        self.launch = lambda *given: told.append(given)

    def __call__(self, x: int, y: int, z: int, stream: int, function: object, *more: object) -> None:
        metadata, about, enter, leave, *arguments = more
        scratch = None if self.scratch == 0 else stream * self.scratch
        self.launch(x, y, z, stream, function, metadata, about, enter, leave, scratch, tuple(arguments))


class Flat(Launcher):
    """As in Triton 3.6: one after the other."""

    def __call__(self, x: int, y: int, z: int, stream: int, function: object, *more: object) -> None:
        self.launch(x, y, z, stream, function, False, None, *more)


class Hungry(Launcher):
    """Of a kernel that needs memory from its launcher at each launch."""

    scratch = 2


class Reordering(Launcher):
    """Of a version that nobody has seen yet."""

    def __call__(self, x: int, y: int, z: int, stream: int, function: object, *more: object) -> None:
        self.launch(*more, stream)


class Kernel:
    """A compiled one."""

    function, packed_metadata = object(), (4, 1, 0)

    def __init__(self, run: object) -> None:
        self.run = run

    def launch_metadata(self, grid: tuple[int, int, int], stream: int, *arguments: object) -> object:
        return grid, stream, arguments


@pytest.mark.parametrize("kind", [Launcher, Flat, Hungry, Reordering])
def test_what_the_function_in_c_gets(kind: type[Launcher]) -> None:
    """Started directly, by way of Triton's launcher, and with hooks, it is the same but for the hooks."""
    told: list[tuple[object, ...]] = []
    run = kind(told)
    found = launch.starts(Kernel(run), 7)
    assert found is not None
    assert told == []  # the rehearsal has started nothing
    run(7, 1, 1, 5, Kernel.function, Kernel.packed_metadata, None, None, None, 11, None, 0.5)
    for start in found:
        start(5, (11, None, 0.5))
    by_triton, directly, with_hooks = told
    assert directly == by_triton
    runtime = launch.triton.knobs.runtime
    hooks = ((7, 1, 1), 5, (11, None, 0.5)), runtime.launch_enter_hook, runtime.launch_exit_hook
    at = by_triton.index(Kernel.packed_metadata) + 1
    assert with_hooks == (*by_triton[:at], *hooks, *by_triton[at + 3 :])


def test_a_triton_without_what_this_takes() -> None:
    assert launch.starts(object(), 7) is None


def test_hooks_see_every_launch() -> None:
    chain = launch.triton.knobs.runtime.launch_enter_hook
    assert not launch._is_watched()
    chain.add(print)
    try:
        assert launch._is_watched()
    finally:
        chain.remove(print)
    assert not launch._is_watched()


def test_products_divide() -> None:
    for divisor in (1, 2, 3, 5, 7, 49, 392, 1000, 65536, (1 << 30) + 3, (1 << 31) - 1):
        factor = factor_of(divisor)
        assert factor >= 1 << 32  # or the compiler would take it for a number of 32 bits
        for k in (0, 1, 2, (1 << 31) // divisor):
            for number in (k * divisor - 1, k * divisor, k * divisor + 1):
                if 0 <= number < 1 << 31:
                    assert number * (factor % (1 << 32)) >> (factor >> 32) == number // divisor


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
