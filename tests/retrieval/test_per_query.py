"""The figures of every query are kept, and runs are compared by them, query by query."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from judged import METRICS, TASKS, judged_pool, judged_result

from lightning_mmembed.errors import UserInputError
from lightning_mmembed.items import decode_id
from lightning_mmembed.retrieval.compare import ComparedRun
from lightning_mmembed.retrieval.per_query import compare_runs, read_measured, write_queries
from lightning_mmembed.retrieval.results import RetrievalResult, average_prompts
from lightning_mmembed.retrieval.runs import record
from lightning_mmembed.retrieval.significance import holm

POOLS = ("union", "local")
FACTS = {"system": "judged", "split": "test", "instruction": "prompt 0"}


def evaluated(directory: Path, seed: int = 0, facts: dict[str, Any] = FACTS, **arguments: Any) -> RetrievalResult:
    result = judged_result(seed, **arguments)
    record(directory, [result], facts)
    return result


def compared(own: Path, *others: Path) -> list[ComparedRun]:
    return compare_runs(read_measured(own), [read_measured(path) for path in others])


def test_every_query_has_a_row_with_every_metric(tmp_path: Path) -> None:
    pool = judged_pool()
    result = average_prompts([judged_result(seed, pool) for seed in range(2)])
    write_queries(tmp_path / "queries.parquet", result)
    table = pq.read_table(tmp_path / "queries.parquet")
    assert table.column_names == ["pool", "task", "qid", "n_positives", "headline", *METRICS, "first_hits"]
    rows = {(row["pool"], row["task"], row["qid"]): row for row in table.to_pylist()}
    assert len(rows) == len(table) == 2 * 4 * 25
    for task, outcome in result.tasks.items():
        for name in POOLS:
            for i, code in enumerate(outcome.queries.ids.tolist()):
                row = rows[name, task, decode_id(code)]
                assert {m: row[m] for m in METRICS} == {m: outcome.values[name][m][i].item() for m in METRICS}
                assert row["headline"] == outcome.headline(name)[i].item()
                assert row["first_hits"] == outcome.first_hits[name][i].tolist()
                assert row["n_positives"] == len(set(outcome.queries.positives[i]))
    assert [path.name for path in tmp_path.iterdir()] == ["queries.parquet"]


def test_a_run_is_compared_with_itself_by_values_and_intervals_of_its_metrics_file(tmp_path: Path) -> None:
    evaluated(tmp_path / "own")
    content = json.loads((tmp_path / "own" / "metrics.json").read_text())
    (union, local) = compared(tmp_path / "own")
    for row, pool in ((union, "union"), (local, "local")):
        headline = content[pool]["headline"]
        assert (row.name, row.pool, row.source, row.differences) == ("own (judged)", pool, "", {})
        assert row.values.keys() == row.intervals.keys() == {*TASKS, "average", "single_modal", "multi_modal"}
        assert row.values["average"] == headline["average"]["value"]
        assert row.intervals["pets_task3"] == tuple(headline["tasks"]["pets_task3"][end] for end in ("low", "high"))


def test_differences_are_those_of_the_same_queries(tmp_path: Path) -> None:
    results = [evaluated(tmp_path / name, seed) for seed, name in enumerate(("own", "other"))]
    rows = compared(tmp_path / "own", tmp_path / "other" / "metrics.json", tmp_path / "own")
    assert [row.pool for row in rows] == ["union"] * 3 + ["local"] * 3
    for pool in POOLS:
        own, other, again = (row for row in rows if row.pool == pool)
        for task in TASKS:
            values = [result.tasks[task].headline(pool).numpy() for result in results]
            difference = other.differences[task]
            assert difference.value == pytest.approx((values[1] - values[0]).mean())
            assert difference.value == pytest.approx(other.values[task] - own.values[task])
            # Paired: narrower or wider than the two intervals side by side, and by the normal approximation.
            error = (values[1] - values[0]).std() / 25**0.5
            assert difference.high - difference.low == pytest.approx(2 * 1.96 * error, rel=0.25)
            assert difference.low <= difference.value <= difference.high
        assert {task: other.differences[task].p_holm for task in TASKS} == holm(
            {task: other.differences[task].p for task in TASKS}
        )
        for group in ("average", "single_modal", "multi_modal"):
            assert other.differences[group].value == pytest.approx(other.values[group] - own.values[group])
            assert other.differences[group].p_holm is None
        assert {(d.value, d.low, d.high, d.p) for d in again.differences.values()} == {(0.0, 0.0, 0.0, 1.0)}


def test_the_order_of_rows_and_tasks_does_not_matter(tmp_path: Path) -> None:
    for seed, name in enumerate(("own", "other", "shuffled")):
        evaluated(tmp_path / name, min(seed, 1))
    path = tmp_path / "shuffled" / "queries.parquet"
    table = pq.read_table(path)
    pq.write_table(table.take(np.random.default_rng(0).permutation(len(table))), path)
    plain, shuffled = (compared(tmp_path / "own", tmp_path / name) for name in ("other", "shuffled"))
    assert [row.differences for row in plain] == [row.differences for row in shuffled]


def test_runs_are_named_by_their_folder_and_checkpoint_or_system_and_by_their_path_where_these_are_the_same(
    tmp_path: Path,
) -> None:
    for name in ("a/run", "b/run"):
        evaluated(tmp_path / name)
    evaluated(tmp_path / "b/other", facts={**FACTS, "checkpoint": "logs/train/best.ckpt"})
    names = {row.name for row in compared(tmp_path / "a/run", tmp_path / "b/other")}
    assert names == {"run (judged)", "other (best.ckpt)"}
    names = [str(tmp_path / "a/run"), str(tmp_path / "b/run")]
    assert [row.name for row in compared(tmp_path / "a/run", tmp_path / "b/run")] == names * 2


def test_a_pool_that_one_of_the_two_lacks_is_not_compared(tmp_path: Path) -> None:
    evaluated(tmp_path / "both")
    evaluated(tmp_path / "one", pools=("union",))
    rows = compared(tmp_path / "both", tmp_path / "one")
    both, one = "both (judged)", "one (judged)"
    assert [(row.name, row.pool) for row in rows] == [(both, "union"), (one, "union"), (both, "local")]
    evaluated(tmp_path / "none", pools=("local",))
    with pytest.raises(UserInputError, match="is over the local pool, this run over the union pool"):
        compared(tmp_path / "one", tmp_path / "none")


def change_queries(directory: Path, change: Any) -> None:
    path = directory / "queries.parquet"
    pq.write_table(change(pq.read_table(path)), path)


def test_runs_over_other_data_are_refused_with_the_reason(tmp_path: Path) -> None:
    evaluated(tmp_path / "own")
    own = read_measured(tmp_path / "own")
    evaluated(tmp_path / "val", facts={**FACTS, "split": "val"})
    with pytest.raises(UserInputError, match=r"val': its split is 'val', here it is 'test'"):
        compare_runs(own, [read_measured(tmp_path / "val")])

    shutil.copytree(tmp_path / "own", tmp_path / "qids")
    column = pq.read_table(tmp_path / "own" / "queries.parquet").column_names.index("qid")
    change_queries(
        tmp_path / "qids",
        lambda table: table.set_column(
            column, "qid", [[qid.replace("77:1001", "77:1") for qid in table["qid"].to_pylist()]]
        ),
    )
    with pytest.raises(
        UserInputError, match=r"pets_task3: 2 queries, 77:1 among them, are in one of the two runs only"
    ):
        compare_runs(own, [read_measured(tmp_path / "qids")])

    shutil.copytree(tmp_path / "own", tmp_path / "labels")
    counts = [50, *[int(n.as_py()) for n in pq.read_table(tmp_path / "own" / "queries.parquet")["n_positives"]][1:]]
    change_queries(tmp_path / "labels", lambda table: table.set_column(3, "n_positives", [counts]))
    with pytest.raises(UserInputError, match=r"fashion200k_task0: query 1:1000 has other labels there"):
        compare_runs(own, [read_measured(tmp_path / "labels")])

    shutil.copytree(tmp_path / "own", tmp_path / "tasks")
    content = json.loads((tmp_path / "tasks" / "metrics.json").read_text())
    for pool in POOLS:
        del content[pool]["headline"]["tasks"]["pets_task3"]
    (tmp_path / "tasks" / "metrics.json").write_text(json.dumps(content))
    with pytest.raises(UserInputError, match="one of the two runs lacks pets_task3 over the"):
        compare_runs(own, [read_measured(tmp_path / "tasks")])


def test_runs_are_compared_by_the_fingerprint_of_their_shards_where_both_tell_it(tmp_path: Path) -> None:
    for name, facts in (
        ("own", {"shards": "1a"}),
        ("same", {"shards": "1a"}),
        ("older", {}),
        ("other", {"shards": "2b"}),
    ):
        evaluated(tmp_path / name, facts={**FACTS, **facts})
    assert len(compared(tmp_path / "own", tmp_path / "same", tmp_path / "older")) == 6
    assert len(compared(tmp_path / "older", tmp_path / "other")) == 4
    with pytest.raises(UserInputError, match=r"other': its shards is '2b', here it is '1a'; evaluate both on the same"):
        compared(tmp_path / "own", tmp_path / "other")


def test_a_record_that_cannot_be_compared_is_not_begun(tmp_path: Path) -> None:
    evaluated(tmp_path / "val", facts={**FACTS, "split": "val"})
    with pytest.raises(UserInputError, match="its split is 'val', here it is 'test'"):
        record(tmp_path / "own", [judged_result()], FACTS, [tmp_path / "val"])
    assert not (tmp_path / "own").exists()


def test_the_title_of_an_approximate_search_says_so_and_how_much_was_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = judged_result()
    record(tmp_path / "exact", [result], FACTS)
    assert "approximate" not in capsys.readouterr().out
    found = {"backend": "ivf", "k": 50, "recall": 0.98765}
    record(tmp_path / "ivf", [RetrievalResult(result.pool, result.tasks, found)], FACTS)
    assert "approximate: 98.8% of the exact top 50" in " ".join(capsys.readouterr().out.split())


def test_files_that_are_missing_or_not_of_one_evaluation_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match=r"compare='.*nothing': .*nothing/metrics\.json is missing"):
        read_measured(tmp_path / "nothing")
    evaluated(tmp_path / "a", 0)
    evaluated(tmp_path / "b", 1)
    shutil.copy(tmp_path / "a" / "queries.parquet", tmp_path / "b")
    with pytest.raises(UserInputError, match=r"metrics\.json and queries\.parquet disagree on"):
        read_measured(tmp_path / "b")
    (tmp_path / "a" / "queries.parquet").unlink()
    with pytest.raises(UserInputError, match=r"a/queries\.parquet is missing; give the directory of an evaluation"):
        read_measured(tmp_path / "a")


def test_a_record_names_system_split_and_instruction_and_prints_the_comparison(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluated(tmp_path / "other", 1)
    capsys.readouterr()
    pool = judged_pool()
    facts = {"system": "mine", "split": "test", "instruction": "mean of prompts 0 to 1"}
    written = record(tmp_path / "own", [judged_result(seed, pool) for seed in range(2)], facts, [tmp_path / "other"])
    printed = capsys.readouterr().out
    assert "mine: test, mean of prompts 0 to 1" in printed
    assert "union: other (judged), against own (mine)" in printed
    assert json.loads((tmp_path / "own" / "metrics.json").read_text()) == written.metrics
    assert [(row.name, row.pool) for row in written.comparison] == [
        (name, pool) for pool in POOLS for name in ("own (mine)", "other (judged)")
    ]
    runs = sorted(path.relative_to(tmp_path / "own/runs") for path in (tmp_path / "own/runs").rglob("*.run"))
    assert [str(path) for path in runs] == sorted(
        f"prompt_{i}/{pool}/{task}.run" for i in range(2) for pool in POOLS for task in TASKS
    )
