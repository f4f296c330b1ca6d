"""What fails while training reads is one message with shard, offset and id; a worker that dies is explained."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed_worlds import in_processes
from dying_workers import DEATHS, tell
from lightning.pytorch import Callback, Trainer
from worlds import ARCHITECTURE, tiny_module, tiny_trainer

from lightning_mmembed import MBEIRDataModule
from lightning_mmembed.cli import user_error
from lightning_mmembed.data import Shards, places
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.failures import run_failure

WORKERS = pytest.mark.parametrize("num_workers", [0, 2])


class AfterFirstBatch(Callback):
    """Does something to the shards once a batch was trained."""

    def __init__(self, what: Any) -> None:
        self.what = what

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 1:
            self.what()


@pytest.fixture
def shards(tiny_shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_shards, tmp_path / "shards"))


def message_of_fit(shards: Path, checkpoint: Path, directory: Path, num_workers: int, what: Any) -> str:
    """What the user is told of a run whose shards are spoiled after its first batch."""
    datamodule = MBEIRDataModule(shards, batch_size=4, num_workers=num_workers)
    trainer = tiny_trainer(directory, max_epochs=3, limit_val_batches=0, callbacks=[AfterFirstBatch(what)])
    with pytest.raises(Exception, match=r".") as error:
        trainer.fit(tiny_module(checkpoint), datamodule)
    told = user_error(error.value)
    assert told is not None, repr(error.value)
    assert "Traceback" not in told
    assert "DataLoader worker" not in told
    assert "\n" not in told
    return told


@WORKERS
def test_a_shard_that_is_cut_short_while_training_is_named_with_offset_and_id(
    shards: Path, tiny_checkpoint: Path, tmp_path: Path, num_workers: int
) -> None:
    def cut() -> None:
        for path in shards.glob("candidates-*.tar"):
            os.truncate(path, 512)

    told = message_of_fit(shards, tiny_checkpoint, tmp_path, num_workers, cut)
    assert names(told, r"candidates-\d+\.tar")
    assert "ends before byte" in told
    assert "is truncated: make the shards again" in told


@WORKERS
def test_a_shard_that_is_gone_is_named_with_offset_and_id(
    shards: Path, tiny_checkpoint: Path, tmp_path: Path, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A process that has a shard open goes on reading it; one that opened another meanwhile opens it again.
    monkeypatch.setattr(places, "MAX_OPEN_FILES", 0)

    def remove() -> None:
        for path in shards.glob("queries-*.tar"):
            path.unlink()

    told = message_of_fit(shards, tiny_checkpoint, tmp_path, num_workers, remove)
    assert names(told, r"queries-train-\d+\.tar")
    assert ".tar is missing; make the shards again" in told


@WORKERS
def test_a_picture_that_cannot_be_decoded_is_named_with_shard_offset_and_id(
    shards: Path, tiny_checkpoint: Path, tmp_path: Path, num_workers: int
) -> None:
    told = message_of_fit(shards, tiny_checkpoint, tmp_path, num_workers, lambda: spoil_pictures(shards))
    assert names(told, r"\S+\.tar")
    assert "a picture of" in told
    assert "cannot be decoded" in told


def spoil_pictures(shards: Path) -> None:
    """Overwrite the pictures of a dataset."""
    opened = Shards(shards)
    columns, files = opened._columns, opened.manifest["shards"]
    for row in np.flatnonzero(columns["image_size"]):
        with open(shards / files[columns["image_shard"][row]]["file"], "r+b") as file:
            file.seek(columns["image_offset"][row])
            file.write(b"x" * int(columns["image_size"][row]))


def test_an_input_output_error_is_named_with_offset_and_id(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Shards(shards)

    def fails(*_: Any) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", fails)
    row = int(opened.candidate_rows[0])
    with pytest.raises(UserInputError, match=r"^candidate 77:\d+ \(.* at byte \d+.*: \[Errno 5\] .*; see"):
        opened.candidate_at(row)


def names(told: str, shard: str) -> bool:
    """Whether a message begins with an id and where its record lies."""
    return re.match(rf"(candidate|train query) 77:\d+ \(.*{shard} at byte \d+.*\): ", told) is not None


# --- workers that die -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """What the user is told of each death, and of several while a tensor is handed over.

    Each in a process of its own: torch may tell of a death once more, at any time.
    """
    directory = tmp_path_factory.mktemp("told")
    in_processes(len(DEATHS) + 1, tell, directory)
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(len(DEATHS) + 1)]


@pytest.mark.parametrize("number", range(len(DEATHS)))
def test_a_worker_that_dies_is_told_by_its_pid_its_signal_and_what_to_do(told: list[list[str]], number: int) -> None:
    (message,) = told[number]
    assert DEATHS[number][1] in message
    assert "data.num_workers" in message
    assert message.partition("worker ")[2].split(",")[0].isdigit()


def test_a_worker_that_dies_while_it_hands_over_a_tensor_is_told_too(told: list[list[str]]) -> None:
    assert len(told[-1]) == 5  # torch finds out in one of several ways
    for message in told[-1]:
        assert message.startswith("a process that reads data (worker ")


def test_an_error_of_the_program_is_told_as_one() -> None:
    for error in (
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("DataLoader worker"),
        KeyError(1),
    ):
        assert run_failure(error) is None
        assert user_error(error) is None


def test_a_device_without_memory_is_told_with_what_takes_less() -> None:
    told = run_failure(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ..."))
    assert told is not None
    assert told.startswith("the device has no memory left (CUDA out of memory); lower model.mini_batch_num_tokens")


def test_a_peer_that_is_gone_is_told_under_nccl_too() -> None:
    told = run_failure(RuntimeError("NCCL communicator was aborted on rank 1."))
    assert told is not None
    assert told.startswith("another process of this run has ended")


@pytest.mark.slow  # runs the command
def test_the_command_ends_with_one_message_where_a_worker_was_killed(tiny_shards: Path, tmp_path: Path) -> None:
    killed = (
        "import os, sys\n"
        "from lightning_mmembed import cli\n"
        "from lightning_mmembed.data.batches import TrainingBatches\n"
        "TrainingBatches.__getitem__ = lambda self, key: os.kill(os.getpid(), 9)\n"
        "cli.train_main()\n"
    )
    pets = [
        "data=mbeir",
        "dataset=pets",
        "data.source=null",
        f"data.shards={tiny_shards}",
        f"paths.root_dir={tmp_path}",
    ]
    small = [f"model.encoder.architecture.{name}={value}" for name, value in ARCHITECTURE.items()]
    process = subprocess.run(
        [
            sys.executable,
            "-c",
            killed,
            *pets,
            f"paths.root_dir={tmp_path}",
            *small,
            "data.num_workers=2",
            "callbacks.evaluation=null",
        ],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert process.returncode == 1, process.stderr
    assert process.stderr.startswith("error: a process that reads data (worker "), process.stderr
    assert "died of 'Killed'" in process.stderr
    assert "Traceback" not in process.stderr
