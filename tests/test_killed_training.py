"""Contract 8, training: killed with SIGKILL at random moments and started again, a run ends with the same weights.

The processes are forked by a server that has imported everything, so that a start costs no imports.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_worlds import PRELOADED
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim.lr_scheduler import LambdaLR
from worlds import tiny_module, tiny_trainer

from lightning_mmembed import HardNegativeMining, MBEIRDataModule
from lightning_mmembed.callbacks import PreemptionCheckpoint
from lightning_mmembed.errors import TRY_AGAIN
from lightning_mmembed.files import replacing
from lightning_mmembed.mining_rule import MiningRule
from lightning_mmembed.sharded_checkpoints import finish_replacing, whole
from lightning_mmembed.strategies import FSDP2Strategy

pytestmark = pytest.mark.slow  # a hundred runs, half of them in two processes

KILLS = 20
#: Seconds that a run may take on a busy machine.
PATIENCE = 180.0


@dataclass(frozen=True)
class Work:
    """What the processes of a run do; the same command starts it and goes on with it."""

    shards: Path
    checkpoint: Path
    strategy: str = "auto"
    size: int = 1
    workers: int = 0
    budget: int | None = None  # of GradCache
    lora: bool = True
    dropout: float = 0.2
    sharded: bool = False
    queries: int = 16  # a step
    epochs: int = 2

    def __call__(self, folder: Path, rank: int, port: int) -> None:
        multiprocessing.set_start_method("fork", force=True)  # as in a run: it would start a server of its own
        torch.set_num_threads(1)
        faulthandler.dump_traceback_later(PATIENCE - 10)  # of a run that hangs
        if self.size > 1:  # where Lightning finds a LOCAL_RANK, it starts no processes of its own
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank))
        torch.manual_seed(0)
        settings: dict[str, Any] = {"lora": {"r": 2, "lora_dropout": self.dropout}} if self.lora else {}
        module = tiny_module(self.checkpoint, **settings)
        module.scheduler = partial(LambdaLR, lr_lambda=lambda step: 1 / (1 + 0.2 * step))
        module.mini_batch_num_tokens = self.budget
        data = MBEIRDataModule(self.shards, batch_size=self.queries // self.size, num_workers=self.workers)
        saving = {"dirpath": folder / "checkpoints", "enable_version_counter": False, "save_last": True}
        callbacks: list[Callback] = [
            HardNegativeMining(after_epochs=[1], rule=MiningRule(k=20, k_prime=6), batch_size=16),
            ModelCheckpoint(filename="best", monitor="val/loss", **saving),
            ModelCheckpoint(every_n_train_steps=1, save_top_k=0, **saving),
            PreemptionCheckpoint(),
            Diary(folder / "diary"),
        ]
        strategy: Any = self.strategy
        if strategy == "fsdp2":
            strategy = FSDP2Strategy(save_distributed_checkpoint=self.sharded)
        arguments: dict[str, Any] = {"max_epochs": self.epochs, "enable_checkpointing": True}
        arguments |= {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0, "strategy": strategy}
        trainer = tiny_trainer(folder, callbacks=callbacks, devices=self.size, **arguments)
        last = folder / "checkpoints" / "last.ckpt"
        finish_replacing(last) if rank == 0 else None
        trainer.fit(module, data, ckpt_path=last if last.exists() else None)
        weights = {name: whole(value).clone() for name, value in module.state_dict().items()}
        if rank == 0:
            with replacing(folder / "weights.pt") as path:
                torch.save(weights, path)


class Diary(Callback):
    """A line for every batch, read at moments drawn over the progress of the run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.is_global_zero:
            with self.path.open("a") as file:
                print(trainer.current_epoch, batch_idx, file=file)


@pytest.fixture(scope="module")
def server() -> BaseContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, "peft", "lightning_mmembed.callbacks"])
    return context


def start(server: BaseContext, work: Work, folder: Path) -> list[BaseProcess]:
    port = find_free_network_port()
    processes = [server.Process(target=work, args=(folder, rank, port)) for rank in range(work.size)]
    for process in processes:
        process.start()
    return processes


def kill(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def finish(server: BaseContext, work: Work, folder: Path) -> dict[str, torch.Tensor]:
    """The weights at the end of a run."""
    processes = start(server, work, folder)
    try:
        for process in processes:
            process.join(PATIENCE)
        assert [process.exitcode for process in processes] == [0] * work.size
    finally:
        kill(processes)
    weights: dict[str, torch.Tensor] = torch.load(folder / "weights.pt", weights_only=True)
    return weights


def progress(folder: Path) -> int:
    """Batches that were begun, and files of checkpoints, vectors and negatives."""
    diary = folder / "diary"
    lines = len(diary.read_text().splitlines()) if diary.exists() else 0
    return lines + sum(len(files) for _, _, files in os.walk(folder))  # which bears that folders go meanwhile


def reach(processes: list[BaseProcess], folder: Path, awaited: int) -> None:
    """Wait until a run has made some progress."""
    end = time.monotonic() + PATIENCE
    while any(process.is_alive() for process in processes) and progress(folder) < awaited:
        assert time.monotonic() < end, f"{progress(folder)} of {awaited}; statuses {[p.exitcode for p in processes]}"
        time.sleep(0.002)


@dataclass(frozen=True)
class Whole:
    """A run that is not killed: its weights at the end, its progress, and how long it took."""

    work: Work
    weights: dict[str, torch.Tensor]
    progress: int
    seconds: float


CASES: dict[str, dict[str, Any]] = {
    "one process": {"workers": 2, "budget": 300},
    "DDP": {"strategy": "ddp", "size": 2},
    "FSDP2": {"strategy": "fsdp2", "size": 2, "budget": 300},
}


@pytest.fixture(scope="module")
def wholes(
    server: BaseContext, tiny_shards: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Whole]:
    """The run of a case that is not killed, made once."""
    made: dict[str, Whole] = {}

    def whole_run(case: str) -> Whole:
        if case not in made:
            work = Work(tiny_shards, tiny_checkpoint, **CASES[case])
            folder, begun = tmp_path_factory.mktemp("whole"), time.monotonic()
            weights = finish(server, work, folder)
            made[case] = Whole(work, weights, progress(folder), time.monotonic() - begun)
        return made[case]

    return whole_run


@pytest.mark.parametrize("number", range(KILLS))
@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(
    server: BaseContext, wholes: Callable[[str], Whole], tmp_path: Path, case: str, number: int
) -> None:
    expected, draw = wholes(case), random.Random(number)
    processes = start(server, expected.work, tmp_path)
    reach(processes, tmp_path, round(number * expected.progress / KILLS))
    processes[0].join(draw.random() * 0.3 * expected.seconds / expected.progress)
    kill(processes)
    assert any(process.exitcode == -signal.SIGKILL for process in processes) or number > 0.8 * KILLS
    assert (tmp_path / "checkpoints" / "last.ckpt").exists() or number < 0.6 * KILLS
    found = finish(server, expected.work, tmp_path)
    differ = [name for name, value in expected.weights.items() if not torch.equal(found[name], value)]
    assert differ == [], f"{len(differ)} of {len(found)} weights"


@pytest.mark.parametrize("arguments", [{}, {"strategy": "fsdp2", "size": 2, "sharded": True}], ids=["file", "folder"])
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_weights(
    server: BaseContext, tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path, arguments: dict[str, Any]
) -> None:
    """Its checkpoints are files, or folders of shards."""
    work = Work(tiny_shards, tiny_checkpoint, **arguments)
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    expected, draw, kills = finish(server, work, tmp_path / "whole"), random.Random(5), 0
    for _ in range(8):
        processes = start(server, work, tmp_path / "killed")
        reach(processes, tmp_path / "killed", progress(tmp_path / "killed") + draw.randrange(2, 8))
        kill(processes)
        kills += processes[0].exitcode == -signal.SIGKILL
    found = finish(server, work, tmp_path / "killed")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert kills >= 3


# --- preemption -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "asked"),
    [("one process", "the first"), ("DDP", "the first"), ("DDP", "the last"), ("DDP", "all"), ("FSDP2", "the last")],
)
def test_a_run_that_is_asked_to_end_saves_and_ends_with_its_status_and_goes_on_exactly(
    server: BaseContext, wholes: Callable[[str], Whole], tmp_path: Path, case: str, asked: str
) -> None:
    work, expected = wholes(case).work, wholes(case).weights
    processes, diary = start(server, work, tmp_path), tmp_path / "diary"
    try:
        while not diary.exists():
            assert all(process.is_alive() for process in processes)
            time.sleep(0.002)
        for process in {"the first": processes[:1], "the last": processes[-1:], "all": processes}[asked]:
            os.kill(process.pid or 0, signal.SIGTERM)
        for process in processes:
            process.join(PATIENCE)
        # Lightning's launcher would take another status of a process that it has started for a crash.
        assert [process.exitcode for process in processes] == [TRY_AGAIN, 0][: work.size]
    finally:
        kill(processes)
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    done = saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["completed"]
    assert done in (2, 3, 5), "at an optimizer's step, before the end"
    found = finish(server, work, tmp_path)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# --- other strategies -----------------------------------------------------------------------------------------------

ROUTES = {
    "DDP, FSDP2, DDP, one process": [("ddp", 2), ("fsdp2", 2), ("ddp", 2), ("auto", 1)],
    "one process, DDP on four, FSDP2": [("auto", 1), ("ddp", 4), ("fsdp2", 2)],
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("lora", [True, False])
def test_every_strategy_goes_on_from_the_checkpoint_of_every_other_one(
    server: BaseContext, tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path, route: str, lora: bool
) -> None:
    """Their sums of gradients are rounded in other orders, and so the weights differ by a little of what they moved."""
    ends = []
    for stages in (ROUTES[route], [("auto", 1)] * len(ROUTES[route])):
        folder = tmp_path / f"run-{len(ends)}"
        folder.mkdir()
        keys = []
        for epochs, (strategy, size) in enumerate(stages, 1):
            work = Work(tiny_shards, tiny_checkpoint, strategy, size, lora=lora, dropout=0.0, epochs=epochs)
            weights = finish(server, work, folder)
            saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
            states = saved["optimizer_states"][0]["state"]
            shapes = {number: state["exp_avg"].shape for number, state in states.items()}
            keys.append((saved["state_dict"].keys(), saved.get("frozen_weights"), shapes))
            assert len(shapes) == len(saved["state_dict"])
        assert all(key == keys[0] for key in keys)
        ends.append(weights)
    start_of = tiny_module(tiny_checkpoint, **({"lora": {"r": 2}} if lora else {})).state_dict()
    trained = [name for name in start_of if name in keys[0][0] and "lora_A" not in name]  # which begins at random
    moved, apart = (
        torch.cat([(ends[1][name] - other[name]).flatten() for name in trained]).norm() for other in (start_of, ends[0])
    )
    assert apart < 0.02 * moved
