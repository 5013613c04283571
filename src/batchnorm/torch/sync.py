"""Communication between the processes of a group: one collective forward and one backward per normalization."""

import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Group"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OK, FAILED, WIDER = range(3)
"""The kind of a row: the moments of a process, its failure, or a request for longer rows."""
HEADER = 6
"""The entries in front of the moments: the kind of the row, the number of channels, the type of `x`, whether `x` needs
a gradient, the number of positions that the mask keeps, and their total count."""

FIRST_WIDTH = 256
_widths: "weakref.WeakKeyDictionary[Any, int]" = weakref.WeakKeyDictionary()
"""The number of channels for which the rows of each group have room. All rows of a group have the same length."""


class Group:
    """Two or more processes, of which this is one."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    @staticmethod
    def of(group: Any) -> "Group | None":
        """The processes of a `torch.distributed` group; None if there are no others."""
        if not (dist.is_available() and dist.is_initialized()):
            if group is not None:
                raise RuntimeError("a process group was given, but torch.distributed is not initialized")
            return None
        group = dist.group.WORLD if group is None else group
        if dist.get_rank(group) < 0:
            raise RuntimeError("this process is not in the process group of its SyncStatistics")
        return Group(group) if dist.get_world_size(group) > 1 else None

    def pool(self, x: Tensor, positions: Any, count: Any, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Count, mean and biased variance over all processes, differentiable, from those of this process.

        The host waits for the others, to know whether they failed. While a CUDA graph is captured it cannot: then
        nothing is checked.

        Args:
            x: The tensor of these moments. All processes must agree on its channels, its type and whether it needs a
                gradient.
            positions: The number of its positions that count; 0 for a process without samples.
            count: Their total count, a number or a tensor.
            mean, var: `(C,)`; zeros if nothing counts.

        Returns:
            Tensors of float64.

        Raises:
            ValueError: If all processes together have fewer than two positions.
            RuntimeError: If a process failed, died, or does not match the others.
        """
        channels = len(mean)
        self._make_room(channels, mean.device)
        needs_gradient = torch.is_grad_enabled() and x.requires_grad
        own = [OK, channels, DTYPES.index(x.dtype), needs_gradient, positions, count]
        padding = mean.new_zeros(2 * (_widths[self.group] - channels), dtype=torch.float64)
        rows: Tensor = _Gather.apply(torch.cat([_header(own, mean), mean.double(), var.double(), padding]), self)
        if not (mean.is_cuda and torch.cuda.is_current_stream_capturing()):
            values = int(self._require(rows.detach(), OK)[:, 4].sum())
            if values < 2:
                raise ValueError(
                    f"Expected more than 1 value per channel when training, got {values} in all {self.size} "
                    f"processes together, here input size {x.size()}. Use larger batches, or evaluate (model.eval())"
                )
        counts = rows.detach()[:, 5:6]
        means, variances = rows[:, HEADER : HEADER + 2 * channels].chunk(2, 1)
        total = counts.sum()
        center = (counts * means).sum(0) / total
        return total, center, (counts * (variances + (means - center) ** 2)).sum(0) / total

    def reduce(self, sums: Tensor) -> Tensor:
        """The sum of `sums` over all processes, in place."""
        self._call(dist.all_reduce, sums)
        return sums

    def fail(self, device: torch.device) -> None:
        """Tell the other processes, which are waiting in `pool`, that this one failed before it could call `pool`."""
        self._gather(self._row([FAILED], device))

    def _row(self, header: list[int], device: torch.device) -> Tensor:
        row = torch.zeros(HEADER + 2 * _widths.setdefault(self.group, FIRST_WIDTH), dtype=torch.float64, device="cpu")
        row[: len(header)] = torch.tensor(header, dtype=torch.float64, device="cpu")
        return row.to(device)

    def _make_room(self, channels: int, device: torch.device) -> None:
        """Agree on longer rows, with one more collective."""
        if channels > _widths.setdefault(self.group, FIRST_WIDTH):
            self._require(self._gather(self._row([WIDER, channels], device)), WIDER)
            _widths[self.group] = channels

    def _require(self, rows: Tensor, kind: int) -> Tensor:
        """The headers of the rows; an error if they do not match."""
        about = rows[:, :HEADER].cpu()
        failed = [rank for rank, flag in enumerate(about[:, 0].tolist()) if flag == FAILED]
        if failed:
            raise RuntimeError(
                f"synchronized batch normalization: process {', '.join(map(str, failed))} of {self.size} failed; "
                "see the error of that process"
            )
        channels = about[:, 1].int().tolist()
        if len(set(channels)) > 1:
            raise RuntimeError(f"x has different numbers of channels in the processes: {self._each(channels)}")
        dtypes = [str(DTYPES[int(code)]).removeprefix("torch.") for code in about[:, 2].tolist()]
        if len(set(dtypes)) > 1:
            raise RuntimeError(f"x has different types in the processes: {self._each(dtypes)}")
        needs = [bool(flag) for flag in about[:, 3].tolist()]
        if len(set(needs)) > 1:
            raise RuntimeError(
                f"x needs a gradient in only some of the processes: {self._each(needs)}; their backward pass would "
                "wait for the others forever"
            )
        assert set(about[:, 0].tolist()) == {kind}, "equal numbers of channels need rows of equal length"
        return about

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
                f"synchronized batch normalization: process {self.rank} of {self.size} waited for the others in vain: "
                "one of them has ended, or the processes called different numbers of synchronized layers or of their "
                f"backward passes ({error})"
            ) from error


def _header(entries: list[Any], like: Tensor) -> Tensor:
    """Numbers, and tensors of one number, in a row. Numbers go to a GPU as arguments of kernels, without a wait."""
    exact = torch.float64
    return torch.stack([e.to(exact) if isinstance(e, Tensor) else like.new_full((), e, dtype=exact) for e in entries])


class _Gather(torch.autograd.Function):
    """The rows of all processes, in every process."""

    @staticmethod
    def forward(ctx: Any, row: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return group._gather(row)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Scatter.apply(grads[0], ctx.group), None


class _Scatter(torch.autograd.Function):
    """The sum over all processes of this process's row: the adjoint of `_Gather`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return group.reduce(rows.contiguous().clone())[group.rank]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Gather.apply(grads[0], ctx.group), None
