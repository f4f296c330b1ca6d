"""The LightningDataModule over the shards of a dataset, or of several that are mixed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from lightning_mmembed.data.batches import BATCH_MIXES, EpochPlan, TrainingBatch, TrainingBatches
from lightning_mmembed.data.layout import TRAIN_POOL
from lightning_mmembed.data.loader import Place, TrainingLoader
from lightning_mmembed.data.manifest import hold_the_records_of
from lightning_mmembed.data.negatives import MinedNegatives, Share, check_share
from lightning_mmembed.data.places import is_url
from lightning_mmembed.data.sampling import check_rule, source_targets, task_targets
from lightning_mmembed.data.shard import shard_dataset
from lightning_mmembed.data.shards import Shards
from lightning_mmembed.data.soft_labels import SoftLabels
from lightning_mmembed.data.union import open_shards
from lightning_mmembed.encoders.base import encoder_of
from lightning_mmembed.encoders.processor import EncoderInputs
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.files import file_sha256
from lightning_mmembed.items import Candidate, Query

log = logging.getLogger(__name__)


class MBEIRDataModule(LightningDataModule):
    """Streams a dataset from its shards, or several as one.

    Every batch is a pure function of (seed, epoch, position): it depends on neither the number of workers nor what was
    drawn before. The prompts are written by the processor of the encoder that the Trainer fits.

    Args:
        shards: Folder of the shards; made from ``source`` if they are absent or stale. Without a source, a URL too, or
            several of them, such as those of M-BEIR and of text-to-text data, which are read as one.
        source: Folder in M-BEIR's layout; None if the shards are all there is.
        batch_size: Queries in a batch, per process.
        batch_mix: ``"mixed"`` draws a batch from all tasks; ``"one-task"`` from one task at a time, which brings the
            modality bias of random negatives out.
        upsample: How often the training queries come in an epoch; by default each once. ``"uniir"``: WebQA 100,000 and
            EDIS, NIGHTS, FashionIQ and CIRR 50,000 times, the rest as they are. ``"source"``: as often as in the
            source's up-sampled training file. A mapping from dataset or task to a factor; a task's own wins, 0 leaves
            it out. The order is made so, nothing is copied on disk.
        temperature: In place of ``upsample``: at least 1; makes the sizes of the datasets proportional to
            ``n ** (1 / temperature)``, while the epoch stays as long.
        negatives_per_query: Hard negatives for each query once they are mined.
        negatives: A file of mined or given negatives to start with, or several, such as one for each folder of shards.
        wrong_modality_share: Share of the kind ``wrong_modality`` among the negatives that are drawn; a curriculum is a
            number for each epoch of the run, or ``{"start": 1.0, "end": 0.5, "epochs": 8}`` for equal steps.
        instructions: False leaves them out of all batches, as a backbone is pretrained; rankings are made with them.
        soft_labels: A file of scores to distil from (``mmembed-rerank negatives=... soft_labels=...``), for a loss
            that asks for them.
        num_workers: Processes that read and prepare batches.
        seed: Seed of the order, the instructions, the positives and the negatives.
        max_bad_fraction: Share of the records that may be left out because they cannot be used, where shards are made.
    """

    def __init__(
        self,
        shards: str | Path | Sequence[str | Path],
        source: str | Path | None = None,
        batch_size: int = 128,
        batch_mix: str = "mixed",
        upsample: str | Mapping[str, float] | None = None,
        temperature: float | None = None,
        negatives_per_query: int = 1,
        negatives: str | Path | Sequence[str | Path] | None = None,
        wrong_modality_share: Share = 0.5,
        instructions: bool = True,
        soft_labels: str | Path | None = None,
        num_workers: int = 0,
        seed: int = 0,
        max_bad_fraction: float = 0.001,
    ) -> None:
        super().__init__()
        if batch_mix not in BATCH_MIXES:
            raise UserInputError(f"batch_mix={batch_mix!r} is unknown; write one of {', '.join(BATCH_MIXES)}")
        check_rule(upsample, temperature)
        check_share(wrong_modality_share)
        if source is not None and not isinstance(shards, str | Path):
            raise UserInputError(
                f"data.shards={[str(one) for one in shards]} are several and data.source={str(source)!r} is one: make "
                "shards of each with mmembed-shard, then read them with data.source=null"
            )
        if source is not None and is_url(cast(str | Path, shards)):
            raise UserInputError(
                f"data.shards={str(shards)!r} is a URL, where no shards are made of data.source={str(source)!r}: write "
                "to a folder, copy it there, then read it with data.source=null"
            )
        self.shards_dir, self.source = shards, source
        self.batch_size, self.batch_mix, self.num_workers, self.seed = batch_size, batch_mix, num_workers, seed
        self.upsample, self.temperature = upsample, temperature
        self.negatives_per_query, self.negatives = negatives_per_query, negatives
        self.wrong_modality_share, self.soft_labels = wrong_modality_share, soft_labels
        self.max_bad_fraction, self.instructions = max_bad_fraction, instructions
        self._given = negatives
        self._shards: Shards | None = None
        #: By path of a file of negatives its SHA-256 when the run first asked for it.
        self._sha256: dict[str, str] = {}

    def prepare_data(self) -> None:
        """Make the shards, unless some of the source's records stand there, made with whatever settings."""
        if self.source is None:
            return
        directory = cast(str | Path, self.shards_dir)  # with a source there is one
        if not hold_the_records_of(directory, self.source):
            shard_dataset(self.source, directory, max_bad_fraction=self.max_bad_fraction)

    @property
    def shards(self) -> Shards:
        """The shards, opened when first asked for."""
        if self._shards is None:
            self._shards = open_shards(self.shards_dir)
        return self._shards

    def use_negatives(self, path: str | Path) -> None:
        """Draw hard negatives from a file, as it is now, from the next epoch on."""
        self.negatives = path
        self._sha256.pop(str(path), None)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the files of the mined negatives in use, and the SHA-256 of each."""
        given, used = _paths(self._given), _paths(self.negatives)
        for path in used:
            if path not in self._sha256 and Path(path).is_file():
                self._sha256[path] = file_sha256(path)
        known = {path: self._sha256[path] for path in used if path in self._sha256}
        one = isinstance(self.negatives, str | Path)
        return {"negatives": used[0] if one else used or None, "sha256": known, "given": given}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the mined negatives that the checkpoint was trained with; a file is checked when it is drawn from.

        Raises:
            UserInputError: If a fit is resumed with other negatives than it was begun with.
        """
        theirs, given = state_dict.get("given"), _paths(self._given)
        fitting = self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        if fitting and theirs is not None and given and given != theirs:
            raise UserInputError(
                f"negatives={', '.join(given)}: the run that is resumed was begun with {', '.join(theirs) or 'none'}, "
                "and goes on with the negatives that it had; to train with these, begin a new run with the weights of "
                "the checkpoint: weights=... in place of ckpt_path=..."
            )
        self._given = self._given if theirs is None else theirs
        self.negatives = state_dict["negatives"]
        self._sha256 = dict(state_dict.get("sha256", {}))

    def train_dataloader(self) -> TrainingLoader:
        """Batches of the training queries from where the Trainer is, with the mined negatives in use."""
        rows = self.shards.query_rows("train")
        plan = self._plan("train", rows, self.batch_mix, self._resampled(rows))
        self._check_left_out(plan)
        return TrainingLoader(plan, partial(self._training_batches, rows), self._place, self.num_workers)

    def val_dataloader(self) -> DataLoader[TrainingBatch]:
        """Batches of the validation queries and their positives, the same in every epoch."""
        return self._fixed_dataloader("val")

    def test_dataloader(self) -> DataLoader[TrainingBatch]:
        """Batches of the test queries and their positives, likewise."""
        return self._fixed_dataloader("test")

    def _training_batches(self, rows: np.ndarray) -> TrainingBatches:
        mined = None if self.negatives is None else MinedNegatives(self.negatives)
        if mined is not None:
            self._check_unchanged(mined.paths)
            pools = [TRAIN_POOL, "val", "test", *self.shards.manifest["counts"]["pools"]]
            mined.check_pool(*(made_of for pool in pools for made_of in self.shards.pool_fingerprints(pool)))
        n_negatives = 0 if mined is None else self.negatives_per_query
        settings: dict[str, Any] = {
            "negatives_per_query": n_negatives,
            "wrong_modality_share": self.wrong_modality_share,
        }
        if self.soft_labels is not None:
            settings["teacher"] = SoftLabels(self.soft_labels, self.shards.fingerprint)
        return self._batches("train", rows, draw_instructions=True, mined=mined, **settings)

    def _check_unchanged(self, paths: Sequence[Path]) -> None:
        """Refuse a file of negatives that holds something else than when the run, or its checkpoint, knew it."""
        for path in paths:
            found = file_sha256(path)
            if self._sha256.setdefault(str(path), found) != found:
                raise UserInputError(
                    f"negatives={str(path)!r} was replaced since the run began to draw from it, and would go on with "
                    "other negatives; put that file back, or begin a new run with the weights of the checkpoint: "
                    "weights=... in place of ckpt_path=..."
                )

    def _fixed_dataloader(self, split: str) -> DataLoader[TrainingBatch]:
        rows, pool = self.shards.query_rows(split), self.shards.pool(split).ids.numpy()
        known = [bool(np.isin(labelled, pool).any()) for labelled in self.shards.positives(rows)]
        rows = rows[np.array(known, dtype=bool)]
        batches = self._batches(split, rows, draw_instructions=False)
        plan = self._plan(split, rows, "mixed", fixed=True)
        return DataLoader(batches, batch_size=None, sampler=plan, num_workers=self.num_workers)

    def _batches(self, split: str, rows: np.ndarray, **settings: Any) -> TrainingBatches:
        pool = self.shards.pool(TRAIN_POOL if split == "train" else split).ids.numpy()
        settings["instructions"] = self.instructions
        return TrainingBatches(self.shards, rows, pool, self._processor(), seed=self.seed, **settings)

    def _processor(self) -> Callable[[Sequence[Query | Candidate]], EncoderInputs]:
        """The processor of the encoder; a module with GradCache says how large the passes are that it cuts."""
        module = self._own_trainer.lightning_module
        budget = getattr(module, "mini_batch_num_tokens", None)
        return partial(encoder_of(module).processor, tokens_per_batch=budget)

    def _plan(
        self,
        split: str,
        rows: np.ndarray,
        batch_mix: str,
        resampled: tuple[np.ndarray, np.ndarray] | None = None,
        fixed: bool = False,
    ) -> EpochPlan:
        n_queries = len(rows) if resampled is None else int(resampled[1].sum())
        replicas = self._own_trainer.world_size
        if n_queries < replicas:
            raise UserInputError(f"{self.shards.directory} has {n_queries} {split} queries for {replicas} processes")
        return EpochPlan(
            self.shards.task_names(rows),
            min(self.batch_size, n_queries // replicas),
            self.seed,
            batch_mix,
            num_replicas=replicas,
            rank=self._own_trainer.global_rank,
            fixed=fixed,
            resampled=resampled,
        )

    def _check_left_out(self, plan: EpochPlan) -> None:
        """Name the tasks that are too small for a batch of their own, and refuse to train on none."""
        if not plan.left_out:
            return
        sizes = ", ".join(f"{task} has {size}" for task, size in plan.left_out.items())
        found = (
            f"batch_mix='one-task' with batch_size={plan.batch_size} in each of {plan.num_replicas} processes trains "
            f"on no task with fewer queries than {plan.batch_size * plan.num_replicas}"
        )
        if plan.batches == 0:
            raise UserInputError(f"{found}, which leaves none: {sizes}; lower batch_size")
        if self._own_trainer.is_global_zero:
            log.warning("%s: %s", found, sizes)

    def _resampled(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        if self.upsample is None and self.temperature is None:
            return None
        if self.upsample == "source":
            return source_targets(self.shards.query_weights(rows))
        return task_targets(self.shards.task_names(rows), self.upsample, self.temperature)

    def _place(self) -> Place:
        """How far the Trainer is; a batch that has been read ahead is not done."""
        loop = self._own_trainer.fit_loop
        end = None if isinstance(loop.max_batches, float) else loop.max_batches
        epochs: int = loop.epoch_progress.current.processed  # type: ignore[attr-defined]
        return Place(epochs, loop.epoch_loop.batch_progress.current.ready, end)

    @property
    def _own_trainer(self) -> Trainer:
        if self.trainer is None:
            raise RuntimeError("MBEIRDataModule needs a Trainer: its encoder's processor writes the prompts")
        return self.trainer


def _paths(negatives: str | Path | Sequence[str | Path] | None) -> list[str]:
    """Files of negatives as a checkpoint keeps them."""
    if negatives is None:
        return []
    return [str(path) for path in ([negatives] if isinstance(negatives, str | Path) else negatives)]
