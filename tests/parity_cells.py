"""The cells of the table of gradients: a strategy, its passes, what is trained; and defects that must be seen."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from contrast_worlds import (
    Gradients,
    Part,
    batch_of,
    build_encoder,
    fit,
    oracle_gradients,
    oracle_gradients_with_dropout,
    parts,
    with_sgd,
)
from torch import Tensor

from lightning_mmembed import RetrievalModule, contrastive_loss, gradcache
from lightning_mmembed.distributed import Processes
from lightning_mmembed.strategies import FSDP2Strategy

#: Queries of each process.
SIZES = {"ddp-2": (2, 3), "ddp-3": (4, 2, 1), "fsdp2-2": (2, 3)}

#: GradCache's positions in a pass, None for a step without it.
TOKENS = {"plain": None, "item-by-item": 1, "three-items": 80, "all-at-once": 10**6}

DROPOUT = 0.3


@dataclass(frozen=True)
class Cell:
    strategy: str
    passes: str
    negatives: bool = True
    lora: bool = True
    checkpointing: bool = False
    dropout: float = 0.0
    defect: str = ""

    def __str__(self) -> str:
        words = [self.passes, "mined" if self.negatives else "in-batch", "lora" if self.lora else "full"]
        flags = {"checkpointing": self.checkpointing, "dropout": self.dropout, self.defect: self.defect}
        return "-".join([self.strategy, *words, *(name for name, is_on in flags.items() if is_on)])

    @property
    def tokens(self) -> int | None:
        return TOKENS[self.passes]

    @property
    def world(self) -> list[Part]:
        return parts(SIZES[self.strategy], self.negatives)

    def encoder(self, checkpoint: Path) -> Any:
        return build_encoder(checkpoint, self.lora, self.checkpointing, self.dropout)


def train(processes: Processes, cells: list[Cell], checkpoint: Path, directory: Path) -> None:
    """Run a step for each cell; write the gradients and the seed that this process has."""
    for cell in cells:
        encoder = cell.encoder(checkpoint)
        module = with_sgd(encoder, cell.tokens)
        batch = batch_of(encoder, cell.world[processes.rank], cell.tokens)
        strategy = FSDP2Strategy() if cell.strategy.startswith("fsdp2") else "ddp"
        with pytest.MonkeyPatch.context() as patch:
            if cell.defect:
                DEFECTS[cell.defect](patch, module, cell.world, processes.rank)
            kept = fit(directory, module, [batch], devices=processes.size, strategy=strategy)
        torch.save({"gradients": kept.gradients, "seed": kept.seed}, directory / f"{cell}-{processes.rank}.pt")


def results(cell: Cell, directory: Path) -> list[dict[str, Any]]:
    """What each process wrote for a cell."""
    ranks = range(len(SIZES[cell.strategy]))
    return [torch.load(directory / f"{cell}-{rank}.pt", weights_only=True) for rank in ranks]


def expected(cell: Cell, checkpoint: Path, seeds: list[int]) -> Gradients:
    """The gradients by one process, which has no use for gradient checkpointing."""
    encoder = build_encoder(checkpoint, cell.lora, dropout=cell.dropout)
    if cell.dropout:
        return oracle_gradients_with_dropout(encoder, cell.world, cell.tokens, seeds)
    return oracle_gradients(encoder, cell.world)


# --- defects ---------------------------------------------------------------------------------------------------------

Defect = Callable[[pytest.MonkeyPatch, RetrievalModule, "list[Part]", int], None]


def _weighted(patch: pytest.MonkeyPatch, weight: Callable[[Tensor], Tensor]) -> None:
    contrast = RetrievalModule._contrast

    def changed(module: RetrievalModule, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        loss, accuracy, own = contrast(module, *arguments)
        return loss, accuracy, weight(own)

    patch.setattr(RetrievalModule, "_contrast", changed)


def missing_scale(patch: pytest.MonkeyPatch, module: RetrievalModule, world: list[Part], rank: int) -> None:
    """Each process counts as much as any other, however many queries it has."""
    _weighted(patch, torch.ones_like)


def summed_gradients(patch: pytest.MonkeyPatch, module: RetrievalModule, world: list[Part], rank: int) -> None:
    _weighted(patch, lambda own: own * len(world))


def missing_temperature(patch: pytest.MonkeyPatch, module: RetrievalModule, world: list[Part], rank: int) -> None:
    module.loss = partial(contrastive_loss, temperature=1.0)


def _masked(module: RetrievalModule, columns: list[bool], value: bool) -> None:
    """Set some columns of the mask."""

    def loss(queries: Tensor, candidates: Tensor, positive_index: Tensor, mask: Tensor) -> Tensor:
        changed = mask.masked_fill(torch.tensor(columns), value)
        return contrastive_loss(queries, candidates, positive_index, changed)

    module.loss = loss


def _columns(world: list[Part], rank: int, positives: bool, negatives: bool) -> list[bool]:
    """Which candidates are positives or negatives of another process."""
    return [
        other != rank and (positives if number < len(part.queries) else negatives)
        for other, part in enumerate(world)
        for number in range(len(part.candidates))
    ]


def ungathered_positives(patch: pytest.MonkeyPatch, module: RetrievalModule, world: list[Part], rank: int) -> None:
    _masked(module, _columns(world, rank, True, False), True)


def ungathered_negatives(patch: pytest.MonkeyPatch, module: RetrievalModule, world: list[Part], rank: int) -> None:
    _masked(module, _columns(world, rank, False, True), True)


def local_mask(patch: pytest.MonkeyPatch, module: RetrievalModule, world: list[Part], rank: int) -> None:
    """Labelled positives of a query that another process has count as its negatives."""
    _masked(module, _columns(world, rank, True, True), False)


def gather_without_gradient(patch: pytest.MonkeyPatch, module: RetrievalModule, world: list[Part], rank: int) -> None:
    """The rows of the other processes are constants."""
    gather = Processes.gather

    def changed(processes: Processes, rows: Tensor) -> Tensor:
        gathered = gather(processes, rows.detach())
        if rows.ndim < 2 or not rows.requires_grad:
            return gathered
        first = sum(len(part.candidates) for part in world[:rank])
        return torch.cat([gathered[:first], rows, gathered[first + len(rows) :]])

    patch.setattr(Processes, "gather", changed)


def wrong_pass(patch: pytest.MonkeyPatch, module: RetrievalModule, world: list[Part], rank: int) -> None:
    """Each item gets the gradient of its neighbour."""
    backward = gradcache.GradCache.backward

    def changed(cache: gradcache.GradCache, *arguments: Any) -> None:
        assert cache.vectors.grad is not None
        cache.vectors.grad = cache.vectors.grad.roll(1, 0)
        backward(cache, *arguments)

    patch.setattr(gradcache.GradCache, "backward", changed)


def dropout_not_replayed(patch: pytest.MonkeyPatch, module: RetrievalModule, world: list[Part], rank: int) -> None:
    """The second time a pass is computed its dropout is another."""
    calls: list[int] = []
    seeded = gradcache.seeded

    def changed(seed: int, device: torch.device) -> contextlib.AbstractContextManager[None]:
        calls.append(seed)
        return seeded(seed + 1000 * calls.count(seed) - 1000, device)

    patch.setattr(gradcache, "seeded", changed)


def no_exchange(patch: pytest.MonkeyPatch, module: RetrievalModule, world: list[Part], rank: int) -> None:
    """No pass goes through DDP, so that each process keeps its own gradients."""
    patch.setattr(RetrievalModule, "_encode_last", RetrievalModule.forward)


DEFECTS: dict[str, Defect] = {
    function.__name__: function
    for function in (
        missing_scale,
        summed_gradients,
        missing_temperature,
        ungathered_positives,
        ungathered_negatives,
        local_mask,
        gather_without_gradient,
        wrong_pass,
        dropout_not_replayed,
        no_exchange,
    )
}
