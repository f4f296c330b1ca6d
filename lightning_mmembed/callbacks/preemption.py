"""Saves a checkpoint and ends the run with a status of its own when a scheduler asks it to end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_mmembed.callbacks.access import output_directory, processes_of
from lightning_mmembed.errors import TRY_AGAIN, UserInputError


class PreemptionCheckpoint(Callback):
    """On SIGTERM saves ``last.ckpt`` at the next optimizer step and ends the run with exit status 75.

    One process that gets the signal is enough: after every batch the processes ask each other, one number each. While
    the pool is evaluated or mined the signal waits for the next batch. For the time of the fit this takes the place of
    Lightning's own handlers of all signals, which talk to the other processes inside of the handler.

    Args:
        signals: Names of the signals, such as ``["SIGTERM", "SIGUSR1"]``.
        dirpath: Where the checkpoint is written; by default where the first ``ModelCheckpoint`` writes, or else
            ``checkpoints`` in the Trainer's ``default_root_dir``.

    Raises:
        UserInputError: If there is no signal of such a name.
    """

    def __init__(self, signals: Sequence[str] = ("SIGTERM",), dirpath: str | Path | None = None) -> None:
        known = signal.Signals.__members__
        unknown = [name for name in signals if name not in known]
        if unknown:
            raise UserInputError(f"signals: {unknown[0]!r} is unknown; write names such as SIGTERM or SIGUSR1")
        self.signals, self.dirpath = [known[name] for name in signals], dirpath
        self._received = False
        self._handlers: dict[signal.Signals, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take over the signals."""
        if stage != "fit":
            return
        self._received = False
        # Set on the instance: it hides the method that would register Lightning's handlers.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        if threading.current_thread() is threading.main_thread():  # no other may
            self._handlers = {number: signal.signal(number, self._note) for number in self.signals}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and end, if one of the processes has got a signal and no gradients are being accumulated."""
        if not processes_of(trainer).any(self._received) or trainer.fit_loop._should_accumulate():
            return
        path = self._directory(trainer) / "last.ckpt"
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            print(f"asked to end: saved {path} after step {trainer.global_step}; start again with ckpt_path=last")
        # Lightning takes a process that it has started and that ends with another status for a crashed one, and kills
        # the others: the first process's status is the run's.
        started = isinstance(_environment(trainer), LightningEnvironment) and trainer.local_rank > 0
        raise SystemExit(0 if started else TRY_AGAIN)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        self._give_back(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the signals back where no teardown follows."""
        self._give_back(trainer)

    def _note(self, number: int, frame: Any) -> None:
        self._received = True

    def _give_back(self, trainer: Trainer) -> None:
        vars(trainer._signal_connector).pop("register_signal_handlers", None)
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._handlers = {}

    def _directory(self, trainer: Trainer) -> Path:
        savers = [saver for saver in trainer.checkpoint_callbacks if isinstance(saver, ModelCheckpoint)]
        if self.dirpath is None and savers and savers[0].dirpath is not None:
            return Path(savers[0].dirpath)
        return output_directory(trainer, self.dirpath) / ("checkpoints" if self.dirpath is None else "")


def _environment(trainer: Trainer) -> Any:
    return getattr(trainer.strategy, "cluster_environment", None)
