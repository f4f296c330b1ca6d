"""The outcome of an evaluation: what was found for each query, and what it scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_mmembed.items import Modality
from lightning_mmembed.metrics import RetrievalMean
from lightning_mmembed.retrieval.pool import Pool, QuerySet
from lightning_mmembed.retrieval.search import Ranking


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
