"""What the callbacks take from a Trainer: its dataset, and one store of vectors that all of them share."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_mmembed.data.datamodule import MBEIRDataModule
from lightning_mmembed.distributed import Processes
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.retrieval.embed import VectorStore

log = logging.getLogger(__name__)

#: Seconds in which a run that was asked to end may do so, before the one that takes its place gives up.
PATIENCE = 60.0


def datamodule_of(trainer: Trainer) -> MBEIRDataModule:
    """The datamodule of a Trainer.

    Raises:
        UserInputError: If it has none, or one that knows no pools.
    """
    datamodule = getattr(trainer, "datamodule", None)
    if not isinstance(datamodule, MBEIRDataModule):
        raise UserInputError(
            f"the Trainer's datamodule is {type(datamodule).__name__}; evaluation and mining need an MBEIRDataModule, "
            "passed as trainer.fit(module, datamodule)"
        )
    return datamodule


def processes_of(trainer: Trainer) -> Processes:
    """The processes of a Trainer."""
    return Processes(trainer.global_rank, trainer.world_size, trainer.strategy.root_device)


def output_directory(trainer: Trainer, dirpath: str | Path | None) -> Path:
    """Where a callback writes: ``dirpath``, or the Trainer's ``default_root_dir``; all processes must ask.

    It is the first process's: the others may have made up one of their own, such as one named by the time.
    """
    return Path(processes_of(trainer).broadcast(str(trainer.default_root_dir if dirpath is None else dirpath)))


class OwnDirectory(Callback):
    """A callback that writes into a directory, and keeps other runs out of it as long as its own goes on.

    Runs of plain Trainers lie in the working directory if nothing else is said: two at a time would delete each other's
    vectors, and one would train with the other's negatives.
    """

    dirpath: str | Path | None
    _lock: FileLock | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the directory.

        Raises:
            UserInputError: If another run has it.
        """
        processes, is_free = processes_of(trainer), True
        directory = output_directory(trainer, self.dirpath)
        if processes.rank == 0:
            self._give_back()
            self._lock = _taken(directory)
            is_free = self._lock is not None
        if not processes.broadcast(is_free):
            raise UserInputError(
                f"another run is at work in {str(directory)!r}; give this one a directory of its own, such as "
                "Trainer(default_root_dir=...)"
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give it back."""
        self._give_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give it back where no teardown follows."""
        self._give_back()

    def _give_back(self) -> None:
        if self._lock is not None:
            self._lock.release()
        self._lock = None


def _taken(directory: Path) -> FileLock | None:
    """The lock of a directory, which callbacks of a run share; None if another run keeps it."""
    directory.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory / ".run.lock", is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.warning("another run is at work in %s; waiting %d s for its end", directory, PATIENCE)
        try:
            lock.acquire(timeout=PATIENCE)
        except Timeout:
            return None
    return lock


def begins_anew(trainer: Trainer, stage: str) -> bool:
    """Whether a fit is set up that has no epoch behind it; where one is resumed, callbacks get their states later."""
    return stage == "fit" and trainer.fit_loop.epoch_progress.current.processed == 0  # type: ignore[attr-defined]


def heartbeat_of(trainer: Trainer, position: str) -> Callable[[], object]:
    """What tells the first callback with a method ``beat``, such as a watchdog, that work goes on; or nothing.

    Args:
        trainer: The Trainer.
        position: What is done.
    """
    beats = (getattr(callback, "beat", None) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    beat = next((beat for beat in beats if beat is not None), None)
    return (lambda: None) if beat is None else partial(beat, position)


def vector_store(
    trainer: Trainer, dirpath: str | Path | None, vectors_dir: str | Path | None = None, /, **settings: Any
) -> VectorStore:
    """A store of vectors, filled by all processes of the Trainer in its precision; all of them must ask.

    Args:
        trainer: The Trainer.
        dirpath: See :func:`output_directory`.
        vectors_dir: Where the vectors lie; by default in ``vectors`` in the output directory.
        **settings: Arguments of :class:`VectorStore`.
    """
    directory = output_directory(trainer, dirpath if vectors_dir is None else vectors_dir)
    return VectorStore(
        directory / "vectors" if vectors_dir is None else directory,
        processes=processes_of(trainer),
        precision=trainer.precision_plugin.forward_context,
        heartbeat=heartbeat_of(trainer, "embedding"),
        **settings,
    )
