"""Calls of the kernels by compiled code: an entry has everything that a call needs besides its buffers.

The functions here do what `launch.forward` and `launch.backward` do, and the `_forward` and `_backward` of
`batchnorm.xla.kernels` around them, for a call whose types, shapes and presence of arrays are known.

Only a lack of memory for tables of the channels can be an error in them. It does not reach XLA: Numba prints it, and
the results have no meaning.
"""

import functools
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm  # type: ignore[import-untyped]
import numba
import numpy as np
from numba import types
from numpy.typing import NDArray

from batchnorm.definition import parse_activation
from batchnorm.kernels import launch, threads
from batchnorm.kernels.activations import CODES, FLAT
from batchnorm.kernels.calls import (
    address,
    call_backward_kernel,
    call_forward_kernel,
    call_grad_input_kernel,
    call_grad_sums_kernel,
    call_moments_kernel,
    call_normalize_kernel,
    kernel_address,
)
from batchnorm.kernels.compilation import Kernel, c_function, inlined, pointer
from batchnorm.kernels.formats import arithmetic
from batchnorm.kernels.formulas import is_finite
from batchnorm.kernels.memory import WORD, array, call, read, record
from batchnorm.kernels.tiling import SERIAL, tiling
from batchnorm.xla.call_frame import HUGE, HUGE_PAGES, Buffer, CallFrame, Many, large_pages
from batchnorm.xla.formula import How

__all__ = ["ARGUMENTS", "RESULTS", "Made", "backward", "data", "forward"]

Array = NDArray[Any]
Made = tuple[int, Array] | None
"""The address of a function that makes a call, and its entry; None if the call must be left to Python."""

_WHOLE = (
    *("members", "N", "C", "L", "weight", "bias", "residual", "counts", "in_place"),
    *("rows", "width", "fused", "flat", "threads"),
    *("kernel", "next_kernel", "stage", "next_stage", "exact", "next_exact"),
    *("ones", "zeros", "get_threads", "set_threads", "advise"),
)

ENTRY = np.dtype([(name, np.int64) for name in _WHOLE] + [(name, np.float64) for name in ("eps", "parameter")])
"""What is known of a call.

Attributes:
    members: The number of normalizations that `vmap` has put together.
    N, C, L: The shape of one.
    weight, bias, residual, counts, in_place: Whether there are these arrays, and whether `dx` is written over `dy`.
    rows, width, fused: The tiling.
    flat: Whether the gradient must be `exact` if the sums are not finite.
    threads: For a parallel kernel; 0 for a serial one.
    kernel, next_kernel: The kernels' addresses. If fused, there is one.
    stage, next_stage, exact, next_exact: Those of the two stages, and of the exact ones.
    ones, zeros: Those of a weight and a bias that are absent.
    get_threads, set_threads, advise: Those of C functions; 0 for none.
"""

ARGUMENTS = CallFrame.arguments.offset + Many.values.offset
RESULTS = CallFrame.results.offset + Many.values.offset
DATA = Buffer.data.offset


@inlined
def data(buffers: int, i: int) -> int:
    """The address of the data of a buffer."""
    return read(read(buffers + 8 * i, WORD) + DATA, WORD)


@inlined
def _ask_for_large_pages(advise: int, data: int, size: int) -> None:
    """As `call_frame.ask_for_large_pages`."""
    if advise != 0 and size >= 2 * HUGE:
        begin = -(-data // HUGE) * HUGE
        call(advise, (begin, (data + size - begin) // HUGE * HUGE, HUGE_PAGES))


@inlined
def _set_threads(entry: Any, threads: int) -> int:
    """Have parallel kernels that this thread calls run on so many threads, and return on how many they did before."""
    if entry.threads == 0:
        return 0
    before = call(entry.get_threads, ()) & 0xFFFFFFFF  # a C integer has 32 bits
    call(entry.set_threads, (threads,))
    return before


@inlined
def _read(frame: int, entry: Any, i: int, values: Any, numbers: Any) -> Any:
    """What both passes read, of all members: x, weights, biases, residuals and counts.

    Args:
        frame, entry, values, numbers: As in the passes.
        i: The place of `x` among the arguments. Those that may be absent come after it.
    """
    batch, table = (entry.members, entry.N, entry.C, entry.L), (entry.members, entry.C)
    arguments = read(frame + ARGUMENTS, WORD)
    x = array(data(arguments, i), values, batch)
    weights, biases = array(entry.ones, numbers, table), array(entry.zeros, numbers, table)
    residuals, counts = x, array(entry.ones, numbers, (entry.members, 0, 0))
    if entry.weight:
        i += 1
        weights = array(data(arguments, i), numbers, table)
    if entry.bias:
        i += 1
        biases = array(data(arguments, i), numbers, table)
    if entry.residual:
        i += 1
        residuals = array(data(arguments, i), values, batch)
    if entry.counts:
        i += 1
        counts = array(data(arguments, i), numbers, (entry.members, entry.N, entry.L))
    return x, weights, biases, residuals, counts


@functools.cache
def _forward() -> Callable[..., Any]:
    @c_function
    def forward(frame: int, where: int, values: Any, numbers: Any) -> int:
        entry = record(where, ENTRY)
        C, members, table = entry.C, entry.members, (entry.members, entry.C)
        x, weights, biases, residuals, all_counts = _read(frame, entry, 0, values, numbers)
        results = read(frame + RESULTS, WORD)
        y = array(data(results, 0), values, x.shape)
        high, low = array(data(results, 1), numbers, table), array(data(results, 2), numbers, table)
        found = array(data(results, 3), numbers, table)
        _ask_for_large_pages(entry.advise, data(results, 0), y.nbytes)
        threads_before = _set_threads(entry, entry.threads)
        parameter = weights.dtype.type(entry.parameter)
        mean, var, rstd = np.empty(C), np.empty(C), np.empty(C)
        for m in range(members):
            arrays = x[m], residuals[m], all_counts[m], weights[m], biases[m]
            given = *arrays, parameter, entry.rows, entry.width
            if entry.fused:
                stages = entry.stage, entry.next_stage
                call_forward_kernel(entry.kernel, (*stages, *given, entry.eps, y[m], mean, var, rstd))
            else:
                call_moments_kernel(entry.kernel, (entry.stage, *given, mean, var))
                for c in range(C):
                    rstd[c] = 1.0 / np.sqrt(var[c] + entry.eps)
                call_normalize_kernel(entry.next_kernel, (entry.next_stage, *given, mean, rstd, y[m]))
            for c in range(C):
                high[m, c] = mean[c]
                low[m, c] = mean[c] - high[m, c]
                found[m, c] = var[c]
        _set_threads(entry, threads_before)
        return 0

    return forward


@functools.cache
def _backward() -> Callable[..., Any]:
    @c_function
    def backward(frame: int, where: int, values: Any, numbers: Any) -> int:
        entry = record(where, ENTRY)
        N, C, L, members, table = entry.N, entry.C, entry.L, entry.members, (entry.members, entry.C)
        x, weights, biases, residuals, all_counts = _read(frame, entry, 4, values, numbers)
        arguments, results = read(frame + ARGUMENTS, WORD), read(frame + RESULTS, WORD)
        dy, dx = array(data(arguments, 0), values, x.shape), array(data(results, 0), values, x.shape)
        high, low = array(data(arguments, 1), numbers, table), array(data(arguments, 2), numbers, table)
        var = array(data(arguments, 3), numbers, table)
        d_weights, d_biases, d_residuals = weights[:0], biases[:0], dx
        if entry.weight:
            d_weights = array(data(results, 1), numbers, table)
        if entry.bias:
            d_biases = array(data(results, 1 + entry.weight), numbers, table)
        if entry.residual:
            place = data(results, 1 + entry.weight + entry.bias)
            d_residuals = array(place, values, x.shape)
            _ask_for_large_pages(entry.advise, place, dx.nbytes)
        if not entry.in_place:
            _ask_for_large_pages(entry.advise, data(results, 0), dx.nbytes)
        threads_before = _set_threads(entry, entry.threads)
        parameter, flat = weights.dtype.type(entry.parameter), entry.flat != 0
        mean, rstd, sum_dz, sum_dz_xhat = np.empty(C), np.empty(C), np.empty(C), np.empty(C)
        for m in range(members):
            count = float(N * L)
            if entry.counts:
                count = 0.0
                for n in range(N):
                    for position in range(L):
                        count += all_counts[m, n, position]
            for c in range(C):
                mean[c] = np.float64(high[m, c]) + np.float64(low[m, c])  # Numba's `float` leaves a float32 as it is
                rstd[c] = 1.0 / np.sqrt(np.float64(var[m, c]) + entry.eps)
            arrays = x[m], residuals[m], all_counts[m], weights[m], biases[m]
            given = *arrays, parameter, entry.rows, entry.width
            sums, last = (sum_dz, sum_dz_xhat), (dx[m], d_residuals[m])
            if entry.fused:
                stages, exact = (entry.stage, entry.next_stage), (entry.exact, entry.next_exact)
                read_too = dy[m], mean, rstd, flat
                call_backward_kernel(entry.kernel, (*stages, *given, *read_too, False, count, *sums, *last))
                if flat and not is_finite(sum_dz, 0, C):
                    call_backward_kernel(entry.kernel, (*exact, *given, *read_too, True, count, *sums, *last))
            else:
                next_stage = entry.next_stage
                call_grad_sums_kernel(entry.kernel, (entry.stage, *given, dy[m], mean, rstd, *sums))
                if flat and not is_finite(sum_dz, 0, C):
                    call_grad_sums_kernel(entry.kernel, (entry.exact, *given, dy[m], mean, rstd, *sums))
                    next_stage = entry.next_exact
                call_grad_input_kernel(entry.next_kernel, (next_stage, *given, dy[m], mean, rstd, *sums, count, *last))
            for c in range(C):
                if entry.weight:
                    d_weights[m, c] = sum_dz_xhat[c]
                if entry.bias:
                    d_biases[m, c] = sum_dz[c]
        _set_threads(entry, threads_before)
        return 0

    return backward


# --- Preparing --------------------------------------------------------------------------------------------------------

Factory = Callable[[bool], Kernel]
FORWARD: tuple[Factory, Factory] = launch.moments_kernel, launch.normalize_kernel
BACKWARD: tuple[Factory, Factory] = launch.grad_sums_kernel, launch.grad_input_kernel


@functools.cache
def _run(factory: Callable[[], Any], dtype: np.dtype[Any]) -> int:
    data, number = numba.from_dtype(dtype), numba.from_dtype(arithmetic(dtype))
    return pointer(factory(), (types.intp, types.intp, types.CPointer(data), types.CPointer(number)))


def _entry(fused: Factory, one_by_one: tuple[Factory, Factory], x: Array, how: How, members: int, tensors: int) -> Any:
    """An entry without its stages; None if the kernels must not run in several threads at once.

    Args:
        fused, one_by_one: The kernels, according to the tiling.
        x, how, members: As in `forward`.
        tensors: As in `tiling`.
    """
    cut, parallel = tiling(x.shape, x.itemsize, tensors), x.size >= SERIAL
    if parallel and not threads.concurrent():
        return None
    number, channels = arithmetic(x.dtype), x.shape[1]
    entry = np.zeros((), ENTRY)
    entry["members"], (entry["N"], entry["C"], entry["L"]) = members, x.shape
    for name in "weight", "bias", "residual", "counts":
        entry[name] = getattr(how, name)
    entry["rows"], entry["width"], entry["fused"] = cut.rows, cut.width, cut.fused(x)
    kernels = (fused,) if cut.fused(x) else one_by_one
    for name, factory in zip(("kernel", "next_kernel"), kernels, strict=False):
        entry[name] = kernel_address(factory(parallel), x.dtype)
    if parallel:
        entry["threads"] = threads.available()
        for name in "get_threads", "set_threads":
            entry[name] = llvm.address_of_symbol(name.replace("_", "_num_"))
    entry["ones"], entry["zeros"] = (_filled(v, members * channels, number).ctypes.data for v in (1, 0))
    entry["advise"], entry["eps"], entry["parameter"] = large_pages(), how.eps, parse_activation(how.activation)[1]
    return entry


@functools.cache
def _filled(value: int, size: int, dtype: np.dtype[Any]) -> Array:
    return np.full(size, value, dtype)


def forward(x: Array, how: How, members: int) -> Made:
    """A function that makes a forward call, and its entry; None if it must be left to Python.

    Args:
        x: One batch, `(N, C, L)`.
        how: The rest.
        members: The number of batches.
    """
    if (entry := _entry(launch.forward_kernel, FORWARD, x, how, members, 1)) is None:
        return None
    walk, code = launch.walk_of(tiling(x.shape, x.itemsize, 1)), CODES[how.activation[0]]
    entry["stage"] = address(walk.moments(int(how.counts)), x.dtype)
    entry["next_stage"] = address(walk.normalize(code, int(how.residual)), x.dtype)
    return _run(_forward, x.dtype), entry


def backward(x: Array, how: How, members: int, in_place: bool) -> Made:
    """A function that makes a backward call, and its entry; None if it must be left to Python.

    Args:
        x, how, members: As in `forward`.
        in_place: Whether `dx` is written over `dy`.
    """
    if (entry := _entry(launch.backward_kernel, BACKWARD, x, how, members, 2)) is None:
        return None
    walk, code = launch.walk_of(tiling(x.shape, x.itemsize, 2)), CODES[how.activation[0]]
    residual, counted = int(how.residual), int(how.counts)
    entry["in_place"], entry["flat"] = in_place, code in FLAT
    for exact, (sums, gradient) in enumerate([("stage", "next_stage"), ("exact", "next_exact")]):
        if not exact or code in FLAT:
            entry[sums] = address(walk.grad_sums(code, residual, exact), x.dtype)
            entry[gradient] = address(walk.grad_input(code, residual, counted, exact, int(in_place)), x.dtype)
    return _run(_backward, x.dtype), entry
