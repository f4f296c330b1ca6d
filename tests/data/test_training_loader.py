"""The loader of training batches: which it reads, from where, on how many processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from lightning_mmembed.data.batches import EpochPlan, plan_epoch
from lightning_mmembed.data.loader import Place, TrainingLoader
from lightning_mmembed.errors import UserInputError

TASKS = np.array(["a"] * 23 + ["b"] * 9 + ["c"] * 32)
STEP = 8  # queries, over all processes


class Echo:
    """Gives back which batch it was asked for."""

    def __getitem__(self, key: tuple[int, np.ndarray]) -> tuple[int, list[int]]:
        epoch, positions = key
        return epoch, positions.tolist()


class Asked(Echo):
    """The same; the process that reads the second batch is asked to end."""

    def __getitem__(self, key: tuple[int, np.ndarray]) -> tuple[int, list[int]]:
        if key[1].tolist() == plan_epoch(TASKS, STEP, 5, 0)[1].tolist():
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__getitem__(key)


def loader(
    place: Place, processes: int = 1, rank: int = 0, size: int | None = None, workers: int = 0, batches: Any = Echo
) -> TrainingLoader:
    plan = EpochPlan(TASKS, size or STEP // processes, seed=5, num_replicas=processes, rank=rank)
    return TrainingLoader(plan, batches, lambda: place, workers)


@pytest.fixture(autouse=True)
def workers_are_forked() -> Iterator[None]:
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("fork", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_any_number_of_processes_goes_on_with_the_same_steps_in_the_same_order(processes: int, workers: int) -> None:
    whole = plan_epoch(TASKS, STEP, 5, epoch=3)
    for done in (0, 1, 5, len(whole)):
        loaders = [loader(Place(3, done), processes, rank, workers=workers) for rank in range(processes)]
        for one in loaders:
            one.load_state_dict(loader(Place(), 2).state_dict())
        steps = [[query for _, part in parts for query in part] for parts in zip(*loaders, strict=True)]
        assert steps == whole[done:].tolist()
        assert {len(one) for one in loaders} == {len(whole)}, "the length is that of the epoch"


def test_the_place_is_asked_for_when_the_first_batch_is_and_not_before() -> None:
    places = [Place(1, 2)]
    plan = EpochPlan(TASKS, STEP, seed=5)
    opened: list[int] = []
    batches = iter(TrainingLoader(plan, lambda: (opened.append(1), Echo())[1], lambda: places[-1]))  # type: ignore
    assert not opened
    places.append(Place(4, 6, 7))
    assert list(batches) == [[4, plan_epoch(TASKS, STEP, 5, epoch=4)[6].tolist()]]


@pytest.mark.parametrize(
    ("processes", "size", "remedy"),
    [
        (2, 8, r"data.batch_size=8 on 2 processes makes 16; set data.batch_size=4, or resume"),
        (1, 4, r"data.batch_size=4 on 1 processes makes 4; set data.batch_size=8, or resume"),
        (3, 4, r"on 3 processes makes 12; use a number of processes that divides 8, or resume from a checkpoint of"),
    ],
)
def test_other_steps_within_an_epoch_are_refused_with_what_to_set(processes: int, size: int, remedy: str) -> None:
    resumed = loader(Place(3, 1), processes, size=size)
    resumed.load_state_dict(loader(Place()).state_dict())
    with pytest.raises(UserInputError, match=r"in the middle of an epoch of 8 queries per step, and .*" + remedy):
        next(iter(resumed))
    at_the_beginning = loader(Place(3, 0), processes, size=size)
    at_the_beginning.load_state_dict(loader(Place()).state_dict())
    assert next(iter(at_the_beginning))


def test_steps_are_only_compared_in_the_epoch_that_is_resumed() -> None:
    places = [Place(3, 0), Place(4, 1)]
    resumed = TrainingLoader(EpochPlan(TASKS, 4, seed=5), Echo, lambda: places.pop(0))  # type: ignore[arg-type]
    resumed.load_state_dict({"queries_per_step": 8})
    assert len(list(resumed)) == 16
    assert len(list(resumed)) == 15


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_worker_that_is_asked_to_end_once_still_reads_its_batches() -> None:
    whole = plan_epoch(TASKS, STEP, 5, epoch=0)
    found = [positions for _, positions in loader(Place(), workers=1, batches=Asked)]
    assert found == whole.tolist()
