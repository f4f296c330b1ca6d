"""Parity with the reference evaluator of M-BEIR on a miniature of the benchmark that holds every trap of its format."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ir_measures
import numpy as np
import pytest
import torch
from ir_measures import RR, R, Success, nDCG
from PIL import Image
from torch import Tensor

from lightning_mmembed.data.layout import BadRecord, MBEIRLayout, QueryRecord, format_text
from lightning_mmembed.data.negatives import KINDS
from lightning_mmembed.data.shard import shard_dataset
from lightning_mmembed.data.shards import Shards
from lightning_mmembed.encoders.processor import decode_image
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.items import MBEIR_TASKS, Modality, Task, decode_id, encode_id
from lightning_mmembed.mining import mine_modality_aware
from lightning_mmembed.retrieval.evaluate import RetrievalResult, evaluate_task
from lightning_mmembed.retrieval.mine import mine_negatives
from lightning_mmembed.retrieval.pool import Pool, QuerySet
from lightning_mmembed.retrieval.runs import write_runs
from lightning_mmembed.retrieval.search import exact_search

TREE = Path(__file__).parent / "golden" / "mbeir_tiny"
GOLDEN = TREE / "golden"
EXPECTED = json.loads((GOLDEN / "expected" / "expected.json").read_text())
MINING = json.loads((GOLDEN / "mining" / "expected_mining.json").read_text())

POOLS = ("union", "local")
DEPTHS = (1, 5, 10, 20, 50)
#: Our name of each metric that the expected values have.
NAMES = {
    **{f"hit@{k}": f"success@{k}" for k in DEPTHS},
    **{f"recall@{k}": f"recall@{k}" for k in DEPTHS},
    "mrr@10": "mrr@10",
    "ndcg@10": "ndcg@10",
    "modality@1": "modality_accuracy@1",
}
ORACLES = {
    **{f"hit@{k}": Success @ k for k in DEPTHS},
    **{f"recall@{k}": R @ k for k in DEPTHS},
    "mrr@10": RR @ 10,
    "ndcg@10": nDCG @ 10,
}
#: The headline figure of a task is hit@5, but for these hit@10.
DEEP_TASKS = ("fashion200k_task0", "fashion200k_task3", "fashioniq_task7")

#: Records that cannot be used, by trap, with a part of the reason.
BAD = {
    "C1": ("0:82", "is missing"),
    "C2": ("4:6", "is missing"),
    "C3": ("1:91", "cannot be decoded"),
    "C4": ("1:92", "cannot be decoded"),
    "B6": ("9:19", "9:654321"),
}
BAD_CANDIDATES = {"0:82", "1:91", "1:92"}
BAD_TRAIN_QUERIES = {"4:6", "9:19"}


def dids_of(hashed: np.ndarray) -> list[str]:
    """The fixture's integers: dataset * 10,000,000 + number; -1 is padding."""
    return [f"{code // 10_000_000}:{code % 10_000_000}" for code in hashed.tolist() if code >= 0]


def qids_of(hashed: np.ndarray) -> list[str]:
    return [f"{code // 500_000}:{code % 500_000}" for code in hashed.tolist()]


def codes(names: Sequence[str]) -> Tensor:
    return torch.tensor([encode_id(name) for name in names])


def unit(path: Path) -> Tensor:
    return torch.nn.functional.normalize(torch.from_numpy(np.load(path)).float(), dim=1)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def table(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


IMAGES = {row["path"]: row for row in table(GOLDEN / "images" / "images.tsv")}


@pytest.fixture(scope="module")
def layout() -> MBEIRLayout:
    return MBEIRLayout(TREE)


@pytest.fixture(scope="module")
def modalities(layout: MBEIRLayout) -> dict[str, Modality]:
    """Of every candidate of every pool."""
    found: dict[str, Modality] = {}
    for _, path in layout.pool_files():
        for record in layout.candidates(path):
            assert not isinstance(record, BadRecord)
            found[record.did] = record.modality
    return found


@pytest.fixture(scope="module")
def embedded_pool(modalities: dict[str, Modality]) -> tuple[Pool, Tensor]:
    """The union test pool in canonical order, and its vectors."""
    folder = GOLDEN / "embeddings" / "cand_pool"
    dids = dids_of(np.load(folder / "mbeir_union_cand_pool_ids.npy"))
    order = codes(dids).argsort()
    local = {}
    for task in MBEIR_TASKS:
        name = f"{task}_test" if task.startswith("mscoco") else task
        local[task] = torch.isin(
            codes(dids)[order], codes(dids_of(np.load(folder / f"mbeir_{name}_cand_pool_ids.npy")))
        )
    by_row = torch.tensor([modalities[dids[i]].code for i in order], dtype=torch.int8)
    pool = Pool("test", codes(dids)[order], by_row, local, [], "golden")
    return pool, unit(folder / "mbeir_union_cand_pool_embed.npy")[order]


def query_vectors_of(task: str) -> tuple[list[str], Tensor]:
    """Query ids and vectors of a task."""
    folder = GOLDEN / "embeddings" / "test"
    return qids_of(np.load(folder / f"mbeir_{task}_test_ids.npy")), unit(folder / f"mbeir_{task}_test_embed.npy")


@pytest.fixture(scope="module")
def result(layout: MBEIRLayout, embedded_pool: tuple[Pool, Tensor]) -> RetrievalResult:
    pool, vectors = embedded_pool
    judged = layout.qrels("test")
    tasks = {}
    for name in MBEIR_TASKS:
        qids, query_vectors = query_vectors_of(name)
        positives = [[encode_id(did) for did in judged[name][qid]] for qid in qids]
        queries = QuerySet(Task.parse(name), codes(qids), positives, [], "golden")
        tasks[name] = evaluate_task(queries, query_vectors, pool, vectors, list(NAMES))
    return RetrievalResult(pool, tasks)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return Shards(shard_dataset(TREE, tmp_path_factory.mktemp("golden") / "shards", max_bad_fraction=0.05))


def expected_values(pool: str) -> dict[tuple[str, str], float]:
    independent = EXPECTED["independent"][pool]
    return {(task, ours): independent[task]["canonical"][name] for task in MBEIR_TASKS for ours, name in NAMES.items()}


def our_values(result: RetrievalResult, pool: str) -> dict[tuple[str, str], float]:
    return {(task, name): v for task, row in result.metrics[pool]["tasks"].items() for name, v in row.items()}


def headline(result: RetrievalResult, pool: str) -> dict[str, float]:
    rows = result.metrics[pool]["tasks"]
    values = {task: rows[task]["hit@10" if task in DEEP_TASKS else "hit@5"] for task in MBEIR_TASKS}
    return {**values, "average": sum(values.values()) / len(values)}


# --- search and metrics


def test_every_expected_metric_is_compared_but_those_over_reachable_positives() -> None:
    names = set(EXPECTED["independent"]["union"]["oven_task6"]["canonical"])
    assert names - set(NAMES.values()) == {*(f"recall_reachable@{k}" for k in DEPTHS), "ndcg_reachable@10"}


@pytest.mark.parametrize("pool", POOLS)
def test_every_metric_of_every_task_is_the_expected_one(result: RetrievalResult, pool: str) -> None:
    assert our_values(result, pool) == pytest.approx(expected_values(pool), abs=1e-9)


@pytest.mark.parametrize("pool", POOLS)
def test_hit_rates_lie_within_those_of_all_tie_orders_and_equal_the_reference_where_nothing_ties(
    result: RetrievalResult, pool: str
) -> None:
    tied = {(row["task"], row["pool"]) for row in EXPECTED["queries_whose_metrics_depend_on_tie_order"]}
    for task, row in result.metrics[pool]["tasks"].items():
        for k in DEPTHS:
            low, high = EXPECTED["independent"][pool][task]["success_bounds_over_tie_orders"][f"success@{k}"]
            assert low - 1e-9 <= row[f"hit@{k}"] <= high + 1e-9
            if (task, pool) not in tied:
                assert round(row[f"hit@{k}"], 4) == EXPECTED["reference_recall_k50"][pool][task][f"Recall@{k}"]


@pytest.mark.parametrize("pool", POOLS)
def test_the_headline_average_takes_hit_at_10_for_the_three_fashion_tasks(result: RetrievalResult, pool: str) -> None:
    values = headline(result, pool)
    rows = {row["task"]: row[f"{pool}_canonical"] for row in EXPECTED["headline"]["rows"]}
    average = EXPECTED["headline"][f"average_{pool}_canonical"]
    assert values == pytest.approx({**rows, "average": average}, abs=1e-9)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("mistake", [name for name in EXPECTED["headline_under_mistakes"] if name != "note"])
def test_no_known_mistake_of_an_evaluator_is_reproduced(result: RetrievalResult, mistake: str, pool: str) -> None:
    values, wrong = headline(result, pool), EXPECTED["headline_under_mistakes"][mistake][pool]
    if (mistake, pool) == ("cross_dataset_positives_dropped", "local"):
        assert values == pytest.approx(wrong, abs=1e-9)  # a local pool holds one dataset: nothing to drop
    else:
        assert abs(values["average"] - wrong["average"]) > 1e-3


@pytest.mark.parametrize("pool", POOLS)
def test_rankings_equal_the_canonical_order_and_end_where_a_small_pool_ends(result: RetrievalResult, pool: str) -> None:
    with np.load(GOLDEN / "expected" / f"top50_{pool}.npz") as file:
        stored = dict(file)
    shorter = 0
    for task, outcome in result.tasks.items():
        ranking = outcome.rankings[pool]
        assert [decode_id(int(qid)) for qid in outcome.queries.ids] == qids_of(stored[f"{task}__qids"])
        for rows, scores, row in zip(ranking.rows, ranking.scores, stored[f"{task}__dids_canonical"], strict=True):
            kept = rows >= 0
            assert [decode_id(int(did)) for did in result.pool.ids[rows[kept]]] == dids_of(row), task
            assert torch.isneginf(scores[~kept]).all()
            shorter += int(not kept.all())
        np.testing.assert_allclose(ranking.scores.numpy()[:, :30], stored[f"{task}__scores"][:, :30], atol=1e-6)
    assert (shorter > 0) == (pool == "local")


@pytest.mark.parametrize("pool", POOLS)
def test_every_query_has_the_expected_first_hit_and_first_result(result: RetrievalResult, pool: str) -> None:
    rows = [row for row in table(GOLDEN / "expected" / "per_query.tsv") if row["pool"] == pool]
    assert len(rows) == 288
    for row in rows:
        outcome = result.tasks[row["task"]]
        i = outcome.queries.ids.tolist().index(encode_id(row["qid"]))
        ranked = [int(result.pool.ids[r]) for r in outcome.rankings[pool].rows[i] if r >= 0]
        positives = set(outcome.queries.positives[i])
        hits = [rank for rank, did in enumerate(ranked, 1) if did in positives]
        assert (decode_id(ranked[0]), len(positives)) == (row["rank1_canonical"], int(row["n_pos"]))
        assert (hits[0] if hits else 0) == int(row["first_hit_canonical"] or 0)


@pytest.mark.parametrize("pool", POOLS)
def test_trec_runs_give_the_same_metrics_through_ir_measures(
    result: RetrievalResult, pool: str, tmp_path: Path
) -> None:
    write_runs(tmp_path, result, "golden")
    for task in MBEIR_TASKS:
        qrels: dict[str, dict[str, int]] = {}
        for line in (TREE / "qrels" / "test" / f"mbeir_{task}_test_qrels.txt").read_text().split("\n"):
            if line:
                qid, _, did, relevance, _ = line.split()
                qrels.setdefault(qid, {})[did] = int(relevance)
        run: dict[str, dict[str, float]] = {}
        scores: dict[str, list[float]] = {}
        for line in (tmp_path / pool / f"{task}.run").read_text().splitlines():
            qid, _, did, rank, score, name = line.split(" ")
            assert name == "golden"
            run.setdefault(qid, {})[did] = -float(rank)  # trec_eval would break ties of scores by name
            scores.setdefault(qid, []).append(float(score))
            assert int(rank) == len(run[qid]) == len(scores[qid])
        assert all(row == sorted(row, reverse=True) for row in scores.values())
        found = ir_measures.calc_aggregate(list(ORACLES.values()), qrels, run)
        row = result.metrics[pool]["tasks"][task]
        assert row == pytest.approx({**row, **{n: found[m] for n, m in ORACLES.items()}}, abs=1e-9), task


def test_positives_across_datasets_count_in_the_union_pool(result: RetrievalResult) -> None:
    # TRAPS B3: each is found only through the candidate of the other dataset.
    for qid, task in [(qid, f"oven_task{task}") for qid, task in EXPECTED["designed"]["crossq"]]:
        outcome = result.tasks[task]
        i = outcome.queries.ids.tolist().index(encode_id(qid))
        assert outcome.values["union"]["hit@5"][i] == 1
        assert outcome.values["local"]["hit@5"][i] == 0


def test_a_query_whose_positive_is_in_no_pool_counts_as_zero(result: RetrievalResult) -> None:
    outcome = result.tasks["webqa_task1"]
    i = outcome.queries.ids.tolist().index(encode_id("2:29"))
    assert len(outcome.queries) == 18
    for pool in POOLS:
        values = {name: value[i].item() for name, value in outcome.values[pool].items() if not name.startswith("mod")}
        assert set(values.values()) == {0.0}


# --- mining


@pytest.mark.parametrize("case", MINING["cases"], ids=lambda case: case["case"])
def test_mined_negatives_are_the_expected_ones(case: dict[str, Any], modalities: dict[str, Modality]) -> None:
    folder = GOLDEN / "mining"
    dids, vectors = dids_of(np.load(folder / "cand_ids.npy")), unit(folder / "cand_embed.npy")
    order = codes(dids).argsort()
    dids, vectors = [dids[i] for i in order], vectors[order]
    query = np.flatnonzero(np.load(folder / "train_query_ids.npy") == case["hashed_qid"])
    inside = set(dids_of(np.load(folder / MINING["pools"][case["pool"]]["file"])))
    mask = torch.tensor([did in inside for did in dids])
    rows = exact_search(unit(folder / "train_query_embed.npy")[query], vectors, 50, [mask])[0].rows[0]
    ranked = [dids[row] for row in rows[rows >= 0]]
    assert ranked == case["top"]
    found = mine_modality_aware(
        ranked, [modalities[did] for did in ranked], set(case["positives"]), Modality(case["desired_modality"])
    )
    assert [ranked[i] for i in found.wrong_modality] == case["C1"]
    assert [ranked[i] for i in found.wrong_content] == case["C2"]


class StoredVectors:
    """Hands out the fixture's vectors by what they are of."""

    def __init__(self, vectors: dict[str, Tensor]) -> None:
        self.vectors = vectors

    def embed(self, encoder: object, entries: object, content: str, made_by: str, label: str) -> Tensor:
        return self.vectors[content]


@pytest.mark.parametrize("name", MINING["pools"])
def test_mining_a_whole_pool_writes_the_expected_negatives_with_their_rank(
    name: str, modalities: dict[str, Modality]
) -> None:
    folder = GOLDEN / "mining"
    dids, vectors = dids_of(np.load(folder / "cand_ids.npy")), unit(folder / "cand_embed.npy")
    inside = set(dids_of(np.load(folder / MINING["pools"][name]["file"])))
    order = torch.tensor([i for i in codes(dids).argsort().tolist() if dids[i] in inside])
    by_row = torch.tensor([modalities[dids[i]].code for i in order], dtype=torch.int8)
    pool = Pool("train", codes(dids)[order], by_row, {}, [], "pool")
    query_ids, query_vectors = np.load(folder / "train_query_ids.npy").tolist(), unit(folder / "train_query_embed.npy")
    stored, sets, expected = {"pool": vectors[order]}, [], []
    cases = [case for case in MINING["cases"] if case["pool"] == name]
    for task_id in sorted({case["task_id"] for case in cases}):
        mine = [case for case in cases if case["task_id"] == task_id]
        positives = [[encode_id(did) for did in case["positives"]] for case in mine]
        qids = codes([case["qid"] for case in mine])
        sets.append(QuerySet(Task("golden", task_id), qids, positives, [], f"task {task_id}"))
        stored[f"task {task_id}"] = query_vectors[[query_ids.index(case["hashed_qid"]) for case in mine]]
        for case in mine:
            for kind in ("C1", "C2"):
                expected += [
                    (case["qid"], did, ("C1", "C2").index(kind), case["top"].index(did) + 1) for did in case[kind]
                ]
    rows, audit = mine_negatives(None, pool, sets, StoredVectors(stored), "weights")  # type: ignore[arg-type]
    ids = [[decode_id(int(code)) for code in rows[column]] for column in ("qid", "did")]
    assert sorted(zip(*ids, rows["kind"].tolist(), rows["rank"].tolist(), strict=True)) == sorted(expected)
    assert KINDS == ("wrong_modality", "wrong_content")
    assert sum(row["queries"] for row in audit.values()) == len(cases)
    assert sum(row["with_none"] for row in audit.values()) == sum(not (case["C1"] or case["C2"]) for case in cases)
    met = sum(len(set(case["positives"]) & set(case["top"])) for case in cases)
    assert sum(row["positives_met"] for row in audit.values()) == met


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
    with pytest.raises(UserInputError, match=r"of \d+ records .* cannot be used .*: 1:91: picture .*90000101_0\.jpg"):
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
    for shard in shards.manifest["shards"]:
        path = shards.directory / shard["file"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == shard["sha256"]
        split = splits[shard["file"].rpartition("-")[0]]
        rows = shards.query_rows(split) if split else shards.candidate_rows
        samples = list(wds.WebDataset([str(path)], shardshuffle=False))
        assert len(samples) == len(rows)
        for sample, row in zip(samples, rows, strict=True):
            record = json.loads(sample["json"])
            entry = shards.query_at(int(row)) if split else shards.candidate_at(int(row))
            name = record["qid"] if split else record["did"]
            assert encode_id(name) == int(sample["__key__"])
            assert (entry.qid if split else entry.did) == name  # type: ignore[union-attr]
            pictures = [v for k, v in sample.items() if k != "json" and not k.startswith("__")]
            assert pictures == ([] if entry.item.image is None else [entry.item.image])
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
    tasks = {}
    for queries in shards.query_sets("test"):
        qids, query_vectors = query_vectors_of(queries.task.name)
        order = [qids.index(decode_id(code)) for code in queries.ids.tolist()]
        tasks[queries.task.name] = evaluate_task(queries, query_vectors[order], pool, vectors, list(NAMES))
    assert tuple(tasks) == MBEIR_TASKS
    result = RetrievalResult(pool, tasks)
    for name in POOLS:
        assert our_values(result, name) == pytest.approx(expected_values(name), abs=1e-9)
