"""Several folders of shards as one: the same records, pools and queries, and batches of both."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from text_worlds import birds
from worlds import write_pets

from lightning_mmembed.data import Shards, ShardTexts, UnionShards, open_shards, shard_dataset
from lightning_mmembed.data.batches import EpochPlan, TrainingBatches
from lightning_mmembed.data.beir import BEIRLayout
from lightning_mmembed.data.sampling import task_targets
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.items import Query, decode_id, encode_id

PARTS = ("pets", "birds")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Shards of pictures and texts, and of texts alone; the ids of the latter come first."""
    root = tmp_path_factory.mktemp("parts")
    texts = BEIRLayout(birds(root / "birds", 60), dataset_id=50)
    return {
        "pets": shard_dataset(
            write_pets(root / "pets"), root / "shards-pets", samples_per_shard=9, show_progress=False
        ),
        "birds": shard_dataset(texts, root / "shards-birds", samples_per_shard=9, show_progress=False),
    }


@pytest.fixture(scope="module")
def union(folders: dict[str, Path]) -> UnionShards:
    """The two as one."""
    return UnionShards([folders[name] for name in PARTS])


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_union_holds_the_candidates_and_queries_of_its_parts_and_no_others(
    folders: dict[str, Path], union: UnionShards, split: str
) -> None:
    parts = [Shards(folders[name]) for name in PARTS]
    pool, pools = union.pool(split), [part.pool(split) for part in parts]
    expected = {candidate.did: candidate for given in pools for candidate in given.items}
    assert {candidate.did: candidate for candidate in pool.items} == expected
    assert [decode_id(code) for code in pool.ids.tolist()] == [candidate.did for candidate in pool.items]
    assert (pool.ids.diff() > 0).all()
    for given in pools:
        rows = torch.searchsorted(pool.ids, given.ids)
        assert torch.equal(pool.modalities[rows], given.modalities)
        assert pool.sizes is not None
        assert given.sizes is not None
        assert torch.equal(pool.sizes[rows], given.sizes)
        for task, inside in given.local.items():
            assert torch.equal(pool.ids[pool.local[task]], given.ids[inside])
    by_task = {queries.task.name: queries for part in parts for queries in part.query_sets(split)}
    found = union.query_sets(split)
    assert {queries.task.name for queries in found} == by_task.keys()
    for queries in found:
        same = by_task[queries.task.name]
        assert list(queries.queries) == list(same.queries)
        assert torch.equal(queries.ids, same.ids)
        assert list(queries.positives) == list(same.positives)
        assert (queries.grades, queries.ignored) == (same.grades, same.ignored)


def test_a_union_counts_what_its_parts_count(folders: dict[str, Path], union: UnionShards) -> None:
    manifests = [json.loads((folders[name] / "manifest.json").read_text()) for name in PARTS]
    counts = union.manifest["counts"]
    assert counts["pools"]["train"] == sum(manifest["counts"]["pools"]["train"] for manifest in manifests)
    assert counts["queries"] == manifests[0]["counts"]["queries"] | manifests[1]["counts"]["queries"]
    assert [task.name for task in union.tasks("train")] == sorted({k.split("/")[0] for k in counts["queries"]})
    index = union._index
    assert ((index["image_shard"].to_numpy() < 0) == (index["image_size"].to_numpy() == 0)).all(), (
        "no picture, no shard"
    )
    assert union.source_ids("test") == Shards(folders["birds"]).source_ids("test")


def test_neither_the_order_of_the_folders_nor_a_pickle_changes_anything(
    folders: dict[str, Path], union: UnionShards
) -> None:
    other = UnionShards([folders[name] for name in reversed(PARTS)])
    copy = pickle.loads(pickle.dumps(union))
    for same in (other, copy):
        assert same.fingerprint == union.fingerprint
        assert np.array_equal(same.query_ids(same.query_rows("train")), union.query_ids(union.query_rows("train")))
    assert union.fingerprint not in {Shards(folders[name]).fingerprint for name in PARTS}
    assert len(pickle.dumps(union)) < 1000


def test_one_folder_is_opened_as_it_is(folders: dict[str, Path]) -> None:
    assert type(open_shards(folders["pets"])) is Shards
    assert type(open_shards([folders["pets"]])) is Shards
    assert type(open_shards([str(folders["pets"]), folders["birds"]])) is UnionShards
    with pytest.raises(UserInputError, match=r"data\.shards=\[\] names no folder"):
        open_shards([])


def test_a_tokenizer_learns_from_all_of_them(folders: dict[str, Path]) -> None:
    both = sorted(ShardTexts([folders[name] for name in PARTS]))
    assert both == sorted(text for name in PARTS for text in ShardTexts(folders[name]))


def test_folders_that_share_an_id_or_a_task_are_refused_with_both_names(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    def more(name: str, **settings: Any) -> Path:
        return shard_dataset(
            BEIRLayout(birds(tmp_path / name), **settings), tmp_path / f"{name}-s", show_progress=False
        )

    with pytest.raises(UserInputError, match=r"(?s)shards-birds\b.*dataset_id=50") as caught:
        open_shards([folders["birds"], more("owls", dataset_id=50)])
    assert "owls-s" in str(caught.value)
    with pytest.raises(UserInputError, match="both have the task birds_task1") as caught:
        open_shards([folders["birds"], more("birds", dataset_id=51)])
    assert str(folders["birds"]) in str(caught.value)
    assert str(tmp_path / "birds-s") in str(caught.value)


def test_what_is_wrong_with_a_record_is_told_with_the_folder_that_it_lies_in(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    copy = tmp_path / "birds"
    shutil.copytree(folders["birds"], copy)
    union = UnionShards([folders["pets"], copy])
    (copy / "candidates-00000.tar").write_bytes(b"")
    with pytest.raises(
        UserInputError, match=rf"candidate 50:1 \({copy}/candidates-00000\.tar at byte \d+\): .*truncated"
    ):
        union.candidate_at(union.candidate_row(encode_id("50:1")))


def entries_of(entries: Any) -> Any:
    """In place of an encoder's processor: what it would be given."""
    return [(e.qid, e.instruction, e.item) if isinstance(e, Query) else (e.did, e.item) for e in entries]


def test_batches_of_a_union_mix_both_by_weight_and_depend_on_epoch_and_position_alone(union: UnionShards) -> None:
    rows, pool = union.query_rows("train"), union.pool("train").ids.numpy()
    names = union.task_names(rows)
    resampled = task_targets(names, {"birds": 3, "pets": 0.5})
    plan = EpochPlan(names, 8, seed=1, resampled=resampled)
    sizes = dict(zip(*np.unique(names, return_counts=True), strict=True))
    drawn = np.concatenate([positions for _, positions in plan])
    counts = dict(zip(*np.unique(names[drawn], return_counts=True), strict=True))
    assert abs(counts["birds_task1"] - 3 * sizes["birds_task1"]) <= 8
    made = [TrainingBatches(union, rows, pool, entries_of, seed=1, negatives_per_query=1) for _ in range(2)]
    plan.set_epoch(2)
    keys = list(plan)
    mixed = 0
    for key in keys:
        first, second = made[0][key], made[1][key]
        assert first.inputs == second.inputs
        kinds = {decode_id(code).partition(":")[0] for code in first.query_ids.tolist()}
        mixed += kinds == {"50", "77"}
        for entry in first.inputs:  # type: ignore[attr-defined]
            assert entry[-1].text or entry[-1].image
            assert len(entry) == 2 or (":" in entry[0] and entry[1])
    assert mixed > len(keys) / 2
    made[1][keys[-1]]  # in another order
    assert made[1][keys[0]].inputs == made[0][keys[0]].inputs
