"""Writes the HTML report of a run when it has been tested."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_mmembed.callbacks.access import datamodule_of, output_directory
from lightning_mmembed.callbacks.evaluation import RetrievalEvaluation
from lightning_mmembed.callbacks.mining import HardNegativeMining
from lightning_mmembed.data.negatives import read_columns
from lightning_mmembed.items import MBEIR_TASKS
from lightning_mmembed.retrieval.compare import ComparedRun
from lightning_mmembed.retrieval.mined_examples import mined_examples
from lightning_mmembed.retrieval.mining_views import Mined, MinedQuery
from lightning_mmembed.retrieval.published import PUBLISHED
from lightning_mmembed.retrieval.report import Stage, write_report
from lightning_mmembed.retrieval.results import RetrievalResult
from lightning_mmembed.retrieval.runs import Record, gallery

C = TypeVar("C", bound=Callback)


class RunReport(Callback):
    """Collects curves while training and writes ``report.html`` after the evaluation of the test or validation split.

    Args:
        title: Heading of the page.
        facts: What the reader must know about the run, such as dataset and seed; one that is None is left out.
        config_file: The run's configuration, shown as it is.
        queries_per_task: Queries of each task in the gallery.
        published: Show published figures beside one's own where all 16 tasks of M-BEIR were evaluated.
        dirpath: Where the report is written; by default the Trainer's ``default_root_dir``.
    """

    def __init__(
        self,
        title: str = "Retrieval report",
        facts: dict[str, Any] | None = None,
        config_file: str | Path | None = None,
        queries_per_task: int = 6,
        published: bool = False,
        dirpath: str | Path | None = None,
    ) -> None:
        self.title, self.config_file = title, config_file
        known = {name: value for name, value in (facts or {}).items() if value is not None}
        self.facts = {n: ", ".join(map(str, v)) if isinstance(v, list) else str(v) for n, v in known.items()}
        self.queries_per_task, self.published, self.dirpath = queries_per_task, published, dirpath
        self.history: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the curves so far."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the curves that the checkpoint knew."""
        self.history = list(state_dict["history"])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ask where to write while all processes are there to answer."""
        self._directory = output_directory(trainer, self.dirpath)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add a point to the curves."""
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            row = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("train/")}
            row["lr"] = trainer.optimizers[0].param_groups[0]["lr"]
            self.history.append({"step": trainer.global_step, "epoch": trainer.current_epoch, **row})

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the report."""
        self._write(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the report, unless the validation belongs to a fit."""
        if trainer.state.fn == "validate":
            self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        evaluation = _find(trainer, RetrievalEvaluation)
        if evaluation is None or evaluation.record is None or not trainer.is_global_zero:
            return
        assert evaluation.result is not None
        mining = _find(trainer, HardNegativeMining)
        minings = mining.versions if mining else []
        # A Trainer that made no step does not know how far the weights are trained that it evaluates.
        during_fit = [e for e in evaluation.evaluations if e["split"] == "val" and trainer.global_step]
        self.write(
            self._directory,
            evaluation.record,
            evaluation.result,
            history=self._rows(during_fit, minings),
            stages=_stages(during_fit, [version["step"] for version in minings]),
            minings=_mined(mining, trainer) if mining else (),
        )

    def write(
        self,
        directory: Path,
        record: Record,
        result: RetrievalResult,
        history: Sequence[Mapping[str, Any]] = (),
        stages: Sequence[Stage] = (),
        minings: Sequence[Mined] = (),
    ) -> None:
        """Write ``report.html``.

        Args:
            directory: Where to write.
            record: What was written of the evaluation.
            result: The evaluation, for the gallery.
            history: Curves; see :func:`~lightning_mmembed.retrieval.report.write_report`.
            stages: Measurements while training; likewise. Without them the evaluation itself is the only one.
            minings: What was mined; likewise.
        """
        evaluated = f"{record.metrics['protocol']['split']} split"
        if "prompts" in record.metrics:
            evaluated += ", first prompt"
        path = write_report(
            directory / "report.html",
            title=self.title,
            metrics=record.metrics,
            history=history,
            stages=stages or [Stage(evaluated, record.metrics, result.modality_matrix)],
            gallery=gallery(result, self.queries_per_task),
            minings=minings,
            comparison=self._comparison(record),
            facts={**self.facts, "union pool": f"{len(result.pool):,} candidates"},
            config=Path(self.config_file).read_text() if self.config_file else "",
        )
        print(f"report: {path}")

    def _comparison(self, record: Record) -> list[ComparedRun]:
        """The run itself with the others and the published ones; nothing if it would stand alone."""
        whole = {row.pool for row in record.comparison if set(MBEIR_TASKS) <= row.values.keys()}
        published = [row for row in PUBLISHED if self.published and row.pool in whole]
        pools = {row.pool for row in record.comparison}
        return [*record.comparison, *published] if published or len(record.comparison) > len(pools) else []

    def _rows(self, evaluations: list[dict[str, Any]], minings: list[dict[str, Any]]) -> list[dict[str, Any]]:
        rows = list(self.history)
        for evaluation in evaluations:
            averages = {
                f"val/{pool}/{name}": values["average"][name]
                for pool, values in evaluation["metrics"].items()
                for name in ("hit@5", "modality@1")
                if name in values["average"]
            }
            rows.append({"step": evaluation["step"], **averages})
        rows += [{"step": version["step"], "mined": number} for number, version in enumerate(minings, 1)]
        return sorted(rows, key=lambda row: row["step"])


def _stages(evaluations: list[dict[str, Any]], mined_at: list[int]) -> list[Stage]:
    """The evaluations that tell the story: untrained, before the first mining, after it, and the last."""
    first = mined_at[0] if mined_at else float("inf")
    before = [e for e in evaluations if 0 < e["step"] <= first]
    after = [e for e in evaluations if e["step"] > first]
    picked = {"untrained": [e for e in evaluations if e["step"] == 0][:1]}
    if mined_at:
        picked |= {"before mining": before[-1:], "after mining": after[-1:]}
    else:
        picked |= {"trained": before[-1:]}
    return [Stage(name, e["metrics"], e["modality_matrix"]) for name, found in picked.items() for e in found]


def _mined(mining: HardNegativeMining, trainer: Trainer) -> list[Mined]:
    """What was mined, the last time with examples where its file is still there."""
    shown = []
    for number, version in enumerate(mining.versions, 1):
        examples: list[MinedQuery] = []
        if number == len(mining.versions) and Path(version["path"]).is_file():
            shards = datamodule_of(trainer).shards
            columns = read_columns(version["path"])
            examples = mined_examples(shards.pool(mining.pool), shards.query_sets("train"), columns)
        epochs = version["epochs"]
        name = f"mining {number}, after {epochs} epoch{'' if epochs == 1 else 's'}, step {version['step']:,}"
        shown.append(Mined(name, version["audit"], examples))
    return shown


def _find(trainer: Trainer, kind: type[C]) -> C | None:
    found: C | None = next((c for c in trainer.callbacks if isinstance(c, kind)), None)  # type: ignore[attr-defined]
    return found
