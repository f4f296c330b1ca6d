"""Graded judgements and documents that a query ignores: the figures are those of ir_measures on the source's files."""

from __future__ import annotations

from pathlib import Path

import ir_measures
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ir_measures import RR, R, Success, nDCG
from text_worlds import birds, write_beir
from worlds import read_lines

from lightning_mmembed.data import Shards, shard_dataset
from lightning_mmembed.data.beir import BEIRLayout
from lightning_mmembed.data.source_ids import write_run_in_source_ids
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.metrics import graded_ndcg, ndcg
from lightning_mmembed.retrieval.evaluate import evaluate_vectors
from lightning_mmembed.retrieval.results import RetrievalResult, leave_out
from lightning_mmembed.retrieval.runs import write_runs
from lightning_mmembed.retrieval.search import Ranking

METRICS = {"ndcg@10": nDCG @ 10, "ndcg@3": nDCG @ 3, "recall@10": R @ 10, "hit@5": Success @ 5, "mrr@10": RR @ 10}


def ranked(shards: Shards, seed: int = 0) -> RetrievalResult:
    """The test queries of some shards, ranked with random vectors."""
    generator = torch.Generator().manual_seed(seed)
    pool, query_sets = shards.pool("test"), shards.query_sets("test")
    sizes = [len(pool), *map(len, query_sets)]
    vectors = [F.normalize(torch.randn(size, 16, generator=generator), dim=1) for size in sizes]
    return evaluate_vectors(pool, vectors[0], query_sets, vectors[1:], list(METRICS))


def judgements(source: Path) -> list[ir_measures.Qrel]:
    lines = [line.split("\t") for line in (source / "qrels/test.tsv").read_text().splitlines()[1:]]
    return [ir_measures.Qrel(query, document, int(score)) for query, document, score in lines]


def by_run(path: Path) -> list[ir_measures.ScoredDoc]:
    lines = [line.split("\t") for line in path.read_text().splitlines()]
    return [ir_measures.ScoredDoc(line[0], line[2], float(line[4])) for line in lines]


@pytest.mark.parametrize("seed", range(3))
def test_every_figure_of_a_graded_text_set_is_that_of_ir_measures(tmp_path: Path, seed: int) -> None:
    source = birds(tmp_path / "birds", 90)
    shards = Shards(shard_dataset(BEIRLayout(source), tmp_path / "shards", show_progress=False))
    result = ranked(shards, seed)
    queries = result.tasks["birds_task1"].queries
    assert queries.grades is not None
    assert {g for given in queries.grades for g in given} == {1, 2, 3}
    for run in write_runs(tmp_path / "runs", result, "random"):
        out = write_run_in_source_ids(run, shards, "test", tmp_path / "renamed.run")
        expected = ir_measures.calc_aggregate(list(METRICS.values()), judgements(source), by_run(out))
        found = result.metrics[run.parent.name]["tasks"]["birds_task1"]
        for name, measure in METRICS.items():
            assert found[name] == pytest.approx(expected[measure], abs=1e-9)


def test_grades_of_one_are_the_binary_metric() -> None:
    rng = np.random.default_rng(0)
    relevant = torch.from_numpy(rng.random((50, 12)) < 0.2)
    more = torch.from_numpy(rng.integers(0, 4, 50))
    n_positives = relevant.sum(1) + more
    grades = (torch.arange(20)[None] < n_positives[:, None]).long()
    for k in (1, 3, 10, 12):
        torch.testing.assert_close(
            graded_ndcg(relevant.long(), grades, k), ndcg(relevant, n_positives, k), rtol=0, atol=1e-12
        )


def test_judgements_that_are_all_alike_are_scored_as_those_without_grades(tmp_path: Path) -> None:
    documents = [{"_id": str(n), "text": f"text {n}"} for n in range(20)]
    queries = [{"_id": f"q{n}", "text": f"query {n}"} for n in range(9)]
    judged = [(f"q{n % 9}", str(n), int(n < 15)) for n in range(20)]
    source = write_beir(tmp_path / "s", documents, queries, {"test": judged})
    shards = Shards(shard_dataset(BEIRLayout(source), tmp_path / "shards", show_progress=False))
    assert shards.query_sets("test")[0].grades is None


@pytest.mark.parametrize("k", [10, 50])
def test_a_query_never_finds_itself_and_its_figures_are_those_without_it(k: int, tmp_path: Path) -> None:
    documents = [{"_id": str(n), "title": f"t{n}", "text": f"argument {n}"} for n in range(40)]
    queries = [{"_id": str(n), "text": f"argument {n}"} for n in range(20)]
    judged = [(str(n), str(20 + n), 1) for n in range(20)]
    source = write_beir(tmp_path / "s", documents, queries, {"test": judged})
    shards = Shards(shard_dataset(BEIRLayout(source), tmp_path / "shards", show_progress=False))
    pool, (query_set,) = shards.pool("test"), shards.query_sets("test")
    assert query_set.ignored is not None
    generator = torch.Generator().manual_seed(0)
    vectors = F.normalize(torch.randn(40, 16, generator=generator), dim=1)
    result = evaluate_vectors(pool, vectors, [query_set], [vectors[:20]], list(METRICS), k)
    (union, _) = write_runs(tmp_path / "runs", result, "same")
    out = by_run(write_run_in_source_ids(union, shards, "test", tmp_path / "renamed.run"))
    assert len(out) == 20 * min(k, 39)
    assert all(scored.query_id != scored.doc_id for scored in out)
    scores = vectors[:20] @ vectors.T
    everything = [
        ir_measures.ScoredDoc(str(q), str(d), float(scores[q, d])) for q in range(20) for d in range(40) if d != q
    ]
    expected = ir_measures.calc_aggregate(list(METRICS.values()), judgements(source), everything)
    found = result.metrics["union"]["tasks"]["s_task1"]
    for name, measure in METRICS.items():
        assert found[name] == pytest.approx(expected[measure], abs=1e-9)


def test_what_is_left_out_of_a_ranking_is_gone_and_the_rest_keeps_its_order() -> None:
    rng = np.random.default_rng(0)
    rows = np.array([rng.permutation(12)[:8] for _ in range(30)])
    rows[3, 5:] = -1
    gone = rng.integers(-1, 12, (30, 2))
    scores = torch.from_numpy(-np.sort(rng.random((30, 8)), 1).astype(np.float32))
    found = leave_out(Ranking(scores, torch.from_numpy(rows)), torch.from_numpy(gone))
    for i in range(30):
        kept = [(row, float(scores[i, n])) for n, row in enumerate(rows[i].tolist()) if row >= 0 and row not in gone[i]]
        padded = kept + [(-1, float("-inf"))] * (8 - len(kept))
        got = list(zip(found.rows[i].tolist(), found.scores[i].tolist(), strict=True))
        assert got[: len(kept)] == kept
        assert [row for row, _ in got] == [row for row, _ in padded]


def test_a_run_of_other_ids_is_not_renamed(tmp_path: Path) -> None:
    source = birds(tmp_path / "birds")
    shards = Shards(shard_dataset(BEIRLayout(source), tmp_path / "shards", show_progress=False))
    assert len(read_lines(source / "corpus.jsonl")) == len(shards.source_ids())
    (tmp_path / "other.run").write_text("9:1 Q0 9:2 1 0.5 other\n")
    with pytest.raises(UserInputError, match=r"other\.run:1: 9:1 or 9:2 has no other id"):
        write_run_in_source_ids(tmp_path / "other.run", shards, "test", tmp_path / "out.run")
