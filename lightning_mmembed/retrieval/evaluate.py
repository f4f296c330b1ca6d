"""Retrieval evaluation: rank the union and the local pools for the queries of each task, and score the ranking."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_mmembed.encoders.mllm import MLLMEncoder
from lightning_mmembed.items import Modality
from lightning_mmembed.metrics import DEFAULT_METRICS, RetrievalMean, parse_metric, per_query_metrics
from lightning_mmembed.retrieval.embed import VectorStore, encoder_fingerprint
from lightning_mmembed.retrieval.pool import Pool, QuerySet
from lightning_mmembed.retrieval.search import Ranking, exact_search

#: Depth of the rankings that are kept and written as TREC runs.
RUN_DEPTH = 50


@dataclass(frozen=True)
class TaskResult:
    """The outcome of one task.

    Args:
        queries: The queries.
        rankings: By pool (``"union"``, ``"local"``).
        values: By pool and canonical metric name, ``(Q,)`` values.
    """

    queries: QuerySet
    rankings: dict[str, Ranking]
    values: dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class RetrievalResult:
    """The outcome of all tasks over one pool."""

    pool: Pool
    tasks: dict[str, TaskResult]

    @property
    def metrics(self) -> dict[str, Any]:
        """The content of ``metrics.json``: pool, then ``tasks`` and their ``average``, then shares from 0 to 1."""
        report: dict[str, Any] = {}
        for name, result in self.tasks.items():
            for pool, values in result.values.items():
                means = {metric: _mean(per_query) for metric, per_query in values.items()}
                report.setdefault(pool, {"tasks": {}})["tasks"][name] = means
        for pool in report.values():
            rows = list(pool["tasks"].values())
            pool["average"] = {metric: sum(row[metric] for row in rows) / len(rows) for metric in rows[0]}
        return report

    @property
    def modality_matrix(self) -> dict[str, dict[str, int]]:
        """``[wanted][got]``: number of queries by wanted modality and modality of the first union result."""
        names = [m.value for m in Modality]
        matrix = {wanted: dict.fromkeys(names, 0) for wanted in names}
        for result in self.tasks.values():
            first = result.rankings["union"].rows[:, 0]
            row = matrix[result.queries.task.target_modality.value]
            got = self.pool.modalities[first[first >= 0]].long()
            for name, count in zip(names, torch.bincount(got, minlength=len(names)).tolist(), strict=True):
                row[name] += count
        return matrix


def _mean(values: Tensor) -> float:
    metric = RetrievalMean(sync_on_compute=False)  # every process evaluates every query
    metric.update(values)
    return float(metric.compute())


def judge(ranking: Ranking, pool: Pool, positives: Sequence[Sequence[int]], wanted: Modality) -> tuple[Tensor, Tensor]:
    """Compare a ranking with the labels.

    Args:
        ranking: The ranking.
        pool: The pool that was ranked.
        positives: Encoded ids of the labelled positives of each query.
        wanted: The modality that the instructions ask for.

    Returns:
        ``(Q, K)`` boolean relevance and ``(Q, K)`` boolean right modality, both False past the end of a list.
    """
    relevant = torch.zeros_like(ranking.rows, dtype=torch.bool)
    for column in pool.rows_of(positives).T:
        relevant |= ranking.rows == column[:, None]
    present = ranking.rows >= 0
    return relevant & present, (pool.modalities[ranking.rows] == wanted.code) & present


def evaluate_task(
    queries: QuerySet,
    query_vectors: Tensor,
    pool: Pool,
    pool_vectors: Tensor,
    metrics: Sequence[str] = DEFAULT_METRICS,
    k: int = RUN_DEPTH,
) -> TaskResult:
    """Rank and score one task over the union pool and, where it has one, its local pool.

    Every labelled positive counts, whether the pool holds it or not; a query without any is scored 0.

    Args:
        queries: The queries.
        query_vectors: ``(Q, D)`` unit vectors.
        pool: The union pool.
        pool_vectors: ``(N, D)`` unit vectors, in the order of the pool.
        metrics: Canonical metric names.
        k: Depth of the rankings; at least the depth of every metric.

    Raises:
        ValueError: If a metric is deeper than ``k``.
    """
    deepest = max(parse_metric(name)[1] for name in metrics)
    if deepest > k:
        raise ValueError(f"k={k} is less than the depth of a metric ({deepest}); raise k")
    subsets = {"union": None, "local": pool.local.get(queries.task.name)}
    searched = {name: mask for name, mask in subsets.items() if name == "union" or mask is not None}
    rankings = exact_search(query_vectors, pool_vectors, k, list(searched.values()))
    n_positives = torch.tensor([len(set(labelled)) for labelled in queries.positives])
    values = {}
    for name, ranking in zip(searched, rankings, strict=True):
        judged = judge(ranking, pool, queries.positives, queries.task.target_modality)
        values[name] = per_query_metrics(*judged, n_positives, metrics)
    return TaskResult(queries, dict(zip(searched, rankings, strict=True)), values)


def evaluate_retrieval(
    encoder: MLLMEncoder,
    pool: Pool,
    query_sets: Sequence[QuerySet],
    store: VectorStore,
    metrics: Sequence[str] = DEFAULT_METRICS,
) -> RetrievalResult:
    """Embed a pool and the queries of all tasks, rank and score; see :func:`evaluate_task`."""
    made_by = encoder_fingerprint(encoder)
    pool_vectors = store.embed(encoder, pool.items, pool.fingerprint, made_by, f"embedding the {pool.name} pool")
    results = {}
    for queries in query_sets:
        vectors = store.embed(
            encoder, queries.queries, queries.fingerprint, made_by, f"embedding queries of {queries.task.name}"
        )
        results[queries.task.name] = evaluate_task(queries, vectors, pool, pool_vectors, metrics)
    return RetrievalResult(pool, results)
