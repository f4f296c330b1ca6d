"""The LightningModule: an encoder, the contrastive loss and the optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, cast

from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import AdamW, Optimizer

from lightning_mmembed.checkpoints import check_settings, drop_frozen, restore_frozen, write_settings
from lightning_mmembed.data.batches import TrainingBatch
from lightning_mmembed.encoders.base import Encoder
from lightning_mmembed.encoders.processor import EncoderInputs
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.losses import contrastive_loss, in_batch_accuracy, labelled_positive_mask

LossFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
OptimizerFactory = Callable[..., Optimizer]
SchedulerFactory = Callable[..., Any]

#: The paper's learning rate for its random and hard stages.
DEFAULT_OPTIMIZER: OptimizerFactory = partial(AdamW, lr=1e-4)


class RetrievalModule(LightningModule):
    """Trains an encoder with in-batch and mined negatives; drops into any Trainer.

    Args:
        encoder: The encoder.
        loss: From ``(queries, candidates, positive_index, mask)`` to a scalar; by default
            :func:`~lightning_mmembed.losses.contrastive_loss` at its temperature of 0.05.
        optimizer: From parameters to an optimizer; by default AdamW with a learning rate of 1e-4.
        scheduler: From an optimizer to a learning-rate scheduler, stepped after every batch. Given
            ``num_training_steps`` if it takes such an argument, as the schedulers of transformers do.
    """

    def __init__(
        self,
        encoder: Encoder,
        loss: LossFunction = contrastive_loss,
        optimizer: OptimizerFactory = DEFAULT_OPTIMIZER,
        scheduler: SchedulerFactory | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder.train()  # transformers loads models in evaluation mode
        self.loss = loss
        self.optimizer = optimizer
        self.scheduler = scheduler

    def forward(self, inputs: EncoderInputs) -> Tensor:
        """Encode prepared items to ``(N, D)`` unit vectors."""
        vectors: Tensor = self.encoder(inputs)
        return vectors

    def training_step(self, batch: TrainingBatch, batch_idx: int) -> Tensor:
        """Contrast the local queries with the candidates of every process."""
        loss, accuracy = self._contrast(batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        self.log("train/accuracy", accuracy, prog_bar=True, batch_size=len(batch))
        return loss

    def validation_step(self, batch: TrainingBatch, batch_idx: int) -> None:
        """Log the loss and in-batch accuracy of validation queries."""
        self._log_evaluation("val", batch)

    def test_step(self, batch: TrainingBatch, batch_idx: int) -> None:
        """Log the loss and in-batch accuracy of test queries."""
        self._log_evaluation("test", batch)

    def _log_evaluation(self, split: str, batch: TrainingBatch) -> None:
        loss, accuracy = self._contrast(batch)
        for name, value in {"loss": loss, "accuracy": accuracy}.items():
            self.log(f"{split}/{name}", value, batch_size=len(batch), sync_dist=True)

    def _contrast(self, batch: TrainingBatch) -> tuple[Tensor, Tensor]:
        queries, candidates = self(batch.inputs).split([len(batch), len(batch.candidate_ids)])
        candidate_ids, positive_index = batch.candidate_ids, batch.positive_index
        if self.trainer.world_size > 1:
            # DDP averages the gradients of the processes; with the gather's own gradient that is the exact one.
            candidates = cast(Tensor, self.all_gather(candidates, sync_grads=True)).flatten(0, 1)
            candidate_ids = cast(Tensor, self.all_gather(candidate_ids)).flatten()
            positive_index = positive_index + self.global_rank * len(batch.candidate_ids)
        mask = labelled_positive_mask(batch.positives, candidate_ids, positive_index)
        loss = self.loss(queries, candidates, positive_index, mask)
        return loss, in_batch_accuracy(queries, candidates, positive_index, mask)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave frozen weights out of the checkpoint, and say in it how the encoder was built."""
        drop_frozen(self.encoder, checkpoint)
        write_settings(self.encoder, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make sure that this encoder is built as the checkpoint's, and has the weights that it left out."""
        if "state_dict" in checkpoint:  # strategies that shard the model have read the weights already
            restore_frozen(self.encoder, checkpoint)
        check_settings(self.encoder, checkpoint)

    def configure_optimizers(self) -> Any:
        """Build the optimizer over the trainable parameters, and the scheduler."""
        parameters = [p for p in self.encoder.parameters() if p.requires_grad]
        optimizer = self.optimizer(parameters)
        if self.scheduler is None:
            return optimizer
        arguments = {}
        if "num_training_steps" in inspect.signature(self.scheduler).parameters:
            steps = self.trainer.estimated_stepping_batches
            if not 0 < steps < float("inf"):
                raise UserInputError("the scheduler needs to know the number of steps; set max_epochs or max_steps")
            arguments["num_training_steps"] = int(steps)
        scheduler = self.scheduler(optimizer, **arguments)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
