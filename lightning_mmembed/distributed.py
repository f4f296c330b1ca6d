"""The processes of a run, and what they tell each other; everything else in the package is the same for one or many."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """This process among those of its run. Every method but :meth:`share` is to be called by all of them.

    Args:
        rank: This process, from 0.
        size: Number of processes; with one, nothing is sent and ``torch.distributed`` is not needed.
        device: Where the backend wants tensors to lie: a GPU for NCCL, the CPU for Gloo.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def share(self, length: int) -> slice:
        """The part of a list of some length that is this process's; parts differ by one at most, and may be empty.

        Example:
            >>> [Processes(rank, 3).share(4) for rank in range(3)]
            [slice(0, 1, None), slice(1, 2, None), slice(2, 4, None)]
        """
        return slice(self.rank * length // self.size, (self.rank + 1) * length // self.size)

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def broadcast(self, value: Any) -> Any:
        """The value that the first process has, any that can be pickled."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, device=self.device)
        return values[0]

    def any(self, value: bool) -> bool:
        """Whether it is so in one of the processes."""
        return self.largest(int(value)) > 0

    def largest(self, value: int) -> int:
        """The largest of the numbers that the processes have."""
        if self.size == 1:
            return value
        number = torch.tensor(value, device=self.device)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)

    def gather(self, rows: Tensor) -> Tensor:
        """Put the rows of all processes below each other, those of the first process first.

        The gradient of a gathered row flows back to the process that it comes from, summed over all processes. DDP and
        FSDP then take the mean over the processes, so what is minimised is the mean of the losses of all processes.

        Args:
            rows: ``(N, ...)`` rows, as many as a process has, none included; the other dimensions are the same
                everywhere.

        Returns:
            ``(sum of N, ...)`` rows, on the device and in the type of the rows.
        """
        if self.size == 1:
            return rows
        counts = self._gather(torch.tensor([len(rows)], device=self.device)).tolist()
        gathered = _GatherRows.apply(rows.to(self.device), counts, self)  # type: ignore[no-untyped-call]
        return cast(Tensor, gathered).to(rows.device)

    def _gather(self, rows: Tensor) -> Tensor:
        """The same for as many rows in every process, without a gradient."""
        parts = [torch.empty_like(rows) for _ in range(self.size)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)


#: A process without others.
ALONE = Processes()


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int], processes: Processes) -> Tensor:
        start = sum(counts[: processes.rank])
        ctx.own = slice(start, start + counts[processes.rank])
        most = max(1, *counts)
        filler = rows.new_zeros(most - len(rows), *rows.shape[1:])
        parts = torch.split(processes._gather(torch.cat([rows, filler])), most)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        summed = gradients[0].clone(memory_format=torch.contiguous_format)  # what comes in is not ours to change
        dist.all_reduce(summed)
        return summed[ctx.own], None, None
