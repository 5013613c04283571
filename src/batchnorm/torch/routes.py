"""The table of routes, the ways to compute a normalization: the first route that takes a call computes it."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.torch import cards, composed, cpu, function, gpu, native, operators, transforms
from batchnorm.torch.call import Call, Outcome, Plan, is_plain, is_recorded
from batchnorm.torch.running import Running

__all__ = ["ROUTES", "Route", "choose", "is_small", "route"]


class Route(NamedTuple):
    """One way to compute a call.

    Attributes:
        name: Its name in `route` and `explain`.
        takes: Whether it can compute this plan of this call.
        pays: Whether it should, where later routes can as well. Not asked inside `with route(...)`.
        compute: Computes the outcome; None, and nothing is changed, if the routes after it would be more exact.
    """

    name: str
    takes: Callable[[Call, Plan], bool]
    pays: Callable[[Call, Plan], bool]
    compute: Callable[[Call, Plan, Running], Outcome | None]


SMALL, SMALL_EVALUATION, SMALL_COMPILED = 1 << 16, 1 << 18, 1 << 15
"""The numbers of values from which the CPU kernels pay: in training (8 times as many for matrices and for strides that
are not those of channels-first), in evaluation, and in training in a compiled graph.

Forward and backward, an autograd function in Python takes longer than PyTorch's operation in C++, above all when it
finds nothing in the caches. From about these sizes on, on two cores, the kernels make up for it. They have less to gain
where channels are adjacent, because PyTorch's operation is faster there, and in evaluation, where each of PyTorch's
operations reads once and writes once. In a compiled graph, an operator in Python takes longer than the graph's own
loops, which are several times slower.
"""


def _native_pays(call: Call, plan: Plan) -> bool:
    """On small CPU tensors, where calling our kernels costs more than they gain, and where we have no kernels."""
    if not call.x.is_cpu or call.x.is_mkldnn:
        return True
    if not call.is_eager and is_recorded():
        return True  # deployment tools know PyTorch's operation
    if (
        not call.is_eager or not is_plain(call.x) or call.x.dtype is not call.arithmetic
    ):  # PyTorch computes half precision less exactly
        return False
    return is_small(call.x, plan.constants is None)


def is_small(x: Tensor, training: bool) -> bool:
    """Whether calling our kernels for a CPU tensor costs more than they gain."""
    if training:
        return x.numel() < (SMALL if x.dim() > 2 and x.is_contiguous() else 8 * SMALL)
    return x.numel() < SMALL_EVALUATION


def _stages_take(stages: Any, call: Call, plan: Plan) -> bool:
    """Whether the kernels of a device support everything in the call."""
    return (
        call.x.dtype in stages.DTYPES
        and not plan.has_gradients
        and not call.x.is_mkldnn
        and (call.residual is None or call.residual.dtype is call.x.dtype)
        and (call.x.numel() > 0 or plan.group is not None)
        and call.is_eager
        and is_plain(call.x, *call.tensors, *(plan.constants or ()))
    )


def _numba_takes(call: Call, plan: Plan) -> bool:
    return call.x.is_cpu and _stages_take(cpu, call, plan)


def _triton_takes(call: Call, plan: Plan) -> bool:
    x = call.x
    if not x.is_cuda or not gpu.is_available(x.device):
        return False
    # All processes of a group must decide alike, whatever the sizes and strides of their own x.
    whole = gpu.takes(x) if plan.group is None else x.shape[1] * x.element_size() % gpu.VECTOR == 0
    return whole and _stages_take(gpu, call, plan)


def _triton_pays(call: Call, plan: Plan) -> bool:
    """From a size on, where PyTorch's operation takes less time for small tensors and can compute the call."""
    return call.x.numel() >= cards.smallest(call.x.device) or not native.takes(call, plan)


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


def _compute_natively(call: Call, plan: Plan, running: Running) -> Outcome | None:
    """By PyTorch's operation, which must be as exact as our kernels where these may be used instead."""
    others = allowed is None or "numba" in allowed
    strict = call.is_eager and call.x.numel() > 0 and others and is_plain(call.x, *call.tensors)
    return native.compute(call, plan, running, strict=strict)


def _composed_takes(call: Call, plan: Plan) -> bool:
    return not call.x.is_mkldnn


ROUTES = (
    Route("triton", _triton_takes, _triton_pays, functools.partial(function.compute, gpu)),
    Route("native", native.takes, _native_pays, _compute_natively),
    Route("numba", _numba_takes, _always, functools.partial(function.compute, cpu)),
    Route(
        "operator",
        _operator_takes,
        lambda call, _: call.x.numel() >= SMALL_COMPILED,
        lambda call, plan, _: operators.compute(call, plan),
    ),
    Route("functorch", _functorch_takes, _always, lambda call, plan, _: transforms.compute(call, plan)),
    Route("composed", _composed_takes, _always, lambda call, plan, _: composed.compute(call, plan)),
)
"""In order of preference.

1. `triton`: the GPU kernels, in one autograd function. For eager calls with CUDA tensors of a supported type, from the
   size on that the table in `cards.py` has for the GPU, and all calls that `native` cannot compute.
2. `native`: `torch.batch_norm` and the activation. For the statistics of the batch or constants, without a mask: small
   tensors on the CPU, unless their mean is so far from 0 that the kernels are more exact, and all sizes on devices
   without kernels of ours.
3. `numba`: the CPU kernels, in the same autograd function. For eager calls with ordinary tensors of a supported type.
4. `operator`: the CPU kernels as registered operators. For compiled graphs on the CPU, from a minimum size.
5. `functorch`: the same operators inside `grad` and `vmap` of `torch.func`, on the CPU.
6. `composed`: the formula in PyTorch's elementary operations. For everything else.
"""

_NAMES = tuple(route.name for route in ROUTES)
allowed: tuple[str, ...] | None = None
"""The routes to which `with route(...)` restricts calls; None outside of it."""


def choose(call: Call, plan: Plan, after: Route | None = None) -> Route:
    """The first route that takes the call, among all or among those after another.

    Raises:
        RuntimeError: If none of the routes that `with route(...)` allows can compute it, or none at all.
    """
    for each in ROUTES[0 if after is None else ROUTES.index(after) + 1 :]:
        if allowed is None:
            if each.takes(call, plan) and each.pays(call, plan):
                return each
        elif each.name in allowed and each.takes(call, plan):
            return each
    if call.x.is_mkldnn:
        raise RuntimeError(
            f"x is an mkldnn tensor of shape {tuple(call.x.shape)}, for which there is only PyTorch's own operation: "
            "without a mask, by the statistics of the batch or the running ones; otherwise call x.to_dense() first"
        )
    raise RuntimeError(
        f"route({', '.join(map(repr, allowed or ()))}) cannot compute this call: x is {call.x.dtype} of shape "
        f"{tuple(call.x.shape)} on {call.x.device}. Allow another route as well; 'composed' computes everything"
    )


@contextmanager
def route(*names: str) -> Iterator[None]:
    """Restrict batch normalizations to these routes: for tests, benchmarks and bug reports.

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
        ValueError: If a name is unknown, or if there is none.
        RuntimeError: In a call, if none of these routes can compute it.
    """
    global allowed
    unknown = [name for name in names if name not in _NAMES]
    if unknown:
        raise ValueError(f"a route must be one of {', '.join(_NAMES)}; got {', '.join(map(str, unknown))}")
    before, allowed = allowed, names or None
    try:
        yield
    finally:
        allowed = before
