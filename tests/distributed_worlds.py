"""Processes of one group, forked by a server that has imported everything, so that a start costs no imports."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from torch.multiprocessing import start_processes

from lightning_mmembed.distributed import Processes

#: From the processes and further arguments to nothing: what it found it writes to a file.
Work = Callable[..., None]

PRELOADED = [
    *("pytest", "lightning.pytorch", "lightning_mmembed", "lightning_mmembed.data", "lightning_mmembed.strategies"),
    *(f"transformers.models.{name}.modeling_{name}" for name in ("clip", "llava_next", "mistral")),
]


def in_processes(size: int, work: Work, *arguments: Any, seconds: float = 240) -> None:
    """Call ``work(processes, *arguments)`` in so many processes of one gloo group, as a Trainer's launcher would.

    Args:
        size: Number of processes.
        work: A function of a module, since it is sent by its name.
        *arguments: Sent too.
        seconds: After so many the processes are ended, and the test fails.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    arguments = (work, size, find_free_network_port(), arguments)
    context = start_processes(_member, arguments, nprocs=size, join=False, start_method="forkserver")
    end = time.monotonic() + seconds
    try:
        while not context.join(timeout=1):  # raises what a process raises
            if time.monotonic() > end:
                pytest.fail(f"the processes are not done after {seconds} seconds")
    finally:
        for process in context.processes:
            process.kill()


def _member(rank: int, work: Work, size: int, port: int, arguments: tuple[Any, ...]) -> None:
    # Where Lightning finds a LOCAL_RANK, it starts no processes of its own.
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    store = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", store, rank=rank, world_size=size, timeout=timedelta(seconds=120))
    work(Processes(rank, size), *arguments)
    dist.barrier()
    dist.destroy_process_group()
