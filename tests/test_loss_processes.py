"""Losses that see all processes or have weights of their own: the gradient of a step is that of one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from contrast_worlds import Gradients, batch_of, error, fit, gradients_of, with_sgd
from distributed_worlds import in_processes
from lightning.pytorch import Callback, LightningModule, Trainer
from parity_cells import SIZES, Cell
from torch import Tensor, nn

from lightning_mmembed.distributed import Processes
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.items import encode_id
from lightning_mmembed.loss_modules import LearnedTemperature, MatryoshkaLoss
from lightning_mmembed.losses import (
    distillation_loss,
    hardness_weighted_loss,
    labelled_positive_mask,
    symmetric_contrastive_loss,
)
from lightning_mmembed.strategies import FSDP2Strategy

pytestmark = pytest.mark.slow

LOSSES: dict[str, Callable[[], Callable[..., Tensor]]] = {
    "learned temperature": lambda: LearnedTemperature(temperature=0.1),
    "symmetric": lambda: partial(symmetric_contrastive_loss, temperature=0.1),
    "cut, learned, symmetric": lambda: MatryoshkaLoss(
        LearnedTemperature(symmetric_contrastive_loss, temperature=0.1), [32, 16], [1.0, 0.5]
    ),
    "hard negatives": lambda: partial(hardness_weighted_loss, hardness_mode="hard_negatives", hardness_strength=5.0),
}
CELLS = [(strategy, passes) for strategy in SIZES for passes in ("plain", "three-items")]


class OwnGradients(Callback):
    """Keeps the gradients of the loss's own weights before the optimizer uses them."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.found = own_gradients(pl_module.loss)


def own_gradients(loss: Any) -> Gradients:
    return {name: p.grad.clone() for name, p in loss.named_parameters()} if isinstance(loss, nn.Module) else {}


def train(processes: Processes, strategy: str, passes: str, checkpoint: Path, directory: Path) -> None:
    """A step with each loss; write the gradients that this process has."""
    cell = Cell(strategy, passes)
    for name, make in LOSSES.items():
        encoder, own = cell.encoder(checkpoint), OwnGradients()
        module = with_sgd(encoder, cell.tokens, loss=make())
        batch = batch_of(encoder, cell.world[processes.rank], cell.tokens)
        kind: Any = FSDP2Strategy() if strategy.startswith("fsdp2") else "ddp"
        kept = fit(directory, module, [batch], devices=processes.size, strategy=kind, callbacks=[own])
        torch.save({"encoder": kept.gradients, "own": own.found}, directory / f"{name}-{processes.rank}.pt")


def expected(name: str, cell: Cell, checkpoint: Path) -> tuple[Gradients, Gradients]:
    """The gradients by one process that encodes everything in one pass and has all queries."""
    encoder, loss, world = cell.encoder(checkpoint), LOSSES[name](), cell.world
    queries = [query for part in world for query in part.queries]
    candidates = [candidate for part in world for candidate in part.candidates[: len(part.queries)]]
    candidates += [candidate for part in world for candidate in part.candidates[len(part.queries) :]]
    vectors = encoder(encoder.processor([*queries, *candidates], tokens_per_batch=10**6))
    labels = [[encode_id(did) for did in query.positives] for query in queries]
    width, index = max(map(len, labels)), torch.arange(len(queries))
    positives = torch.tensor([[*row, *[-1] * (width - len(row))] for row in labels])
    mask = labelled_positive_mask(positives, torch.tensor([encode_id(c.did) for c in candidates]), index)
    extra = {}
    if name == "hard negatives":
        drawn = torch.arange(len(queries), len(candidates)).reshape(len(queries), -1)
        extra["listed"] = torch.cat([index[:, None], drawn], 1)
    loss(vectors[: len(queries)], vectors[len(queries) :], index, mask, **extra).backward()
    return gradients_of(encoder, absent=True), own_gradients(loss)


@pytest.mark.parametrize(("strategy", "passes"), CELLS)
def test_every_process_has_the_gradients_of_one_that_has_all_queries(
    strategy: str, passes: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    in_processes(len(SIZES[strategy]), train, strategy, passes, tiny_checkpoint, tmp_path)
    for name in LOSSES:
        encoder, own = expected(name, Cell(strategy, passes), tiny_checkpoint)
        for rank in range(len(SIZES[strategy])):
            found = torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True)
            assert max(error(found["encoder"], encoder)) <= 1e-5, name
            assert found["own"].keys() == own.keys()
            for weight, gradient in own.items():
                torch.testing.assert_close(found["own"][weight], gradient, rtol=1e-5, atol=1e-6)


class Told(Callback):
    """Keeps the share of the queries that have a teacher."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.share = float(trainer.callback_metrics["train/share_with_teacher"])


def distil(processes: Processes, checkpoint: Path, directory: Path) -> None:
    """A step in which the first process alone has a teacher, and one without any; write what each process is told."""
    found = []
    for scored in (True, False):
        cell, told = Cell("ddp-2", "plain"), Told()
        encoder = cell.encoder(checkpoint)
        batch = batch_of(encoder, cell.world[processes.rank])
        scores = torch.arange(float(batch.listed.numel())).view(batch.listed.shape)
        if processes.rank or not scored:
            scores[:, 1:] = torch.nan
        module = with_sgd(encoder, loss=distillation_loss)
        try:
            batches = [replace(batch, teacher_scores=scores)]
            fit(directory, module, batches, devices=2, strategy="ddp", callbacks=[told])
            found.append(f"{told.share:.3f}")
        except UserInputError as error:
            found.append(str(error)[:25])
    (directory / str(processes.rank)).write_text("\n".join(found))


def test_all_processes_are_told_the_share_with_a_teacher_and_refuse_a_step_without_any(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    in_processes(2, distil, tiny_checkpoint, tmp_path)
    for rank in range(2):
        assert (tmp_path / str(rank)).read_text().splitlines() == ["0.400", "no query of this step has"], rank
