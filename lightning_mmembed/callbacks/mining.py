"""(Re-)mines modality-aware hard negatives and hands them to the datamodule."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_mmembed.callbacks.access import datamodule_of, output_directory, vector_store
from lightning_mmembed.checkpoints import load_encoder_weights
from lightning_mmembed.data.layout import TRAIN_POOL
from lightning_mmembed.data.negatives import write_negatives
from lightning_mmembed.encoders.base import Encoder, encoder_of
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.retrieval.embed import encoder_fingerprint
from lightning_mmembed.retrieval.mine import mine_negatives

log = logging.getLogger(__name__)


class HardNegativeMining(Callback):
    """Mines by the rule of MM-Embed, before fit or between epochs.

    A version is one Parquet file ``negatives-{version}.parquet``; the datamodule's next training dataloader draws from
    it. Negatives mined between epochs need ``Trainer(reload_dataloaders_every_n_epochs=1)``.

    Args:
        before_fit: Mine before the first batch.
        after_epochs: Mine after these many epochs, such as ``[4, 8]``.
        every_n_epochs: Mine after every n-th epoch, too.
        ckpt_path: Mine before fit with the weights of this checkpoint (the random stage's, as the paper does) in place
            of those that are trained.
        k: Depth of the rankings that are mined.
        k_prime: Rank below which candidates of the wanted modality count as negatives.
        batch_size: Items per pass of the encoder.
        num_workers: Processes that read and prepare items.
        dtype: Precision of the stored vectors, ``"float16"`` or ``"float32"``.
        dirpath: Where files are written; by default the Trainer's ``default_root_dir``.
    """

    def __init__(
        self,
        before_fit: bool = False,
        after_epochs: list[int] | None = None,
        every_n_epochs: int | None = None,
        ckpt_path: str | Path | None = None,
        k: int = 50,
        k_prime: int = 45,
        batch_size: int = 256,
        num_workers: int = 0,
        dtype: str = "float16",
        dirpath: str | Path | None = None,
    ) -> None:
        if ckpt_path is not None and not before_fit:
            raise UserInputError(f"ckpt_path={str(ckpt_path)!r} is only mined with before fit; set before_fit=True")
        self.before_fit, self.after_epochs, self.every_n_epochs = before_fit, list(after_epochs or ()), every_n_epochs
        self.ckpt_path, self.k, self.k_prime, self.dirpath = ckpt_path, k, k_prime, dirpath
        self._store = {"batch_size": batch_size, "num_workers": num_workers, "dtype": dtype}
        #: One entry for each version: step, path and audit.
        self.versions: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the versions mined so far."""
        return {"versions": self.versions}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the versions that the checkpoint knew."""
        self.versions = list(state_dict["versions"])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a Trainer that would go on with the old negatives."""
        between = self.after_epochs or self.every_n_epochs
        reload_every = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
        if stage == "fit" and between and reload_every != 1:
            raise UserInputError(
                f"reload_dataloaders_every_n_epochs={reload_every} would keep the old negatives; set "
                "Trainer(reload_dataloaders_every_n_epochs=1)"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mine before the first batch: the training dataloader is made after this hook."""
        if not self.before_fit or self.versions:
            return
        encoder = encoder_of(pl_module)
        if self.ckpt_path is not None:
            encoder = copy.deepcopy(encoder)
            load_encoder_weights(encoder, self.ckpt_path)
        self._mine(trainer, encoder)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mine for the next epoch, whose dataloader is made after this hook."""
        done = trainer.current_epoch + 1
        due = done in self.after_epochs or (self.every_n_epochs and done % self.every_n_epochs == 0)
        if due and done != trainer.max_epochs:
            self._mine(trainer, encoder_of(pl_module))

    def _mine(self, trainer: Trainer, encoder: Encoder) -> None:
        datamodule = datamodule_of(trainer)
        made_by = encoder_fingerprint(encoder)
        store = vector_store(trainer, self.dirpath, **self._store)
        store.prune(made_by)
        pool, queries = datamodule.shards.pool(TRAIN_POOL), datamodule.shards.query_sets("train")
        columns, audit = mine_negatives(encoder, pool, queries, store, made_by, self.k, self.k_prime)
        path = output_directory(trainer, self.dirpath) / f"negatives-{len(self.versions) + 1}.parquet"
        if trainer.is_global_zero:
            made_of = {"encoder": made_by, "pool": pool.fingerprint, "k": self.k, "k_prime": self.k_prime}
            write_negatives(path, columns, made_of, audit)
            totals = {name: sum(task[name] for task in audit.values()) for name in next(iter(audit.values()))}
            log.info("mined %s into %s", totals, path)
        trainer.strategy.barrier()
        self.versions.append({"step": trainer.global_step, "path": str(path), "audit": audit})
        datamodule.use_negatives(path)
