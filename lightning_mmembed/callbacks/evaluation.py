"""Retrieval metrics per task over the union and the local pools, during fit, validate and test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console

from lightning_mmembed.callbacks.access import datamodule_of, output_directory, vector_store
from lightning_mmembed.encoders.mllm import encoder_of
from lightning_mmembed.metrics import DEFAULT_METRICS, parse_metric
from lightning_mmembed.retrieval.embed import encoder_fingerprint
from lightning_mmembed.retrieval.evaluate import evaluate_retrieval
from lightning_mmembed.retrieval.results import RetrievalResult
from lightning_mmembed.retrieval.runs import write_metrics, write_runs
from lightning_mmembed.retrieval.table import metrics_table


class RetrievalEvaluation(Callback):
    """Embeds the pool of a split, ranks it for every query and logs the metrics, whenever a Trainer evaluates.

    Logged are ``{split}/{pool}/{metric}`` averages over the tasks, and ``{split}/{pool}/{task}/{metric}``. After
    ``trainer.validate`` and ``trainer.test`` the table is printed, and ``metrics.json`` and the TREC runs are written.

    Args:
        metrics: Canonical metric names.
        before_fit: Evaluate the validation split once before training, too.
        instruction_index: Which of the prompts every query gets.
        batch_size: Items per pass of the encoder.
        num_workers: Processes that read and prepare items.
        dtype: Precision of the stored vectors, ``"float16"`` or ``"float32"``.
        dirpath: Where files are written; by default the Trainer's ``default_root_dir``.
    """

    def __init__(
        self,
        metrics: Sequence[str] = DEFAULT_METRICS,
        before_fit: bool = False,
        instruction_index: int = 0,
        batch_size: int = 256,
        num_workers: int = 0,
        dtype: str = "float16",
        dirpath: str | Path | None = None,
    ) -> None:
        for name in metrics:
            parse_metric(name)
        self.metrics, self.before_fit = tuple(metrics), before_fit
        self.instruction_index, self.dirpath = instruction_index, dirpath
        self._store = {"batch_size": batch_size, "num_workers": num_workers, "dtype": dtype}
        #: One entry for each evaluation: step, split, metrics and modality matrix.
        self.evaluations: list[dict[str, Any]] = []
        #: The latest evaluation, with its rankings.
        self.result: RetrievalResult | None = None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the evaluations so far."""
        return {"evaluations": self.evaluations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the evaluations that the checkpoint knew."""
        self.evaluations = list(state_dict["evaluations"])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate before training."""
        if self.before_fit and trainer.global_step == 0 and not self.evaluations:
            self._evaluate(trainer, pl_module, "val")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the validation split."""
        if trainer.sanity_checking:
            return
        result = self._evaluate(trainer, pl_module, "val")
        self._log(pl_module, "val", result)
        if trainer.state.fn == "validate":
            self._write(trainer, "val", result)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the test split."""
        result = self._evaluate(trainer, pl_module, "test")
        self._log(pl_module, "test", result)
        self._write(trainer, "test", result)

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule, split: str) -> RetrievalResult:
        shards = datamodule_of(trainer).shards
        store = vector_store(trainer, self.dirpath, **self._store)
        encoder = encoder_of(pl_module)
        store.prune(encoder_fingerprint(encoder))
        sets = shards.query_sets(split, self.instruction_index)
        result = evaluate_retrieval(encoder, shards.pool(split), sets, store, self.metrics)
        self.evaluations.append(
            {
                "step": trainer.global_step,
                "epoch": trainer.current_epoch,
                "split": split,
                "metrics": result.metrics,
                "modality_matrix": result.modality_matrix,
            }
        )
        self.result = result
        return result

    def _log(self, pl_module: LightningModule, split: str, result: RetrievalResult) -> None:
        for pool, values in result.metrics.items():
            rows = {"": values["average"], **{f"{task}/": row for task, row in values["tasks"].items()}}
            for prefix, row in rows.items():
                for name, value in row.items():
                    # Every process evaluates the same vectors, so the values agree and need no reduction.
                    pl_module.log(f"{split}/{pool}/{prefix}{name}", value, rank_zero_only=False)

    def _write(self, trainer: Trainer, split: str, result: RetrievalResult) -> None:
        if not trainer.is_global_zero:
            return
        directory = output_directory(trainer, self.dirpath)
        write_metrics(directory / "metrics.json", result)
        write_runs(directory / "runs", result, "mmembed")
        Console().print(metrics_table(result.metrics, title=f"{split}, union pool of {len(result.pool):,}"))
        print(f"metrics: {directory / 'metrics.json'}\nTREC runs: {directory / 'runs'}")
