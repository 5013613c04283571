"""Weight decay and gradients: what an optimizer does to gamma and beta, and how to take them out of the decay."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from batchnorm.jax.modules import refuse

__all__ = ["Treatment", "exclude_from_weight_decay", "treatment"]

Path = tuple[Any, ...]

STEPS = (0, 1, 3, 7, 15, 31)
"""A schedule may begin with 0, and one that accumulates gradients updates in one of several steps."""


def exclude_from_weight_decay(tx: Any, model: Any) -> Any:
    """The optimizer, without weight decay for the scale and bias of batch normalizations.

    Weight decay is meant for weights whose scale a normalization takes away. What the optimizer sees in the place of
    scale and bias is 0, so that all it takes from the values of parameters, decay or a trust ratio, is as for 0.

    Args:
        tx: A transformation of `optax`. In a `nnx.Optimizer`, replace the one that it has, which keeps its state:
            `optimizer.tx = exclude_from_weight_decay(optimizer.tx, model)`.
        model: The model.

    Returns:
        The transformation.

    Raises:
        TypeError: If `model` is no module, or `tx` no transformation.
    """
    refuse(model)
    _check(tx)
    paths = set(_paths(model))
    inner = optax.with_extra_args_support(tx)

    def update(updates: Any, state: Any, params: Any = None, **more: Any) -> Any:
        if params is not None:
            params = _map(lambda path, p: jnp.zeros_like(p) if path in paths else p, params)
        return inner.update(updates, state, params, **more)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _paths(model: Any) -> Iterator[Path]:
    """The paths of all scales and biases."""
    for path, module in nnx.iter_graph(model):
        if isinstance(module, nnx.BatchNorm):
            yield (*path, "scale")
            yield (*path, "bias")


class Treatment(NamedTuple):
    """What an optimizer does to a variable.

    Attributes:
        learns: Whether it follows its gradient.
        decay: How much less of 1 a step leaves; 0 without decay.
    """

    learns: bool
    decay: float


def treatment(optimizer: Any, model: Any) -> dict[Path, Treatment]:
    """What an optimizer does to each variable that it updates, by its path.

    Optax does not say, so it is tried: with gradients of 0 an update is the decay, and with gradients of 1 it is
    something. Neither the optimizer nor the model changes.

    Args:
        optimizer: A `nnx.Optimizer`, or a transformation of `optax` for all `nnx.Param`.
        model: The model.

    Raises:
        TypeError: If it is neither, or an update needs more than gradients and parameters.
    """
    tx, wrt = (optimizer.tx, optimizer.wrt) if isinstance(optimizer, nnx.Optimizer) else (optimizer, nnx.Param)
    _check(tx)
    pure = getattr(nnx, "as_pure", None) or nnx.pure  # Flax 0.12.0 has only the second
    params = pure(nnx.state(model, wrt))
    zeros, ones = (jax.tree.map(make, params) for make in (jnp.zeros_like, jnp.ones_like))
    update = jax.jit(tx.update)  # uncompiled, `optax.MultiSteps` would compile its branches anew in each step
    largest: dict[Path, list[float]] = {}
    try:
        start = tx.init(params)
        for step in STEPS:
            at = jax.tree.map(lambda leaf, step=step: leaf + step if _counts(leaf) else leaf, start)
            moved = update(ones, at, ones)[0]
            decayed, still = (update(zeros, at, values)[0] for values in (ones, zeros))
            decay = jax.tree.map(lambda a, b: a - b, decayed, still)
            for place, tree in enumerate((moved, decay)):
                for path, leaf in _flat(tree):
                    of = largest.setdefault(path, [0.0, 0.0])
                    of[place] = max(of[place], float(jnp.abs(leaf).max(initial=0.0)))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"the optimizer cannot be looked at, because its update fails with gradients and parameters alone "
            f"({str(error).splitlines()[0]}): diagnose without optimizer"
        ) from error
    any_moves = any(moved for moved, _ in largest.values())
    return {path: Treatment(moved > 0 or not any_moves, decay) for path, (moved, decay) in largest.items()}


def _check(tx: Any) -> None:
    if not (callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))):
        raise TypeError(f"optimizer must be a nnx.Optimizer or a transformation of optax, got {type(tx).__name__}")


def _counts(leaf: Any) -> bool:
    """Whether this is a number of steps."""
    return jnp.ndim(leaf) == 0 and jnp.issubdtype(jnp.result_type(leaf), jnp.integer)


def _key(path: Any) -> Path:
    """A path of JAX as one of Flax."""
    return tuple(getattr(part, "key", getattr(part, "idx", getattr(part, "name", None))) for part in path)


def _map(function: Any, tree: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, leaf: function(_key(path), leaf), tree)


def _flat(tree: Any) -> Iterator[tuple[Path, Any]]:
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield _key(path), leaf
