"""The LightningModule: an encoder, the contrastive loss and the optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer

from lightning_mmembed.checkpoints import check_settings, drop_frozen, restore_frozen, write_settings
from lightning_mmembed.data.batches import TrainingBatch
from lightning_mmembed.distributed import Processes
from lightning_mmembed.encoders.base import Encoder
from lightning_mmembed.encoders.lockstep import idle_pass
from lightning_mmembed.encoders.processor import EncoderInputs
from lightning_mmembed.encoders.sharding import is_sharded, shard
from lightning_mmembed.errors import UserInputError, refuse_below_one
from lightning_mmembed.files import fingerprint
from lightning_mmembed.gradcache import GradCache, seeded
from lightning_mmembed.loss_modules import check_widths
from lightning_mmembed.losses import (
    batch_arguments,
    contrastive_loss,
    has_teacher,
    in_batch_accuracy,
    labelled_positive_mask,
    labelled_query_mask,
)
from lightning_mmembed.reproducer import Moment, refuse_nonfinite
from lightning_mmembed.resuming import settle_progress
from lightning_mmembed.sharded_checkpoints import WholeFileIO

LossFunction = Callable[..., Tensor]
OptimizerFactory = Callable[..., Optimizer]
SchedulerFactory = Callable[..., Any]

#: The paper's learning rate for its random and hard stages.
DEFAULT_OPTIMIZER: OptimizerFactory = partial(AdamW, lr=1e-4)

#: Strategies under which GradCache computes the exact gradient.
EXACT_STRATEGIES = (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy)


class RetrievalModule(LightningModule):
    """Trains an encoder with in-batch and mined negatives; drops into any Trainer.

    A query is contrasted with the candidates of all processes. The gradient is that of the mean loss over the queries
    of all processes, however many each of them has.

    Args:
        encoder: The encoder.
        loss: From ``(queries, candidates, positive_index, mask)`` to a scalar, the mean over the queries; by default
            :func:`~lightning_mmembed.losses.contrastive_loss` at its temperature of 0.05.
        optimizer: From parameters to an optimizer; by default AdamW with a learning rate of 1e-4.
        scheduler: From an optimizer to a learning-rate scheduler, stepped after every batch. Given
            ``num_training_steps`` if it takes such an argument, as the schedulers of transformers do.
        mini_batch_num_tokens: Switches GradCache on, for batches larger than memory
            (:mod:`lightning_mmembed.gradcache`): activations are held of so many positions at a time, padding and
            pictures counted; a longer item goes alone. The gradient is the same.
    """

    def __init__(
        self,
        encoder: Encoder,
        loss: LossFunction = contrastive_loss,
        optimizer: OptimizerFactory = DEFAULT_OPTIMIZER,
        scheduler: SchedulerFactory | None = None,
        mini_batch_num_tokens: int | None = None,
    ) -> None:
        super().__init__()
        refuse_below_one(mini_batch_num_tokens=mini_batch_num_tokens)
        self.encoder = encoder.train()  # transformers loads models in evaluation mode
        self.loss = loss
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.mini_batch_num_tokens = mini_batch_num_tokens
        self._cache: GradCache | None = None
        self._exchanges = False

    def setup(self, stage: str) -> None:
        """Refuse GradCache where its gradient would be another, a loss for other vectors; write checkpoints whole."""
        check_widths(self.loss, self.encoder.embedding_dim)
        strategy = self.trainer.strategy
        if type(strategy.checkpoint_io) is TorchCheckpointIO:
            strategy.checkpoint_io = WholeFileIO()
        exact = isinstance(strategy, EXACT_STRATEGIES) and not getattr(strategy, "_ddp_kwargs", {}).get("static_graph")
        if self.mini_batch_num_tokens is not None and not exact:
            raise UserInputError(
                f"mini_batch_num_tokens={self.mini_batch_num_tokens} cannot be used with {type(strategy).__name__}: "
                "GradCache runs several backward passes in a step, which it does not allow (FSDP1 fails an assertion, "
                "others exchange the gradients of the first one only); use one device, DDP without static_graph, or "
                "FSDP2"
            )
        # The loss has no part in GradCache's last pass, in which DDP exchanges gradients: `backward` sees to its own.
        own = [f"loss.{name}" for name, _ in self._loss_weights()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, own)  # type: ignore[no-untyped-call]

    def _loss_weights(self) -> list[tuple[str, nn.Parameter]]:
        """The weights that a loss has of its own, such as a temperature."""
        return list(self.loss.named_parameters()) if isinstance(self.loss, nn.Module) else []

    def configure_model(self) -> None:
        """Shard the encoder where the strategy shares out its weights (FSDP2)."""
        if self.device_mesh is None or is_sharded(self.encoder):
            return
        if self.device_mesh["tensor_parallel"].size() > 1:
            raise UserInputError(
                f"tensor_parallel_size={self.device_mesh['tensor_parallel'].size()} is not supported; use "
                "lightning_mmembed.strategies.FSDP2Strategy, or set tensor_parallel_size=1 and data_parallel_size to "
                "the number of processes"
            )
        shard(self.encoder, self.device_mesh["data_parallel"], self.trainer.precision)

    def forward(self, inputs: EncoderInputs) -> Tensor:
        """Encode prepared items to ``(N, D)`` unit vectors."""
        vectors: Tensor = self.encoder(inputs)
        return vectors

    def training_step(self, batch: TrainingBatch, batch_idx: int) -> Tensor:
        """Contrast the local queries with the candidates of every process."""
        seed = self._seed(batch_idx)
        if self.mini_batch_num_tokens is None:
            with seeded(seed, self.device):
                vectors = self(batch.inputs)
        else:
            vectors = self._cached(batch.inputs, seed)
        loss, accuracy, weight = self._contrast(batch, vectors)
        self._refuse_nonfinite(batch, vectors, loss, seed)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        self.log("train/accuracy", accuracy, prog_bar=True, batch_size=len(batch))
        return loss * weight

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Backpropagate; with GradCache to the vectors, and from there pass by pass to the weights."""
        super().backward(loss, *args, **kwargs)
        for _, weight in self._loss_weights():
            assert weight.grad is not None
            weight.grad = self._processes.gather(weight.grad[None]).mean(0)
        if self._cache is None:
            return
        with self.trainer.precision_plugin.train_step_context():
            self._cache.backward(self.forward, self._encode_last)
        self._cache = None

    def validation_step(self, batch: TrainingBatch, batch_idx: int) -> None:
        """Log the loss and in-batch accuracy of validation queries."""
        self._log_evaluation("val", batch)

    def test_step(self, batch: TrainingBatch, batch_idx: int) -> None:
        """Log the loss and in-batch accuracy of test queries."""
        self._log_evaluation("test", batch)

    def _log_evaluation(self, split: str, batch: TrainingBatch) -> None:
        cached = self.mini_batch_num_tokens is not None
        vectors = self._cache_of(batch.inputs, 0)[0] if cached else self(batch.inputs)
        loss, accuracy, _ = self._contrast(batch, vectors)
        for name, value in {"loss": loss, "accuracy": accuracy}.items():
            self.log(f"{split}/{name}", value, batch_size=len(batch), sync_dist=True)

    def _refuse_nonfinite(self, batch: TrainingBatch, vectors: Tensor, loss: Tensor, seed: int) -> None:
        processes, trainer = self._processes, self.trainer
        own = torch.stack([torch.isfinite(vectors.detach()).all(), torch.isfinite(loss.detach())])
        of_vectors, of_loss = processes.gather(own[None]).unbind(1)
        saver = trainer.checkpoint_callback
        moment = Moment(
            trainer.global_step,
            trainer.current_epoch,
            seed,
            str(trainer.precision),
            Path(trainer.default_root_dir),
            getattr(saver, "last_model_path", "") or getattr(saver, "best_model_path", "") or None,
        )
        save = partial(trainer.save_checkpoint, weights_only=True)
        # Vectors that are not finite make the losses of other processes so, which are not to blame.
        refuse_nonfinite(processes, of_vectors.tolist(), batch, vectors, None, moment, self.parameters(), save)
        refuse_nonfinite(processes, of_loss.tolist(), batch, vectors, loss, moment, self.parameters(), save)

    def _seed(self, batch_idx: int) -> int:
        """Seed of a step's dropout: it depends on nothing but the run's seed, the process and the position."""
        return int(fingerprint(torch.initial_seed(), self.global_rank, self.current_epoch, batch_idx), 16)

    def _cached(self, inputs: EncoderInputs, seed: int) -> Tensor:
        """Vectors whose gradient :meth:`backward` sends on."""
        vectors, self._cache = self._cache_of(inputs, seed)
        wrapper = self.trainer.strategy.model
        if isinstance(wrapper, DistributedDataParallel):
            # This step's output has no graph that reaches the weights: DDP, inside of whose forward we are, would take
            # all of them for unused and exchange their gradients at once. The last pass goes through it again.
            self._exchanges = wrapper.require_backward_grad_sync
            wrapper.require_backward_grad_sync = False
        return vectors

    def _cache_of(self, inputs: EncoderInputs, seed: int) -> tuple[Tensor, GradCache]:
        """The vectors of some items in their order, and where their gradients go."""
        passes = inputs.passes()
        if is_sharded(self.encoder):
            # Each pass is a meeting of all processes: those with fewer passes than others run some for nothing.
            missing = self._processes.largest(len(passes)) - len(passes)
            if missing:
                passes += [idle_pass(self.encoder).to(inputs.order.device)] * missing
        cache = GradCache(self.forward, passes, seed)
        rows = cache.vectors[: len(inputs)]
        return torch.zeros_like(rows).index_copy(0, inputs.order, rows), cache

    def _encode_last(self, inputs: EncoderInputs) -> Tensor:
        wrapper = self.trainer.strategy.model
        if isinstance(wrapper, DistributedDataParallel):
            wrapper.require_backward_grad_sync = self._exchanges
        assert wrapper is not None
        vectors: Tensor = wrapper(inputs)
        return vectors

    @property
    def _processes(self) -> Processes:
        return Processes(self.global_rank, self.trainer.world_size, self.device)

    def _contrast(self, batch: TrainingBatch, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss and accuracy of the local queries, and their weight in the mean over the processes."""
        queries, candidates = torch.split(vectors, [len(batch), len(batch.candidate_ids)])
        processes, own = self._processes, vectors.new_tensor([[len(batch), len(batch.candidate_ids)]])
        counts = processes.gather(own)
        positive_index = batch.positive_index + int(counts[: processes.rank, 1].sum())
        candidates, candidate_ids = processes.gather(candidates), processes.gather(batch.candidate_ids)
        mask = labelled_positive_mask(batch.positives, candidate_ids, positive_index)
        further = self._further(batch, queries, counts, candidate_ids[positive_index])
        loss = self.loss(queries, candidates, positive_index, mask, **further)
        if self.training and "teacher_scores" in further:
            self._log_teacher(has_teacher(further["listed"], mask))
        # DDP and FSDP take the mean over the processes, whatever their number of queries.
        weight = own[0, 0] / counts[:, 0].mean()
        return loss, in_batch_accuracy(queries, candidates, positive_index, mask), weight

    def _further(
        self, batch: TrainingBatch, queries: Tensor, counts: Tensor, positive_ids: Tensor
    ) -> dict[str, Tensor]:
        """What else of the batch the loss asks for, in all processes."""
        asked, processes, further = batch_arguments(self.loss), self._processes, {}
        first_query, first_candidate = counts[: processes.rank].sum(0).long().tolist()
        if "all_queries" in asked:
            width = processes.largest(batch.positives.shape[1])
            positives = F.pad(batch.positives, (0, width - batch.positives.shape[1]), value=-1)
            index = first_query + torch.arange(len(batch), device=queries.device)
            further["all_queries"], further["query_index"] = processes.gather(queries), index
            further["query_mask"] = labelled_query_mask(processes.gather(positives), positive_ids, index)
        if "listed" in asked:
            further["listed"] = torch.where(batch.listed < 0, -1, batch.listed + first_candidate)
        if "teacher_scores" in asked and (batch.teacher_scores is not None or not self.training):
            # A validation batch has no teacher: its queries add nothing.
            scores = batch.teacher_scores
            scores = torch.full_like(further["listed"], torch.nan, dtype=torch.float) if scores is None else scores
            further["listed"] = further["listed"].masked_fill(scores.isnan(), -1)
            further["teacher_scores"] = scores.nan_to_num()
        return further

    def _log_teacher(self, taught: Tensor) -> None:
        """Log which share of the queries of all processes has a teacher; all refuse a step in which none has."""
        share = self._processes.gather(taught.float()).mean()
        if not share:
            raise UserInputError(
                "no query of this step has two candidates that data.soft_labels has scores of, so there is nothing to "
                "distil: train with data.negatives=<the file that was scored> and callbacks.mining=null, or mine "
                "(mmembed-mine out=negatives.parquet) and score (mmembed-rerank negatives=negatives.parquet "
                "soft_labels=soft_labels.parquet) first"
            )
        self.log("train/share_with_teacher", share, batch_size=len(taught))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say in the checkpoint how far the run is and how the encoder was built; leave frozen weights out."""
        if self._trainer is not None:
            settle_progress(self.trainer, checkpoint)
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
        groups: list[dict[str, Any]] = [{"params": parameters}]
        if own := [weight for _, weight in self._loss_weights()]:
            groups.append({"params": own, "weight_decay": 0.0})
        optimizer = self.optimizer(groups if own else parameters)
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
