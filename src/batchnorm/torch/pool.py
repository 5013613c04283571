"""Moments that several processes have found, merged: the same on all of them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from batchnorm.definition import Moments, merge_moments

__all__ = ["Pool"]

FAILED = -1.0


class Pool:
    """The processes of a group that call together; this one alone without `torch.distributed`.

    Every process calls `merge` as often as the others. One that fails before makes the others fail too, if it does so
    within `all_or_none`: they do not wait for what never comes.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.alone = not (dist.is_available() and dist.is_initialized())
        if group is not None and self.alone:
            raise ValueError("a process group was given, but torch.distributed is not initialized")
        self._merged = False

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """One call of `merge`, and what leads to it."""
        self._merged = False
        try:
            yield
        except BaseException:
            if not self._merged and not self.alone:
                self._gather([FAILED, 0, 0])
            raise

    def merge(
        self, samples: int, sizes: Mapping[str, int], found: Mapping[str, Moments], *, first_only: bool = False
    ) -> tuple[int, dict[str, Moments]]:
        """Add up the samples, merge the moments.

        Args:
            samples: How many this process had.
            sizes: The channels of each layer, the same on all processes.
            found: The moments of some of them, in the order in which they came.
            first_only: Whether only one layer is wanted: of those that came first in a process, the first in `sizes`.

        Raises:
            RuntimeError: If another process failed, or has other layers.
        """
        self._merged = True
        if self.alone:
            return samples, dict(found)
        names = list(sizes)
        first = names.index(next(iter(found))) if found else len(names)
        headers = self._gather([samples, first, sum(sizes.values())])
        failed = [str(rank) for rank, header in enumerate(headers) if header[0] == FAILED]
        if failed:
            raise RuntimeError(f"process {', '.join(failed)} of the group failed; here nothing has been changed")
        if len({header[2] for header in headers}) > 1:
            raise RuntimeError("the processes of the group have models of different sizes")
        if first_only:
            names = names[int(min(header[1] for header in headers)) :][:1]
        merged: dict[str, Moments] = {}
        if names:
            mine = [found.get(name) or _nothing(sizes[name]) for name in names]
            ends = np.cumsum([1 + 2 * sizes[name] for name in names])[:-1]
            for row in self._gather(np.concatenate([np.r_[m.count, m.mean, m.var] for m in mine])):
                for name, part in zip(names, np.split(row, ends), strict=True):
                    theirs = Moments(float(part[0]), *np.split(part[1:], 2))
                    merged[name] = merge_moments(merged[name], theirs) if name in merged else theirs
        total = int(sum(header[0] for header in headers))
        return total, {name: moments for name, moments in merged.items() if moments.count > 0}

    def _gather(self, values: Any) -> list[Any]:
        """One row of each process."""
        device = "cuda" if dist.get_backend(self.group) == "nccl" else "cpu"
        mine = torch.as_tensor(np.asarray(values, np.float64), device=device)
        rows = [torch.empty_like(mine) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(rows, mine, group=self.group)
        return [row.cpu().numpy() for row in rows]


def _nothing(size: int) -> Moments:
    return Moments(0.0, np.zeros(size), np.zeros(size))
