"""Merge the moments of several devices or processes by their counts, on every backend."""

from typing import Any

import keras
from keras import ops

from batchnorm.keras.functional import Moments

__all__ = ["pool"]


def pool(own: Moments, axis_name: str | tuple[str, ...] | None = None) -> Moments:
    """The moments of all replicas together, differentiable, from the moments of each.

    `mean = sum n_i mean_i / n`, `var = sum n_i (var_i + (mean_i - mean)^2) / n`. This is exact for any split, even if
    some replicas are empty.

    - TensorFlow: the replicas of the `tf.distribute` strategy around the call.
    - JAX: the devices along `axis_name`, an axis of `shard_map`, `pmap` or `vmap`; if None, along all axes of the
      `shard_map` around the call. Under `jit`, the statistics of a sharded array are already those of the whole array.
    - PyTorch: the processes of `torch.distributed`.

    Args:
        own: The moments of this replica.
        axis_name: JAX only: the mapped axes to pool over.

    Source: Chan, Golub & LeVeque 1983.
    """
    backend = keras.backend.backend()
    if backend == "tensorflow":
        total = _sum_of_replicas
    elif backend == "jax":
        names = _mapped_axes() if axis_name is None else axis_name
        if not names:
            return own

        def total(values: Any) -> Any:
            import jax

            return jax.lax.psum(values, names)

    else:
        total = _sum_of_processes
    channels = own.mean.shape[0]
    sums = total(ops.concatenate([own.count, own.count * own.mean]))
    count, weighted = sums[:channels], sums[channels:]
    some = ops.where(count > 0, count, 1)
    mean = weighted / some
    return Moments(count, mean, total(own.count * (own.var + ops.square(own.mean - mean))) / some)


def _sum_of_replicas(values: Any) -> Any:
    import tensorflow as tf

    replica = tf.distribute.get_replica_context()
    if replica is None or replica.num_replicas_in_sync == 1:
        return values
    return replica.all_reduce(tf.distribute.ReduceOp.SUM, values)


def _mapped_axes() -> tuple[str, ...]:
    """The axes of the `shard_map` around the call."""
    import jax

    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def _sum_of_processes(values: Any) -> Any:
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return values
    from torch.distributed.nn.functional import all_reduce

    return all_reduce(values)
