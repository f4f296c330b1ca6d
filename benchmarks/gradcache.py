"""GradCache against the plain step: activations held as the batch grows 16 times, and time at a batch that fits both.

    python -m benchmarks.gradcache            the built-in benchmark, its tiny encoder, one CPU process

Both are steps of the Trainer on the same queries: the plain one in 8 passes by length, GradCache in passes of at most
so many positions. Activations are the bytes of the tensors that the encoder keeps for the backward pass, each storage
once, its weights left out: an exact count, the same in every run. What the loss keeps is counted by itself: scores of
all queries against all candidates grow with the square of the batch under any method. Beside it stands how far the
memory of a process rose in a step, which also holds the batch and its vectors, and what the allocator does not give
back. Each size is measured in a process of its own, over as many queries: 16 steps of the smallest batch, 1 of the
largest. Linux only.

Time is that of the steps alone, after a warm-up: batches are prepared before the clock starts. Rounds alternate, so
that a machine whose speed drifts slows all; the figures are medians of the ratios within a round, by the clock and by
CPU time. GradCache computes every pass once more without a graph: a third of the arithmetic, a ratio of 1.33.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.encoding import resident
from lightning_mmembed import MBEIRDataModule, RetrievalModule, contrastive_loss
from lightning_mmembed.data import ShardTexts
from lightning_mmembed.data.mini import generate_mini
from lightning_mmembed.encoders.tiny import tiny_encoder

BATCHES, BUDGET = (64, 256, 1024), 512
BATCH, BUDGETS, STEPS, WARM_UP, ROUNDS = 256, (1024, 2048, 4096), 6, 1, 5
FLAT, GOAL = 1.1, 1.35


class Saved:
    """Bytes that are saved for the backward pass: now, and at most."""

    def __init__(self, weights: nn.Module) -> None:
        self.weights = {parameter.untyped_storage().data_ptr() for parameter in weights.parameters()}
        self.holders: Counter[int] = Counter()
        self.now = self.most = 0

    def hooks(self) -> saved_tensors_hooks:
        return saved_tensors_hooks(partial(_Held, self), lambda held: held.tensor)


class _Held:
    """A saved tensor, for as long as its graph lives."""

    def __init__(self, saved: Saved, tensor: Tensor) -> None:
        self.saved, self.tensor, storage = saved, tensor, tensor.untyped_storage()
        self.storage, self.bytes = storage.data_ptr(), storage.nbytes()
        if self.storage in saved.weights:
            self.bytes = 0
        elif not saved.holders[self.storage]:
            saved.now += self.bytes
            saved.most = max(saved.most, saved.now)
        saved.holders[self.storage] += 1

    def __del__(self) -> None:
        self.saved.holders[self.storage] -= 1
        if not self.saved.holders[self.storage]:
            self.saved.now -= self.bytes


class Probe(Callback):
    """Times the steps after the warm-up; takes the memory of the process before the first, and resets its peak."""

    def __init__(self) -> None:
        self.clock, self.cpu, self.before = 0.0, 0.0, 0.0

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not batch_idx:
            self.before = resident("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        self.started = time.perf_counter(), time.process_time()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, out: Any, batch: Any, index: int) -> None:
        if index >= WARM_UP:
            self.clock += time.perf_counter() - self.started[0]
            self.cpu += time.process_time() - self.started[1]


def counted(module: RetrievalModule) -> dict[str, Saved]:
    """Count what the encoder and the loss of a module save."""
    saved = {name: Saved(module.encoder) for name in ("encoder", "loss")}
    forward, loss = module.encoder.forward, module.loss

    def encode(inputs: Any) -> Tensor:
        with saved["encoder"].hooks():
            return forward(inputs)

    def contrast(*arguments: Tensor) -> Tensor:
        with saved["loss"].hooks():
            return loss(*arguments)

    module.encoder.forward, module.loss = encode, contrast  # type: ignore[method-assign]
    return saved


def world(folder: str) -> None:
    """Make the shards."""
    MBEIRDataModule(f"{folder}/shards", generate_mini(f"{folder}/mini")).prepare_data()


def build(folder: str, budget: int | None) -> RetrievalModule:
    texts = ShardTexts(f"{folder}/shards")
    encoder = tiny_encoder(f"{folder}/tiny", texts, {}, max_length=64, length_buckets=8)
    optimizer = partial(torch.optim.AdamW, lr=1e-3)
    return RetrievalModule(encoder, contrastive_loss, optimizer, mini_batch_num_tokens=budget)


def fit(folder: str, module: RetrievalModule, batch_size: int, steps: int) -> Probe:
    probe = Probe()
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        callbacks=[probe],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        limit_val_batches=0,
    )
    trainer.fit(module, MBEIRDataModule(f"{folder}/shards", batch_size=batch_size))
    return probe


def measure(folder: str, batch_size: int, budget: int | None) -> dict[str, float]:
    """MiB at most: saved by encoder and loss, and how far this process rose; over the queries of the largest batch."""
    module = build(folder, budget)
    saved = counted(module)
    probe = fit(folder, module, batch_size, BATCHES[-1] // batch_size)
    risen = resident("VmHWM") - probe.before
    return {name: s.most / 2**20 for name, s in saved.items()} | {"risen": risen}


def memory(folder: str) -> bool:
    """Print the memory of both methods as the batch grows; whether GradCache's activations stay flat."""
    held = []
    for budget in (None, BUDGET):
        for batch_size in BATCHES:
            command = [sys.executable, "-m", "benchmarks.gradcache", "--measure", folder, str(batch_size)]
            found = json.loads(subprocess.check_output([*command, str(budget or 0)]).splitlines()[-1])
            held.append(found["encoder"])
            name = f"GradCache, {budget} positions" if budget else "plain"
            print(
                f"{name}, {batch_size} queries: activations {found['encoder']:.1f} MiB, loss {found['loss']:.1f} MiB, "
                f"process rose by {found['risen']:.0f} MiB",
                flush=True,
            )
    plain, ours = held[: len(BATCHES)], held[len(BATCHES) :]
    print(
        f"activations over {BATCHES[-1] // BATCHES[0]} times the queries: plain {plain[-1] / plain[0]:.2f} times, "
        f"GradCache {max(ours) / min(ours):.3f} times"
    )
    return max(ours) <= FLAT * min(ours)


def speed(folder: str) -> None:
    """Print how many times as long GradCache takes."""
    ratios: dict[int, list[tuple[float, float]]] = {budget: [] for budget in BUDGETS}
    for number in range(ROUNDS):
        plain = fit(folder, build(folder, None), BATCH, WARM_UP + STEPS)
        for budget in BUDGETS:
            cached = fit(folder, build(folder, budget), BATCH, WARM_UP + STEPS)
            ratios[budget].append((cached.clock / plain.clock, cached.cpu / plain.cpu))
        print(
            f"round {number}: plain {plain.clock / STEPS:.2f} s a step, "
            + ", ".join(f"{budget} positions {r[-1][0]:.2f}" for budget, r in ratios.items()),
            file=sys.stderr,
        )
    print(f"{BATCH} queries, GradCache / plain:")
    for budget, found in ratios.items():
        clock, cpu = ([pair[which] for pair in found] for which in (0, 1))
        print(
            f"  {budget} positions: {statistics.median(clock):.2f} ({min(clock):.2f} to {max(clock):.2f}) by the "
            f"clock, {statistics.median(cpu):.2f} ({min(cpu):.2f} to {max(cpu):.2f}) by CPU time"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs=3, metavar=("FOLDER", "QUERIES", "POSITIONS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if options.measure:
        folder, batch_size, budget = options.measure
        print(json.dumps(measure(folder, int(batch_size), int(budget) or None)))
        return
    with tempfile.TemporaryDirectory() as folder:
        world(folder)
        flat = memory(folder)
        speed(folder)
    if not flat:
        sys.exit(f"activations grew by more than {FLAT - 1:.0%} with the batch")


if __name__ == "__main__":
    main()
