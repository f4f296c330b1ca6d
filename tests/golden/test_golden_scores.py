"""Parity with the reference evaluator of M-BEIR: search, metrics and mining over given vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ir_measures
import numpy as np
import pytest
import torch
from golden_tree import (
    DEPTHS,
    EXPECTED,
    GOLDEN,
    MINING,
    NAMES,
    ORACLES,
    POOLS,
    TREE,
    codes,
    dids_of,
    expected_values,
    headline,
    our_values,
    qids_of,
    table,
    unit,
)

from lightning_mmembed.data.negatives import KINDS
from lightning_mmembed.items import MBEIR_TASKS, Modality, Task, decode_id, encode_id
from lightning_mmembed.mining import mine_modality_aware
from lightning_mmembed.retrieval.mine import mine_vectors
from lightning_mmembed.retrieval.pool import Pool, QuerySet
from lightning_mmembed.retrieval.results import RetrievalResult
from lightning_mmembed.retrieval.runs import write_runs
from lightning_mmembed.retrieval.search import exact_search


def test_every_expected_metric_is_compared() -> None:
    assert set(EXPECTED["independent"]["union"]["oven_task6"]["canonical"]) == set(NAMES.values())


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
    sets, asked, expected = [], [], []
    cases = [case for case in MINING["cases"] if case["pool"] == name]
    for task_id in sorted({case["task_id"] for case in cases}):
        mine = [case for case in cases if case["task_id"] == task_id]
        positives = [[encode_id(did) for did in case["positives"]] for case in mine]
        qids = codes([case["qid"] for case in mine])
        sets.append(QuerySet(Task("golden", task_id), qids, positives, [], f"task {task_id}"))
        asked.append(query_vectors[[query_ids.index(case["hashed_qid"]) for case in mine]])
        for case in mine:
            for kind in ("C1", "C2"):
                expected += [
                    (case["qid"], did, ("C1", "C2").index(kind), case["top"].index(did) + 1) for did in case[kind]
                ]
    rows, audit = mine_vectors(pool, vectors[order], sets, asked)
    ids = [[decode_id(int(code)) for code in rows[column]] for column in ("qid", "did")]
    assert sorted(zip(*ids, rows["kind"].tolist(), rows["rank"].tolist(), strict=True)) == sorted(expected)
    assert KINDS[:2] == ("wrong_modality", "wrong_content")
    assert sum(row["queries"] for row in audit.values()) == len(cases)
    assert sum(row["with_none"] for row in audit.values()) == sum(not (case["C1"] or case["C2"]) for case in cases)
    met = sum(len(set(case["positives"]) & set(case["top"])) for case in cases)
    assert sum(row["positives_met"] for row in audit.values()) == met
