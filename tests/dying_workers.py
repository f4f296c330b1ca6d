"""Workers of a DataLoader that die, for tests; it imports little, because each of several processes imports it anew."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

from torch.utils.data import DataLoader, Dataset

from lightning_mmembed.distributed import Processes
from lightning_mmembed.failures import run_failure

#: What ends a worker, and what the user is told of it.
DEATHS: list[tuple[int | str, str]] = [
    (signal.SIGKILL, "died of 'Killed': most often the system, because memory ran out"),
    (signal.SIGBUS, "died of 'Bus error': shared memory ran out"),
    (signal.SIGABRT, "died of 'Aborted': a library crashed in it"),
    (signal.SIGSEGV, "died of 'Segmentation fault': a library crashed in it"),
    ("exit", "is gone: it ran out of memory or crashed"),
]


class Dying(Dataset[int]):
    """Its item 3 ends the process that reads it."""

    def __init__(self, how: int | str = signal.SIGKILL) -> None:
        self.how = how

    def __len__(self) -> int:
        return 6

    def __getitem__(self, place: int) -> int:
        if place == 3 and isinstance(self.how, int):
            os.kill(os.getpid(), self.how)
        elif place == 3:
            os._exit(3)
        return place


def tell(processes: Processes, directory: Path) -> None:
    """As many processes as deaths and one more, of which each tells of one kind."""
    rank = processes.rank
    how, times, batch_size = (DEATHS[rank][0], 1, None) if rank < len(DEATHS) else (signal.SIGKILL, 5, 1)
    found = []
    while len(found) < times:
        try:
            list(DataLoader(Dying(how), batch_size=batch_size, num_workers=1))
        except (RuntimeError, OSError, EOFError) as error:
            found.append(run_failure(error))
    (directory / f"{rank}.json").write_text(json.dumps(found))
    os._exit(0)
