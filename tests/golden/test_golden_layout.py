"""Every trap of M-BEIR's layout: texts, records and pictures, from the published files to the shards."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_tree import (
    BAD,
    BAD_CANDIDATES,
    BAD_TRAIN_QUERIES,
    GOLDEN,
    IMAGES,
    NAMES,
    POOLS,
    TREE,
    expected_values,
    lines,
    our_values,
    query_vectors_of,
)
from PIL import Image
from torch import Tensor

from lightning_mmembed.data.layout import MBEIRLayout, format_text
from lightning_mmembed.data.records import BadRecord, QueryRecord
from lightning_mmembed.data.shard import shard_dataset
from lightning_mmembed.data.shards import Shards
from lightning_mmembed.encoders.processor import decode_image
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.items import MBEIR_TASKS, Modality, Task, decode_id, encode_id
from lightning_mmembed.retrieval.evaluate import evaluate_vectors
from lightning_mmembed.retrieval.pool import Pool

# --- texts


def test_texts_are_formatted_as_the_reference_formats_them_once_and_twice() -> None:
    for row in json.loads((GOLDEN / "text" / "format_string.json").read_text()):
        assert format_text(row["raw"]) == row["once"], row
        assert format_text(format_text(row["raw"])) == row["twice"], row


def test_the_difficult_candidates_are_read_with_the_expected_text_modality_and_picture(layout: MBEIRLayout) -> None:
    found = {}
    for _, path in layout.pool_files():
        for record in layout.candidates(path):
            assert not isinstance(record, BadRecord)
            found[record.did] = (record.text, str(record.modality), record.image)
    expected = lines(GOLDEN / "text" / "trap_candidates.jsonl")
    assert len(expected) == 19
    for row in expected:
        assert found[row["did"]] == (row["text"], row["modality"], row["img_path"]), row["trap"]


def test_a_query_with_absent_keys_is_read_as_one_with_empty_ones(layout: MBEIRLayout) -> None:
    path = TREE / "query" / "train" / "mbeir_mscoco_train.jsonl"
    queries = {q.qid: q for q in layout.queries(path) if isinstance(q, QueryRecord)}
    assert (queries["9:5"].image, queries["9:5"].negatives) == (None, ())


# --- shards


def test_exactly_the_records_that_cannot_be_used_are_left_out_and_named(shards: Shards) -> None:
    named = {bad["record"].rpartition(" ")[2]: bad["reason"] for bad in shards.manifest["bad_records"]}
    assert set(named) == {record for record, _ in BAD.values()}
    for record, reason in BAD.values():
        assert reason in named[record]
    in_pools = {r["did"] for path in (TREE / "cand_pool").rglob("*.jsonl") for r in lines(path)}
    assert {decode_id(code) for code in shards.candidate_ids.tolist()} == in_pools - BAD_CANDIDATES
    for split in ("train", "val", "test"):
        written = sorted(
            (r["qid"], r["task_id"]) for path in (TREE / "query" / split).glob("*.jsonl") for r in lines(path)
        )
        left_out = BAD_TRAIN_QUERIES if split == "train" else set()
        rows = shards.query_rows(split)
        ids, tasks = shards.query_ids(rows).tolist(), shards.task_names(rows)
        kept = sorted((decode_id(i), Task.parse(t).task_id) for i, t in zip(ids, tasks, strict=True))
        assert kept == [row for row in written if row[0] not in left_out]


def test_by_default_a_tree_with_that_many_bad_records_is_refused_and_one_of_them_named(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match=r"of \d+ records .* cannot be used .*; 1:91: picture .*90000101_0\.jpg"):
        shard_dataset(TREE, tmp_path / "shards")
    assert not (tmp_path / "shards").exists()


def test_a_text_with_a_line_separator_is_one_record_and_keeps_it(shards: Shards) -> None:
    text = shards.candidate(encode_id("2:99")).item.text
    assert text is not None
    assert {"\u2028", "\u0085", "\t"} <= set(text)
    assert text == next(r["text"] for r in lines(GOLDEN / "text" / "trap_candidates.jsonl") if r["did"] == "2:99")


def test_a_test_query_without_a_reachable_positive_is_kept_and_named(shards: Shards) -> None:
    assert shards.manifest["queries_without_reachable_positive"] == ["test 2:29"]
    queries = next(q for q in shards.query_sets("test") if q.task.name == "webqa_task1")
    i = queries.ids.tolist().index(encode_id("2:29"))
    assert queries.positives[i] == [encode_id("2:999983")]


def test_positives_of_another_dataset_reach_the_query_sets(shards: Shards) -> None:
    across = set()
    for queries in shards.query_sets("test"):
        for qid, positives in zip(queries.ids.tolist(), queries.positives, strict=True):
            if any(did // 10**10 != qid // 10**10 for did in positives):
                across.add((queries.task.dataset, decode_id(qid)))
    assert {dataset for dataset, _ in across} == {"oven", "infoseek"}
    assert len(across) == 33


def test_every_record_gets_its_text_picture_and_modality_back(shards: Shards, modalities: dict[str, Modality]) -> None:
    source = {r["did"]: r for path in (TREE / "cand_pool").rglob("*.jsonl") for r in lines(path)}
    union = shards.pool("test")
    assert len(union) == 815 - len(BAD_CANDIDATES)
    for row, candidate in enumerate(union.items):
        record = source[candidate.did]
        assert candidate.item.text == (format_text(record.get("txt")) or None)
        picture = record.get("img_path")
        assert candidate.item.image == ((TREE / picture).read_bytes() if picture else None)
        assert int(union.modalities[row]) == modalities[candidate.did].code
        assert int(union.ids[row]) == encode_id(candidate.did)


def test_a_qid_of_two_splits_is_two_queries(shards: Shards) -> None:
    for split in ("train", "val", "test"):
        source = {(r["qid"], r["task_id"]): r for path in (TREE / "query" / split).glob("*.jsonl") for r in lines(path)}
        for queries in shards.query_sets(split):
            for query in queries.queries:
                record = source[query.qid, queries.task.task_id]
                assert query.item.text == (format_text(record.get("query_txt")) or None)
                picture = record.get("query_img_path")
                assert query.item.image == ((TREE / picture).read_bytes() if picture else None)
                assert query.task == queries.task


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves its shards open
def test_webdataset_reads_every_shard_and_gives_the_same_bytes_as_random_access(shards: Shards) -> None:
    wds = pytest.importorskip("webdataset")
    splits = {"candidates": "", "queries-train": "train", "queries-val": "val", "queries-test": "test"}
    pictures: dict[str, bytes] = {}
    for shard in shards.manifest["shards"]:
        path = Path(shards.directory) / shard["file"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == shard["sha256"]
        samples = list(wds.WebDataset([str(path)], shardshuffle=False))
        if shard["file"].startswith("images"):
            for sample in samples:
                ((suffix, data),) = ((k, v) for k, v in sample.items() if not k.startswith("__"))
                pictures[f"{sample['__key__']}.{suffix}"] = data
            continue
        split = splits[shard["file"].rpartition("-")[0]]
        rows = shards.query_rows(split) if split else shards.candidate_rows
        assert len(samples) == len(rows)
        for sample, row in zip(samples, rows, strict=True):
            record = json.loads(sample["json"])
            entry = shards.query_at(int(row)) if split else shards.candidate_at(int(row))
            name = record["qid"] if split else record["did"]
            assert name.replace(":", "-") == sample["__key__"]
            assert (entry.qid if split else entry.did) == name  # type: ignore[union-attr]
            image = record["query_img_path" if split else "img_path"]
            assert entry.item.image == (None if image is None else pictures[image])
            assert (record["query_txt" if split else "txt"] or None) == entry.item.text


@pytest.mark.parametrize("path", [p for p, row in IMAGES.items() if (row["format"], row["mode"]) != ("JPEG", "RGB")])
def test_pictures_of_rare_kinds_decode_to_the_expected_colours_or_are_refused(path: str) -> None:
    row = IMAGES[path]
    if row["status"] == "missing":
        assert not (TREE / path).exists()
        return
    data = (TREE / path).read_bytes()
    if row["status"] != "ok":
        with pytest.raises(UserInputError, match="cannot be decoded"):
            decode_image(data)
        return
    assert_colours(decode_image(data), row)


def assert_colours(picture: Image.Image, row: dict[str, str]) -> None:
    assert picture.mode == "RGB"
    assert picture.size == (int(row["width"]), int(row["height"])), row["path"]
    means = np.asarray(picture, dtype=np.float64).reshape(-1, 3).mean(0)
    np.testing.assert_allclose(means, [float(row[f"mean_{c}"]) for c in "rgb"], atol=3, err_msg=row["path"])


def test_every_picture_has_its_original_bytes_and_decodes_to_the_expected_colours() -> None:
    kinds = {(row["format"], row["mode"]) for row in IMAGES.values() if row["status"] == "ok"}
    assert kinds == {("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGBA"), ("PNG", "P")}
    for path, row in IMAGES.items():
        if row["status"] == "ok":
            data = (TREE / path).read_bytes()
            assert hashlib.sha256(data).hexdigest() == row["sha256"], path
            assert_colours(decode_image(data), row)


def test_the_instructions_are_read_and_two_datasets_may_share_one(layout: MBEIRLayout, shards: Shards) -> None:
    choices = {}
    for queries in shards.query_sets("test"):
        first = queries.queries[0]
        choices[queries.task.name] = shards.instructions.choices(first.qid, first.item.modality, queries.task)
        assert all(query.instruction == choices[queries.task.name][0] for query in queries.queries)
    assert {len(prompts) for prompts in choices.values()} == {4}
    for task in (6, 8):
        assert choices[f"oven_task{task}"][0] == choices[f"infoseek_task{task}"][0]
        assert choices[f"oven_task{task}"] != choices[f"infoseek_task{task}"]


def test_a_mended_tree_gives_the_expected_metrics_through_its_shards(
    tmp_path: Path, embedded_pool: tuple[Pool, Tensor]
) -> None:
    """End to end but for the encoder: pools, labels and tasks are those that the shards give."""
    shutil.copytree(TREE, tmp_path / "source", ignore=shutil.ignore_patterns("golden"))
    for path, row in IMAGES.items():
        if row["status"] != "ok":
            Image.new("RGB", (8, 8)).save(tmp_path / "source" / path)
    shards = Shards(shard_dataset(tmp_path / "source", tmp_path / "shards"))  # one bad record: within the default
    golden, vectors = embedded_pool
    pool = shards.pool("test")
    assert torch.equal(pool.ids, golden.ids)
    assert torch.equal(pool.modalities, golden.modalities)
    query_sets, query_vectors = shards.query_sets("test"), []
    for queries in query_sets:
        qids, of_task = query_vectors_of(queries.task.name)
        query_vectors.append(of_task[[qids.index(decode_id(code)) for code in queries.ids.tolist()]])
    result = evaluate_vectors(pool, vectors, query_sets, query_vectors, list(NAMES))
    assert tuple(result.tasks) == MBEIR_TASKS
    for name in POOLS:
        assert our_values(result, name) == pytest.approx(expected_values(name), abs=1e-9)
