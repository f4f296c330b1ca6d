"""What is told of an evaluation equals what is counted query by query."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from judged import METRICS, TASKS, judged_pool, judged_result

from lightning_mmembed.items import TASK_MODALITIES, Modality, Task, decode_id
from lightning_mmembed.retrieval.results import RetrievalResult, average_prompts, task_groups
from lightning_mmembed.retrieval.significance import bootstrap_interval
from lightning_mmembed.retrieval.summary import ERRORS, summarise, unreachable

POOLS = ("union", "local")
DOMAIN_OF = {
    0: "news",
    3: "news",
    1: "fashion",
    7: "fashion",
    2: "wiki",
    5: "wiki",
    6: "wiki",
    4: "common",
    8: "common",
}


def ranked_dids(result: RetrievalResult, task: str, pool: str) -> list[list[str]]:
    rows = result.tasks[task].rankings[pool].rows
    return [[decode_id(int(result.pool.ids[r])) for r in row if r >= 0] for row in rows]


def labelled(result: RetrievalResult, task: str) -> list[set[str]]:
    return [{decode_id(code) for code in ids} for ids in result.tasks[task].queries.positives]


def first_hit(ranked: list[str], positives: set[str]) -> int:
    return next((rank for rank, did in enumerate(ranked, 1) if did in positives), 0)


def naive_hits(result: RetrievalResult, task: str, pool: str) -> list[int]:
    return [first_hit(*pair) for pair in zip(ranked_dids(result, task, pool), labelled(result, task), strict=True)]


@pytest.mark.parametrize("pool", POOLS)
def test_the_first_hit_is_the_rank_of_the_best_positive(pool: str) -> None:
    result, met = judged_result(), set[int]()
    for task, outcome in result.tasks.items():
        ranks = naive_hits(result, task, pool)
        assert outcome.first_hits[pool].tolist() == [[rank] for rank in ranks]
        met |= set(ranks)
    assert {0, 1, 5} <= met


@pytest.mark.parametrize("pool", POOLS)
def test_the_headline_takes_ten_results_for_the_fashion_tasks_and_five_for_others(pool: str) -> None:
    result = judged_result()
    found = summarise([result], {})[pool]["headline"]
    assert list(found["tasks"]) == ["fashion200k_task0", "nights_task4", "fashioniq_task7", "pets_task3"]
    means = {}
    for task, row in found["tasks"].items():
        depth = 10 if "fashion" in task else 5
        ranks = np.array(naive_hits(result, task, pool))
        means[task] = float(((ranks > 0) & (ranks <= depth)).mean())
        assert (row["metric"], row["value"]) == (f"hit@{depth}", pytest.approx(means[task]))
        hits = ((ranks > 0) & (ranks <= depth)) * 1.0
        assert (row["low"], row["high"]) == pytest.approx(bootstrap_interval({task: hits}))
        assert row["low"] < row["value"] < row["high"]
    assert found["average"]["value"] == pytest.approx(np.mean(list(means.values())))
    assert found["multi_modal"]["value"] == pytest.approx(means["fashioniq_task7"])
    single = [means[task] for task in means if task != "fashioniq_task7"]
    assert found["single_modal"]["value"] == pytest.approx(np.mean(single))


@pytest.mark.parametrize("pool", POOLS)
def test_averages_are_over_the_tasks_of_a_kind_of_query(pool: str) -> None:
    metrics = judged_result().metrics[pool]
    asked = {task: TASK_MODALITIES[Task.parse(task).task_id][0] for task in TASKS}
    kinds = {
        "average": list(Modality),
        "single_modal": [Modality.TEXT, Modality.IMAGE],
        "multi_modal": [Modality.IMAGE_TEXT],
    }
    for group, modalities in kinds.items():
        rows = [metrics["tasks"][task] for task in TASKS if asked[task] in modalities]
        assert metrics[group] == pytest.approx({m: np.mean([row[m] for row in rows]) for m in METRICS})


def test_a_kind_of_query_that_no_task_has_is_left_out() -> None:
    assert task_groups(["mscoco_task3"]) == {"average": ["mscoco_task3"], "single_modal": ["mscoco_task3"]}
    assert task_groups(["cirr_task7"]) == {"average": ["cirr_task7"], "multi_modal": ["cirr_task7"]}
    assert task_groups([]) == {}


def naive_error(result: RetrievalResult, task: str, ranked: list[str], positives: set[str]) -> str | None:
    if not ranked or ranked[0] in positives:
        return None
    modalities = {
        decode_id(code): list(Modality)[m]
        for code, m in zip(result.pool.ids.tolist(), result.pool.modalities.tolist(), strict=True)
    }
    if modalities[ranked[0]] is not Task.parse(task).target_modality:
        return "wrong_modality"
    mine, got = TASKS[task], int(ranked[0].split(":")[0])
    return "other" if DOMAIN_OF.get(mine, mine) == DOMAIN_OF.get(got, got) else "wrong_domain"


@pytest.mark.parametrize("pool", POOLS)
def test_errors_are_counted_by_modality_then_domain_and_another_dataset_is_its_own_domain(pool: str) -> None:
    result, kinds = judged_result(), Counter[tuple[str, str | None]]()
    found = summarise([result], {})[pool]["errors"]
    for task in TASKS:
        pairs = zip(ranked_dids(result, task, pool), labelled(result, task), strict=True)
        counts = Counter(naive_error(result, task, *pair) for pair in pairs)
        kinds.update({(task, kind): n for kind, n in counts.items()})
        row = found["tasks"][task]
        assert {kind: row[kind] for kind in ERRORS} == {kind: counts[kind] for kind in ERRORS}
        assert row["misses"] == sum(counts[kind] for kind in ERRORS) < 25
        assert sum(row["shares"].values()) == pytest.approx(1)
    assert all(sum(kinds[task, kind] for task in TASKS) > 0 for kind in ERRORS)
    assert found["all"]["misses"] == sum(row["misses"] for row in found["tasks"].values())


def test_unreachable_positives_are_told_apart_by_where_they_are() -> None:
    result = judged_result()
    for task, outcome in result.tasks.items():
        union = set(map(decode_id, result.pool.ids.tolist()))
        local = {decode_id(code) for code in result.pool.ids[result.pool.local[task]].tolist()}
        labels = labelled(result, task)
        outside = [did for labels_of_query in labels for did in labels_of_query - local]
        other_task = sum(did in union and int(did.split(":")[0]) == TASKS[task] for did in outside)
        found = unreachable(outcome, result)
        assert found == {
            "queries": sum(not positives <= local for positives in labels),
            "positives": len(outside),
            "other_dataset": sum(did in union and int(did.split(":")[0]) != TASKS[task] for did in outside),
            "no_pool": sum(did not in union for did in outside),
            "queries_without_reachable": sum(not positives & local for positives in labels),
            "all_positives": sum(len(positives) for positives in labels),
        }
        assert other_task == found["positives"] - found["other_dataset"] - found["no_pool"] > 0
        assert min(found.values()) > 0


# --- several prompts


def prompts() -> list[RetrievalResult]:
    pool = judged_pool()
    return [judged_result(seed, pool) for seed in range(3)]


@pytest.mark.parametrize("pool", POOLS)
def test_values_of_several_prompts_are_averaged_query_by_query(pool: str) -> None:
    results = prompts()
    mean = average_prompts(results)
    for task, outcome in mean.tasks.items():
        for metric in METRICS:
            each = torch.stack([result.tasks[task].values[pool][metric] for result in results])
            assert torch.equal(outcome.values[pool][metric], each.mean(0))
        headlines = torch.stack([result.tasks[task].headline(pool) for result in results])
        torch.testing.assert_close(outcome.headline(pool), headlines.mean(0))
        assert outcome.first_hits[pool].tolist() == [
            list(ranks) for ranks in zip(*(naive_hits(result, task, pool) for result in results), strict=True)
        ]
        assert torch.equal(outcome.rankings[pool].rows, results[0].tasks[task].rankings[pool].rows)


@pytest.mark.parametrize("pool", POOLS)
def test_the_spread_over_the_prompts_is_that_of_their_own_headlines(pool: str) -> None:
    results = prompts()
    content = summarise(results, {})
    alone = [summarise([result], {})[pool] for result in results]
    found = content["prompts"][pool]
    rows: dict[str, Any] = {**found["headline"].pop("tasks"), **found["headline"]}
    assert rows.keys() == {*TASKS, "average", "single_modal", "multi_modal"}
    for key, row in rows.items():
        values = [{**one["headline"], **one["headline"]["tasks"]}[key]["value"] for one in alone]
        assert row["values"] == pytest.approx(values)
        assert (row["min"], row["max"]) == pytest.approx((min(values), max(values)))
        assert (row["mean"], row["std"]) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    assert found["averages"] == [{g: one[g] for g in ("average", "single_modal", "multi_modal")} for one in alone]
    assert content[pool]["headline"]["average"]["value"] == pytest.approx(rows["average"]["mean"])
    misses = [one["errors"]["all"]["misses"] for one in alone]
    assert content[pool]["errors"]["all"]["misses"] == sum(misses)


def test_one_prompt_has_no_spread() -> None:
    assert "prompts" not in summarise([judged_result()], {})


# --- protocol


def test_the_protocol_says_what_was_evaluated_and_how() -> None:
    result = judged_result()
    approximate = RetrievalResult(result.pool, result.tasks, {"backend": "ivf", "recall": 0.9})
    found = summarise([approximate], {"split": "val", "instruction": "prompt 0"})["protocol"]
    assert found.pop("version")
    assert found == {
        "split": "val",
        "instruction": "prompt 0",
        "ties": "lower id first",
        "queries": 100,
        "candidates": 120,
        "search_backend": "ivf",
        "search_recall": 0.9,
    }


def test_a_pool_that_was_not_searched_is_left_out() -> None:
    for pool in POOLS:
        result = judged_result(pools=(pool,))
        assert set(result.metrics) == {pool}
        assert set(summarise([result], {})) == {pool, "unreachable", "protocol"}
        answered = sum(sum(row.values()) for row in result.modality_matrix.values())
        assert answered == (92 if pool == "union" else 0)
