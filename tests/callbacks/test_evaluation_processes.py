"""An evaluation in several processes of a Trainer finds what one process finds, wherever each would have written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from distributed_worlds import in_processes
from worlds import tiny_module, tiny_trainer

from lightning_mmembed import MBEIRDataModule, RetrievalEvaluation
from lightning_mmembed.callbacks import RunReport
from lightning_mmembed.distributed import ALONE, Processes

pytestmark = pytest.mark.slow  # starts several processes

STRATEGIES = {"ddp-2": 2, "ddp-3": 3, "fsdp2-2": 2}


def run(processes: Processes, folder: Path, checkpoint: Path, shards: Path, strategy: str) -> None:
    """Fit without learning anything, validate and test; each process believes in a run directory of its own."""
    from lightning_mmembed.strategies import FSDP2Strategy

    callback = RetrievalEvaluation(metrics=("hit@5", "ndcg@10"), before_fit=True, dtype="float32")
    trainer = tiny_trainer(
        folder / f"run-{processes.rank}",
        strategy=FSDP2Strategy() if strategy.startswith("fsdp2") else "auto" if processes.size == 1 else "ddp",
        devices=processes.size,
        callbacks=[callback, RunReport()],
        **{"max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 1, "limit_test_batches": 1},
        inference_mode=False,
    )
    assert trainer.world_size == processes.size
    module, datamodule = tiny_module(checkpoint, lr=0.0), MBEIRDataModule(shards, batch_size=2)
    logged: list[Any] = []
    for stage in (trainer.fit, trainer.validate, trainer.test):
        stage(module, datamodule=datamodule)  # type: ignore[operator]
        logged.append({name: float(v) for name, v in trainer.callback_metrics.items() if "union" in name})
    (folder / f"{processes.rank}.json").write_text(json.dumps([callback.evaluations, logged]))


@pytest.fixture(scope="module")
def expected(tiny_checkpoint: Path, tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    run(ALONE, folder, tiny_checkpoint, tiny_shards, "one")
    return folder


def vectors(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.npy")}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_processes_evaluate_during_fit_validate_and_test_as_one_process_does(
    expected: Path, tiny_checkpoint: Path, tiny_shards: Path, tmp_path: Path, strategy: str
) -> None:
    in_processes(STRATEGIES[strategy], run, tmp_path, tiny_checkpoint, tiny_shards, strategy)
    evaluations, logged = json.loads((expected / "0.json").read_text())
    assert [(one["split"], one["step"]) for one in evaluations] == [("val", 0), ("val", 1), ("val", 1), ("test", 1)]
    for rank in range(STRATEGIES[strategy]):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [evaluations, logged]
    assert [path.name for path in tmp_path.glob("run-*")] == ["run-0"], "the first process says where files lie"
    assert vectors(tmp_path / "run-0") == vectors(expected / "run-0")
    assert (tmp_path / "run-0/metrics.json").read_text() == (expected / "run-0/metrics.json").read_text()
    assert (tmp_path / "run-0/report.html").is_file()
