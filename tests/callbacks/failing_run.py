"""A training run on the small dataset that one of its processes spoils; a program that tests start.

Arguments: the folder of the shards, the checkpoint, the run directory, and the settings as JSON.
"""

from __future__ import annotations

import ctypes
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from worlds import tiny_module, tiny_trainer

from lightning_mmembed import MBEIRDataModule
from lightning_mmembed.callbacks import Watchdog, watchdog
from lightning_mmembed.data.batches import TrainingBatches
from lightning_mmembed.items import decode_id

FOR_EVER = 10_000


class Spoiler(Callback):
    """Prints the ids of batch 1, and does to it in some processes what their entry says."""

    def __init__(self, watchdog: Watchdog, timeout: float, spoil: dict[str, str]) -> None:
        self.watchdog, self.timeout, self.spoil = watchdog, timeout, spoil

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.watchdog.timeout = self.timeout  # from now on: on a busy machine, the way to batch 0 may take longer
        self.watchdog.beat("after the first batches")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx != 1:
            return
        line = json.dumps([trainer.global_rank, [decode_id(code) for code in batch.query_ids.tolist()]])
        print(line + "\n", end="", flush=True)  # one write, whatever the buffering: all processes share the file
        how = self.spoil.get(str(trainer.global_rank))
        if how == "sleeps":
            time.sleep(FOR_EVER)
        elif how == "sleeps in C":
            ctypes.PyDLL(None).sleep(FOR_EVER)  # unlike other C code, it keeps Python's lock
        elif how == "raises":
            time.sleep(2)  # the others are where they hang by now
            raise ValueError("spoiled")
        elif how == "works long":
            for part in range(10):
                time.sleep(1)
                self.watchdog.beat(f"part {part}")


def main(shards: Path, checkpoint: Path, directory: Path, settings: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    watchdog.MARGIN, watchdog.GRACE = 2.0, 1.0
    timeout, devices, spoil = settings["timeout"], settings.get("devices", 1), settings.get("spoil", {})
    callback = Watchdog(timeout if "worker" in spoil else 1000)
    datamodule = MBEIRDataModule(shards, batch_size=4, num_workers=settings.get("num_workers", 0))
    if "worker" in spoil:  # workers are forked, so they have it too
        TrainingBatches.__getitem__ = lambda self, key: time.sleep(FOR_EVER)  # type: ignore[assignment]
    trainer = tiny_trainer(
        directory,
        devices=devices,
        strategy="ddp_find_unused_parameters_true" if devices > 1 else "auto",
        max_steps=3,
        limit_val_batches=0,
        callbacks=[callback, Spoiler(callback, timeout, spoil)],
    )
    trainer.fit(tiny_module(checkpoint), datamodule)
    time.sleep(timeout + watchdog.MARGIN + 1)  # a timer that is still armed would end the process
    print("threads", [thread.name for thread in threading.enumerate()])


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), json.loads(sys.argv[4]))
