"""The training batches of one process, read from the place that the run has come to."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader

from lightning_mmembed.data.batches import EpochPlan, TrainingBatch, TrainingBatches
from lightning_mmembed.errors import UserInputError

#: Key of the number of queries per step, over all processes, in a checkpoint.
QUERIES_PER_STEP = "queries_per_step"


@dataclass(frozen=True)
class Place:
    """How far a run is.

    Args:
        epoch: Epochs that are done.
        done: Batches of the next epoch that are done.
        end: Number of batches after which the epoch ends; by default all.
    """

    epoch: int = 0
    done: int = 0
    end: int | None = None


class TrainingLoader:
    """Reads the batches of an epoch that are not done yet.

    Nothing is read before the first batch is asked for. Only then does a resumed Trainer know how far it is, and have
    the negatives for this epoch been mined. What a checkpoint keeps is the same in every process, because only that of
    the first process is written.

    Args:
        plan: Which queries come in which batch.
        batches: Opens the dataset; called at the beginning of every epoch, for its negatives.
        place: Says how far the run is.
        num_workers: Processes that read and prepare batches.
    """

    def __init__(
        self,
        plan: EpochPlan,
        batches: Callable[[], TrainingBatches],
        place: Callable[[], Place],
        num_workers: int = 0,
    ) -> None:
        self.plan, self.batches, self.place, self.num_workers = plan, batches, place, num_workers
        self._saved: int | None = None

    @property
    def queries_per_step(self) -> int:
        """Queries in a batch, over all processes."""
        return self.plan.batch_size * self.plan.num_replicas

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[TrainingBatch]:
        place = self.place()
        if place.done:
            self._check_step()
        self._saved = None
        self.plan.set_epoch(place.epoch)
        keys: Any = list(self.plan)[place.done : place.end]
        yield from DataLoader(
            self.batches(),
            batch_size=None,
            sampler=keys,
            num_workers=self.num_workers,
            worker_init_fn=_outlive_one_sigterm,
        )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the Trainer's own count of batches."""
        return {QUERIES_PER_STEP: self.queries_per_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember what the count of batches was counted in."""
        self._saved = state_dict[QUERIES_PER_STEP]

    def _check_step(self) -> None:
        """Refuse to go on in the middle of an epoch that was cut into other batches."""
        now, processes = self.queries_per_step, self.plan.num_replicas
        if self._saved in (None, now):
            return
        assert self._saved is not None
        size, rest = divmod(self._saved, processes)
        remedy = f"set data.batch_size={size}" if not rest else f"use a number of processes that divides {self._saved}"
        raise UserInputError(
            f"the checkpoint was saved in the middle of an epoch of {self._saved} queries per step, and "
            f"data.batch_size={self.plan.batch_size} on {processes} processes makes {now}; {remedy}, or resume from a "
            "checkpoint of the end of an epoch"
        )


def _outlive_one_sigterm(worker: int) -> None:
    """A scheduler that ends a job signals every process of it, and the batches in work are still needed."""
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
