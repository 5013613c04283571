"""The one table of the ways in which a normalization is computed: the first that takes a call computes it."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from batchnorm.torch import composed, cpu, function, gpu, native, operators, transforms
from batchnorm.torch.call import Call, Outcome, Plan, is_plain, is_tracing
from batchnorm.torch.running import Running

__all__ = ["ROUTES", "Route", "choose", "route"]


class Route(NamedTuple):
    """One way to compute a call.

    Attributes:
        name: What `route` and `explain` call it.
        takes: Whether it can compute a plan of a call.
        pays: Whether it should, where others can, too. Not asked inside of `with route(...)`.
        compute: `y`, and the statistics of the batch.
    """

    name: str
    takes: Callable[[Call, Plan], bool]
    pays: Callable[[Call, Plan], bool]
    compute: Callable[[Call, Plan, Running], Outcome]


SMALL, SMALL_EVALUATION, SMALL_COMPILED = 1 << 17, 1 << 20, 1 << 15
"""Values from which on the CPU's kernels pay: in training (twice as many where channels are last), in evaluation, and
in training in a compiled graph.

An autograd function in Python takes about 30 us more, forward and backward, than PyTorch's operation in C++, and from
cold caches several times that. From about these sizes on, on two cores, the kernels make up for it. In evaluation there
is less to make up with: PyTorch's operation reads once and writes once, and the activation is applied in place. In a
compiled graph an operator in Python takes some 100 us more than loops of its own, which are several times as slow.
"""


def _native_pays(call: Call, plan: Plan) -> bool:
    """Where the kernels would not make up for their calls; and wherever there are no kernels of ours."""
    if not call.x.is_cpu:
        return True
    if plan.constants is not None and not call.is_eager and is_tracing():
        return True  # deployment tools know PyTorch's operation
    if not call.is_eager or call.x.dtype is not call.arithmetic:  # PyTorch computes half precision less exactly
        return False
    if plan.constants is not None:
        return call.x.numel() < SMALL_EVALUATION
    return call.x.numel() < (SMALL if call.x.is_contiguous() else 2 * SMALL)


def _stages_take(stages: Any, call: Call, plan: Plan) -> bool:
    """Whether the kernels of a device know what is in the call."""
    return (
        call.x.dtype in stages.DTYPES
        and (call.residual is None or call.residual.dtype is call.x.dtype)
        and (call.x.numel() > 0 or plan.group is not None)
        and call.is_eager
        and is_plain(call.x, *call.tensors, *(plan.constants or ()))
    )


def _numba_takes(call: Call, plan: Plan) -> bool:
    return call.x.is_cpu and _stages_take(cpu, call, plan)


def _triton_takes(call: Call, plan: Plan) -> bool:
    return call.x.is_cuda and gpu.is_available(call.x.device) and _stages_take(gpu, call, plan)


def _operator_takes(call: Call, plan: Plan) -> bool:
    return (
        torch.compiler.is_compiling()
        and not torch.compiler.is_exporting()
        and not transforms.active()
        and operators.takes(call, plan)
    )


def _functorch_takes(call: Call, plan: Plan) -> bool:
    return not torch.compiler.is_compiling() and transforms.takes(call, plan)


def _always(call: Call, plan: Plan) -> bool:
    return True


ROUTES = (
    Route("triton", _triton_takes, _always, functools.partial(function.compute, gpu)),
    Route("native", native.takes, _native_pays, native.compute),
    Route("numba", _numba_takes, _always, functools.partial(function.compute, cpu)),
    Route(
        "operator",
        _operator_takes,
        lambda call, _: call.x.numel() >= SMALL_COMPILED,
        lambda call, plan, _: operators.compute(call, plan),
    ),
    Route("functorch", _functorch_takes, _always, lambda call, plan, _: transforms.compute(call, plan)),
    Route("composed", _always, _always, lambda call, plan, _: composed.compute(call, plan)),
)
"""In this order.

1. `triton`: the GPU's kernels in one autograd function. Called eagerly, with CUDA tensors of a known type.
2. `native`: `torch.batch_norm` and the activation. The statistics of the batch or constants, without a mask: small
   tensors on the CPU, and every size on devices for which there are no kernels of ours.
3. `numba`: the CPU's kernels in the same function as the GPU's. Called eagerly, with ordinary tensors of a known type.
4. `operator`: the CPU's kernels as registered operators. In a compiled graph on the CPU, from a size on.
5. `functorch`: these operators inside `torch.func`'s `grad` and `vmap`, on the CPU.
6. `composed`: the formula in PyTorch's elementary operations. Everything.
"""

_NAMES = tuple(route.name for route in ROUTES)
_allowed: tuple[str, ...] | None = None


def choose(call: Call, plan: Plan) -> Route:
    """The first route that takes the call.

    Raises:
        RuntimeError: If none of those that `with route(...)` allows can.
    """
    for each in ROUTES:
        if _allowed is None:
            if each.takes(call, plan) and each.pays(call, plan):
                return each
        elif each.name in _allowed and each.takes(call, plan):
            return each
    raise RuntimeError(
        f"route({', '.join(map(repr, _allowed or ()))}) cannot compute this call: x is {call.x.dtype} of shape "
        f"{tuple(call.x.shape)} on {call.x.device}. Allow another route as well; 'composed' computes everything"
    )


@contextmanager
def route(*names: str) -> Iterator[None]:
    """Let batch normalizations be computed only in these ways: for tests, benchmarks and bug reports.

    ```
    with batchnorm.torch.route("composed"):
        y = model(x)
    ```

    Of the routes that are named, the first in the table that can compute a call does so, whatever its size. This holds
    in the whole process, for calls made inside the block; a backward pass belongs to the call that it started from.
    `route()` without names lets the table choose again, inside a block that does not.

    Args:
        names: Among `"triton"`, `"native"`, `"numba"`, `"operator"`, `"functorch"` and `"composed"`.

    Raises:
        ValueError: If there is no such route.
        RuntimeError: In a call, if none of these routes can compute it.
    """
    global _allowed
    unknown = [name for name in names if name not in _NAMES]
    if unknown:
        raise ValueError(f"a route must be one of {', '.join(_NAMES)}; got {', '.join(unknown)}")
    before, _allowed = _allowed, names or None
    try:
        yield
    finally:
        _allowed = before
