"""Training throughput: the Trainer over the datamodule against a bare loop on batches prepared beforehand.

    python -m benchmarks.throughput            the built-in benchmark, its tiny encoder, one CPU process

Both run the same encoder, loss, optimizer and batches; the bare loop reads nothing, logs nothing and calls no hook.
Rounds alternate, so that a machine whose speed drifts slows both; the ratio of the medians is the figure.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from functools import partial
from typing import Any

import torch
import transformers
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_mmembed import MBEIRDataModule, RetrievalModule, contrastive_loss
from lightning_mmembed.data import ShardTexts
from lightning_mmembed.data.batches import TrainingBatch
from lightning_mmembed.data.mini import generate_mini
from lightning_mmembed.encoders.tiny import tiny_encoder
from lightning_mmembed.losses import labelled_positive_mask

STEPS, WARM_UP, ROUNDS, BATCH_SIZE = 30, 3, 5, 128


class Stopwatch(Callback):
    """Times a fit from the batch after the warm-up to its last, and keeps its batches."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.batches: list[TrainingBatch] = []

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, out: Any, batch: Any, index: int) -> None:
        """Start after the warm-up, stop after the last."""
        self.batches.append(batch)
        if len(self.batches) == WARM_UP:
            self.start = time.perf_counter()
        self.seconds = time.perf_counter() - getattr(self, "start", time.perf_counter())


def bare_loop(module: RetrievalModule, batches: list[TrainingBatch]) -> float:
    """Seconds of the training steps after the warm-up."""
    optimizer = module.optimizer(module.encoder.parameters())
    for i, batch in enumerate(batches):
        if i == WARM_UP:
            start = time.perf_counter()
        queries, candidates = module.encoder(batch.inputs).split([len(batch), len(batch.candidate_ids)])
        mask = labelled_positive_mask(batch.positives, batch.candidate_ids, batch.positive_index)
        loss = contrastive_loss(queries, candidates, batch.positive_index, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return time.perf_counter() - start


def main() -> None:
    """Print the figures of every round and their ratio."""
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with tempfile.TemporaryDirectory() as folder:
        data = MBEIRDataModule(f"{folder}/shards", generate_mini(f"{folder}/mini"), batch_size=BATCH_SIZE)
        data.prepare_data()
        build = partial(
            tiny_encoder, f"{folder}/tiny", ShardTexts(f"{folder}/shards"), {}, max_length=64, length_buckets=8
        )
        rates: dict[str, list[float]] = {"trainer": [], "bare loop": []}
        for number in range(ROUNDS):
            watch = Stopwatch()
            module = RetrievalModule(build(), optimizer=partial(torch.optim.AdamW, lr=1e-3))
            trainer = Trainer(
                max_steps=STEPS,
                accelerator="cpu",
                callbacks=[watch],
                logger=False,
                enable_checkpointing=False,
                enable_model_summary=False,
                enable_progress_bar=False,
                limit_val_batches=0,
            )
            trainer.fit(module, data)
            pairs = (STEPS - WARM_UP) * BATCH_SIZE
            rates["trainer"].append(pairs / watch.seconds)
            bare = RetrievalModule(build(), optimizer=partial(torch.optim.AdamW, lr=1e-3))
            rates["bare loop"].append(pairs / bare_loop(bare, watch.batches))
            print(
                f"round {number}: " + ", ".join(f"{name} {r[-1]:.0f} pairs/s" for name, r in rates.items()),
                file=sys.stderr,
            )
    medians = {name: statistics.median(r) for name, r in rates.items()}
    ratio = medians["trainer"] / medians["bare loop"]
    print(f"trainer {medians['trainer']:.0f} pairs/s, bare loop {medians['bare loop']:.0f} pairs/s, ratio {ratio:.3f}")


if __name__ == "__main__":
    main()
