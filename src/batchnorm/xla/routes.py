"""The two routes, our CPU kernels and XLA's own loops, and the rule that chooses between them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp

from batchnorm.xla import kernels
from batchnorm.xla.formula import How

__all__ = ["ROUTES", "SMALL", "choose", "expect_formula", "route"]

ROUTES = ("kernels", "formula")
"""In order of preference."""

SMALL = 1 << 12
"""The number of values from which the kernels compute, in any layout.

From it on they are faster than XLA's loops, with a backward pass or without. Below it a step takes some tens of
microseconds in any case, most of them to start the program, and a small model does without Numba. `python -m benchmarks
jax` times both on either side. In evaluation XLA always computes: it is one pass, which XLA fuses with its neighbours.
"""

GROUPS = 4
"""Up to this many groups, `SMALL` is the number of values of all; with more, each needs this share of it."""

DTYPES = (jnp.float32, jnp.float64, jnp.bfloat16)
"""The types that the kernels support."""

_allowed: tuple[str, ...] | None = None


def choose(x: Any, arrays: Sequence[Any], how: How, groups: int = 1) -> How | None:
    """How the kernels compute this on a CPU, with `least` set; None if the formula computes it.

    Args:
        x, arrays, how: As in `formula.forward`.
        groups: The number of groups of samples that are normalized on their own.

    Raises:
        RuntimeError: If `with route("kernels")` excludes the formula, and the kernels cannot compute this.
    """
    if _allowed is not None and "kernels" not in _allowed:
        return None
    least = SMALL if _allowed is None else 0
    # The size comes first, because registering the kernels imports Numba. An export may leave it open.
    if isinstance(x.size, int) and x.size * GROUPS < least * max(groups, GROUPS):
        return None
    if problem := _problem(x, arrays, how):
        expect_formula(x, problem)
        return None
    return how._replace(least=least)


def expect_formula(x: Any, problem: str) -> None:
    """Raise an error unless the formula may compute what the kernels cannot.

    Args:
        x: The batch.
        problem: Why they cannot.

    Raises:
        RuntimeError: If `with route("kernels")` excludes the formula.
    """
    if _allowed is not None and "formula" not in _allowed:
        raise RuntimeError(
            f"route('kernels') cannot compute this call: {problem}; x is {x.dtype} of shape {x.shape}. Allow 'formula' "
            "as well, which computes everything"
        )


def _problem(x: Any, arrays: Sequence[Any], how: How) -> str:
    """Why the kernels cannot compute this; "" if they can.

    They are used in programs for one device: in a program for several, a custom call would gather `x` on each.
    """
    *_, residual, counts = how.spread(arrays)
    if not isinstance(x.size, int):
        return "its size is not known"
    if x.size == 0:
        return "it is empty"
    if x.dtype not in DTYPES:
        return "they do not have this type"
    if residual is not None and residual.dtype != x.dtype:
        return f"its residual is {residual.dtype}"
    if counts is not None and counts.shape[how.axis] != 1:
        return "its mask differs between the channels"
    if not jax.typeof(x).sharding.mesh.empty:
        return "it is inside shard_map, or has an explicit sharding"
    return "" if kernels.registered() else "XLA's interface has an unknown version"


@contextmanager
def route(*names: str) -> Iterator[None]:
    """Restrict batch normalizations to these routes: for tests, benchmarks and bug reports.

    ```
    with batchnorm.jax.route("formula"):
        y, _ = batch_norm(x, training=True)
    ```

    With `"kernels"`, the CPU kernels compute every call that they can, whatever its size, and another call is an error.
    With both names, the formula computes the others. The layer for Keras on JAX obeys where it normalizes by the
    statistics of the batch; its evaluation, renormalization, synchronized statistics and virtual batches are never
    computed by the kernels, and no error says so. This holds in the whole process, for calls that are traced inside the
    block: a function that `jax.jit` has compiled before keeps its route. Programs for other devices than one CPU, and
    exported ones, are made from the formula in any case. `route()` without names lets the rule choose again, inside a
    block that does not.

    Args:
        names: Among `"kernels"` and `"formula"`.

    Raises:
        ValueError: If a name is unknown.
        RuntimeError: In a call, if none of these routes can compute it: the kernels have no evaluation, and only
            float32, float64 and bfloat16.
    """
    global _allowed
    unknown = [name for name in names if name not in ROUTES]
    if unknown:
        raise ValueError(f"a route must be one of {', '.join(ROUTES)}; got {', '.join(map(str, unknown))}")
    before, _allowed = _allowed, names or None
    try:
        yield
    finally:
        _allowed = before
