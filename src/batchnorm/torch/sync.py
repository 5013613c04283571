"""What the processes of a group tell each other about a normalization: one collective forward, one backward."""

import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Group"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FAILED = -1.0
HEADER = 4
"""Numbers before the moments of a process: whether it failed, the type of `x`, whether `x` needs a gradient, count."""

_agreed: "weakref.WeakKeyDictionary[Any, set[int]]" = weakref.WeakKeyDictionary()
"""For how many channels each group has seen that all its processes have as many."""


class Group:
    """Two processes or more, of which this is one."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    @staticmethod
    def of(group: Any) -> "Group | None":
        """The processes of a group of `torch.distributed`; None if this one is alone."""
        if not (dist.is_available() and dist.is_initialized()):
            if group is not None:
                raise RuntimeError("a process group was given, but torch.distributed is not initialized")
            return None
        group = dist.group.WORLD if group is None else group
        if dist.get_rank(group) < 0:
            raise RuntimeError("this process is not in the process group of its SyncStatistics")
        return Group(group) if dist.get_world_size(group) > 1 else None

    def pool(self, x: Tensor, count: Any, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Count, mean and biased variance over all processes, differentiable, from those of this process.

        Args:
            x: Whose moments they are; its type and whether it needs a gradient must be the same everywhere.
            count: A number or a tensor; 0 with zeros for a process without samples.
            mean, var: `(C,)`.

        Returns:
            Tensors of float64.

        Raises:
            RuntimeError: If a process failed, or is gone, or does not fit the others.
        """
        self._agree(len(mean))
        needs_gradient = torch.is_grad_enabled() and x.requires_grad
        about = [0.0, float(DTYPES.index(x.dtype)), float(needs_gradient)]
        header = torch.tensor(about, dtype=torch.float64, device=mean.device)
        own = torch.as_tensor(count, dtype=torch.float64, device=mean.device).reshape(1)
        rows = _Gather.apply(torch.cat([header, own, mean.double(), var.double()]), self)
        self._require(rows.detach())
        counts = rows.detach()[:, 3:4]
        means, variances = rows[:, HEADER:].chunk(2, 1)
        total = counts.sum()
        center = (counts * means).sum(0) / total
        return total, center, (counts * (variances + (means - center) ** 2)).sum(0) / total

    def reduce(self, sums: Tensor) -> Tensor:
        """Their sum over all processes, in place."""
        self._call(dist.all_reduce, sums)
        return sums

    def fail(self, channels: int, device: torch.device | None = None) -> None:
        """Tell the others, which wait in `pool`, that this process has failed before it could call it."""
        if channels not in _agreed.setdefault(self.group, set()):
            self._gather(torch.tensor([FAILED, channels], dtype=torch.float64, device=device))
        else:
            row = torch.zeros(HEADER + 2 * channels, dtype=torch.float64, device=device)
            row[0] = FAILED
            self._gather(row)

    def _agree(self, channels: int) -> None:
        """See once that all have as many channels: rows of several lengths cannot be gathered."""
        if channels in _agreed.setdefault(self.group, set()):
            return
        device = "cuda" if dist.get_backend(self.group) == "nccl" else "cpu"
        rows = self._gather(torch.tensor([0.0, channels], dtype=torch.float64, device=device))
        self._require_success(rows)
        if len(set(rows[:, 1].tolist())) > 1:
            raise RuntimeError(
                f"x does not have the same channels in all processes: {self._each(rows[:, 1].int().tolist())}"
            )
        _agreed[self.group].add(channels)

    def _require(self, rows: Tensor) -> None:
        self._require_success(rows)
        dtypes = [str(DTYPES[int(code)]).removeprefix("torch.") for code in rows[:, 1].tolist()]
        if len(set(dtypes)) > 1:
            raise RuntimeError(f"x does not have the same type in all processes: {self._each(dtypes)}")
        needs = [bool(flag) for flag in rows[:, 2].tolist()]
        if len(set(needs)) > 1:
            raise RuntimeError(
                f"x needs a gradient in some processes only: {self._each(needs)}; the backward pass of the others "
                "would wait for ever"
            )

    def _require_success(self, rows: Tensor) -> None:
        failed = [rank for rank, flag in enumerate(rows[:, 0].tolist()) if flag == FAILED]
        if failed:
            raise RuntimeError(
                f"synchronized batch normalization: process {', '.join(map(str, failed))} of {self.size} failed; "
                "its own error says why"
            )

    @staticmethod
    def _each(values: list[Any]) -> str:
        return ", ".join(f"{value} in process {rank}" for rank, value in enumerate(values))

    def _gather(self, row: Tensor) -> Tensor:
        rows = [torch.empty_like(row) for _ in range(self.size)]
        self._call(dist.all_gather, rows, row.contiguous())
        return torch.stack(rows)

    def _call(self, collective: Any, *tensors: Any) -> None:
        try:
            collective(*tensors, group=self.group)
        except RuntimeError as error:
            raise RuntimeError(
                f"synchronized batch normalization: process {self.rank} of {self.size} waited for the others in vain. "
                "One has ended, or has called another number of synchronized layers, or of their backward passes. "
                f"({error})"
            ) from error


class _Gather(torch.autograd.Function):
    """One row of each process, on all of them."""

    @staticmethod
    def forward(ctx: Any, row: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return group._gather(row)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Scatter.apply(grads[0], ctx.group), None


class _Scatter(torch.autograd.Function):
    """The sum of the row that belongs to this process: the reverse of `_Gather`, as it is of this."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return group.reduce(rows.contiguous().clone())[group.rank]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Gather.apply(grads[0], ctx.group), None
