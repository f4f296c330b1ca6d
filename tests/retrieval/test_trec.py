"""Runs of any system score as ir_measures scores them, and a line that is wrong is named."""

from __future__ import annotations

import gzip
import itertools
import logging
import random
import tracemalloc
from pathlib import Path

import ir_measures
import numpy as np
import pytest
import torch
from ir_measures import RR, R, Success, nDCG

from lightning_mmembed.errors import UserInputError
from lightning_mmembed.items import Task, decode_id, encode_id
from lightning_mmembed.retrieval.pool import Pool, QuerySet
from lightning_mmembed.retrieval.results import RetrievalResult
from lightning_mmembed.retrieval.runs import write_runs
from lightning_mmembed.retrieval.trec import TrecRun, find_runs, read_run, score_run

# Numbers of one width: trec_eval breaks ties by the id as a text, the greater first.
DIDS = [f"9:{n}" for n in range(1000, 1060)]
TASKS = {"pets_task0": range(300, 340), "pets_task3": range(500, 525)}
ORACLES = {
    **{f"hit@{k}": Success @ k for k in (1, 5, 10, 50)},
    **{f"recall@{k}": R @ k for k in (1, 5, 10, 50)},
    "mrr@10": RR @ 10,
    "ndcg@10": nDCG @ 10,
}


def world() -> tuple[Pool, list[QuerySet]]:
    """A pool of 60 in two local pools that overlap, and two tasks whose positives lie in and out of them."""
    ids = torch.tensor([encode_id(did) for did in DIDS])
    places = torch.arange(60)
    local = {"pets_task0": places < 40, "pets_task3": places >= 20}
    rng, sets = random.Random(0), []
    for name, numbers in TASKS.items():
        positives = [[encode_id(did) for did in rng.sample([*DIDS, "9:7"], rng.choice([1, 1, 2, 5]))] for _ in numbers]
        qids = torch.tensor([encode_id(f"9:{n}") for n in numbers])
        sets.append(QuerySet(Task.parse(name), qids, positives, [], ""))
    return Pool("test", ids, places.to(torch.int8) % 3, local, [], ""), sets


def tied_lines(pool: str, seed: int = 0, per_query: int = 45) -> list[str]:
    """A run with many ties, its lines in no order and its ranks nonsense."""
    rng, lines = random.Random(seed), []
    inside = {"pets_task0": DIDS[:40], "pets_task3": DIDS[20:]}
    for task, numbers in TASKS.items():
        for number in numbers:
            dids = DIDS if pool == "union" else inside[task]
            for did in rng.sample(dids, rng.choice([1, 7, min(len(dids), per_query)])):
                lines.append(f"9:{number} Q0 {did} {rng.randrange(99)} {rng.randrange(-3, 4) / 8} other")
    rng.shuffle(lines)
    return lines


def write(path: Path, lines: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def scored(run: TrecRun, pool: str = "union") -> RetrievalResult:
    return score_run({pool: run}, *world(), list(ORACLES))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("pool", ["union", "local"])
def test_a_run_with_ties_scores_as_ir_measures_scores_its_canonical_order(tmp_path: Path, pool: str, seed: int) -> None:
    lines = tied_lines(pool, seed)
    result = scored(read_run(write(tmp_path / "other.run", lines)), pool)
    run: dict[str, dict[str, float]] = {}
    for line in lines:
        qid, _, did, _, score, _ = line.split()
        # A score that no other has, in the order of (score descending, did ascending).
        run.setdefault(qid, {})[did] = float(score) - encode_id(did) % 10_000 * 1e-6
    for outcome in result.tasks.values():
        qids = [decode_id(code) for code in outcome.queries.ids.tolist()]
        qrels = {
            qid: {decode_id(code): 1 for code in labelled}
            for qid, labelled in zip(qids, outcome.queries.positives, strict=True)
        }
        found = {
            (m.query_id, str(m.measure)): m.value for m in ir_measures.iter_calc(list(ORACLES.values()), qrels, run)
        }
        for name, oracle in ORACLES.items():
            expected = [found[qid, str(oracle)] for qid in qids]
            assert outcome.values[pool][name].tolist() == pytest.approx(expected, abs=1e-12), name


def test_a_run_with_ties_ranks_as_a_full_sort(tmp_path: Path) -> None:
    lines = tied_lines("union")
    result = scored(read_run(write(tmp_path / "other.run", lines)))
    for outcome in result.tasks.values():
        for qid, rows in zip(outcome.queries.ids.tolist(), outcome.rankings["union"].rows, strict=True):
            mine = [line.split() for line in lines if line.startswith(f"{decode_id(qid)} ")]
            expected = sorted(mine, key=lambda row: (-float(row[4]), encode_id(row[2])))
            assert [decode_id(int(result.pool.ids[r])) for r in rows if r >= 0] == [row[2] for row in expected]


def test_neither_order_nor_files_nor_compression_of_the_lines_matter(tmp_path: Path) -> None:
    lines = tied_lines("union")
    whole = scored(read_run(write(tmp_path / "whole.run", lines)))
    halves = [write(tmp_path / "a.run", sorted(lines[::2])), tmp_path / "b.run.gz"]
    halves[1].write_bytes(gzip.compress("\n".join(lines[1::2]).encode()))
    columns = [f"{line.replace(' ', chr(9))} 3" for line in lines]  # UniIR's seventh, and tabs
    for run in (read_run(*halves), read_run(write(tmp_path / "seven.run", ["", *columns, ""]))):
        again = scored(run)
        assert run.tag == "other"
        assert again.metrics == whole.metrics
        for task, outcome in again.tasks.items():
            assert torch.equal(outcome.rankings["union"].rows, whole.tasks[task].rankings["union"].rows)


def test_scores_that_are_equal_in_single_precision_tie(tmp_path: Path) -> None:
    lines = ["9:300 Q0 9:1001 1 0.50000000001 x", "9:300 Q0 9:1000 2 0.5 x", "9:300 Q0 9:1002 3 0.5000001 x"]
    rows = scored(read_run(write(tmp_path / "x.run", lines))).tasks["pets_task0"].rankings["union"].rows[0]
    assert rows[:4].tolist() == [2, 0, 1, -1]


def test_a_run_is_written_and_read_with_the_same_ties(tmp_path: Path) -> None:
    result = scored(read_run(write(tmp_path / "other.run", tied_lines("union"))))
    write_runs(tmp_path, result, "again")
    again = scored(read_run(*find_runs(tmp_path)["union"]))
    for task, outcome in result.tasks.items():
        assert torch.equal(again.tasks[task].rankings["union"].rows, outcome.rankings["union"].rows)
        assert torch.equal(again.tasks[task].rankings["union"].scores, outcome.rankings["union"].scores)
    fields = [line.split(" ") for line in (tmp_path / "union" / "pets_task0.run").read_text().splitlines()]
    assert {len(row) for row in fields} == {6}
    for before, after in itertools.pairwise(fields):
        assert (int(after[3]) == 1) == (before[0] != after[0])
        assert before[0] != after[0] or (int(after[3]) == int(before[3]) + 1 and float(after[4]) <= float(before[4]))


def test_lists_are_cut_at_the_depth_after_sorting(tmp_path: Path) -> None:
    lines = [f"9:300 Q0 {did} 1 {place} x" for place, did in enumerate(DIDS)]
    result = score_run({"union": read_run(write(tmp_path / "x.run", lines))}, *world(), ["hit@5"], depth=5)
    assert result.tasks["pets_task0"].rankings["union"].rows[0].tolist() == [59, 58, 57, 56, 55]
    with pytest.raises(ValueError, match="depth=4 is less than the depth of a metric"):
        score_run({"union": read_run(tmp_path / "x.run")}, *world(), ["hit@5"], depth=4)


@pytest.mark.parametrize("n_files", [1, 3])
def test_of_each_query_no_more_lines_are_kept_than_the_depth_and_those_are_the_best(
    tmp_path: Path, n_files: int
) -> None:
    lines = tied_lines("union")
    paths = [write(tmp_path / f"{n}.run", lines[n::n_files]) for n in range(n_files)]
    whole, cut = read_run(*paths), read_run(*paths, depth=6)
    rank = np.arange(len(whole.qids)) - np.searchsorted(whole.qids, whole.qids)
    for name in ("qids", "dids", "scores", "files", "lines"):
        assert getattr(cut, name).tolist() == getattr(whole, name)[rank < 6].tolist()
        assert getattr(cut, name).base is None, "a view would hold the lines that were dropped"
    first = [read_run(path, depth=6) for path in paths]
    assert len(cut.qids) <= sum(len(part.qids) for part in first) < len(lines) / 2


def test_of_a_file_that_was_read_only_what_is_kept_stays_in_memory(tmp_path: Path) -> None:
    def peak(paths: list[Path]) -> int:
        tracemalloc.start()
        read_run(*paths, depth=2)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    lines = [[f"{n}:{q} Q0 9:{did} 1 0.5 x" for q in range(4) for did in range(500)] for n in range(6)]
    paths = [write(tmp_path / f"{n}.run", rows) for n, rows in enumerate(lines)]
    assert peak(paths) < 1.5 * peak(paths[:1])


def test_lists_are_cut_after_lines_of_records_that_were_left_out_are_dropped(tmp_path: Path) -> None:
    path = write(tmp_path / "x.run", [f"9:300 Q0 {did} 1 {-place} x" for place, did in enumerate(DIDS)])
    run = read_run(path, depth=3, left_out=([], [encode_id("9:1001")]))
    assert [decode_id(code) for code in run.dids.tolist()] == ["9:1000", "9:1002", "9:1003"]


def test_a_candidate_that_comes_twice_in_a_file_is_found_below_the_depth_too(tmp_path: Path) -> None:
    lines = [f"9:300 Q0 {did} 1 {-place} x" for place, did in enumerate([*DIDS, DIDS[-1]])]
    with pytest.raises(UserInputError, match=r"x\.run:61: query 9:300 has did 9:1059 once more, after .*x\.run:60"):
        read_run(write(tmp_path / "x.run", lines), depth=2)


def test_queries_that_a_run_lacks_score_zero_and_tasks_that_it_lacks_are_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, (queries, _) = world()
    did = decode_id(queries.positives[0][0])
    run = read_run(write(tmp_path / "x.run", [f"9:300 Q0 {did} 1 0.5 x"]))
    with caplog.at_level(logging.WARNING):
        result = scored(run)
    assert list(result.tasks) == ["pets_task0"]
    assert result.metrics["union"]["tasks"]["pets_task0"]["hit@1"] == 1 / 40
    assert result.search_info["union_queries_missing"] == 39
    assert "has no query of pets_task3, which is left out" in caplog.text
    assert "lacks 39 queries, which score 0" in caplog.text


def test_padding_is_skipped(tmp_path: Path) -> None:
    lines = ["9:300 Q0 9:1000 1 0.5 x 0", "9:300 Q0 -1:9999999 2 -3.4028234663852886e+38 x 0"]
    result = scored(read_run(write(tmp_path / "x.run", [*lines, lines[1]])))
    assert result.tasks["pets_task0"].rankings["union"].rows[0].tolist() == [0, *[-1] * 49]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("9:300 Q0 9:1000 1 0.5", "'9:300 Q0 9:1000 1 0.5' has 5 columns; write 'qid Q0 did rank score tag'"),
        ("9:300 Q0 9:1000 1 0.5 my run x", "has 8 columns"),
        ("9:300 Q0 9:1000 1 high x", "score='high' is no finite number"),
        ("9:300 Q0 9:1000 1 nan x", "score='nan' is no finite number"),
        ("9:300 Q0 9:1000 1 -inf x", "score='-inf' is no finite number"),
        ("9:300 Q0 9:1000 1 1e39 x", "score='1e39' is no finite number of single precision"),
        ("9:300 Q0 doc17 1 0.5 x", "id='doc17' is malformed"),
        ("query 9:300 9:1000 1 0.5 x", "id='query' is malformed"),
    ],
)
def test_a_malformed_line_is_named_by_file_and_number(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "bad.run", ["9:301 Q0 9:1000 1 0.5 x", "", line])
    with pytest.raises(UserInputError) as error:
        read_run(path)
    assert str(error.value).startswith(f"{path}:3: ")
    assert message in str(error.value)


def test_a_candidate_that_comes_twice_for_a_query_is_named_by_both_lines(tmp_path: Path) -> None:
    first = write(tmp_path / "a.run", ["9:301 Q0 9:1000 1 0.5 x", "9:300 Q0 9:1000 1 0.5 x"])
    second = write(tmp_path / "b.run", ["9:300 Q0 9:1001 1 0.5 x", "9:300 Q0 9:1000 2 0.25 x"])
    with pytest.raises(UserInputError) as error:
        read_run(first, second)
    assert str(error.value).startswith(f"{second}:2: query 9:300 has did 9:1000 once more, after {first}:2")


@pytest.mark.parametrize(
    ("pool", "line", "message"),
    [
        ("union", "9:300 Q0 9:999 1 0.5 x", "did='9:999' is not in the test pool"),
        ("union", "9:300 Q0 9:99999 1 0.5 x", "did='9:99999' is not in the test pool"),
        ("local", "9:300 Q0 9:1059 1 0.5 x", "did='9:1059' is not in the local pool of pets_task0"),
        ("local", "9:500 Q0 9:1000 1 0.5 x", "did='9:1000' is not in the local pool of pets_task3"),
        ("union", "9:1 Q0 9:1000 1 0.5 x", "qid='9:1' is no query of the test split"),
    ],
)
def test_what_is_not_in_the_pool_or_the_split_is_named_by_its_line(
    tmp_path: Path, pool: str, line: str, message: str
) -> None:
    path = write(tmp_path / "bad.run", ["9:301 Q0 9:1020 1 0.5 x", line])
    with pytest.raises(UserInputError) as error:
        scored(read_run(path), pool)
    assert str(error.value).startswith(f"{path}:2: ")
    assert message in str(error.value)


def test_lines_of_records_that_the_shards_left_out_are_dropped_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = tied_lines("union")
    broken = [f"{line.split()[0]} Q0 9:7 1 9.5 x" for line in lines[::30]]  # 9:7 ranks first, and is a positive too
    broken = [*dict.fromkeys(broken), "9:1 Q0 9:1000 1 0.5 x", "9:1 Q0 9:7 2 0.5 x"]
    path = write(tmp_path / "x.run", [*broken, *lines])
    with pytest.raises(UserInputError, match="is no query of the test split"):
        scored(read_run(path))
    with caplog.at_level(logging.WARNING):
        kept = read_run(path, left_out=([encode_id("9:1")], [encode_id("9:7")]))
    assert [record.getMessage() for record in caplog.records] == [
        f"{len(broken)} lines of the run x and 1 more name a record that the shards left out; they are dropped"
    ]
    expected = scored(read_run(write(tmp_path / "y.run", lines)))
    assert scored(kept).metrics == expected.metrics
    for row in range(len(kept.lines)):  # a line keeps its number, so that an unknown did is named by it
        assert [*broken, *lines][kept.lines[row] - 1].split()[2] == decode_id(int(kept.dids[row]))


def test_a_did_that_is_unknown_is_refused_even_where_others_were_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "x.run", ["9:300 Q0 9:7 1 0.5 x", "9:300 Q0 9:8 2 0.4 x"])
    with pytest.raises(UserInputError) as error:
        scored(read_run(path, left_out=([], [encode_id("9:7")])))
    assert str(error.value).startswith(f"{path}:2: did='9:8' is not in the test pool")


def test_an_empty_or_damaged_or_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match="holds no line"):
        scored(read_run(write(tmp_path / "empty.run", [])))
    with pytest.raises(UserInputError, match="is no file; give a TREC run"):
        read_run(tmp_path / "absent.run")
    damaged = tmp_path / "cut.run.gz"
    damaged.write_bytes(gzip.compress("\n".join(tied_lines("union")).encode())[:-200])
    with pytest.raises(UserInputError, match=r"cut\.run\.gz' cannot be read .*copy it again"):
        read_run(damaged)


def test_a_file_a_pattern_and_a_folder_are_found(tmp_path: Path) -> None:
    for name in ("union/a.run", "union/b.run.gz", "local/a.run", "union/notes.txt", "union/[1].run"):
        write(tmp_path / name, [])
    union = [tmp_path / "union" / name for name in ("[1].run", "a.run", "b.run.gz")]
    assert find_runs(tmp_path) == {"union": union, "local": [tmp_path / "local" / "a.run"]}
    assert find_runs(tmp_path / "union" / "a.run", "local") == {"local": [tmp_path / "union" / "a.run"]}
    assert find_runs(tmp_path / "union" / "[1].run") == {"union": [tmp_path / "union" / "[1].run"]}
    assert find_runs(str(tmp_path / "*" / "a.run")) == {
        "union": [tmp_path / "local" / "a.run", tmp_path / "union" / "a.run"]
    }
    write(tmp_path / "evaluation" / "runs" / "local" / "a.run", [])
    (tmp_path / "evaluation" / "metrics.json").write_text("{}")
    assert find_runs(tmp_path / "evaluation") == {"local": [tmp_path / "evaluation/runs/local/a.run"]}
    for wrong in (tmp_path / "union", tmp_path / "nothing", tmp_path / "*.run"):
        with pytest.raises(UserInputError, match="is neither a file, nor a pattern"):
            find_runs(wrong)
    with pytest.raises(UserInputError, match="run_pool='global' is unknown; write one of union, local"):
        find_runs(tmp_path / "union" / "a.run", "global")
