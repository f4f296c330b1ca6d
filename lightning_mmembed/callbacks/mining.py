"""(Re-)mines hard negatives and hands them to the datamodule."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_mmembed.callbacks.access import (
    OwnDirectory,
    begins_anew,
    datamodule_of,
    output_directory,
    vector_store,
)
from lightning_mmembed.checkpoints import borrowed_weights
from lightning_mmembed.data.layout import TRAIN_POOL
from lightning_mmembed.encoders.base import Encoder, encoder_of
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.mining import PAPER
from lightning_mmembed.mining_rule import MiningRule
from lightning_mmembed.retrieval.embed import encoder_fingerprint
from lightning_mmembed.retrieval.mine import mine_into

log = logging.getLogger(__name__)


class HardNegativeMining(OwnDirectory):
    """Mines before fit or between epochs, by the rule of MM-Embed or another.

    A version is one Parquet file ``negatives-{version}.parquet``, from which the datamodule draws in the next epoch, in
    place of all files that it drew from before, those that were given to it included.
    What is to be mined follows from the number of epochs that are done and the versions that a checkpoint knows, so a
    run that was killed before or while it mined does so when it is resumed, and one that was killed after it takes the
    file as it is.

    Args:
        before_fit: Mine before the first batch.
        after_epochs: Mine after these many epochs, such as ``[4, 8]``.
        every_n_epochs: Mine after every n-th epoch, too.
        ckpt_path: Mine before fit with the weights of this checkpoint (the random stage's, as the paper does) in place
            of those that are trained.
        rule: Which candidates are negatives; by default the rule of MM-Embed. One that needs another model is for
            ``mmembed-mine``.
        pool: Name of the pool that is ranked: ``train``, ``val``, ``test`` or a local one such as ``mscoco_task0/val``.
        batch_size: The most items in a pass of the encoder; by default as many as its budget of positions holds.
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
        rule: MiningRule = PAPER,
        pool: str = TRAIN_POOL,
        batch_size: int | None = None,
        num_workers: int = 0,
        dtype: str = "float16",
        dirpath: str | Path | None = None,
    ) -> None:
        if ckpt_path is not None and not before_fit:
            raise UserInputError(f"ckpt_path={str(ckpt_path)!r} is only mined with before fit; set before_fit=True")
        if rule.needs_check_scores:
            raise UserInputError(
                f"check_margin={rule.check_margin} needs the scores of a second model, which training has not: mine "
                "with mmembed-mine mining=cross_check check=..., then train with data.negatives=..."
            )
        if not (before_fit or after_epochs or every_n_epochs):
            raise UserInputError("nothing says when to mine; give before_fit=True, after_epochs or every_n_epochs")
        self.before_fit, self.after_epochs, self.every_n_epochs = before_fit, list(after_epochs or ()), every_n_epochs
        self.ckpt_path, self.rule, self.pool, self.dirpath = ckpt_path, rule, pool, dirpath
        self._store = {"batch_size": batch_size, "num_workers": num_workers, "dtype": dtype}
        #: One entry for each version: epochs done, step, path and audit.
        self.versions: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the versions mined so far."""
        return {"versions": self.versions}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the versions that the checkpoint knew."""
        self.versions = list(state_dict["versions"])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the directory; a fit from the start knows no versions of an earlier one."""
        super().setup(trainer, pl_module, stage)
        if begins_anew(trainer, stage):
            self.versions = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mine before the first batch, and what a run that was killed has not come to: no batch has been read yet."""
        last = trainer.max_epochs
        if last is not None and 0 < last <= self._first_due() and trainer.is_global_zero:
            log.warning(
                "no negatives will be mined: the first mining is after epoch %d, and the run has %d; set before_fit or "
                "after_epochs, or leave the callback out",
                self._first_due(),
                last,
            )
        self._mine_if_due(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mine for the next epoch."""
        self._mine_if_due(trainer, pl_module)

    def _mine_if_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        done: int = trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]
        due = self._latest_due(done)
        if due is None or done == trainer.max_epochs or any(version["epochs"] >= due for version in self.versions):
            return
        encoder = encoder_of(pl_module)
        other = self.ckpt_path if due == 0 else None
        with contextlib.nullcontext() if other is None else borrowed_weights(encoder, other):
            self._mine(trainer, encoder, done)

    def _first_due(self) -> int:
        return 0 if self.before_fit else min([*self.after_epochs, *filter(None, [self.every_n_epochs])])

    def _latest_due(self, done: int) -> int | None:
        """After how many of the epochs that are done it was last to be mined."""
        due = [after for after in self.after_epochs if after <= done]
        if self.before_fit:
            due.append(0)
        if self.every_n_epochs and done >= self.every_n_epochs:
            due.append(done - done % self.every_n_epochs)
        return max(due, default=None)

    def _mine(self, trainer: Trainer, encoder: Encoder, done: int) -> None:
        datamodule = datamodule_of(trainer)
        pool, queries = datamodule.shards.pool(self.pool), datamodule.shards.query_sets("train")
        path = output_directory(trainer, self.dirpath) / f"negatives-{len(self.versions) + 1}.parquet"
        made_by = encoder_fingerprint(encoder)
        store = vector_store(trainer, self.dirpath, **self._store)
        store.prune(made_by)
        audit = mine_into(path, encoder, pool, queries, store, made_by, self.rule)
        if datamodule.negatives is not None and not self.versions and trainer.is_global_zero:
            log.warning(
                "from now on negatives are drawn from %s and no more from negatives=%s, which were given; to keep "
                "those, train without this callback: callbacks.mining=null",
                path,
                datamodule.negatives,
            )
        self.versions.append({"epochs": done, "step": trainer.global_step, "path": str(path), "audit": audit})
        datamodule.use_negatives(path)
