"""The CPU kernels as targets of XLA's custom calls."""

import atexit
import functools
import json
import logging
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import mlir
from numpy.typing import NDArray

from batchnorm.jax import call_frame
from batchnorm.jax.formula import How

__all__ = ["BACKWARD", "FORWARD", "SMALL", "lowering", "pay", "registered"]

SMALL = 1 << 20
"""The smallest number of values for which the kernels are used. It is cautious, and not measured on a quiet machine: on
a busy one the kernels were slower below half a million values. `python -m benchmarks jax` times both sides of it."""

DTYPES = (jnp.float32, jnp.float64, jnp.bfloat16)
"""The types that the kernels support."""

FORWARD, BACKWARD = "batchnorm_forward", "batchnorm_backward"
"""The names of the custom calls."""


def pay(x: Any, arrays: Sequence[Any], how: How) -> bool:
    """Whether the kernels can compute this call on a CPU and are worth it.

    They are used in programs for one device: in a program for several, a custom call would gather `x` on each.

    Args:
        x, arrays, how: As in `formula.forward`.
    """
    *_, residual, counts = how.spread(arrays)
    return (
        x.size >= SMALL
        and x.dtype in DTYPES
        and (residual is None or residual.dtype == x.dtype)
        and (counts is None or counts.shape[how.axis] == 1)  # the kernels count the same positions in all channels
        and jax.typeof(x).sharding.mesh.empty  # neither inside `shard_map` nor with an explicit sharding
        and registered()
    )


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
        for name, function in (FORWARD, _forward), (BACKWARD, _backward):
            handler = call_frame.target(function, version)
            _handlers.append(handler)
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform="cpu")
        atexit.register(_finish)
    except Exception as error:
        logging.getLogger("batchnorm").warning("XLA computes without the CPU kernels of batchnorm: %s", error)
        return False
    return True


_handlers: list[Any] = []
"""Kept because XLA may call them as long as the process lives."""


def _finish() -> None:
    """Wait for all running work before Python exits.

    JAX waits for it at exit without releasing the interpreter's lock, which a target needs: both would wait forever.
    """
    for array in jax.live_arrays():
        if not array.is_deleted():
            array.block_until_ready()
    for device in jax.local_devices(backend="cpu"):  # this runs after programs whose results nobody holds
        (jax.device_put(np.zeros(1), device) + 1).block_until_ready()


def lowering(name: str, formula: Any) -> Any:
    """The lowering of a primitive on CPUs: a custom call in a program for one device, otherwise the formula."""

    def lower(context: Any, *operands: Any, how: How) -> Any:
        axes = context.module_context.axis_context
        if not (isinstance(axes, mlir.ShardingContext) and axes.num_devices == 1 and registered()):
            return mlir.lower_fun(formula, multiple_results=True)(context, *operands, how=how)
        return jax.ffi.ffi_lowering(name)(context, *operands, how=json.dumps(how))

    return lower


# --- What XLA calls ---------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def _how(text: bytes) -> How:
    axis, eps, (name, parameter), *given = json.loads(text)
    return How(axis, eps, (name, parameter), *given)


def _rows(x: NDArray[Any], axis: int) -> NDArray[Any]:
    """`(N, C, L)`, without a copy."""
    return x.reshape(int(np.prod(x.shape[:axis])), x.shape[axis], int(np.prod(x.shape[axis + 1 :])))


def _spread(how: How, arrays: list[NDArray[Any]]) -> tuple[Any, ...]:
    """Weight, bias, residual `(N, C, L)` and counts `(N, L)`."""
    weight, bias, residual, counts = how.spread(arrays)
    return (
        weight,
        bias,
        None if residual is None else _rows(residual, how.axis),
        None if counts is None else _rows(counts, how.axis)[:, 0],
    )


def _forward(arguments: list[NDArray[Any]], results: list[NDArray[Any]], attributes: dict[str, bytes]) -> None:
    from batchnorm.kernels import launch

    how = _how(attributes["how"])
    y, mean, low, var = results
    x, weight, bias, residual, counts = _rows(arguments[0], how.axis), *_spread(how, arguments[1:])
    exact_mean, exact_var, rstd = np.empty((3, x.shape[1]))
    launch.forward(
        x, residual, counts, weight, bias, how.eps, how.activation, _rows(y, how.axis), exact_mean, exact_var, rstd
    )
    mean[:] = exact_mean
    low[:] = exact_mean - mean
    var[:] = exact_var


def _backward(arguments: list[NDArray[Any]], results: list[NDArray[Any]], attributes: dict[str, bytes]) -> None:
    from batchnorm.kernels import launch

    how = _how(attributes["how"])
    dy, mean, low, var, x, *arrays = arguments
    left = iter(results)
    dx = next(left)
    d_weight, d_bias, d_residual = (next(left) if there else None for there in how[3:6])
    rows = _rows(x, how.axis)
    weight, bias, residual, counts = _spread(how, arrays)
    count = rows.shape[0] * rows.shape[2] if counts is None else float(counts.sum(dtype=np.float64))
    sums = np.empty((2, rows.shape[1]))
    launch.backward(
        _rows(dy, how.axis), rows, residual, counts, mean.astype(np.float64) + low,
        1 / np.sqrt(var.astype(np.float64) + how.eps), weight, bias, count, how.activation, sums[0], sums[1],
        _rows(dx, how.axis), None if d_residual is None else _rows(d_residual, how.axis),
    )  # fmt: skip
    if d_weight is not None:
        d_weight[:] = sums[1]
    if d_bias is not None:
        d_bias[:] = sums[0]
