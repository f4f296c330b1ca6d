"""What processes tell each other: nothing is lost, nothing comes twice, and gradients find their way back."""

from __future__ import annotations

import pytest
import torch
from distributed_worlds import in_processes
from torch import Tensor

from lightning_mmembed.distributed import Processes

#: Rows of the first, the second ... process; fewer processes take the first ones.
COUNTS = [(0, 0, 0, 0), (1, 1, 1, 1), (7, 7, 7, 7), (64, 64, 64, 64), (0, 7, 1, 64), (64, 0, 0, 1), (1, 0, 7, 7)]


def rows_of(rank: int, count: int, kind: str) -> Tensor:
    """Rows that any process can write for any other."""
    generator = torch.Generator().manual_seed(100 * rank + count)
    drawn = torch.randn(count, 3, generator=generator)
    return {
        "float": drawn,
        "bfloat16": drawn.bfloat16(),
        "float64": drawn.double(),
        "one-dimensional": drawn[:, 0],
        "three-dimensional": drawn[:, :, None].expand(-1, -1, 2),
        "no-columns": drawn[:, :0],
        "int64": (drawn * 2**40).long() + 2**53 + 1,  # no float64 holds them
        "bool": drawn > 0,
    }[kind]


KINDS = ["float", "bfloat16", "float64", "one-dimensional", "three-dimensional", "no-columns", "int64", "bool"]


def check_gather(processes: Processes) -> None:
    for counts in COUNTS:
        counts = counts[: processes.size]
        for kind in KINDS:
            gathered = processes.gather(rows_of(processes.rank, counts[processes.rank], kind))
            right = torch.cat([rows_of(rank, count, kind) for rank, count in enumerate(counts)])
            assert gathered.dtype == right.dtype, kind
            assert torch.equal(gathered, right), (counts, kind)


def loss_of(rank: int, rows: Tensor) -> Tensor:
    """What a process makes of all rows: each of them something else, and no row by itself."""
    weights = torch.randn(len(rows), len(rows), generator=torch.Generator().manual_seed(rank))
    return (torch.tanh(rows @ rows.T) * weights).sum()


def check_gradient(processes: Processes) -> None:
    for counts in COUNTS:
        counts = counts[: processes.size]
        rows = rows_of(processes.rank, counts[processes.rank], "float").requires_grad_()
        own = torch.zeros(sum(counts), 3, requires_grad=True)  # of this process alone, and so is its gradient
        local = own * 1  # it comes after the gathered rows on the way back
        loss_of(processes.rank, processes.gather(rows) + local).backward()  # type: ignore[no-untyped-call]
        everything = [rows_of(rank, count, "float").requires_grad_() for rank, count in enumerate(counts)]
        losses = [loss_of(rank, torch.cat(everything)) for rank in range(processes.size)]
        alone = torch.autograd.grad(losses[processes.rank], everything, retain_graph=True)
        summed = torch.autograd.grad(sum(losses), everything)  # type: ignore[arg-type]
        torch.testing.assert_close(rows.grad, summed[processes.rank])
        torch.testing.assert_close(own.grad, torch.cat(alone))


def check_words(processes: Processes) -> None:
    rank, size = processes.rank, processes.size
    for one in range(size):
        assert processes.any(rank == one)
    assert not processes.any(False)
    assert processes.any(True)
    assert processes.largest(rank) == size - 1
    assert processes.largest(-5 - rank) == -5
    assert processes.largest(2**60 + rank) == 2**60 + size - 1
    for value in ("a folder", None, {"rows": [1, 2]}):
        assert processes.broadcast(value if rank == 0 else "another") == value
    processes.barrier()


def check_all(processes: Processes) -> None:
    check_gather(processes)
    check_gradient(processes)
    check_words(processes)


def test_one_process_needs_no_group() -> None:
    check_all(Processes())


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_process_gathers_all_rows_and_gets_its_gradient_from_all_of_them(size: int) -> None:
    in_processes(size, check_all, seconds=120)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_hold_everything_once_and_differ_by_one_at_most(size: int) -> None:
    for length in (*range(20), 1000, 16_397):
        whole = range(length)
        shares = [whole[Processes(rank, size).share(length)] for rank in range(size)]
        assert [one for share in shares for one in share] == list(whole)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
