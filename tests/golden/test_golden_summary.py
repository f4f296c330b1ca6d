"""Parity of headline, errors and unreachable positives, and of runs that are read back."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_tree import (
    DEEP_TASKS,
    DEPTHS,
    EXPECTED,
    GOLDEN,
    NAMES,
    POOLS,
    SHARED,
    codes,
    dids_of,
    expected_values,
    our_values,
    table,
)

from lightning_mmembed.items import MBEIR_TASKS
from lightning_mmembed.retrieval.results import RetrievalResult, headline_depth, score_task
from lightning_mmembed.retrieval.runs import write_runs
from lightning_mmembed.retrieval.search import Ranking
from lightning_mmembed.retrieval.summary import ERRORS, error_counts, summarise
from lightning_mmembed.retrieval.trec import find_runs, read_run, score_run

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the fixture's own tables are not beside the project")
TYPES = dict(zip(ERRORS, ("Type1", "Type2", "Type3"), strict=True))
TIED = {(row["pool"], row["task"]) for row in EXPECTED["queries_whose_metrics_depend_on_tie_order"]}


@pytest.fixture(scope="module")
def content(result: RetrievalResult) -> dict[str, Any]:
    return summarise([result], {"split": "test"})


@pytest.fixture(scope="module")
def in_reference_order(result: RetrievalResult) -> RetrievalResult:
    """The rankings that the reference gives: other ties, so other first results."""
    rankings: dict[str, dict[str, Ranking]] = {task: {} for task in MBEIR_TASKS}
    for pool in POOLS:
        with np.load(GOLDEN / "expected" / f"top50_{pool}.npz") as file:
            for task in MBEIR_TASKS:
                rows = torch.full((len(file[f"{task}__dids"]), 50), -1)
                for i, row in enumerate(file[f"{task}__dids"]):
                    dids = codes(dids_of(row))
                    rows[i, : len(dids)] = torch.searchsorted(result.pool.ids, dids)
                rankings[task][pool] = Ranking(torch.zeros(rows.shape), rows)
    tasks = {
        task: score_task(outcome.queries, result.pool, rankings[task], list(NAMES))
        for task, outcome in result.tasks.items()
    }
    return RetrievalResult(result.pool, tasks)


@pytest.mark.parametrize("pool", POOLS)
def test_the_headline_is_the_expected_one_inside_its_interval(content: dict[str, Any], pool: str) -> None:
    headline = content[pool]["headline"]
    expected = {row["task"]: row[f"{pool}_canonical"] for row in EXPECTED["headline"]["rows"]}
    assert list(headline["tasks"]) == list(MBEIR_TASKS)
    assert {task: row["value"] for task, row in headline["tasks"].items()} == pytest.approx(expected, abs=1e-9)
    assert headline["average"]["value"] == pytest.approx(EXPECTED["headline"][f"average_{pool}_canonical"], abs=1e-9)
    for task, row in headline["tasks"].items():
        assert row["metric"] == ("hit@10" if task in DEEP_TASKS else "hit@5")
        # The normal approximation of a share: twice its standard error, wide enough for the few queries of a task.
        error = (row["value"] * (1 - row["value"]) / EXPECTED["independent"][pool][task]["n_queries"]) ** 0.5
        assert row["value"] - 2.5 * error <= row["low"] <= row["value"] <= row["high"] <= row["value"] + 2.5 * error


@pytest.mark.parametrize("pool", POOLS)
def test_tasks_with_queries_of_one_modality_and_of_two_are_averaged_apart(content: dict[str, Any], pool: str) -> None:
    expected, single = expected_values(pool), MBEIR_TASKS[:10]
    for group, tasks in (("single_modal", single), ("multi_modal", MBEIR_TASKS[10:])):
        for name in NAMES:
            average = sum(expected[task, name] for task in tasks) / len(tasks)
            assert content[pool][group][name] == pytest.approx(average, abs=1e-9)
        average = sum(expected[task, f"hit@{headline_depth(task)}"] for task in tasks) / len(tasks)
        assert content[pool]["headline"][group]["value"] == pytest.approx(average, abs=1e-9)


@pytest.mark.parametrize("pool", POOLS)
def test_errors_are_of_the_expected_kinds(content: dict[str, Any], pool: str) -> None:
    rows = [row for row in table(GOLDEN / "expected" / "per_query.tsv") if row["pool"] == pool]
    counts = Counter((row["task"], row["error_canonical"]) for row in rows)
    errors = content[pool]["errors"]
    for task in MBEIR_TASKS:
        found = errors["tasks"][task]
        assert {kind: found[kind] for kind in ERRORS} == {kind: counts[task, name] for kind, name in TYPES.items()}
        assert found["misses"] == sum(counts[task, name] for name in TYPES.values())
        assert found["shares"] == {kind: found[kind] / found["misses"] for kind in ERRORS}
    for kind in ERRORS:
        assert errors["all"][kind] == sum(errors["tasks"][task][kind] for task in MBEIR_TASKS)


@pytest.mark.parametrize("pool", POOLS)
def test_errors_in_the_order_of_the_reference_are_those_that_it_counts(
    in_reference_order: RetrievalResult, pool: str
) -> None:
    for task, outcome in in_reference_order.tasks.items():
        expected = EXPECTED["error_types"][pool][task]
        found = error_counts(outcome, in_reference_order, pool)
        assert {TYPES[kind]: found[kind] for kind in ERRORS} == {
            name: expected["counts"][name] for name in TYPES.values()
        }
        assert found["misses"] == expected["false_positives"]


def test_positives_outside_the_local_pools_are_counted(content: dict[str, Any]) -> None:
    found = content["unreachable"]
    for task in MBEIR_TASKS:
        expected = EXPECTED["independent"]["local"][task]
        assert found[task]["all_positives"] == expected["n_qrels"]
        assert found[task]["positives"] == expected["n_qrels"] - expected["n_qrels_reachable"]
        assert found[task]["queries_without_reachable"] == expected["n_queries_without_reachable_positive"]
        assert found[task]["positives"] == found[task]["other_dataset"] + found[task]["no_pool"]
    # TRAPS B1, B6 and B7.
    crossing = {task: found[task]["other_dataset"] for task in MBEIR_TASKS if found[task]["other_dataset"]}
    assert crossing == {"oven_task6": 61, "infoseek_task6": 6, "oven_task8": 23, "infoseek_task8": 8}
    dangling = {task: found[task]["no_pool"] for task in MBEIR_TASKS if found[task]["no_pool"]}
    assert dangling == {"webqa_task1": 1, "edis_task2": 1}


# --- runs that are read back


def test_our_own_runs_score_as_what_they_were_written_from(result: RetrievalResult, tmp_path: Path) -> None:
    write_runs(tmp_path, result, "golden")
    runs = {pool: read_run(*paths) for pool, paths in find_runs(tmp_path).items()}
    queries = [outcome.queries for outcome in result.tasks.values()]
    again = score_run(runs, result.pool, queries, list(NAMES))
    for pool in POOLS:
        assert our_values(again, pool) == our_values(result, pool)
        for task, outcome in result.tasks.items():
            assert torch.equal(again.tasks[task].rankings[pool].rows, outcome.rankings[pool].rows)
            assert torch.equal(again.tasks[task].rankings[pool].scores, outcome.rankings[pool].scores)
    write_runs(tmp_path / "again", again, "golden")
    for path in tmp_path.glob("*/*.run"):
        assert (tmp_path / "again" / path.relative_to(tmp_path)).read_bytes() == path.read_bytes()


@needs_shared
@pytest.mark.parametrize("pool", POOLS)
def test_the_expected_runs_of_the_fixture_give_the_expected_scores(result: RetrievalResult, pool: str) -> None:
    paths = sorted((SHARED / "trec" / pool).glob("*.run.gz"))
    assert len(paths) == 16
    queries = [outcome.queries for outcome in result.tasks.values()]
    found = score_run({pool: read_run(*paths)}, result.pool, queries, list(NAMES))
    assert our_values(found, pool) == pytest.approx(expected_values(pool), abs=1e-9)


@needs_shared
@pytest.mark.parametrize("pool", POOLS)
def test_the_run_files_of_the_reference_give_its_scores(result: RetrievalResult, pool: str) -> None:
    for task in MBEIR_TASKS:
        name = f"mbeir_{task}_{'union' if pool == 'union' else 'single'}_pool_test_k*_run.txt"
        (path,) = (SHARED / "reference_runs").glob(name)
        names = ["hit@10", "hit@20", "hit@50"] if task in DEEP_TASKS else ["hit@1", "hit@5", "hit@10"]
        found = score_run({pool: read_run(path)}, result.pool, [result.tasks[task].queries], names)
        row = found.metrics[pool]["tasks"][task]
        assert int(found.tasks[task].rankings[pool].rows.max()) < len(result.pool)
        for metric in names:
            k = metric.removeprefix("hit@")
            low, high = EXPECTED["independent"][pool][task]["success_bounds_over_tie_orders"][f"success@{k}"]
            assert low - 1e-9 <= row[metric] <= high + 1e-9
            if (pool, task) not in TIED:
                expected = EXPECTED["reference_recall_protocol"][pool][task][f"Recall@{k}"]
                assert row[metric] == pytest.approx(expected, abs=5e-5)


@needs_shared
@pytest.mark.parametrize("pool", POOLS)
def test_the_tables_of_the_reference_hold_our_values_in_its_order_of_ties(
    in_reference_order: RetrievalResult, pool: str
) -> None:
    column, metrics = {"union": "UnionValue", "local": "Value"}[pool], in_reference_order.metrics[pool]["tasks"]
    evaluated = table(SHARED / "reference_eval_k50.tsv")
    assert len(evaluated) == 16 * len(DEPTHS)
    for row in evaluated:
        name = row["Metric"].replace("Recall", "hit")
        assert metrics[row["Dataset"]][name] == pytest.approx(float(row[column]), abs=5e-5)
    for row in table(SHARED / "reference_eval.tsv"):
        # Its list for k = 10 need not be the first ten of its list for k = 50.
        if (pool, row["Dataset"]) not in TIED:
            name = row["Metric"].replace("Recall", "hit")
            assert metrics[row["Dataset"]][name] == pytest.approx(float(row[column]), abs=5e-5)
    errors = summarise([in_reference_order], {})[pool]["errors"]["tasks"]
    types = table(SHARED / "reference_error_types.tsv")
    assert len(types) == 16 * 3
    for row in types:
        kind = next(kind for kind, name in TYPES.items() if name == row["Metric"])
        assert errors[row["Dataset"]]["shares"][kind] == pytest.approx(float(row[column]), abs=5e-5)
