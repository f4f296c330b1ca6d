"""Training throughput of several processes against one, at the same batch in each process.

    OMP_NUM_THREADS=1 python -m benchmarks.devices                           two CPU processes
    python -m benchmarks.devices --accelerator gpu --devices 8               the GPUs of a machine, over NCCL

Every run is a fit of the Trainer on the built-in benchmark with its tiny encoder: one process, then as many as asked
for under DDP, then under FSDP2, in alternating rounds, each started anew. The rate is that of all processes together,
from the end of the warm-up to the last step, reading of data included; each reads its own. Twice as many processes
that wait for nothing are twice as fast; they wait for the gradients of each other, and for the vectors. The model has
1.7M weights: one with more has more to exchange, and more to compute.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from typing import Any

import torch
import transformers
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_mmembed import MBEIRDataModule, RetrievalModule
from lightning_mmembed.data import ShardTexts
from lightning_mmembed.data.mini import generate_mini
from lightning_mmembed.encoders.tiny import tiny_encoder
from lightning_mmembed.strategies import FSDP2Strategy

METHODS = ("one", "ddp", "fsdp2")
STEPS, WARM_UP, ROUNDS = 18, 3, 5


class Stopwatch(Callback):
    """Times a fit from the end of the warm-up to its last step."""

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, out: Any, batch: Any, index: int) -> None:
        if index + 1 in (WARM_UP, STEPS):
            if module.device.type == "cuda":
                torch.cuda.synchronize(module.device)
            trainer.strategy.barrier()
            self.start, self.seconds = time.perf_counter(), time.perf_counter() - getattr(self, "start", 0.0)


def measure(options: argparse.Namespace) -> None:
    """Train in this process, and in those that the Trainer starts; print queries per second of all of them."""
    data = MBEIRDataModule(f"{options.folder}/shards", batch_size=options.batch_size)
    texts = ShardTexts(f"{options.folder}/shards")
    encoder = tiny_encoder(f"{options.folder}/tiny", texts, {}, max_length=64, length_buckets=8)
    watch = Stopwatch()
    trainer = Trainer(
        max_steps=STEPS,
        accelerator=options.accelerator,
        devices=1 if options.measure == "one" else options.devices,
        strategy={"one": "auto", "ddp": "ddp", "fsdp2": FSDP2Strategy()}[options.measure],
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        limit_val_batches=0,
    )
    trainer.fit(RetrievalModule(encoder, optimizer=partial(torch.optim.AdamW, lr=1e-3)), data)
    if trainer.is_global_zero:
        print(json.dumps((STEPS - WARM_UP) * options.batch_size * trainer.world_size / watch.seconds))


def compare(options: argparse.Namespace) -> None:
    """Print the rates and their ratios to that of one process."""
    given = [f"--accelerator={options.accelerator}", f"--devices={options.devices}"]
    given += [f"--batch-size={options.batch_size}", f"--folder={options.folder}"]
    rates: dict[str, list[float]] = {method: [] for method in METHODS}
    for number in range(ROUNDS):
        for method, found in rates.items():
            command = [sys.executable, "-m", "benchmarks.devices", f"--measure={method}", *given]
            found.append(json.loads(subprocess.check_output(command).splitlines()[-1]))
        print(f"round {number}: " + ", ".join(f"{m} {r[-1]:.0f} queries/s" for m, r in rates.items()), file=sys.stderr)
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    print(f"{options.accelerator}, OMP_NUM_THREADS={threads}, batches of {options.batch_size} in each process")
    print(f"  one process: {statistics.median(rates['one']):.0f} queries/s")
    for method in METHODS[1:]:
        ratios = [several / one for several, one in zip(rates[method], rates["one"], strict=True)]
        print(
            f"  {method}, {options.devices} processes: {statistics.median(rates[method]):.0f} queries/s, "
            f"{statistics.median(ratios):.2f} times one ({min(ratios):.2f} to {max(ratios):.2f})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accelerator", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--measure", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if options.measure:
        measure(options)
        return
    with tempfile.TemporaryDirectory() as options.folder:
        MBEIRDataModule(f"{options.folder}/shards", generate_mini(f"{options.folder}/mini")).prepare_data()
        ShardTexts(f"{options.folder}/shards")
        compare(options)


if __name__ == "__main__":
    main()
