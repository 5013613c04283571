"""Batch normalization as JAX primitives, which our kernels compute on a CPU.

`forward` is `y` and the statistics of the batch, `tangent` its derivative along a direction, and `backward` the
transpose of that. Between forward and backward only `x`, the statistics and the small arguments are kept. A higher
derivative is that of the formula. `vmap` adds an axis to every array, and the kernels take one normalization after the
other. Programs for other devices, or for several, and exported ones are made from the formula.

The statistics have no derivative: they are returned to be kept, not to be differentiated.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from batchnorm.xla import formula, kernels
from batchnorm.xla.formula import How

__all__ = ["batch_norm"]


def batch_norm(x: Any, arrays: Sequence[Any], how: How) -> tuple[Any, Any, Any, Any]:
    """`y`, and mean, low and var of the batch: `formula.forward`."""
    if how.counts:  # the kernels need one count for every position
        shape = list(x.shape)
        shape[how.axis] = 1
        arrays = [*arrays[:-1], jnp.broadcast_to(arrays[-1], shape)]
    return tuple(FORWARD.bind(x, *arrays, how=how))


# --- What each primitive computes -------------------------------------------------------------------------------------
# `primals` are x and the weight, bias, residual and counts that are present; the counts have no derivative.


def _for_each(compute: Callable[..., Any]) -> Callable[..., Any]:
    """The same for arrays with further axes, `how.batch` of them, in front."""

    @functools.wraps(compute)
    def mapped(*operands: Any, how: How) -> Any:
        one = functools.partial(compute, how=how._replace(batch=0))
        for _ in range(how.batch):
            one = jax.vmap(one)
        return one(*operands)

    return mapped


def _learnable(how: How) -> int:
    """The number of primals that have a derivative."""
    return 1 + sum(how[3:6])


def _y(primals: Sequence[Any], how: How) -> Callable[..., Any]:
    """`y` as a function of the primals that have a derivative."""
    counts = tuple(primals[_learnable(how) :])
    return lambda *given: formula.forward(*given, *counts, how=how)[0]


@_for_each
def _tangent(*operands: Any, how: How) -> tuple[Any]:
    """The derivative of `y`. The operands are the statistics, the primals, and the tangents of differentiable ones."""
    size = _learnable(how)
    primals, tangents = operands[3:-size], operands[-size:]
    return (jax.jvp(_y(primals, how), primals[:size], tangents)[1],)


@_for_each
def _backward(dy: Any, mean: Any, low: Any, var: Any, *primals: Any, how: How) -> tuple[Any, ...]:
    """The gradients, by differentiable reverse differentiation of the formula."""
    return tuple(jax.vjp(_y(primals, how), *primals[: _learnable(how)])[1](dy))


_forward = _for_each(formula.forward)
_gradients = _for_each(formula.gradients)


# --- The primitives ---------------------------------------------------------------------------------------------------


def _primitive(name: str, shapes: Callable[..., list[Any]], compute: Callable[..., Any]) -> Any:
    """A primitive with several results.

    Args:
        name: Its name.
        shapes: The abstract results.
        compute: What it computes.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_abstract_eval(shapes)

    @functools.lru_cache(maxsize=1024)
    def compiled(how: How) -> Any:
        return jax.jit(functools.partial(primitive.bind, how=how))

    def batch(operands: Sequence[Any], axes: Sequence[Any], how: How) -> tuple[Any, Any]:
        size = next(x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None)
        arrays = (
            jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
            for x, axis in zip(operands, axes, strict=True)
        )
        found = primitive.bind(*arrays, how=how._replace(batch=how.batch + 1))
        return found, [0] * len(found)

    primitive.def_impl(lambda *operands, how: compiled(how)(*operands))
    batching.primitive_batchers[primitive] = batch
    mlir.register_lowering(primitive, mlir.lower_fun(compute, multiple_results=True))
    return primitive


def _y_and_statistics(x: Any, *arrays: Any, how: How) -> list[Any]:
    shape = (*x.shape[: how.batch], x.shape[how.batch + how.axis])
    return [x, *[x.update(shape=shape, dtype=formula.arithmetic(x.dtype), weak_type=False)] * 3]


FORWARD = _primitive("batchnorm_forward", _y_and_statistics, _forward)
TANGENT = _primitive("batchnorm_tangent", lambda mean, low, var, x, *rest, how: [x], _tangent)
BACKWARD = _primitive(
    "batchnorm_backward", lambda dy, mean, low, var, *primals, how: list(primals[: _learnable(how)]), _gradients
)
mlir.register_lowering(FORWARD, kernels.lowering(kernels.FORWARD, _forward), platform="cpu")
# Not cached, because in a cached lowering every operand looks like an argument of the program.
mlir.register_lowering(BACKWARD, kernels.lowering(kernels.BACKWARD, _gradients), platform="cpu", cacheable=False)


# --- Their derivatives ------------------------------------------------------------------------------------------------


def _forward_jvp(primals: Sequence[Any], tangents: Sequence[Any], how: How) -> tuple[Any, Any]:
    y, *statistics = FORWARD.bind(*primals, how=how)
    given = [ad.instantiate_zeros(t) for t in tangents[: _learnable(how)]]
    (y_dot,) = TANGENT.bind(*statistics, *primals, *given, how=how)
    return [y, *statistics], [y_dot, *(ad.Zero(jax.typeof(each)) for each in statistics)]


def _tangent_transpose(cotangents: Sequence[Any], *operands: Any, how: How) -> list[Any]:
    (dy,) = cotangents
    size = _learnable(how)
    known, linear = operands[:-size], operands[-size:]
    if type(dy) is ad.Zero:
        return [None] * len(operands)
    found = BACKWARD.bind(dy, *known, how=how)
    wanted = [each if ad.is_undefined_primal(of) else None for each, of in zip(found, linear, strict=True)]
    return [None] * len(known) + wanted


def _differentiated(compute: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """The derivative of a derivative, from the formula, in which the statistics are functions of `x`."""

    def jvp(primals: Sequence[Any], tangents: Sequence[Any], how: How) -> tuple[Any, Any]:
        given = [ad.instantiate_zeros(t) for t in tangents]
        return jax.jvp(functools.partial(compute, how=how), tuple(primals), tuple(given))

    return jvp


ad.primitive_jvps[FORWARD] = _forward_jvp
ad.primitive_jvps[TANGENT] = _differentiated(_tangent)
ad.primitive_jvps[BACKWARD] = _differentiated(_backward)
ad.primitive_transposes[TANGENT] = _tangent_transpose
