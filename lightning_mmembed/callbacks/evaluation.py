"""Retrieval metrics per task over the union and the local pools, during fit, validate and test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from lightning_mmembed.data.shards import Shards
from lightning_mmembed.encoders.base import encoder_of
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.metrics import DEFAULT_METRICS, parse_metric
from lightning_mmembed.retrieval.embed import encoder_fingerprint
from lightning_mmembed.retrieval.evaluate import evaluate_retrieval
from lightning_mmembed.retrieval.per_query import labels_of, read_measured, refuse_other_data
from lightning_mmembed.retrieval.pool import QuerySet
from lightning_mmembed.retrieval.results import RUN_DEPTH, RetrievalResult, average_prompts
from lightning_mmembed.retrieval.runs import Record, record
from lightning_mmembed.retrieval.search import SearchSettings


class RetrievalEvaluation(OwnDirectory):
    """Embeds the pool of a split, ranks it for every query and logs the metrics, whenever a Trainer evaluates.

    Logged are ``{split}/{pool}/{metric}`` averages over the tasks, and ``{split}/{pool}/{task}/{metric}``. After
    ``trainer.validate`` and ``trainer.test`` the table is printed, and ``metrics.json``, ``queries.parquet`` and the
    TREC runs are written.

    Args:
        metrics: Canonical metric names.
        before_fit: Evaluate the validation split once before training, too.
        instruction: Which of the prompts every query gets: its place, from 0; ``"random"``, drawn for each query; or
            ``"all"``: evaluate with each of them, as many as the task with the fewest has, and average.
        instruction_seed: Of the draw.
        batch_size: The most items in a pass of the encoder; by default as many as its budget of positions holds.
        num_workers: Processes that read and prepare items.
        dtype: Precision of the stored vectors, ``"float16"`` or ``"float32"``.
        search: How to search, as :class:`SearchSettings` or its arguments; by default exactly, with torch.
        vectors_dir: Where vectors are kept; by default in ``vectors`` beside the other files, without those of
            earlier weights. A folder that is given may be shared: nothing in it is deleted.
        compare: Run directories of other evaluations of the same queries, to compare with.
        checkpoint: Where the weights come from, for the protocol; one that the Trainer loads is known without.
        dirpath: Where files are written; by default the Trainer's ``default_root_dir``.

    Raises:
        UserInputError: If ``instruction`` is unknown, a metric is deeper than the rankings (50), or a run to compare
            with is missing.
        ValueError: If a metric is unknown.
    """

    def __init__(
        self,
        metrics: Sequence[str] = DEFAULT_METRICS,
        before_fit: bool = False,
        instruction: int | str = 0,
        instruction_seed: int = 0,
        batch_size: int | None = None,
        num_workers: int = 0,
        dtype: str = "float16",
        search: SearchSettings | Mapping[str, Any] | None = None,
        vectors_dir: str | Path | None = None,
        compare: Sequence[str | Path] = (),
        checkpoint: str | Path | None = None,
        dirpath: str | Path | None = None,
    ) -> None:
        for name in metrics:
            if parse_metric(name)[1] > RUN_DEPTH:
                raise UserInputError(f"metrics: {name!r} is deeper than the rankings; write {RUN_DEPTH} or less")
        if instruction not in ("all", "random") and (not isinstance(instruction, int) or instruction < 0):
            raise UserInputError(f"instruction={instruction!r} is unknown; write a place from 0, 'all' or 'random'")
        for path in compare:
            read_measured(path)  # a wrong path is told before the work, not after it
        self.metrics, self.before_fit, self.dirpath = tuple(metrics), before_fit, dirpath
        self.instruction, self.instruction_seed, self.compare = instruction, instruction_seed, tuple(compare)
        self.search = search if isinstance(search, SearchSettings) else SearchSettings(**(search or {}))
        self.vectors_dir, self.checkpoint = vectors_dir, checkpoint
        self._store = {"batch_size": batch_size, "num_workers": num_workers, "dtype": dtype}
        #: One entry for each evaluation: step, split, metrics and modality matrix.
        self.evaluations: list[dict[str, Any]] = []
        #: The latest evaluation, with its rankings; of several prompts the average, with those of the first.
        self.result: RetrievalResult | None = None
        #: What was written of the latest evaluation of a split.
        self.record: Record | None = None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the evaluations so far."""
        return {"evaluations": self.evaluations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the evaluations that the checkpoint knew."""
        self.evaluations = list(state_dict["evaluations"])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse prompts that a query of the split does not have, and runs of other data, before any work.

        A fit from the start knows no evaluations of an earlier one.
        """
        super().setup(trainer, pl_module, stage)
        if begins_anew(trainer, stage):
            self.evaluations = []
        self._directory = output_directory(trainer, self.dirpath)
        split = "test" if stage == "test" else "val"
        shards = datamodule_of(trainer).shards
        query_sets = self._query_sets(shards, split)[0]
        if self.compare and stage != "fit":  # a fit writes no figures, and so compares none
            pool = shards.pool(split)
            labels = {queries.task.name: labels_of(queries) for queries in query_sets}
            local = {task: row for task, row in labels.items() if task in pool.local}
            protocol = {"split": split, "candidates": len(pool), "shards": shards.fingerprint}
            for path in self.compare:
                refuse_other_data(protocol, {"union": labels, "local": local}, read_measured(path))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate before training; not in ``on_fit_start``, which precedes the restoring of a sharded checkpoint."""
        if self.before_fit and trainer.global_step == 0 and not self.evaluations:
            self._evaluate(trainer, pl_module, "val")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the validation split."""
        if trainer.sanity_checking:
            return
        results = self._evaluate(trainer, pl_module, "val")
        self._log(pl_module, "val")
        if trainer.state.fn == "validate":
            self._write(trainer, "val", results)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the test split."""
        results = self._evaluate(trainer, pl_module, "test")
        self._log(pl_module, "test")
        self._write(trainer, "test", results)

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule, split: str) -> list[RetrievalResult]:
        """The outcome with each prompt."""
        shards, encoder = datamodule_of(trainer).shards, encoder_of(pl_module)
        store = vector_store(trainer, self._directory, self.vectors_dir, **self._store)
        made_by = encoder_fingerprint(encoder)
        if self.vectors_dir is None:
            store.prune(made_by)
        pool = shards.pool(split)
        results = [
            evaluate_retrieval(encoder, pool, query_sets, store, made_by, self.metrics, self.search)
            for query_sets in self._query_sets(shards, split)
        ]
        self.result = average_prompts(results)
        self.evaluations.append(
            {
                "step": trainer.global_step,
                "epoch": trainer.current_epoch,
                "split": split,
                "metrics": self.result.metrics,
                "modality_matrix": self.result.modality_matrix,
            }
        )
        return results

    def _query_sets(self, shards: Shards, split: str) -> list[list[QuerySet]]:
        """The queries with each prompt that they are evaluated with."""
        if self.instruction == "random":
            return [shards.query_sets(split, "random", self.instruction_seed)]
        if self.instruction != "all":
            return [shards.query_sets(split, int(self.instruction))]
        return [shards.query_sets(split, index) for index in range(max(1, shards.prompt_count(split)))]

    def _log(self, pl_module: LightningModule, split: str) -> None:
        assert self.result is not None
        for name, value in self.result.named_metrics.items():
            # Every process evaluates the same vectors, so the values agree and need no reduction.
            pl_module.log(f"{split}/{name}", value, rank_zero_only=False)

    def _write(self, trainer: Trainer, split: str, results: Sequence[RetrievalResult]) -> None:
        if not trainer.is_global_zero:
            return
        prompts = f"prompt {self.instruction}"
        if self.instruction == "random":
            prompts = f"random prompts with seed {self.instruction_seed}"
        elif self.instruction == "all":
            prompts = f"mean of prompts 0 to {len(results) - 1}"
        facts = {"system": "mmembed", "split": split, "instruction": prompts, "depth": RUN_DEPTH}
        facts["shards"] = datamodule_of(trainer).shards.fingerprint
        checkpoint = trainer.ckpt_path or self.checkpoint
        if checkpoint is not None:
            facts["checkpoint"] = str(checkpoint)
        facts["search_backend"] = self.search.backend
        self.record = record(self._directory, results, facts, self.compare)
