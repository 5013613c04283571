"""How kernels are started: as cheaply as Triton allows, with the scratch memory that belongs to the stream.

Triton's own launcher looks at every argument each time, which takes tens of microseconds. A `Launch` is made once for
each combination of shapes, types and alignments. It compiles its kernel the first time it is called and keeps it; later
calls hand over addresses, to the function in C that Triton's launcher ends with. Where Triton does not offer what this
takes, its own launcher is used.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.runtime.jit import JITFunction

from batchnorm.kernels.gpu.tiling import RESIDUAL_REGISTERS, Tiling

# These functions take 0.1 microseconds each; the public ones around them take 1 to 2.
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
_is_capturing: Callable[[], bool] = getattr(
    torch._C, "_cuda_isCurrentStreamCapturing", torch.cuda.is_current_stream_capturing
)
_stream: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)

__all__ = ["Launch", "Scratch"]

Tensor = torch.Tensor
Start = Callable[[int, tuple[Any, ...]], object]
"""Starts a kernel: `start(stream, arguments)`."""


class Scratch:
    """Memory in which the programs of a launch meet: counters, which every launch leaves as `order` says, and sums.

    Two launches may share it if one begins when the other has ended, as on one stream. The stages keep one for each
    stream of each device. While a CUDA graph is captured they make one for each launch, in the graph's own memory, and
    clear it there (a microsecond per launch): graphs may be replayed on any stream, beside anything. To save the
    microsecond, make one before capturing, and pass it to all calls of the graph; then the graph must not be replayed
    beside another launch with the same `Scratch`.

    Args:
        device: Of the tensors that will be normalized.
        counters, numbers: Sizes to begin with; both grow as needed.
    """

    def __init__(self, device: torch.device | str, counters: int = 1 << 13, numbers: int = 1 << 18) -> None:
        self.device = torch.device(device)
        self.state = torch.zeros(counters, dtype=torch.int64, device=device)
        self.parts = torch.empty(numbers, dtype=torch.float32, device=device)
        self._replaced: list[tuple[Tensor, Tensor]] = []
        self._measure()

    def reserve(self, counters: int, numbers: int) -> tuple[int, int]:
        """Addresses of counters and numbers, at least so many.

        What is replaced is kept, half as large at most: another thread may be about to start a kernel with its address.
        """
        if self._sizes[0] < counters or self._sizes[1] < numbers:
            self._replaced.append((self.state, self.parts))
        if self._sizes[0] < counters:
            self.state = torch.zeros(2 * counters, dtype=torch.int64, device=self.device)
        if self._sizes[1] < numbers:
            self.parts = torch.empty(2 * numbers, dtype=torch.float32, device=self.device)
        if self._sizes[0] < counters or self._sizes[1] < numbers:
            self._measure()
        return self._addresses

    def _measure(self) -> None:
        self._sizes = self.state.numel(), self.parts.numel()
        self._addresses = self.state.data_ptr(), self.parts.data_ptr()


_scratch: dict[tuple[int, int], Scratch] = {}


def _of_stream(device: torch.device, index: int, stream: int) -> Scratch:
    if index >= 0 and _is_capturing():
        return Scratch(device, 0, 0)
    scratch = _scratch.get((index, stream))
    if scratch is None:
        scratch = _scratch[index, stream] = Scratch(device)
    return scratch


class Launch:
    """A kernel with everything that does not change from call to call.

    Args:
        kernel: A Triton kernel whose arguments are tensors, floats, integers and constants, in this order; the last two
            tensors are the scratch memory.
        cut: How the tensor is cut.
        passes: Of the tensor, 1 or 2.
        integers: The kernel's.
        constants: The kernel's.
        counters, numbers: Sizes of the scratch memory that it needs.
        residual: Whether there is one.
    """

    def __init__(
        self,
        kernel: Any,
        cut: Tiling,
        passes: int,
        integers: tuple[int, ...],
        constants: dict[str, Any],
        counters: int,
        numbers: int,
        residual: bool,
    ) -> None:
        self.kernel = kernel
        self.programs = cut.programs(passes)
        self.integers = integers
        self.constants = constants
        self.options: dict[str, Any] = {"num_warps": cut.warps, "num_stages": 1, "enable_fp_fusion": True}
        if cut.registers:
            self.options["maxnreg"] = cut.registers + RESIDUAL_REGISTERS * residual
        self.counters = counters
        self.numbers = numbers
        self._rest = (*integers, *constants.values())
        self._fast: Start | None = None
        self._seen: Start | None = None
        self._slow = not isinstance(kernel, JITFunction)  # interpreted: there is nothing to keep

    @property
    def takes_addresses(self) -> bool:
        """Whether `start` may be called: the kernel is compiled, and can be started directly."""
        return self._fast is not None

    def start(
        self,
        device: torch.device,
        addresses: tuple[int | None, ...],
        floats: tuple[float, ...],
        scratch: Scratch | None,
    ) -> None:
        """Start it on the device's current stream with the addresses of its tensors."""
        index = device.index
        if index != _current_device():
            with torch.cuda.device(index):
                self.start(device, addresses, floats, scratch)
            return
        assert _stream is not None
        assert self._fast is not None
        assert self._seen is not None
        stream = _stream(index)
        if scratch is None:
            scratch = _of_stream(device, index, stream)
        begin = self._seen if _is_watched() else self._fast
        begin(stream, (*addresses, *scratch.reserve(self.counters, self.numbers), *floats, *self._rest))

    def __call__(self, tensors: tuple[Tensor | None, ...], floats: tuple[float, ...], scratch: Scratch | None) -> None:
        """Start it on the current stream of the device of the first tensor."""
        first = tensors[0]
        assert first is not None
        if self.programs == 0:
            return None
        if self._fast is not None:
            addresses = tuple([None if t is None else t.data_ptr() for t in tensors])
            return self.start(first.device, addresses, floats, scratch)
        index = first.get_device()
        if first.is_cuda and index != _current_device():
            with torch.cuda.device(index):
                return self(tensors, floats, scratch)
        if scratch is None:
            scratch = _of_stream(first.device, index, torch.cuda.current_stream().cuda_stream if first.is_cuda else 0)
        scratch.reserve(self.counters, self.numbers)
        compiled = self.kernel[(self.programs,)](
            *tensors, scratch.state, scratch.parts, *floats, *self.integers, **self.constants, **self.options
        )
        if not self._slow and _stream is not None:
            self._keep(compiled)
        return None

    def _keep(self, compiled: Any) -> None:
        """Remember the compiled kernel, if it is one that can be started directly."""
        found = starts(compiled, self.programs)
        if found is None:
            self._slow = True
        else:
            self._fast, self._seen = found


# --- Starting directly -----------------------------------------------------------------------------------------------


def _is_watched() -> bool:
    """Whether hooks want to see every launch, such as those of Triton's profiler."""
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def starts(compiled: Any, programs: int) -> tuple[Start, Start] | None:
    """How to start a compiled kernel directly, and with Triton's hooks; None where this Triton is another.

    Known to fit Triton 3.6 and 3.9.
    """
    try:
        run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
        describe, _ = compiled.launch_metadata, _is_watched()
    except AttributeError:
        return None
    grid = programs, 1, 1

    def by_launcher(stream: int, arguments: tuple[Any, ...]) -> None:
        run(*grid, stream, function, metadata, None, None, None, *arguments)

    def with_hooks(stream: int, arguments: tuple[Any, ...]) -> None:
        runtime = triton.knobs.runtime
        hooks = runtime.launch_enter_hook, runtime.launch_exit_hook
        run(*grid, stream, function, metadata, describe(grid, stream, *arguments), *hooks, *arguments)

    return _in_c(run, grid, function, metadata) or by_launcher, with_hooks


def _in_c(run: Any, grid: tuple[int, int, int], function: Any, metadata: Any) -> Start | None:
    """The last call of Triton's launcher, a function in C, without the 2 microseconds of Python before it.

    A rehearsal shows what that function gets: a copy of the launcher is called, whose function only takes notes. The
    order of its arguments has changed between versions. None if the notes do not look like a call.
    """
    stream, argument = object(), object()
    notes: list[tuple[Any, ...]] = []
    try:
        launch = run.launch
        rehearsal = copy.copy(run)
        rehearsal.launch = lambda *given: notes.append(given)
        rehearsal(*grid, stream, function, metadata, None, None, None, argument)
        ((*given, last),) = notes
        place = given.index(stream)
    except Exception:  # whatever another version raises: the launcher itself will do
        return None
    before, between = tuple(given[:place]), tuple(given[place + 1 :])
    if last is argument:
        return lambda stream, arguments: launch(*before, stream, *between, *arguments)
    if last == (argument,):
        return lambda stream, arguments: launch(*before, stream, *between, arguments)
    return None
