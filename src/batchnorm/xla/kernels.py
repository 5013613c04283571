"""The CPU kernels as targets of XLA's custom calls."""

import atexit
import ctypes
import functools
import json
import logging
import math
import os
from typing import Any

import jax
import numpy as np
from jax.extend.mlir import ir
from jax.interpreters import mlir
from numpy.typing import NDArray

from batchnorm.xla import call_frame
from batchnorm.xla.formula import How

__all__ = ["BACKWARD", "FORWARD", "lowering", "registered"]

FORWARD, BACKWARD = "batchnorm_forward", "batchnorm_backward"
"""The names of the custom calls."""


@functools.cache
def registered() -> bool:
    """Register the targets with XLA once, and return whether that worked; it fails if XLA's version is unknown."""
    version = call_frame.version(jax.ffi.include_dir())
    try:
        if version is None:
            raise RuntimeError("its interface has an unknown version")
        # Imported here because XLA's threads flush denormal numbers to 0, which NumPy would note for the whole process.
        from batchnorm.kernels import launch  # noqa: F401

        jax.local_devices(backend="cpu")  # first, because a backend cannot start once a target has been refused
        handler = _handler(version)
        for name in FORWARD, BACKWARD:
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform="cpu")
        atexit.register(_finish, os.getpid())
    except Exception as error:
        logging.getLogger("batchnorm").warning("XLA computes without the CPU kernels of batchnorm: %s", error)
        return False
    return True


@functools.cache  # kept, because XLA may call it as long as the process lives
def _python(version: call_frame.Version) -> Any:
    return call_frame.target(_call, version)


def _handler(version: call_frame.Version) -> Any:
    """The C function of both targets: compiled, or in Python where nothing is compiled."""
    from batchnorm.kernels import threads

    python = _python(version)
    if threads.forbidden():
        return python
    from batchnorm.xla import handler

    return call_frame.HANDLER(handler.start(ctypes.cast(python, ctypes.c_void_p).value or 0))


def _finish(process: int) -> None:
    """Wait for the work that a process has started, before Python ends.

    JAX waits for it then without letting go of the interpreter's lock, which a target needs: both would wait forever.
    A forked child has none of the threads that work, and must not wait for them.
    """
    if os.getpid() != process:
        return
    for array in jax.live_arrays():
        if not array.is_deleted():
            array.block_until_ready()
    for device in jax.local_devices(backend="cpu"):  # this runs after programs whose results nobody holds
        (jax.device_put(np.zeros(1), device) + 1).block_until_ready()


def lowering(name: str, formula: Any) -> Any:
    """How a primitive becomes a program for CPUs: a custom call, or the formula.

    It is the formula in a program for several devices, and in one that is exported: our targets are not in the process
    that loads it, and JAX refuses to export custom calls that it does not know.

    Args:
        name: The target.
        formula: What it computes.
    """

    def lower(context: Any, *operands: Any, how: How) -> Any:
        module = context.module_context
        alone = isinstance(module.axis_context, mlir.ShardingContext) and module.axis_context.num_devices == 1
        large = math.prod(context.avals_out[0].shape) >= how.least
        if not (large and alone and not module.lowering_parameters.for_export and registered()):
            return mlir.lower_fun(formula, multiple_results=True)(context, *operands, how=how)
        over = {0: 0} if name == BACKWARD and _is_computed(operands[0]) else None
        return jax.ffi.ffi_lowering(name, operand_output_aliases=over)(context, *operands, how=json.dumps([name, *how]))

    return lower


def _is_computed(value: Any) -> bool:
    """Whether the program computes an array, in whose memory it may then have another one.

    `dx` over `dy` saves the reading of memory that is only written. XLA copies `dy` before if something else needs it,
    as it always does with an argument of the program.
    """
    return not isinstance(value.owner, ir.Block)


# --- What XLA calls ---------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def _how(text: bytes) -> tuple[str, How]:
    """A target and how it is called."""
    target, axis, eps, (name, parameter), *given = json.loads(text)
    return target, How(axis, eps, (name, parameter), *given)


def _rows(x: NDArray[Any], axis: int) -> NDArray[Any]:
    """`(N, C, L)`, without a copy."""
    return x.reshape(math.prod(x.shape[:axis]), x.shape[axis], math.prod(x.shape[axis + 1 :]))


def _spread(how: How, arrays: list[NDArray[Any]]) -> tuple[Any, ...]:
    """Weight, bias, residual `(N, C, L)` and counts `(N, L)`."""
    weight, bias, residual, counts = how.spread(arrays)
    return (
        weight,
        bias,
        None if residual is None else _rows(residual, how.axis),
        None if counts is None else _rows(counts, how.axis)[:, 0],
    )


def _call(arguments: list[NDArray[Any]], results: list[NDArray[Any]], attributes: dict[str, bytes]) -> None:
    """Compute one normalization after the other, of those that `vmap` has put together.

    As in XLA, 1/0 is infinity without a word.
    """
    target, how = _how(attributes["how"])
    function = _forward if target == FORWARD else _backward
    for result in results:
        call_frame.ask_for_large_pages(result)
    with np.errstate(all="ignore"):
        for i in np.ndindex(results[0].shape[: how.batch]):
            function([x[i] for x in arguments], [x[i] for x in results], how)
    _prepare(attributes["how"], arguments, results)


def _prepare(text: bytes, arguments: list[NDArray[Any]], results: list[NDArray[Any]]) -> None:
    """Leave this call to compiled code from its third time on."""
    from batchnorm.kernels import threads

    if threads.forbidden() or arguments[0].size == 0:
        return
    from batchnorm.xla import handler, prepared

    def entry() -> Any:
        target, how = _how(text)
        x = arguments[0]
        one = _rows(x[(0,) * how.batch], how.axis)
        members = math.prod(x.shape[: how.batch])
        if target == FORWARD:
            return prepared.forward(one, how, members)
        return prepared.backward(one, how, members, x.ctypes.data == results[0].ctypes.data)

    handler.prepare(text, arguments, results, entry)


def _forward(arguments: list[NDArray[Any]], results: list[NDArray[Any]], how: How) -> None:
    from batchnorm.kernels import launch

    y, mean, low, var = results
    x, weight, bias, residual, counts = _rows(arguments[0], how.axis), *_spread(how, arguments[1:])
    exact_mean, exact_var, rstd = np.empty((3, x.shape[1]))
    launch.forward(
        x, residual, counts, weight, bias, how.eps, how.activation, _rows(y, how.axis), exact_mean, exact_var, rstd
    )
    mean[:] = exact_mean
    low[:] = exact_mean - mean
    var[:] = exact_var


def _backward(arguments: list[NDArray[Any]], results: list[NDArray[Any]], how: How) -> None:
    from batchnorm.kernels import launch

    dy, mean, low, var, x, *arrays = arguments
    left = iter(results)
    dx = next(left)
    d_weight, d_bias, d_residual = (next(left) if there else None for there in how[3:6])
    rows = _rows(x, how.axis)
    weight, bias, residual, counts = _spread(how, arrays)
    # One after the other, as `prepared` adds them: a call has the same bits before and after it is prepared.
    count = rows.shape[0] * rows.shape[2] if counts is None else float(np.cumsum(counts, dtype=np.float64)[-1])
    sums, dy_rows = np.empty((2, rows.shape[1])), _rows(dy, how.axis)
    launch.backward(
        dy_rows, rows, residual, counts, mean.astype(np.float64) + low,
        1 / np.sqrt(var.astype(np.float64) + how.eps), weight, bias, count, how.activation, sums[0], sums[1],
        dy_rows if dx.ctypes.data == dy.ctypes.data else _rows(dx, how.axis),
        None if d_residual is None else _rows(d_residual, how.axis),
    )  # fmt: skip
    if d_weight is not None:
        d_weight[:] = sums[1]
    if d_bias is not None:
        d_bias[:] = sums[0]
