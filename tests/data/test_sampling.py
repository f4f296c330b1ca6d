"""Up-sampling as a rule of the order: how often each query comes in an epoch, and how far apart its copies stand."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch import Callback
from worlds import read_lines, tiny_module, tiny_trainer, write_lines

from lightning_mmembed import MBEIRDataModule
from lightning_mmembed.data.batches import EpochPlan, plan_epoch
from lightning_mmembed.data.sampling import resample, source_targets, spread, task_targets
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.items import decode_id

MIXES = ("mixed", "one-task")


def tasks_of(sizes: dict[str, int], seed: int = 0) -> np.ndarray:
    """The task of each query, in any order."""
    names = np.repeat(list(sizes), list(sizes.values()))
    return np.random.default_rng(seed).permutation(names)


def targets_of(tasks: np.ndarray, **rule: Any) -> dict[str, int]:
    """The target of each task, and proof that the groups are the tasks."""
    groups, targets = task_targets(tasks, **rule)
    names = np.unique(tasks)
    assert names[groups].tolist() == tasks.tolist()
    return dict(zip(names.tolist(), targets.tolist(), strict=True))


# --- the draw -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_no_query_of_a_group_comes_more_than_once_more_often_than_another(seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, 5, 300)
    sizes = np.bincount(groups, minlength=5)
    targets = np.array([0, sizes[1] // 3, sizes[2], 4 * sizes[3], 2 * sizes[4] + 7])
    for epoch in range(4):
        drawn = Counter(resample(groups, targets, seed, epoch).tolist())
        for group, target in enumerate(targets):
            times = [drawn[i] for i in np.flatnonzero(groups == group).tolist()]
            assert sum(times) == target
            assert min(times) == target // sizes[group]
            assert max(times) == -(-target // sizes[group])


def test_the_draw_is_a_pure_function_of_seed_and_epoch() -> None:
    groups, targets = np.zeros(50, dtype=int), np.array([75])
    plans = {(seed, epoch): resample(groups, targets, seed, epoch).tolist() for seed in range(3) for epoch in range(3)}
    np.random.seed(7)  # whatever the state of the process
    assert all(resample(groups, targets, *key).tolist() == plan for key, plan in reversed(plans.items()))
    assert len({str(plan) for plan in plans.values()}) == 9


def test_over_the_epochs_every_query_has_its_turn_to_come_once_more() -> None:
    groups, targets = np.zeros(40, dtype=int), np.array([50])
    more = Counter(i for epoch in range(400) for i in resample(groups, targets, 0, epoch).tolist())
    expected = 400 * 50 / 40
    assert all(abs(more[i] - expected) < 5 * (400 * 0.25 * 0.75) ** 0.5 for i in range(40))


# --- the sizes ------------------------------------------------------------------------------------------------------

#: Queries of M-BEIR's training split. Those of MSCOCO, VisualNews, WebQA, NIGHTS and CIRR are published in thousands
#: only; their parts here agree with that and make the published total.
MBEIR_TRAIN = {
    "visualnews_task0": 99_903,
    "visualnews_task3": 100_000,
    "mscoco_task0": 100_000,
    "mscoco_task3": 113_287,
    "fashion200k_task0": 15_000,
    "fashion200k_task3": 15_000,
    "webqa_task1": 16_100,
    "webqa_task2": 17_163,
    "edis_task2": 25_917,
    "nights_task4": 15_941,
    "oven_task6": 150_753,
    "oven_task8": 154_460,
    "infoseek_task6": 141_256,
    "infoseek_task8": 143_131,
    "fashioniq_task7": 16_176,
    "cirr_task7": 26_116,
}


def test_uniirs_rule_makes_its_up_sampled_epoch_of_m_beir() -> None:
    assert sum(MBEIR_TRAIN.values()) == 1_150_203
    targets = targets_of(tasks_of(MBEIR_TRAIN), upsample="uniir")
    assert sum(targets.values()) == 1_332_790
    assert targets["webqa_task1"] + targets["webqa_task2"] == 100_000
    assert {targets[task] for task in ("edis_task2", "nights_task4", "fashioniq_task7", "cirr_task7")} == {50_000}
    raised = ("webqa", "edis", "nights", "fashioniq", "cirr")
    for task, size in MBEIR_TRAIN.items():
        assert targets[task] == size or task.startswith(raised)


def test_a_dataset_above_its_target_stays_as_it_is() -> None:
    sizes = {"edis_task2": 50_001, "webqa_task1": 70_000, "webqa_task2": 30_000, "pets_task0": 5}
    assert targets_of(tasks_of(sizes), upsample="uniir") == sizes


def test_the_tasks_of_a_dataset_keep_their_shares_of_it() -> None:
    targets = targets_of(tasks_of({"webqa_task1": 1000, "webqa_task2": 2000, "pets_task0": 3}), upsample="uniir")
    assert targets == {"webqa_task1": 33_333, "webqa_task2": 66_667, "pets_task0": 3}


@pytest.mark.parametrize("temperature", [1, 1.5, 2, 5, math.inf])
def test_a_temperature_flattens_the_datasets_and_keeps_the_epoch(temperature: float) -> None:
    sizes = {"a_task0": 4000, "b_task0": 500, "b_task3": 400, "c_task7": 100}
    datasets = np.array([4000, 900, 100])
    targets = targets_of(tasks_of(sizes), temperature=temperature)
    assert sum(targets.values()) == 5000
    expected = datasets ** (1 / temperature)
    expected *= 5000 / expected.sum()
    found = [targets["a_task0"], targets["b_task0"] + targets["b_task3"], targets["c_task7"]]
    np.testing.assert_allclose(found, expected, atol=1)
    assert targets["b_task0"] / targets["b_task3"] == pytest.approx(500 / 400, abs=0.01)
    if temperature == 1:
        assert targets == sizes


def test_factors_are_of_a_dataset_or_a_task_and_the_tasks_own_wins() -> None:
    tasks = tasks_of({"a_task0": 10, "a_task3": 11, "b_task0": 12, "c_task1": 13, "d_task2": 14})
    targets = targets_of(tasks, upsample={"a": 2, "a_task3": 0.5, "b": 0, "c_task1": 1.5})
    assert targets == {"a_task0": 20, "a_task3": 6, "b_task0": 0, "c_task1": 20, "d_task2": 14}


def test_by_the_sources_file_a_query_comes_as_often_as_it_stands_there() -> None:
    weights = np.random.default_rng(0).integers(0, 5, 200)
    groups, targets = source_targets(weights)
    for epoch in range(3):
        assert resample(groups, targets, 1, epoch).tolist() == np.repeat(np.arange(200), weights).tolist()


# --- rules that say nothing, or two things --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"upsample": "unir"}, "upsample='unir' is unknown; write one of uniir, source, or a factor for each dataset"),
        ({"upsample": {"pets": -1}}, "upsample: the factor -1 of 'pets' is no number from 0 up"),
        ({"upsample": {"pets": math.inf}}, "upsample: the factor inf of 'pets' is no number from 0 up"),
        ({"upsample": {"pets": "3x"}}, "upsample: the factor '3x' of 'pets' is no number from 0 up"),
        ({"temperature": 0.5}, "temperature=0.5 is no number from 1 up; 1 keeps the sizes as they are"),
        ({"temperature": math.nan}, "temperature=nan is no number from 1 up"),
        (
            {"upsample": "uniir", "temperature": 2},
            "upsample='uniir' and temperature=2 are two rules for the same thing",
        ),
    ],
)
def test_a_rule_that_cannot_be_followed_is_named_at_once(rule: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match=message):
        MBEIRDataModule(tmp_path, **rule)


def test_an_unknown_name_is_named_with_those_that_there_are() -> None:
    with pytest.raises(UserInputError, match=r"'webq' is no dataset or task .* write one of pets, pets_task0, webqa,"):
        task_targets(np.array(["pets_task0", "webqa_task1"]), {"pets": 1, "webq": 3})


def test_a_source_without_an_up_sampled_file_is_not_taken_for_one() -> None:
    with pytest.raises(UserInputError, match="upsample='source': the source has no up-sampled training file"):
        source_targets(np.ones(5, dtype=int))


# --- the order ------------------------------------------------------------------------------------------------------


def test_the_order_holds_each_position_as_often_as_it_was_drawn() -> None:
    positions = np.sort(np.random.default_rng(3).integers(0, 60, 200))
    ordered = spread(positions, np.random.default_rng(0))
    assert np.sort(ordered).tolist() == positions.tolist()
    assert len({str(spread(positions, np.random.default_rng(seed))) for seed in range(9)}) == 9


def test_every_part_of_the_epoch_has_its_share_of_what_is_up_sampled() -> None:
    times = np.repeat([1, 4], [8000, 500])
    ordered = spread(np.repeat(np.arange(8500), times), np.random.default_rng(0))
    shares = (ordered.reshape(10, -1) >= 8000).mean(1)
    assert np.abs(shares - 0.2).max() < 5 * (0.2 * 0.8 / 1000) ** 0.5
    first = np.unique(ordered, return_index=True)[1]
    assert abs(first[:8000].mean() - 5000) < 5 * 10_000 / (12 * 8000) ** 0.5, "what comes once comes at any time"


@pytest.mark.parametrize("mix", MIXES)
def test_no_batch_holds_a_query_twice_where_its_task_has_queries_to_spare(mix: str) -> None:
    tasks = tasks_of({"a_task0": 900, "b_task0": 300, "b_task1": 400})
    groups, targets = task_targets(tasks, {"b": 3.4})
    shuffled_holds_some = 0
    for epoch in range(10):
        positions = resample(groups, targets, 0, epoch)
        for batch in plan_epoch(tasks, 64, 0, epoch, mix, positions):
            assert len(set(batch.tolist())) == 64
        shuffled = np.random.default_rng(epoch).permutation(positions)
        shuffled_holds_some += sum(
            len(set(shuffled[i : i + 64].tolist())) < 64 for i in range(0, len(shuffled) - 64, 64)
        )
    assert shuffled_holds_some > 10, "a plain shuffle would not do"


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("rule", ["factors", "source"])
def test_the_number_of_batches_is_the_same_in_every_epoch_and_known_beforehand(mix: str, rule: str) -> None:
    tasks = tasks_of({"webqa_task1": 23, "webqa_task2": 9, "b_task3": 31})
    weights = np.random.default_rng(0).integers(0, 4, len(tasks))
    resampled = source_targets(weights) if rule == "source" else task_targets(tasks, {"webqa": 2.6, "b": 0.7})
    plans = [EpochPlan(tasks, 4, 1, mix, num_replicas=2, rank=rank, resampled=resampled) for rank in range(2)]
    drawn = set()
    for epoch in range(12):
        for plan in plans:
            plan.set_epoch(epoch)
        whole = plan_epoch(tasks, 8, 1, epoch, mix, resample(*resampled, 1, epoch))
        assert {len(plan) for plan in plans} == {len(whole)}
        parts = zip(*plans, strict=True)
        assert [np.concatenate([b for _, b in part]).tolist() for part in parts] == whole.tolist()
        drawn.add(str(whole))
    assert len(drawn) == 12
    sizes = [int(resampled[1].sum())] if mix == "mixed" else Counter(tasks[resample(*resampled, 1, 0)]).values()
    assert len(plans[0]) == sum(size // 8 for size in sizes)


# --- the datamodule -------------------------------------------------------------------------------------------------


class Seen(Callback):
    """The queries of every training and validation batch, by epoch."""

    def __init__(self) -> None:
        self.train: dict[int, list[str]] = {}
        self.val: dict[int, list[str]] = {}

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        self.train.setdefault(trainer.current_epoch, []).extend(map(decode_id, batch.query_ids.tolist()))

    def on_validation_batch_start(self, trainer: Any, module: Any, batch: Any, *_: Any) -> None:
        self.val.setdefault(trainer.current_epoch, []).extend(map(decode_id, batch.query_ids.tolist()))


def fit(directory: Path, checkpoint: Path, data: MBEIRDataModule, epochs: int = 2) -> Seen:
    seen = Seen()
    tiny_trainer(directory, max_epochs=epochs, callbacks=[seen]).fit(tiny_module(checkpoint), data)
    return seen


def test_only_training_is_up_sampled(tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    rule = {"pets_task1": 0, "pets": 2.5}
    seen = fit(tmp_path, tiny_checkpoint, MBEIRDataModule(tiny_shards, batch_size=9, upsample=rule))
    for epoch in (0, 1):
        times = Counter(seen.train[epoch])
        assert sum(times.values()) == 90
        assert set(times.values()) == {2, 3}
        tasks = Counter(int(qid.partition(":")[2]) // 100 for qid in seen.train[epoch])
        assert tasks == {0: 30, 3: 30, 7: 30}
        assert len(seen.val[epoch]) == len(set(seen.val[epoch])) == 18
    assert seen.train[0] != seen.train[1]


def test_a_batch_is_no_larger_than_what_is_left_to_train_on(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    seen = fit(tmp_path, tiny_checkpoint, MBEIRDataModule(tiny_shards, upsample={"pets": 0, "pets_task7": 1}))
    assert [len(set(seen.train[epoch])) for epoch in (0, 1)] == [12, 12]


def test_nothing_left_to_train_on_is_an_error(tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match="has 0 train queries for 1 processes"):
        fit(tmp_path, tiny_checkpoint, MBEIRDataModule(tiny_shards, upsample={"pets": 0}))


def test_the_sources_own_up_sampling_is_followed(tiny_source: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_source, tmp_path / "source")
    lines = read_lines(source / "query" / "train" / "mbeir_pets_train.jsonl")
    times = np.random.default_rng(0).integers(1, 4, len(lines)).tolist()
    write_lines(
        source / "query" / "union_train" / "mbeir_union_up_train.jsonl",
        [json.dumps(line) for line, n in zip(lines, times, strict=True) for _ in range(n)],
    )
    total = sum(times)
    data = MBEIRDataModule(tmp_path / "shards", source, batch_size=total, upsample="source")
    seen = fit(tmp_path, tiny_checkpoint, data, epochs=1)
    assert Counter(seen.train[0]) == {line["qid"]: n for line, n in zip(lines, times, strict=True)}
