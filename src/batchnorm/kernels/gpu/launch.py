"""How kernels are started: as cheaply as Triton allows, with the scratch memory that belongs to the stream.

Triton's own launcher looks at every argument each time, which takes tens of microseconds. A `Launch` is made once for
each combination of shapes, types and alignments. It compiles its kernel the first time it is called and keeps it; later
calls hand over addresses. Where Triton does not offer what this takes, its own launcher is used.
"""

from collections.abc import Callable
from typing import Any

import torch
from triton.runtime.jit import JITFunction

from batchnorm.kernels.gpu.tiling import Tiling

# These functions take 0.1 microseconds each; the public ones around them take 1 to 2.
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
_is_capturing: Callable[[], bool] = getattr(
    torch._C, "_cuda_isCurrentStreamCapturing", torch.cuda.is_current_stream_capturing
)
_stream: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)

__all__ = ["Launch", "Scratch"]

Tensor = torch.Tensor


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
        self._measure()

    def reserve(self, counters: int, numbers: int) -> tuple[int, int]:
        """Addresses of counters and numbers, at least so many.

        What is replaced may still be in use on the stream; PyTorch gives it only to what comes later on that stream.
        """
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
    ) -> None:
        self.kernel = kernel
        self.programs = cut.programs(passes)
        self.integers = integers
        self.constants = constants
        self.options: dict[str, Any] = {"num_warps": cut.warps, "num_stages": 1, "enable_fp_fusion": True}
        if cut.registers:
            self.options["maxnreg"] = cut.registers
        self.counters = counters
        self.numbers = numbers
        self._fast: Callable[..., None] | None = None
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
                return self.start(device, addresses, floats, scratch)
        assert _stream is not None
        assert self._fast is not None
        stream = _stream(index)
        if scratch is None:
            scratch = _of_stream(device, index, stream)
        state, parts = scratch.reserve(self.counters, self.numbers)
        return self._fast(stream, *addresses, state, parts, *floats)

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
        """Remember the compiled kernel, if it is one that can be started directly (Triton 3.6 to 3.9)."""
        try:
            run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
        except AttributeError:
            self._slow = True
            return
        programs, rest = self.programs, (*self.integers, *self.constants.values())

        def fast(stream: int, *arguments: Any) -> None:
            # What comes behind the metadata are hooks of Triton's profiler.
            run(programs, 1, 1, stream, function, metadata, None, None, None, *arguments, *rest)

        self._fast = fast
