"""Ends a process that hangs, and says where it was."""

from __future__ import annotations

import ctypes
import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_mmembed.callbacks.access import output_directory
from lightning_mmembed.data.batches import TrainingBatch
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.items import decode_id

#: Seconds that a process whose time is out stays, so that others, which its end would end, tell where they are too.
GRACE = 5.0
#: Seconds after which a timer of C ends a process whose threads cannot run, such as one that never frees Python's lock.
MARGIN = 2 * GRACE
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>


class Watchdog(Callback):
    """Ends a process with status 1 that has made no progress for some time; with several, each has its own.

    Progress is a batch that is begun or ended, or a call of :meth:`beat`. ``watchdog-rank-{rank}.log`` in the run
    directory says where the process is: stage, epoch, batch and the ids of its queries. When the time is out, the
    stacks of all threads follow there; otherwise it is removed. Where one process hangs the others wait for it, so all
    of them end.

    On Linux, a process that Lightning has started is ended when the one that started it is gone before it: where the
    first process fails, none is left behind.

    Args:
        timeout: Seconds without progress, more than the longest step takes; None for no limit.
        dirpath: Where the file is written; by default the Trainer's ``default_root_dir``.

    Raises:
        UserInputError: If ``timeout`` is not above 0.
    """

    def __init__(self, timeout: float | None = 1800, dirpath: str | Path | None = None) -> None:
        if timeout is not None and not timeout > 0:
            raise UserInputError(f"timeout={timeout!r} is no number of seconds above 0; use null for no limit")
        self.timeout, self.dirpath = timeout, dirpath
        self._who, self._position, self._path = "", "", Path()
        self._file: int | None = None  # its descriptor
        self._deadline, self._over = 0.0, threading.Event()

    def beat(self, position: str) -> None:
        """Say that the process makes progress.

        Args:
            position: Where it is, such as ``"embedding the test pool, part 3"``.
        """
        if self._file is None or self.timeout is None:
            return
        self._position = f"{self._who}: {position}"
        with suppress(OSError):  # a full disk is no hang
            os.ftruncate(self._file, 0)
            os.write(self._file, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {self._position}\n".encode())
        self._deadline = time.monotonic() + self.timeout
        faulthandler.dump_traceback_later(self.timeout + MARGIN, exit=True, file=self._file)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin to watch."""
        if self.timeout is None:
            return
        self._who = f"process {trainer.global_rank} of {trainer.world_size}"
        self._path = output_directory(trainer, self.dirpath) / f"watchdog-rank-{trainer.global_rank}.log"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self._path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        self._over = threading.Event()
        self.beat(f"{_stage(trainer)}, setup")
        threading.Thread(target=self._watch, args=(self._over,), name="watchdog", daemon=True).start()
        _end_with_parent(trainer, True)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note which queries are trained."""
        self._in_batch(trainer, batch, batch_idx)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note that the batch is done."""
        self._after_batch(trainer, batch_idx)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Note which queries are evaluated."""
        self._in_batch(trainer, batch, batch_idx)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Note that the batch is done."""
        self._after_batch(trainer, batch_idx)

    on_test_batch_start, on_test_batch_end = on_validation_batch_start, on_validation_batch_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the process to its error."""
        self._stop(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Watch no more."""
        self._stop(trainer)

    def _in_batch(self, trainer: Trainer, batch: Any, batch_idx: int) -> None:
        if self._file is not None:
            ids = map(decode_id, batch.query_ids.tolist()) if isinstance(batch, TrainingBatch) else ()
            self.beat(f"{_stage(trainer)}, in batch {batch_idx}, queries {' '.join(ids)}")

    def _after_batch(self, trainer: Trainer, batch_idx: int) -> None:
        self.beat(f"{_stage(trainer)}, after batch {batch_idx}")

    def _stop(self, trainer: Trainer) -> None:
        if self._file is None:
            return
        self._over.set()
        faulthandler.cancel_dump_traceback_later()
        _end_with_parent(trainer, False)
        os.close(self._file)
        self._file = None
        self._path.unlink(missing_ok=True)

    def _watch(self, over: threading.Event) -> None:
        while not over.wait(1):
            if time.monotonic() >= self._deadline:
                self._end()

    def _end(self) -> None:
        file, self._file = self._file, None  # too late for a heartbeat
        try:
            print(
                f"watchdog: no progress for {self.timeout:g} s. {self._position}. The stacks are in {self._path}",
                file=sys.stderr,
                flush=True,
            )
            if file is not None:
                faulthandler.dump_traceback(file)
            time.sleep(GRACE)
            for worker in multiprocessing.active_children():  # one that hangs would stay for ever
                worker.kill()
        finally:
            os._exit(1)


def _stage(trainer: Trainer) -> str:
    stage = trainer.state.stage
    return f"{'setup' if stage is None else stage.value}, epoch {trainer.current_epoch}"


def _end_with_parent(trainer: Trainer, on: bool) -> None:
    """Let the system end a process that Lightning has started when the first one is gone, or no longer so."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if sys.platform == "linux" and trainer.local_rank > 0 and isinstance(environment, LightningEnvironment):
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL if on else 0)
