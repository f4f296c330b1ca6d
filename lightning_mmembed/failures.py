"""What ended a run, in the user's words: the libraries below tell it in their own."""

from __future__ import annotations

import re
import signal
import traceback
from collections.abc import Iterator

import torch

from lightning_mmembed.errors import RunStoppedError

#: What torch says when a worker of a DataLoader is gone.
_WORKER = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? (?P<pids>[\d, ]+)\) (?:is|was) killed by signal: (?P<signal>[^.]*)"
)
_WORKER_GONE = re.compile(r"DataLoader worker \(pid(?:\(s\))? (?P<pids>[\d, ]+)\) exited unexpectedly")
#: What Gloo says when the process at the other end is gone.
_PEER = re.compile(r"Connection (closed by peer|reset by peer|refused)|Broken pipe")

#: What NCCL says then, where it lets Python say anything.
_NCCL = re.compile(r"NCCL (?:error|communicator was aborted)|ncclRemoteError|ncclSystemError")

_CAUSES = {
    "Killed": "most often the system, because memory ran out (its log tells: dmesg); use fewer workers or smaller "
    "batches, or give the run more memory",
    "Bus error": "shared memory ran out; enlarge /dev/shm (docker run --shm-size), or use fewer workers",
    "Terminated": "another program or the scheduler asked it to end; start again with ckpt_path to go on",
}
_CRASH = "a library crashed in it, such as one that decodes pictures; run with 0 workers to see where"
_GONE = "it ran out of memory or crashed; use fewer workers, or 0 to see where"


def run_failure(error: BaseException) -> str | None:
    """The message for a failure of the machine or the numbers, or None for one that is a defect of the program.

    Args:
        error: What ended the run, with what it came from.

    Example:
        >>> run_failure(RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that"))
        "a process that reads data (worker 7, of data.num_workers or callbacks.*.num_workers) died of 'Bus error': ..."
        >>> run_failure(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    """
    chain = list(causes(error))
    stopped = next((link for link in chain if isinstance(link, RunStoppedError)), None)
    if stopped is not None:
        return str(stopped)
    told = "\n".join(str(link) for link in chain if isinstance(link, RuntimeError))
    if found := _WORKER.search(told):
        return _worker(found["pids"], *_died(found["signal"].strip()))
    if found := _WORKER_GONE.search(told):
        name = _signal(chain)
        return _worker(found["pids"], *(("is gone", _GONE) if name is None else _died(name)))
    if any(isinstance(link, (EOFError, ConnectionError)) and _while_waiting(link) for link in chain):
        return _worker("of an unknown number", "is gone", _GONE)
    if (memory := next((link for link in chain if isinstance(link, torch.OutOfMemoryError)), None)) is not None:
        return (
            f"the device has no memory left ({str(memory).partition('.')[0]}); lower model.mini_batch_num_tokens (it "
            "switches GradCache on) or data.batch_size, or set model.encoder.gradient_checkpointing=true"
        )
    if ("gloo" in told and _PEER.search(told)) or _NCCL.search(told):
        return "another process of this run has ended, and this one cannot go on without it; its own message says why"
    return None


def _signal(chain: list[BaseException]) -> str | None:
    """The signal that a worker died of where the error does not tell: not after a Trainer has reset the handlers."""
    for link in chain:
        for frame, _ in traceback.walk_tb(link.__traceback__):
            for worker in frame.f_locals.get("failed_workers", ()):
                if worker.exitcode is not None and worker.exitcode < 0:
                    return signal.strsignal(-worker.exitcode)
    return None


def _died(name: str) -> tuple[str, str]:
    return f"died of {name!r}", _CAUSES.get(name, _CRASH)


def _while_waiting(error: BaseException) -> bool:
    """Whether an error arose where a DataLoader waits for a worker: torch does not always see at once that one died."""
    frames = (frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(code.co_name == "_try_get_data" and "dataloader" in code.co_filename for code in frames)


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error, what it came from, what that came from and so on."""
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        yield cause
        seen.append(cause)
        cause = cause.__cause__ or cause.__context__


def _worker(pids: str, happened: str, cause: str) -> str:
    return (
        f"a process that reads data (worker {pids}, of data.num_workers or callbacks.*.num_workers) {happened}: {cause}"
    )
