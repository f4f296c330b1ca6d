"""One test for each trap of TRAPS.md, over the shards of the tree and the ranking of its vectors."""

from __future__ import annotations

import json
import re
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_tree import BAD, EXPECTED, GOLDEN, IMAGES, POOLS, TREE, codes, dids_of, lines, table, unit

from lightning_mmembed import MLLMEncoder
from lightning_mmembed.data.layout import MBEIRLayout
from lightning_mmembed.data.shards import Shards
from lightning_mmembed.encoders.processor import decode_image
from lightning_mmembed.items import Item, Modality, Query, decode_id, encode_id
from lightning_mmembed.retrieval.results import RetrievalResult

TIES = {tie["name"]: tie for tie in EXPECTED["designed"]["ties"]}
TEXTS = {row["did"]: row["text"] for row in lines(GOLDEN / "text" / "trap_candidates.jsonl")}
PER_QUERY = {(row["pool"], row["task"], row["qid"]): row for row in table(GOLDEN / "expected" / "per_query.tsv")}


def source(pattern: str) -> list[dict[str, Any]]:
    return [record for path in sorted(TREE.glob(pattern)) for record in lines(path)]


def query(shards: Shards, split: str, qid: str, task: str = "") -> Query:
    rows = shards.query_rows(split)
    (row,) = rows[shards.query_ids(rows) == encode_id(qid)]
    found = shards.query_at(int(row))
    assert found.task is not None
    assert found.task.name.startswith(task)
    return found


def item(shards: Shards, did: str) -> Item:
    return shards.candidate(encode_id(did)).item


def picture(shards: Shards, did: str) -> np.ndarray:
    image = item(shards, did).image
    assert isinstance(image, bytes)
    return np.asarray(decode_image(image))


def outcome_of(result: RetrievalResult, pool: str, task: str, qid: str) -> tuple[list[str], dict[str, float], set[str]]:
    """The ranked dids, the metrics and the positives of a query."""
    outcome = result.tasks[task]
    i = outcome.queries.ids.tolist().index(encode_id(qid))
    ranked = [decode_id(int(result.pool.ids[r])) for r in outcome.rankings[pool].rows[i] if r >= 0]
    values = {name: float(value[i]) for name, value in outcome.values[pool].items()}
    return ranked, values, {decode_id(did) for did in outcome.queries.positives[i]}


# --- A. ids, records, files


def test_A1_absent_keys_of_candidates_are_null(shards: Shards) -> None:
    records = source("cand_pool/local/mbeir_webqa_task1_cand_pool.jsonl")
    assert len(records) == 61
    assert not any("img_path" in record for record in records)
    assert all(item(shards, record["did"]).image is None for record in records)


def test_A2_absent_keys_of_queries_are_null(shards: Shards) -> None:
    for split, qid in (("train", "9:5"), ("test", "2:21")):
        records = [r for r in source(f"query/{split}/*.jsonl") if r["qid"] == qid]
        assert any("query_img_path" not in record for record in records)
        assert query(shards, split, qid).item.image is None


def test_A3_a_qid_of_two_splits_is_two_queries(shards: Shards) -> None:
    ids = {split: set(shards.query_ids(shards.query_rows(split)).tolist()) for split in ("train", "val", "test")}
    left_out = {encode_id("4:6"), encode_id("9:19")}  # C2 and B6
    written = {s: {encode_id(r["qid"]) for r in source(f"query/{s}/*.jsonl")} for s in ids}
    assert [len(written[a] & written[b]) for a, b in (("train", "test"), ("val", "test"), ("train", "val"))] == [
        184,
        81,
        80,
    ]
    assert ids == {**written, "train": written["train"] - left_out}


def test_A4_a_candidate_spelled_like_the_query_stays_in_the_ranking(result: RetrievalResult) -> None:
    for row in EXPECTED["designed"]["same_spell"]:
        ranked, _, positives = outcome_of(result, "local", row["task"], row["qid"])
        assert ranked[0] == row["qid"]
        assert row["qid"] not in positives


def test_A5_repeats_of_the_up_sampled_file_become_weights(shards: Shards) -> None:
    counts = Counter(r["qid"] for r in source("query/union_train/*.jsonl"))
    assert (sum(counts.values()), len(counts), counts["2:8"]) == (316, 194, 6)
    rows = shards.query_rows("train")
    weights = dict(
        zip(map(decode_id, shards.query_ids(rows).tolist()), shards.query_weights(rows).tolist(), strict=True)
    )
    assert weights == {qid: counts[qid] for qid in weights}
    assert counts.keys() - weights.keys() <= {"4:6", "9:19"}


@pytest.mark.parametrize("task", ["visualnews_task0", "edis_task2", "cirr_task7"])
def test_A6_a_pool_is_in_canonical_order_whatever_the_order_of_its_file(shards: Shards, task: str) -> None:
    written = [encode_id(r["did"]) for r in source(f"cand_pool/local/mbeir_{task}_cand_pool.jsonl")]
    assert written != sorted(written)
    pool = shards.pool("test")
    assert pool.ids[pool.local[task]].tolist() == sorted(set(written) - {encode_id("0:82")})


def test_A7_the_union_is_the_same_set_as_the_published_file_and_the_vectors(shards: Shards) -> None:
    published = {r["did"] for r in source("cand_pool/global/mbeir_union_test_cand_pool.jsonl")}
    embedded = dids_of(np.load(GOLDEN / "embeddings" / "cand_pool" / "mbeir_union_cand_pool_ids.npy"))
    assert codes(embedded).tolist() != sorted(codes(embedded).tolist())
    bad = {"0:82", "1:91", "1:92"}
    assert {decode_id(code) for code in shards.pool("test").ids.tolist()} == published - bad == set(embedded) - bad


def test_A8_qrels_of_five_columns_give_the_positives(layout: MBEIRLayout, shards: Shards) -> None:
    judged = layout.qrels("test")
    for queries in shards.query_sets("test"):
        for qid, positives in zip(queries.ids.tolist(), queries.positives, strict=True):
            assert judged[queries.task.name][decode_id(qid)] == tuple(map(decode_id, positives))


def test_A9_the_instructions_of_a_query_are_those_of_its_dataset_and_modalities(shards: Shards) -> None:
    rows = [r.split("\t") for r in (TREE / "instructions" / "query_instructions.tsv").read_text().splitlines()]
    assert len(rows) == 17
    for queries in shards.query_sets("test"):
        first = queries.queries[0]
        kinds = [first.item.modality.value, queries.task.target_modality.value]
        (row,) = [r for r in rows[1:] if r[:2] == kinds and r[3] == first.qid.partition(":")[0]]
        assert shards.instructions.choices(first.qid, first.item.modality, queries.task) == tuple(row[4:8])


def test_A10_source_content_stays_out_of_the_shards(shards: Shards) -> None:
    assert any("src_content" in record for record in source("cand_pool/local/*.jsonl"))
    for path in Path(shards.directory).glob("[cq]*.tar"):
        assert b"src_content" not in path.read_bytes()


def test_A11_a_line_separator_in_a_text_ends_no_record(shards: Shards) -> None:
    assert item(shards, "2:99").text == TEXTS["2:99"]
    assert {"\u2028", "\u0085", "\t"} <= set(TEXTS["2:99"])


# --- B. positives and negatives


@pytest.mark.parametrize(
    ("task", "expected"), [("oven_task6", 61), ("infoseek_task6", 6), ("oven_task8", 23), ("infoseek_task8", 8)]
)
def test_B1_positives_of_another_dataset_are_kept_and_lie_outside_the_local_pool(
    shards: Shards, task: str, expected: int
) -> None:
    pool = shards.pool("test")
    local, union = set(pool.ids[pool.local[task]].tolist()), set(pool.ids.tolist())
    positives = [did for q in shards.query_sets("test") if q.task.name == task for row in q.positives for did in row]
    assert sum(did not in local for did in positives) == expected
    assert set(positives) <= union


def test_B2_the_first_positive_may_be_of_another_dataset(shards: Shards) -> None:
    found = query(shards, "test", "5:9", "oven_task6")
    assert not found.positives[0].startswith("5:")
    assert found.task is not None
    assert found.task.target_modality is Modality.TEXT


@pytest.mark.parametrize(("qid", "task"), EXPECTED["designed"]["crossq"])
def test_B3_a_query_may_be_answered_through_the_other_dataset_alone(
    result: RetrievalResult, qid: str, task: int
) -> None:
    hits = [outcome_of(result, pool, f"oven_task{task}", qid)[1]["hit@5"] for pool in ("union", "local")]
    assert hits == [1, 0]


def test_B4_queries_without_labelled_negatives_are_kept(shards: Shards) -> None:
    without = {r["qid"] for r in source("query/train/*.jsonl") if not r.get("neg_cand_list")}
    assert {"2:6", "9:5"} <= without
    kept = {decode_id(code) for code in shards.query_ids(shards.query_rows("train")).tolist()}
    assert without - kept <= {"4:6", "9:19"}


def test_B5_a_labelled_negative_of_another_modality_keeps_its_own(shards: Shards) -> None:
    mixed = 0
    for record in source("query/train/mbeir_webqa_train.jsonl"):
        kinds = {item(shards, did).modality for did in record.get("neg_cand_list", ())}
        mixed += kinds == {Modality.TEXT, Modality.IMAGE_TEXT}
    assert mixed == 19


def test_B6_a_query_whose_positive_is_in_no_pool_counts_as_zero_and_is_not_trained_on(
    shards: Shards, result: RetrievalResult
) -> None:
    assert any("9:654321" in bad["reason"] for bad in shards.manifest["bad_records"])
    assert shards.manifest["queries_without_reachable_positive"] == ["test 2:29"]
    assert outcome_of(result, "union", "webqa_task1", "2:29")[1]["hit@50"] == 0


def test_B7_a_positive_in_no_pool_counts_in_the_denominator(shards: Shards, result: RetrievalResult) -> None:
    assert query(shards, "test", "3:5", "edis_task2").positives[1] == "3:1047999"
    _, values, positives = outcome_of(result, "union", "edis_task2", "3:5")
    assert len(positives) == 2
    assert values["recall@50"] <= 0.5
    assert values["recall_reachable@50"] == values["hit@50"]


@pytest.mark.parametrize(("task", "qid", "n"), [("fashion200k_task0", "1:18", 12), ("oven_task6", "5:5", 19)])
def test_B8_many_positives_are_all_counted(
    shards: Shards, result: RetrievalResult, task: str, qid: str, n: int
) -> None:
    assert len(query(shards, "test", qid, task).positives) == n
    assert outcome_of(result, "union", task, qid)[1]["recall@5"] <= 5 / n


def test_B9_one_caption_of_two_pictures_and_two_pictures_of_one_caption(shards: Shards) -> None:
    assert len(query(shards, "test", "9:11", "mscoco_task0").positives) == 2
    asked = next(q for q in shards.query_sets("test") if q.task.name == "mscoco_task3")
    assert sum(encode_id("9:12") in positives for positives in asked.positives) == 2


def test_B10_a_composed_query_may_have_two_positives(shards: Shards) -> None:
    assert len(query(shards, "test", "8:10", "cirr_task7").positives) == 2


# --- C. images


@pytest.mark.parametrize("trap", ["C1", "C2", "C3", "C4"])
def test_an_unusable_picture_is_named(shards: Shards, trap: str) -> None:
    name, reason = BAD[trap]
    (bad,) = [bad for bad in shards.manifest["bad_records"] if bad["record"].endswith(name)]
    assert reason in bad["reason"]


@pytest.mark.parametrize(
    "did",
    [
        pytest.param(did, id=trap)
        for trap, did in {
            "C5": "2:1",
            "C6": "4:13",
            "C7": "3:1337",
            "C8": "5:8",
            "C9": "8:22",
            "C10": "5:76",
            "C11": "5:68",
            "C12": "1:93",
            "C13": "0:62",
            "C14": "7:17",
        }.items()
    ],
)
def test_a_rare_picture_is_decoded_to_the_expected_colours_and_passes_the_processor(
    shards: Shards, tiny_checkpoint: Path, did: str
) -> None:
    (path,) = {r["img_path"] for r in source("cand_pool/*/*.jsonl") if r["did"] == did}
    pixels, row = picture(shards, did), IMAGES[path]
    assert pixels.shape == (int(row["height"]), int(row["width"]), 3)
    np.testing.assert_allclose(pixels.reshape(-1, 3).mean(0), [float(row[f"mean_{c}"]) for c in "rgb"], atol=3)
    processor = MLLMEncoder.from_pretrained(tiny_checkpoint, max_length=48).processor
    tensor = processor([item(shards, did)]).buckets[0].pictures["pixel_values"]
    assert tensor is not None
    assert tensor.shape == (1, 3, 32, 32)


def test_C15_a_picture_that_many_records_share_is_stored_once(shards: Shards) -> None:
    stored: list[str] = []
    for path in Path(shards.directory).glob("images-*.tar"):
        with tarfile.open(path) as tar:
            stored += tar.getnames()
    records = source("cand_pool/*/*.jsonl") + [
        r for s in ("train", "val", "test") for r in source(f"query/{s}/*.jsonl")
    ]
    named = Counter(r.get("img_path") or r.get("query_img_path") for r in records)
    usable = {path for path in named if path and IMAGES[path]["status"] == "ok"}
    assert sorted(stored) == sorted(usable)
    assert not any("infoseek" in path for path in usable)
    assert max(named[path] for path in usable) > 2


@pytest.mark.parametrize("row", EXPECTED["designed"]["refq"], ids=lambda row: row["qid"])
def test_C16_the_query_picture_stays_in_the_ranking(
    shards: Shards, result: RetrievalResult, row: dict[str, Any]
) -> None:
    ranked, _, positives = outcome_of(result, "local", row["task"], row["qid"])
    assert ranked[0] == row["ref_did"]
    assert item(shards, row["ref_did"]).image == query(shards, "test", row["qid"], row["task"]).item.image
    if "pushed_to_rank" in row:
        assert ranked[row["pushed_to_rank"] - 1] in positives


def test_C17_a_file_that_no_record_mentions_is_left_out(shards: Shards) -> None:
    on_disk = {str(p.relative_to(TREE)) for p in (TREE / "mbeir_images" / "mscoco_images" / "train2014").rglob("*.jpg")}
    text = "".join(p.read_text() for p in TREE.glob("*/*/*.jsonl"))
    (unmentioned,) = {path for path in on_disk if path not in text}
    assert all(unmentioned.encode() not in p.read_bytes() for p in Path(shards.directory).glob("images-*.tar"))


# --- D. texts


@pytest.mark.parametrize(
    "did",
    [
        pytest.param(did, id=f"{trap}-{did}")
        for trap, dids in {
            "D1": ("2:92",),
            "D2": ("2:93", "2:94", "2:96"),
            "D3": ("2:95",),
            "D4": ("2:100", "2:101", "2:102"),
            "D5": ("2:90", "2:91", "2:96", "5:73"),
            "D6": ("2:97", "2:100"),
            "D7": ("2:98",),
            "D8": ("2:104",),
            "D9": ("2:103",),
        }.items()
        for did in dids
    ],
)
def test_a_difficult_text_is_read_and_encoded_as_plain_text(shards: Shards, tiny_checkpoint: Path, did: str) -> None:
    found = item(shards, did)
    assert (found.text or "") == TEXTS[did]
    processor = MLLMEncoder.from_pretrained(tiny_checkpoint, max_length=48).processor
    bucket = processor([Query(found, "Find the answer.")]).buckets[0]
    assert bucket.input_ids.shape[1] <= 48 + len(processor.family.token_ids)
    images = int((bucket.input_ids == processor.family.image_token_id).sum())
    assert images == (0 if found.image is None else len(processor.family.token_ids))
    kept = bucket.input_ids[0][: int((1 - bucket.pool_mask[0]).nonzero()[-1]) + 1]
    assert "Find the answer." in processor.prompts.tokenizer.decode(kept)


# --- E. pools


def test_E1_the_union_test_pool_holds_the_test_pools_of_mscoco_alone(shards: Shards) -> None:
    sizes = {
        (task, split): int(shards.pool(split).local[f"mscoco_{task}"].sum())
        for task in ("task0", "task3")
        for split in ("val", "test")
    }
    assert list(sizes.values()) == [6, 30, 30, 59]
    of_val = {r["did"] for r in source("cand_pool/local/mbeir_mscoco_task*_val_cand_pool.jsonl")}
    of_test = {r["did"] for r in source("cand_pool/local/mbeir_mscoco_task*_test_cand_pool.jsonl")}
    assert not set(codes(sorted(of_val - of_test)).tolist()) & set(shards.pool("test").ids.tolist())


def test_E2_the_trimmed_validation_pool_is_not_the_pool_of_val(shards: Shards) -> None:
    trimmed = {encode_id(r["did"]) for r in source("cand_pool/global/mbeir_union_val_cand_pool.jsonl")}
    assert len(trimmed) == 163
    assert len(shards.pool("val")) > 4 * len(trimmed)


def test_E3_a_ranking_ends_where_a_small_pool_ends(result: RetrievalResult) -> None:
    sizes = {"visualnews_task0": 46, "mscoco_task0": 30, "visualnews_task3": 44, "fashion200k_task3": 36}
    sizes |= {"oven_task6": 44, "fashioniq_task7": 42, "oven_task8": 40, "infoseek_task8": 40}
    for task, size in sizes.items():
        assert ((result.tasks[task].rankings["local"].rows >= 0).sum(1) == size).all(), task


def test_E4_a_local_pool_holds_one_modality(shards: Shards, result: RetrievalResult) -> None:
    pool = shards.pool("test")
    assert all(len(set(pool.modalities[inside].tolist())) == 1 for inside in pool.local.values())
    assert {row["modality@1"] for row in result.metrics["local"]["tasks"].values()} == {1.0}
    assert min(row["modality@1"] for row in result.metrics["union"]["tasks"].values()) < 1


def test_E5_equal_content_under_two_dids_is_two_candidates(shards: Shards) -> None:
    assert item(shards, "0:78") == item(shards, "0:79")
    assert item(shards, "3:1359").text == item(shards, "3:1103").text
    assert item(shards, "3:1359").image != item(shards, "3:1103").image
    assert set(codes(["0:78", "0:79", "3:1359", "3:1103"]).tolist()) <= set(shards.pool("test").ids.tolist())


def test_E6_the_training_pool_is_the_published_one(shards: Shards) -> None:
    published = {r["did"] for r in source("cand_pool/global/mbeir_union_train_cand_pool.jsonl")}
    assert len(published) == 301
    left_out = {"0:82", "1:91", "1:92"}
    assert {decode_id(code) for code in shards.pool("train").ids.tolist()} == published - left_out


# --- F. exact ties


@pytest.mark.parametrize(
    ("name", "pool"),
    [
        pytest.param(name, pool, id=f"{trap}-{name}-{pool}")
        for trap, names in {
            "F1": ("TIE-1", "TIE-2"),
            "F2": ("TIE-3",),
            "F3": ("TIE-4",),
            "F4": ("TIE-5",),
            "F5": ("TIE-6",),
            "F6": ("TIE-7",),
        }.items()
        for name in names
        for pool in POOLS
    ],
)
def test_of_equal_scores_the_smaller_did_ranks_first(result: RetrievalResult, name: str, pool: str) -> None:
    tie = TIES[name]
    ranked, _, positives = outcome_of(result, pool, tie["task"], tie["qid"])
    group = {tie["positive"], *tie["tied_with"]} & set(ranked)
    places = sorted(ranked.index(did) for did in group)
    assert [ranked[place] for place in places] == sorted(group, key=encode_id)
    first = next((rank for rank, did in enumerate(ranked, 1) if did in positives), 0)
    assert first == int(PER_QUERY[pool, tie["task"], tie["qid"]]["first_hit_canonical"] or 0)


def test_F7_vectors_of_one_direction_tie_whatever_their_length(result: RetrievalResult) -> None:
    folder = GOLDEN / "embeddings" / "cand_pool"
    dids = dids_of(np.load(folder / "mbeir_union_cand_pool_ids.npy"))
    rows = [dids.index(did) for did in EXPECTED["designed"]["twins"]]
    stored = np.load(folder / "mbeir_union_cand_pool_embed.npy")[rows].astype(np.float64)
    assert np.array_equal(stored[0] * 2, stored[1]) or np.array_equal(stored[1] * 2, stored[0])
    vectors = unit(folder / "mbeir_union_cand_pool_embed.npy")[rows]
    assert torch.equal(vectors[0], vectors[1])
    met = 0
    for outcome in result.tasks.values():
        for row in outcome.rankings["union"].rows:
            ranked = [decode_id(int(result.pool.ids[r])) for r in row]
            if "0:78" in ranked and "0:79" in ranked:
                met += 1
                assert ranked.index("0:79") == ranked.index("0:78") + 1
    assert met


def test_every_trap_has_a_test() -> None:
    named = set(re.findall(r'(?:test_|")([A-F]\d+)(?:_|")', Path(__file__).read_text()))
    assert named >= {trap["id"] for trap in json.loads((TREE / "traps.json").read_text())}
