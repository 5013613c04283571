"""Moments merged over several processes, with the same result in each."""

import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from batchnorm.definition import Moments, merge_moments

__all__ = ["Pool"]

FAILED = -1.0


class Pool:
    """The processes of a group, or this process alone without `torch.distributed`: a `whole.calibrate.Processes`.

    Every process calls `agree` once, then `merge` as often as the others. If a process fails within `all_or_none`, the
    others fail, too, instead of waiting for it.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.alone = not (dist.is_available() and dist.is_initialized())
        if group is not None and self.alone:
            raise ValueError("a process group was given, but torch.distributed is not initialized")
        self.sizes: dict[str, int] = {}
        self._merged = False

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """Surround one call of `agree` or `merge` and the code before it: an error here is one in all processes."""
        self._merged = False
        try:
            yield
        except BaseException:
            if not self._merged and not self.alone:
                self._gather([FAILED, 0, 0])
            raise

    def agree(self, sizes: Mapping[str, int]) -> None:
        """Check that all processes have the same layers.

        Args:
            sizes: The number of channels of each layer.

        Raises:
            RuntimeError: If their layers differ, or if a process failed.
        """
        self._merged = True
        self.sizes = dict(sizes)
        if not self.alone:
            text = repr(sorted(sizes.items())).encode()
            self._require([0, len(sizes), zlib.crc32(text)])

    def merge(
        self, samples: int, found: Mapping[str, Moments], marked: Collection[str] = ()
    ) -> tuple[int, dict[str, Moments], set[str]]:
        """Add the samples, merge the moments, and unite the marked layers of all processes.

        Args:
            samples: The number of samples that this process has seen.
            found: The moments of some of the layers.
            marked: The names of some of the layers.

        Returns:
            The same three, over all processes.

        Raises:
            RuntimeError: If another process failed.
        """
        self._merged = True
        if self.alone:
            return samples, dict(found), set(marked)
        samples = int(sum(header[1] for header in self._require([0, samples, 0])))
        mine = [
            np.r_[float(name in marked), m.count, m.mean, m.var]
            for name, size in self.sizes.items()
            for m in (found.get(name) or Moments(0.0, np.zeros(size), np.zeros(size)),)
        ]
        ends = np.cumsum([len(part) for part in mine])[:-1]
        merged: dict[str, Moments] = {}
        union: set[str] = set()
        for row in self._gather(np.concatenate(mine)) if mine else ():
            for name, part in zip(self.sizes, np.split(row, ends), strict=True):
                theirs = Moments(float(part[1]), *np.split(part[2:], 2))
                union |= {name} if part[0] else set()
                if theirs.count > 0:
                    merged[name] = merge_moments(merged[name], theirs) if name in merged else theirs
        return samples, merged, union

    def _require(self, header: list[float]) -> list[Any]:
        """The header of each process. The last number must be the same in all.

        Raises:
            RuntimeError: If one of them failed, or if the numbers differ.
        """
        headers = self._gather(header)
        failed = [str(rank) for rank, theirs in enumerate(headers) if theirs[0] == FAILED]
        if failed:
            raise RuntimeError(f"process {', '.join(failed)} of the group failed; nothing was changed here")
        if len({theirs[2] for theirs in headers}) > 1:
            raise RuntimeError("the processes of the group do not have the same layers")
        return headers

    def _gather(self, values: Any) -> list[Any]:
        """The values of each process."""
        device = "cuda" if dist.get_backend(self.group) == "nccl" else "cpu"
        mine = torch.as_tensor(np.asarray(values, np.float64), device=device)
        rows = [torch.empty_like(mine) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(rows, mine, group=self.group)
        return [row.cpu().numpy() for row in rows]
