"""What reranking makes of an evaluation: every ranking, each pair once, and how sure the difference is."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from distributed_worlds import in_processes
from omegaconf import OmegaConf

from lightning_mmembed import Candidate, Query, ZeroShotReranker
from lightning_mmembed.data import Shards
from lightning_mmembed.distributed import Processes
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.items import decode_id
from lightning_mmembed.rerank import ScoreStore
from lightning_mmembed.rerank.effect import effect_table, effects, helped, verdict
from lightning_mmembed.rerank.pipeline import Budget, rerank_result, score_work, spread_queries
from lightning_mmembed.rerank.work import work_of, write_scores
from lightning_mmembed.retrieval.compare import Difference
from lightning_mmembed.retrieval.results import RetrievalResult, score_task
from lightning_mmembed.retrieval.search import Ranking

CONF = Path(__file__).parents[2] / "conf"
WORDINGS = dict(OmegaConf.load(CONF / "rerank" / "llava_next.yaml").prompts)
TASKS = ["pets_task0", "pets_task7"]
DEPTH = 3


@pytest.fixture
def model(answering_checkpoint: Callable[[str], Path]) -> ZeroShotReranker:
    return ZeroShotReranker.from_pretrained(answering_checkpoint("llava_next"), prompts=WORDINGS)


@pytest.fixture(scope="module")
def found(tiny_shards: Path) -> RetrievalResult:
    return drawn(tiny_shards)


def drawn(directory: Path) -> RetrievalResult:
    """Random rankings of the test queries of all tasks over both pools, five deep; a query's list is shorter."""
    shards, rng = Shards(directory), np.random.default_rng(0)
    pool, tasks = shards.pool("test"), {}
    for queries in shards.query_sets("test"):
        inside = {"union": torch.arange(len(pool)), "local": pool.local[queries.task.name].nonzero()[:, 0]}
        rankings = {}
        for name, rows in inside.items():
            ranked = torch.from_numpy(np.stack([rng.permutation(rows.numpy())[:5] for _ in range(len(queries))]))
            ranked[1, 2:] = -1
            scores = torch.from_numpy(-np.sort(-rng.random(ranked.shape), 1)).float()
            rankings[name] = Ranking(scores.masked_fill(ranked < 0, float("-inf")), ranked)
        tasks[queries.task.name] = score_task(queries, pool, rankings, ["hit@1", "hit@5"])
    return RetrievalResult(pool, tasks)


def by_hand(
    model: ZeroShotReranker, found: RetrievalResult, task: str, pool: str, n: int, weight: float = 1.0
) -> list[int]:
    outcome = found.tasks[task]
    rows = [row for row in outcome.rankings[pool].rows[n].tolist() if row >= 0]
    scores = model.score(outcome.queries.queries[n], [found.pool.items[row] for row in rows[:DEPTH]])
    mixed = weight * scores + (1 - weight) * outcome.rankings[pool].scores[n, : len(scores)]
    return [rows[k] for k in (-mixed).argsort(stable=True).tolist()] + rows[DEPTH:]


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_every_head_is_in_the_order_of_its_scores_and_the_rest_as_it_was(
    model: ZeroShotReranker, found: RetrievalResult, tmp_path: Path, weight: float
) -> None:
    with ScoreStore(tmp_path) as store:
        made = rerank_result(model, found, TASKS, Budget(DEPTH, weight), store, show_progress=False)
    for task in TASKS:
        for pool, ranking in made.after.tasks[task].rankings.items():
            for n, rows in enumerate(ranking.rows.tolist()):
                assert [row for row in rows if row >= 0] == by_hand(model, found, task, pool, n, weight)
            present = ranking.rows >= 0
            assert (ranking.scores.diff(dim=1)[present[:, 1:]] < 0).all(), "a reader goes by the scores"
            assert (ranking.scores[~present] == float("-inf")).all()
    for task in found.tasks.keys() - set(TASKS):
        assert made.after.tasks[task] is found.tasks[task]
    assert made.tasks == TASKS


def test_a_weight_mixes_scores_of_any_size_as_shares_of_their_head(
    model: ZeroShotReranker, found: RetrievalResult, tmp_path: Path
) -> None:
    outcome = found.tasks["pets_task0"]
    big = {pool: Ranking(20 + 30 * r.scores, r.rows) for pool, r in outcome.rankings.items()}
    result = replace(found, tasks={"pets_task0": score_task(outcome.queries, found.pool, big, ["hit@1"])})
    with ScoreStore(tmp_path) as store:
        made = rerank_result(model, result, ["pets_task0"], Budget(DEPTH, 0.95), store, show_progress=False)
    for pool, ranking in made.after.tasks["pets_task0"].rankings.items():
        for n, rows in enumerate(ranking.rows.tolist()):
            head = [row for row in big[pool].rows[n, :DEPTH].tolist() if row >= 0]
            scores = model.score(outcome.queries.queries[n], [found.pool.items[row] for row in head])
            raw = big[pool].scores[n, : len(head)]
            mixed = 0.95 * scores + 0.05 * (raw - raw.min()) / (raw.max() - raw.min())
            assert rows[: len(head)] == [head[k] for k in (-mixed).argsort(stable=True).tolist()]


def test_a_pair_of_both_pools_is_scored_once(model: ZeroShotReranker, found: RetrievalResult, tmp_path: Path) -> None:
    pairs = {
        (qid, row)
        for task in TASKS
        for ranking in found.tasks[task].rankings.values()
        for qid, rows in zip(found.tasks[task].queries.ids.tolist(), ranking.rows[:, :DEPTH].tolist(), strict=True)
        for row in rows
        if row >= 0
    }
    with ScoreStore(tmp_path) as store:
        made = rerank_result(model, found, TASKS, Budget(DEPTH), store, show_progress=False)
    assert model.pairs == len(pairs) == made.counts["scored"]
    assert {(qid, int((found.pool.ids == did).nonzero())) for qid, did in made.rows.tolist()} == pairs
    for qid, did in made.rows[:5].tolist():
        (outcome,) = [found.tasks[task] for task in TASKS if qid in found.tasks[task].queries.ids.tolist()]
        query = outcome.queries.queries[outcome.queries.ids.tolist().index(qid)]
        candidate = found.pool.items[int((found.pool.ids == did).nonzero())]
        score = made.scores[(made.rows == [qid, did]).all(1)].item()
        assert score == pytest.approx(float(model.score(query, [candidate])), abs=1e-5)


def test_a_budget_leaves_what_it_does_not_reach_in_the_retrievers_order(
    model: ZeroShotReranker, found: RetrievalResult, tmp_path: Path
) -> None:
    whole = sum(len(rows) for rows in work_of(found, TASKS, DEPTH).rows)
    with ScoreStore(tmp_path) as store:
        none = rerank_result(model, found, TASKS, Budget(DEPTH, max_pairs=0), store, show_progress=False)
        some = rerank_result(model, found, TASKS, Budget(DEPTH, max_pairs=20), store, show_progress=False)
    for task in TASKS:
        for pool, ranking in none.after.tasks[task].rankings.items():
            assert ranking.rows.equal(found.tasks[task].rankings[pool].rows)
    assert none.counts["unscored"] == whole
    assert (some.counts["scored"], some.counts["unscored"], len(some.scores)) == (20, whole - 20, 20)


def test_two_pairs_of_a_query_over_both_pools_reorder_the_union_pool(
    model: ZeroShotReranker, found: RetrievalResult, tmp_path: Path
) -> None:
    outcome = found.tasks["pets_task0"]
    before, budget = outcome.rankings["union"].rows, Budget(DEPTH, max_pairs=2 * len(outcome.queries))
    with ScoreStore(tmp_path) as store:
        made = rerank_result(model, found, ["pets_task0"], budget, store, show_progress=False)
    for n, rows in enumerate(made.after.tasks["pets_task0"].rankings["union"].rows.tolist()):
        first, second = before[n, :2].tolist()
        scores = model.score(outcome.queries.queries[n], [found.pool.items[row] for row in (first, second)])
        assert rows[:2] == ([second, first] if scores[1] > scores[0] else [first, second])


def test_the_probe_counts_among_the_seconds_and_takes_two_candidates_of_a_query(
    model: ZeroShotReranker, found: RetrievalResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, asked, score = [0.0], [], model.score

    def scored(query: Query, candidates: list[Candidate], task: object = None) -> torch.Tensor:
        asked.append(len(candidates))
        return score(query, candidates)

    monkeypatch.setattr(model, "score", scored)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    budget, work = Budget(DEPTH, max_seconds=60), work_of(found, TASKS, DEPTH)
    with ScoreStore(tmp_path) as store:
        score_work(
            model, work, budget, store, announce=lambda left: clock.append(clock.pop() + 61), show_progress=False
        )
    assert asked == [2] * 4, "nothing after the probe"


def test_what_was_shortened_in_the_probe_is_counted_once(
    answering_checkpoint: Callable[[str], Path], found: RetrievalResult, tmp_path: Path
) -> None:
    counts = []
    for name, announce in (("probed", lambda left: None), ("plain", None)):
        model = ZeroShotReranker.from_pretrained(
            answering_checkpoint("llava_next"), prompts={"task3": "{query}\n{candidate}"}, max_length=50
        )
        work = work_of(found, ["pets_task3"], DEPTH)
        with ScoreStore(tmp_path / name) as store:
            counts.append(score_work(model, work, Budget(DEPTH), store, announce=announce, show_progress=False).counts)
    assert counts[0] == counts[1]
    assert counts[0]["shortened"] > 0


def score_in_turns(
    processes: Processes, path: Path, shards: Path, directory: Path, alone: torch.Tensor, tasks: list[str]
) -> None:
    model = ZeroShotReranker.from_pretrained(path, prompts=WORDINGS)
    work, asked, score = work_of(drawn(shards), tasks, DEPTH), [], model.score

    def scored(query: Query, candidates: list[Candidate], task: object = None) -> torch.Tensor:
        asked.append(query.task.name if query.task else "")
        return score(query, candidates)

    model.score = scored  # type: ignore[assignment, method-assign]
    with ScoreStore(directory) as store:
        made = score_work(model, work, Budget(DEPTH), store, processes, show_progress=False)
    torch.testing.assert_close(made.scores, alone, atol=1e-5, rtol=0, equal_nan=True)
    counts = [asked.count(task) for task in tasks]
    assert max(counts) - min(counts) <= 1, "each process has its share of every task"


@pytest.mark.slow
def test_processes_take_queries_in_turns_and_scores_come_back_in_order(
    answering_checkpoint: Callable[[str], Path], tiny_shards: Path, found: RetrievalResult, tmp_path: Path
) -> None:
    path = answering_checkpoint("llava_next")
    model = ZeroShotReranker.from_pretrained(path, prompts=WORDINGS)
    with ScoreStore(tmp_path / "alone") as store:
        alone = score_work(model, work_of(found, TASKS, DEPTH), Budget(DEPTH), store, show_progress=False).scores
    in_processes(2, score_in_turns, path, tiny_shards, tmp_path / "two", alone, TASKS, seconds=120)


def test_a_query_without_candidates_stays_without(
    model: ZeroShotReranker, found: RetrievalResult, tmp_path: Path
) -> None:
    outcome = found.tasks["pets_task0"]
    empty = {pool: Ranking(torch.full_like(r.scores, float("-inf")), torch.full_like(r.rows, -1))
             for pool, r in outcome.rankings.items()}  # fmt: skip
    result = replace(found, tasks={"pets_task0": score_task(outcome.queries, found.pool, empty, ["hit@1"])})
    with ScoreStore(tmp_path) as store:
        made = rerank_result(model, result, ["pets_task0"], Budget(DEPTH), store, show_progress=False)
    assert (made.after.tasks["pets_task0"].rankings["union"].rows == -1).all()
    assert made.rows.shape == (0, 2)
    assert model.pairs == 0


@pytest.mark.parametrize(
    ("tasks", "budget", "named"),
    [
        (["cirr_task7"], {}, r"tasks=\['cirr_task7'\] are unknown; those that are ranked are pets_task0"),
        (TASKS, {"top": 1}, "top=1 goes by one ranking"),
        (TASKS, {"depth": 0}, "depth=0"),
        (TASKS, {"weight": 1.5}, "weight=1.5"),
        (TASKS, {"weight": "half"}, "weight='half'"),
        (TASKS, {"max_pairs": -1}, "max_pairs=-1"),
        (TASKS, {"max_pairs": 2.5}, r"max_pairs=2\.5"),
        (TASKS, {"max_seconds": -3}, "max_seconds=-3"),
        (TASKS, {"max_seconds": "60s"}, "max_seconds='60s'"),
        (TASKS, {"top": 0}, "top=0"),
    ],
)
def test_what_cannot_be_reranked_is_named_before_the_work(
    model: ZeroShotReranker, found: RetrievalResult, tmp_path: Path, tasks: list[str], budget: dict[str, Any],
    named: str,
) -> None:  # fmt: skip
    with pytest.raises(UserInputError, match=named), ScoreStore(tmp_path) as store:
        rerank_result(model, found, tasks, Budget(**budget), store, show_progress=False)
    assert model.pairs == 0


def test_a_task_without_a_prompt_is_named_before_the_work(
    answering_checkpoint: Callable[[str], Path], found: RetrievalResult, tmp_path: Path
) -> None:
    model = ZeroShotReranker.from_pretrained(
        answering_checkpoint("llava_next"), prompts={"pets_task0": "{query} {candidate}"}
    )
    with pytest.raises(UserInputError, match="task='pets_task7' has no prompt"), ScoreStore(tmp_path) as store:
        rerank_result(model, found, TASKS, Budget(), store, show_progress=False)
    assert model.pairs == 0


# --- effects --------------------------------------------------------------------------------------------------------


def moved(found: RetrievalResult, task: str, to: float) -> RetrievalResult:
    outcome = found.tasks[task]
    values = {pool: {**row, "hit@1": torch.full_like(row["hit@1"], to)} for pool, row in outcome.values.items()}
    return replace(found, tasks={**found.tasks, task: replace(outcome, values=values)})


def test_a_task_is_helped_where_the_interval_lies_above_zero(found: RetrievalResult) -> None:
    before = moved(moved(found, "pets_task0", 0.0), "pets_task7", 1.0)
    after = moved(moved(before, "pets_task0", 1.0), "pets_task7", 0.0)
    moves = effects(before, after)
    assert helped(moves) == ["pets_task0"]
    assert [verdict(moves["union"][task]) for task in ("pets_task0", "pets_task1", "pets_task7")] == [
        "helps", "", "hurts",
    ]  # fmt: skip
    assert moves["union"]["average"].value == pytest.approx(0.0)
    table = effect_table(before, after, moves, "union", "hit@1", TASKS, "")
    assert list(table.columns[-1].cells)[:4] == ["helps", "left out", "left out", "hurts"]
    with pytest.raises(UserInputError, match="metric='mrr@10' was not evaluated"):
        effects(before, after, "mrr@10")


def test_an_interval_that_touches_zero_helps_nobody() -> None:
    assert verdict(Difference(0.02, 0.0, 0.05, 0.3, 0.3)) == ""
    assert verdict(Difference(-0.02, -0.05, 0.0, 0.3, 0.3)) == ""


def test_some_queries_of_each_task_are_evaluated_as_they_are_among_all(found: RetrievalResult) -> None:
    some = spread_queries(found, 3)
    for name, outcome in some.tasks.items():
        whole = found.tasks[name]
        assert len(outcome.queries) == 3
        for n, qid in enumerate(outcome.queries.ids.tolist()):
            place = whole.queries.ids.tolist().index(qid)
            assert outcome.queries.queries[n].qid == decode_id(qid)
            for pool, values in outcome.values.items():
                assert values["hit@5"][n] == whole.values[pool]["hit@5"][place]
                assert outcome.rankings[pool].rows[n].equal(whole.rankings[pool].rows[place])


def test_soft_labels_are_read_as_they_were_written(tmp_path: Path) -> None:
    rows = np.array([[9, 4], [2, 7], [2, 1]])
    path = write_scores(tmp_path / "labels.parquet", rows, np.array([0.5, 0.25, 1.0], np.float32), {"reranker": "x"})
    table = pq.read_table(path)
    assert table.to_pydict() == {"qid": [2, 2, 9], "did": [1, 7, 4], "score": [1.0, 0.25, 0.5]}
    assert table.schema.metadata == {b"reranker": b"x"}
