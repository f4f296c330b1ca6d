"""Which queries come in which batch: a pure function of (seed, epoch), whatever the processes and workers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_mmembed import MLLMEncoder
from lightning_mmembed.data import Shards
from lightning_mmembed.data.batches import EpochPlan, TrainingBatch, TrainingBatches, plan_epoch
from lightning_mmembed.encoders.processor import EncoderInputs

TASKS = np.array(["a"] * 23 + ["b"] * 9 + ["c"] * 31)
MIXES = ("mixed", "one-task")


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("batch_size", [1, 4, 7, 23])
def test_every_query_comes_at_most_once_in_an_epoch(mix: str, batch_size: int) -> None:
    for epoch in range(5):
        plan = plan_epoch(TASKS, batch_size, seed=1, epoch=epoch, batch_mix=mix)
        assert plan.shape[1] == batch_size
        assert len(np.unique(plan)) == plan.size
        sizes = [len(TASKS)] if mix == "mixed" else [int((t == TASKS).sum()) for t in "abc"]
        assert len(plan) == sum(size // batch_size for size in sizes), "only what fills no batch sits out"


@pytest.mark.parametrize("mix", MIXES)
def test_the_plan_is_a_pure_function_of_seed_and_epoch(mix: str) -> None:
    def plan(seed: int, epoch: int) -> list[list[int]]:
        np.random.seed(seed + 99)  # whatever the state of the process
        return plan_epoch(TASKS, 4, seed, epoch, mix).tolist()

    plans = {(seed, epoch): plan(seed, epoch) for seed in range(3) for epoch in range(3)}
    assert all(plan(*key) == value for key, value in reversed(plans.items()))
    assert len({str(value) for value in plans.values()}) == len(plans)


def test_over_the_epochs_every_query_takes_part() -> None:
    seen = {int(i) for epoch in range(8) for i in plan_epoch(TASKS, 8, 0, epoch, "one-task").flat}
    assert seen == set(range(len(TASKS)))


def test_one_task_batches_hold_one_task_and_come_in_mixed_order() -> None:
    plan = plan_epoch(TASKS, 4, seed=0, epoch=0, batch_mix="one-task")
    tasks = [set(TASKS[batch].tolist()) for batch in plan]
    assert all(len(t) == 1 for t in tasks)
    order = [t.pop() for t in tasks]
    assert order != sorted(order)
    assert any(len(set(TASKS[batch])) > 1 for batch in plan_epoch(TASKS, 4, seed=0, epoch=0))


def test_a_task_that_fills_no_batch_of_its_own_is_named_with_its_size_and_one_that_is_not_asked_for_is_not() -> None:
    assert EpochPlan(TASKS, 5, batch_mix="one-task", num_replicas=2).left_out == {"b": 9}
    assert EpochPlan(TASKS, 16, batch_mix="one-task", num_replicas=2).left_out == {"a": 23, "b": 9, "c": 31}
    assert EpochPlan(TASKS, 9, batch_mix="one-task").left_out == {}
    assert EpochPlan(TASKS, 5, num_replicas=2).left_out == {}, "mixed batches hold every task"
    groups, targets = np.unique(TASKS, return_inverse=True)[1], np.array([23, 0, 31])
    assert EpochPlan(TASKS, 24, batch_mix="one-task", resampled=(groups, targets)).left_out == {"a": 23}


def test_an_unknown_batch_mix_is_named() -> None:
    with pytest.raises(ValueError, match=r"batch_mix='striped' is unknown; write one of \('mixed', 'one-task'\)"):
        plan_epoch(TASKS, 4, 0, 0, "striped")


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("replicas", [2, 3])
def test_the_ranks_cut_the_global_batches_into_equal_parts(mix: str, replicas: int) -> None:
    ranks = [EpochPlan(TASKS, 3, seed=5, batch_mix=mix, num_replicas=replicas, rank=rank) for rank in range(replicas)]
    for epoch in (0, 1):
        for rank in ranks:
            rank.set_epoch(epoch)
        whole = plan_epoch(TASKS, 3 * replicas, 5, epoch, mix)
        parts = [list(rank) for rank in ranks]
        assert {len(rank) for rank in ranks} == {len(whole)}
        for number, batch in enumerate(whole):
            assert [part[number][0] for part in parts] == [epoch] * replicas
            assert np.concatenate([part[number][1] for part in parts]).tolist() == batch.tolist()


def test_a_fixed_plan_is_the_same_in_every_epoch() -> None:
    plan = EpochPlan(TASKS, 4, fixed=True)
    first = [(epoch, batch.tolist()) for epoch, batch in plan]
    plan.set_epoch(7)
    assert [(epoch, batch.tolist()) for epoch, batch in plan] == first


# --- a real DataLoader ----------------------------------------------------------------------------------------------


def dataset(shards_dir: Path, processor: Any, **arguments: Any) -> tuple[TrainingBatches, EpochPlan]:
    shards = Shards(shards_dir)
    rows = shards.query_rows("train")
    pool = shards.pool("train").ids.numpy()
    batches = TrainingBatches(shards, rows, pool, processor, seed=3, negatives_per_query=2, **arguments)
    return batches, EpochPlan(shards.task_names(rows), 8, seed=3)


def flat(batch: TrainingBatch) -> list[Any]:
    """Everything in a batch, as plain values."""
    tensors: Sequence[torch.Tensor | None] = [
        batch.query_ids,
        batch.candidate_ids,
        batch.positive_index,
        batch.positives,
        batch.inputs.order,
        *(t for b in batch.inputs.buckets for t in (b.input_ids, b.attention_mask, b.pool_mask, *b.pictures.values())),
    ]
    return [t if t is None else t.tolist() for t in tensors]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_the_number_of_workers_does_not_change_the_batches(tiny_shards: Path, tiny_checkpoint: Path) -> None:
    processor = MLLMEncoder.from_pretrained(tiny_checkpoint).processor
    seen = {}
    for workers in (0, 2):
        batches, plan = dataset(tiny_shards, processor)
        loader: DataLoader[TrainingBatch] = DataLoader(batches, batch_size=None, sampler=plan, num_workers=workers)
        for epoch in (0, 1):
            plan.set_epoch(epoch)
            seen[workers, epoch] = [flat(batch) for batch in loader]
    assert len(seen[0, 0]) == 6
    assert seen[0, 0] == seen[2, 0]
    assert seen[0, 1] == seen[2, 1]
    assert seen[0, 0] != seen[0, 1]


def test_a_batch_can_be_read_alone_and_again(tiny_shards: Path, tiny_checkpoint: Path) -> None:
    """What resuming in the middle of an epoch rests on."""
    processor = MLLMEncoder.from_pretrained(tiny_checkpoint).processor
    batches, plan = dataset(tiny_shards, processor)
    keys = list(plan)
    whole = [flat(batches[key]) for key in keys]
    fresh, _ = dataset(tiny_shards, processor)
    assert flat(fresh[keys[4]]) == whole[4]
    assert isinstance(fresh[keys[0]].inputs, EncoderInputs)
