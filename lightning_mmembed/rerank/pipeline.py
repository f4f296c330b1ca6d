"""Reranks what an evaluation found, or a part of it, in one process or shared out over several."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lightning_mmembed.distributed import ALONE, Processes
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.rerank.order import mixable, rerank
from lightning_mmembed.rerank.prompts import Prompts
from lightning_mmembed.rerank.runs import DEPTH, Estimate, estimate, score_run, share_out
from lightning_mmembed.rerank.store import ScoreStore
from lightning_mmembed.rerank.work import Lazy, Work, known_scores, reader, scored_pairs, work_of
from lightning_mmembed.rerank.zero_shot import ZeroShotReranker
from lightning_mmembed.retrieval.pool import Pool
from lightning_mmembed.retrieval.results import RetrievalResult, TaskResult, score_task
from lightning_mmembed.retrieval.search import Ranking

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Budget:
    """How much of the rankings is scored.

    Args:
        depth: How many of each ranking; the paper's 10 by default.
        weight: Of P(True) in the fused score; see :func:`~lightning_mmembed.rerank.order.fused`. Scores of a
            retriever that are no cosines are normalised (:func:`~lightning_mmembed.rerank.order.mixable`).
        max_pairs: The most pairs, of all queries and processes.
        max_seconds: Ends once so long has passed, in each process; that of the probe counts.
        top: How many places matter: a query is left once they are settled. For rankings over one pool.
    """

    depth: int = DEPTH
    weight: float = 1.0
    max_pairs: int | None = None
    max_seconds: float | None = None
    top: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("depth", 1), ("max_pairs", 0), ("top", 1)):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= least) and (value is not None or name == "depth"):
                raise UserInputError(f"{name}={value!r} is no such number; write a whole number from {least} on")
        if not (isinstance(self.weight, int | float) and 0 <= self.weight <= 1):
            raise UserInputError(f"weight={self.weight!r} is out of range; write 0 (retrieval) to 1 (P(True) alone)")
        seconds = self.max_seconds
        if seconds is not None and not (isinstance(seconds, int | float) and seconds >= 0):
            raise UserInputError(f"max_seconds={seconds!r} is no time; write seconds from 0 on, or null for no limit")


@dataclass(frozen=True)
class Scored:
    """P(True) of the first candidates of each query, and how they were come by.

    Args:
        scores: ``(Q, K)`` float32, NaN past the last that was scored.
        counts: Pairs by what became of them: ``scored``, ``found``, ``unscored``, ``settled``; and of those scored here
            and now, in the probe too, how many were ``shortened``.
    """

    scores: Tensor
    counts: dict[str, int]


@dataclass(frozen=True)
class Reranked:
    """What reranking made of an evaluation.

    Args:
        after: All its tasks, those that were not chosen as they were.
        tasks: The names of those that were reranked.
        counts: See :class:`Scored`.
        rows: ``(N, 2)`` encoded qid and did of every pair that has a score.
        scores: ``(N,)`` their P(True).
    """

    after: RetrievalResult
    tasks: list[str]
    counts: dict[str, int]
    rows: np.ndarray
    scores: np.ndarray


def score_work(
    reranker: ZeroShotReranker,
    work: Work,
    budget: Budget,
    store: ScoreStore,
    processes: Processes = ALONE,
    announce: Callable[[Estimate], object] | None = None,
    show_progress: bool = True,
) -> Scored:
    """Score the candidates of queries, which the processes take in turns; all get all scores.

    In turns, since queries of one task follow each other, and tasks differ by far in what a pair costs.

    Args:
        reranker: The model, the same in every process.
        work: The queries and their candidates.
        budget: How much of it; pairs are shared out before the queries are, so that as many processes as there may be
            score the same ones.
        store: Where scores are kept.
        processes: Those that share out the queries.
        announce: Given in the first process what is left to do, before it begins. Where ``max_seconds`` is given, the
            probe is of two candidates a query, as the first round of the scoring is.
        show_progress: Show a progress bar with an ETA, in the first process.

    Raises:
        UserInputError: If a pair cannot be scored; what was scored is kept.
    """
    begin, pairs, shortened = time.monotonic(), reranker.pairs, reranker.shortened
    lengths = [len(rows) for rows in work.rows]
    depths = share_out(lengths, max(lengths, default=0), budget.max_pairs) if lengths else []
    own = work.part(slice(processes.rank, None, processes.size), depths)
    rankings, deepest, seconds = own.rankings, max(1, *depths, 1), budget.max_seconds
    if announce is not None:
        few = None if seconds is None else 2
        found = estimate(reranker, own.queries, rankings, depth=deepest, store=store, probe_depth=few)
        announced = _summed(found, processes)
        if processes.rank == 0:
            announce(announced)
    run = score_run(
        reranker,
        own.queries,
        rankings,
        depth=deepest,
        store=store,
        max_seconds=None if seconds is None else max(0.0, seconds - (time.monotonic() - begin)),
        top=budget.top,
        retrieval=own.retrieval,
        weight=budget.weight,
        show_progress=show_progress and processes.rank == 0,
    )
    scores = torch.full((len(own.qids), deepest), float("nan"))
    for n, of_query in enumerate(run.scores):
        scores[n, : len(of_query)] = torch.tensor(of_query)
    new = reranker.pairs - pairs  # those of the probe, which the run then finds, among them
    counted = {"scored": new, "found": max(0, run.scored + run.found - new), "unscored": run.unscored}
    counted |= {"settled": run.settled, "shortened": reranker.shortened - shortened}
    counts = processes.gather(torch.tensor([list(counted.values())])).sum(0).tolist()
    totals = dict(zip(counted, counts, strict=True))
    totals["unscored"] += sum(lengths) - sum(depths)
    return Scored(_in_order(processes.gather(scores), processes.size), totals)


def rerank_result(
    reranker: ZeroShotReranker,
    result: RetrievalResult,
    tasks: Sequence[str],
    budget: Budget,
    store: ScoreStore,
    processes: Processes = ALONE,
    announce: Callable[[Estimate], object] | None = None,
    show_progress: bool = True,
) -> Reranked:
    """Rerank every ranking of some tasks, and score what comes of it with the metrics of the evaluation.

    Args:
        reranker: See :func:`score_work`.
        result: Of one prompt; its rankings are reordered, and the scores in them become ``1 / rank``, since P(True) and
            the scores of a retriever have no common order.
        tasks: Those to rerank.
        budget: See :func:`score_work`.
        store: See :func:`score_work`.
        processes: See :func:`score_work`.
        announce: See :func:`score_work`.
        show_progress: See :func:`score_work`.

    Raises:
        UserInputError: If a task is unknown or has no prompt, or a pair cannot be scored.
    """
    check_tasks(tasks, pools_of(result), reranker.processor.writer.prompts, budget)
    work = work_of(result, tasks, budget.depth)
    scored = score_work(reranker, work, budget, store, processes, announce, show_progress)
    after, first = dict(result.tasks), 0
    for name in tasks:
        outcome = result.tasks[name]
        numbers = range(first, first := first + len(outcome.queries))
        known = [known_scores(work.rows[n], scored.scores[n]) for n in numbers]
        after[name] = _reordered(outcome, result.pool, known, budget)
    return Reranked(replace(result, tasks=after), list(tasks), scored.counts, *scored_pairs(work, scored.scores))


def check_tasks(
    tasks: Collection[str], ranked: Mapping[str, Collection[str]], prompts: Prompts, budget: Budget
) -> None:
    """Refuse tasks that cannot be reranked, before the work.

    Args:
        tasks: Those to rerank.
        ranked: From each task of an evaluation to the pools that it is ranked over; see :func:`pools_of`.
        prompts: The wordings.
        budget: Its ``top`` goes by one ranking of a query.

    Raises:
        UserInputError: If a task is unknown or has no prompt, or is ranked over two pools where ``top`` is given.
    """
    if unknown := [name for name in tasks if name not in ranked]:
        raise UserInputError(f"tasks={unknown} are unknown; those that are ranked are {', '.join(ranked)}")
    for name in tasks:
        prompts.of(name)
    if budget.top is not None and any(len(ranked[name]) > 1 for name in tasks):
        raise UserInputError(f"top={budget.top} goes by one ranking of a query, and there are several; leave it out")


def pools_of(result: RetrievalResult) -> dict[str, list[str]]:
    """From each task of an evaluation to the pools that it is ranked over."""
    return {name: list(outcome.rankings) for name, outcome in result.tasks.items()}


def spread_queries(result: RetrievalResult, most: int) -> RetrievalResult:
    """The same evaluation of at most so many queries of each task, spread evenly over it."""
    tasks = {}
    for name, outcome in result.tasks.items():
        queries, count = outcome.queries, len(outcome.queries)
        picked: list[int] = np.unique(np.linspace(0, count - 1, min(most, count)).astype(int)).tolist()
        some = replace(
            queries,
            ids=queries.ids[picked],
            positives=[queries.positives[n] for n in picked],
            queries=Lazy(len(picked), reader(queries.queries, picked)),
            fingerprint=f"{queries.fingerprint}/{most}",
            sizes=None,
            grades=None if queries.grades is None else [queries.grades[n] for n in picked],
            ignored=None if queries.ignored is None else [queries.ignored[n] for n in picked],
        )
        rankings = {pool: Ranking(r.scores[picked], r.rows[picked]) for pool, r in outcome.rankings.items()}
        tasks[name] = score_task(some, result.pool, rankings, list(next(iter(outcome.values.values()))))
    return replace(result, tasks=tasks)


def _reordered(outcome: TaskResult, pool: Pool, known: Sequence[dict[int, float]], budget: Budget) -> TaskResult:
    rankings = {}
    for name, ranking in outcome.rankings.items():
        rows, retrieval = ranking.rows.clone(), mixable(ranking.scores[:, : budget.depth])
        for n, of_query in enumerate(known):
            ranked = [row for row in ranking.rows[n].tolist() if row >= 0]
            head = []
            for row in ranked[: budget.depth]:  # the other pool may have more of them scored
                if row not in of_query:
                    break
                head.append(of_query[row])
            rows[n, : len(ranked)] = torch.tensor(rerank(ranked, head, retrieval[n].tolist(), budget.weight))
        places = (1 / torch.arange(1, rows.shape[1] + 1)).expand(rows.shape)
        rankings[name] = Ranking(places.masked_fill(rows < 0, float("-inf")), rows)
    return score_task(outcome.queries, pool, rankings, list(next(iter(outcome.values.values()))))


def _in_order(rows: Tensor, size: int) -> Tensor:
    """Rows that so many processes took in turns, gathered below each other, as they were before."""
    order = [n for rank in range(size) for n in range(rank, len(rows), size)]
    return rows[torch.tensor(order, dtype=torch.long).argsort()]


def _summed(own: Estimate, processes: Processes) -> Estimate:
    pairs, tokens = processes.gather(torch.tensor([[own.pairs, own.tokens]])).sum(0).tolist()
    return Estimate(pairs, tokens, processes.largest(round(1000 * own.seconds)) / 1000)
