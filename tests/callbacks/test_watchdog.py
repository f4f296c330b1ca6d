"""A process that hangs says where it was and ends, and none is left behind; a run that ends well leaves nothing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from worlds import tiny_module, tiny_trainer

from lightning_mmembed import MBEIRDataModule
from lightning_mmembed.callbacks import Watchdog
from lightning_mmembed.errors import UserInputError

PROGRAM = Path(__file__).with_name("failing_run.py")

needs_proc = pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")


class Run:
    """What a spoiled run left."""

    def __init__(self, shards: Path, checkpoint: Path, directory: Path, **settings: Any) -> None:
        # In a process of its own: pytest uses the timer of faulthandler for itself.
        arguments = [sys.executable, str(PROGRAM), str(shards), str(checkpoint), str(directory), json.dumps(settings)]
        path = os.pathsep.join([str(PROGRAM.parents[1]), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
        out, err = directory / "out.txt", directory / "err.txt"
        with out.open("w") as stdout, err.open("w") as stderr:  # files: a pipe would wait for those left behind, too
            self.returncode = subprocess.run(
                arguments, env=environment, stdout=stdout, stderr=stderr, timeout=200, check=False
            ).returncode
        self.directory, self.stdout, self.stderr = directory, out.read_text(), err.read_text()

    def ids(self) -> dict[int, str]:
        """The ids of the queries of batch 1, by process."""
        lines = [json.loads(line) for line in self.stdout.splitlines() if line.startswith("[")]
        return {rank: " ".join(ids) for rank, ids in lines}

    def log(self, rank: int) -> str:
        return (self.directory / f"watchdog-rank-{rank}.log").read_text()

    def left_behind(self) -> list[str]:
        """Processes of this run that there still are."""
        deadline = time.monotonic() + 20  # the system may take a moment
        while (found := self._processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return found

    def _processes(self) -> list[str]:
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:  # it has ended meanwhile
                continue
            if str(self.directory) in command:
                found.append(f"{path.parent.name}: {command}")
        return found


@needs_proc
@pytest.mark.slow  # starts two processes and waits for a time-out
@pytest.mark.parametrize("hanging", [0, 1])
def test_where_one_process_hangs_all_say_where_they_are_and_end(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path, hanging: int
) -> None:
    run = Run(tiny_shards, tiny_checkpoint, tmp_path, timeout=8, devices=2, spoil={hanging: "sleeps"})
    assert run.returncode != 0
    ids = run.ids()
    assert ids.keys() == {0, 1}
    assert ids[0] != ids[1]
    for rank in (0, 1):
        where = f"process {rank} of 2: train, epoch 0, in batch 1, queries {ids[rank]}"
        assert re.match(rf"\S+ \S+ {re.escape(where)}\n", run.log(rank))
        assert f"watchdog: no progress for 8 s. {where}. The stacks are in {tmp_path}" in run.stderr
        sleeps = re.search(r'failing_run\.py", line \d+ in on_train_batch_start', run.log(rank)) is not None
        assert sleeps == (rank == hanging)
        assert "Thread 0x" in run.log(rank)
    assert run.left_behind() == []


@needs_proc
@pytest.mark.slow  # waits for a time-out
@pytest.mark.parametrize("how", ["sleeps", "sleeps in C"])
def test_a_process_that_hangs_ends_even_where_no_thread_of_it_can_run(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path, how: str
) -> None:
    run = Run(tiny_shards, tiny_checkpoint, tmp_path, timeout=5, spoil={0: how})
    assert run.returncode == 1
    assert f"train, epoch 0, in batch 1, queries {run.ids()[0]}\n" in run.log(0)
    assert "failing_run.py" in run.log(0)
    assert ("watchdog: no progress" in run.stderr) == (how == "sleeps")
    assert run.left_behind() == []


@needs_proc
@pytest.mark.slow  # waits for a time-out
def test_a_worker_that_hangs_ends_with_its_process(tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    run = Run(tiny_shards, tiny_checkpoint, tmp_path, timeout=5, num_workers=2, spoil={"worker": "sleeps"})
    assert run.returncode == 1
    assert re.search(r"process 0 of 1: \w+, epoch 0, setup\n", run.log(0))
    assert run.left_behind() == []


@needs_proc
@pytest.mark.slow  # starts two processes
@pytest.mark.parametrize("failing", [0, 1])
def test_where_one_process_fails_the_other_ends_though_it_hangs(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path, failing: int
) -> None:
    spoil = {failing: "raises", 1 - failing: "sleeps"}
    run = Run(tiny_shards, tiny_checkpoint, tmp_path, timeout=1000, devices=2, spoil=spoil)
    assert run.returncode != 0
    assert "ValueError: spoiled" in run.stderr
    assert run.left_behind() == []
    assert not (tmp_path / f"watchdog-rank-{failing}.log").exists()


@pytest.mark.slow  # waits for a time-out that does not come
def test_a_run_that_ends_well_leaves_no_file_no_thread_and_no_timer(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    # Its batch 1 takes longer than the time-out, and says that it goes on.
    run = Run(tiny_shards, tiny_checkpoint, tmp_path, timeout=6, spoil={0: "works long"})
    assert run.returncode == 0, run.stderr
    assert "threads ['MainThread'" in run.stdout
    assert "watchdog" not in run.stdout
    assert not list(tmp_path.glob("watchdog*"))


@pytest.mark.slow  # starts a process
def test_a_run_that_fails_leaves_its_error_alone(tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    run = Run(tiny_shards, tiny_checkpoint, tmp_path, timeout=1000, spoil={0: "raises"})
    assert run.returncode == 1
    assert "ValueError: spoiled" in run.stderr
    assert not list(tmp_path.glob("watchdog*"))


def test_without_a_time_out_nothing_is_watched(tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    watchdog = Watchdog(timeout=None)
    trainer = tiny_trainer(tmp_path, max_steps=1, limit_val_batches=0, callbacks=[watchdog])
    trainer.fit(tiny_module(tiny_checkpoint), MBEIRDataModule(tiny_shards, batch_size=8))
    watchdog.beat("after the run")
    assert not list(tmp_path.glob("watchdog*"))
    assert "watchdog" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize("timeout", [0, -1, float("nan")])
def test_a_time_out_that_is_none_is_refused(timeout: float) -> None:
    with pytest.raises(UserInputError, match=r"timeout=.* is no number of seconds above 0; use null"):
        Watchdog(timeout)
