"""The outcome of an evaluation: what was found for each query, and what it scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_mmembed.items import TASK_MODALITIES, Modality, Task, task_order
from lightning_mmembed.metrics import DEFAULT_METRICS, RetrievalMean, graded_ndcg, parse_metric, per_query_metrics
from lightning_mmembed.retrieval.pool import Pool, QuerySet, padded_ids
from lightning_mmembed.retrieval.search import Ranking

#: Depth of the rankings that are kept and written as TREC runs.
RUN_DEPTH = 50

#: The pools that are ranked: all tasks' candidates together, and those of the query's task alone.
POOLS = ("union", "local")

#: Tasks whose headline figure is hit@10; of every other task it is hit@5 (UniIR, table 2).
DEEP_TASKS = frozenset({"fashion200k_task0", "fashion200k_task3", "fashioniq_task7"})


@dataclass(frozen=True)
class TaskResult:
    """The outcome of one task.

    Args:
        queries: The queries.
        rankings: By pool (``"union"``, ``"local"``); of the first prompt where there are several.
        values: By pool and canonical metric name, ``(Q,)`` values, averaged over the prompts.
        first_hits: By pool, ``(Q, P)`` rank of the first positive with each prompt, from 1; 0 if none was ranked.
    """

    queries: QuerySet
    rankings: dict[str, Ranking]
    values: dict[str, dict[str, Tensor]]
    first_hits: dict[str, Tensor]

    def headline(self, pool: str) -> Tensor:
        """The ``(Q,)`` headline figure of each query: the share of the prompts with a hit at the task's depth."""
        ranks = self.first_hits[pool]
        return ((ranks > 0) & (ranks <= headline_depth(self.queries.task.name))).double().mean(1)


@dataclass(frozen=True)
class RetrievalResult:
    """The outcome of all tasks over one pool.

    Args:
        pool: The union pool.
        tasks: By task name.
        search_info: What there is to know about the search, such as the measured recall of an approximate one.
    """

    pool: Pool
    tasks: dict[str, TaskResult]
    search_info: dict[str, Any] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, Any]:
        """By pool: ``tasks``, their ``average``, and that of the ``single_modal`` and ``multi_modal`` ones; shares."""
        report: dict[str, Any] = {}
        for pool in POOLS:
            values = {name: result.values[pool] for name, result in self.tasks.items() if pool in result.values}
            if not values:
                continue
            rows = {name: {metric: _mean(v) for metric, v in row.items()} for name, row in values.items()}
            metrics = next(iter(rows.values()))
            report[pool] = {"tasks": {name: rows[name] for name in sorted(rows, key=task_order)}}
            for group, names in task_groups(rows).items():
                report[pool][group] = {m: sum(rows[name][m] for name in names) / len(names) for m in metrics}
        return report

    @property
    def named_metrics(self) -> dict[str, float]:
        """``{pool}/{metric}``, the average over the tasks, and ``{pool}/{task}/{metric}``: the keys of a logger."""
        named = {}
        for pool, values in self.metrics.items():
            for prefix, row in [("", values["average"]), *((f"{task}/", row) for task, row in values["tasks"].items())]:
                named.update({f"{pool}/{prefix}{name}": value for name, value in row.items()})
        return named

    @property
    def modality_matrix(self) -> dict[str, dict[str, int]]:
        """``[wanted][got]``: number of queries by wanted modality and modality of the first union result."""
        names = [m.value for m in Modality]
        matrix = {wanted: dict.fromkeys(names, 0) for wanted in names}
        for result in self.tasks.values():
            if "union" not in result.rankings:
                continue
            first = result.rankings["union"].rows[:, 0]
            row = matrix[result.queries.task.target_modality.value]
            got = self.pool.modalities[first[first >= 0]].long()
            for name, count in zip(names, torch.bincount(got, minlength=len(names)).tolist(), strict=True):
                row[name] += count
        return matrix


def headline_depth(task: str) -> int:
    """Depth of the hit rate that published tables give of a task.

    Example:
        >>> headline_depth("mscoco_task0"), headline_depth("fashioniq_task7")
        (5, 10)
    """
    return 10 if task in DEEP_TASKS else 5


def task_groups(names: Iterable[str]) -> dict[str, list[str]]:
    """The tasks that are averaged together, in canonical order; a group without tasks is left out.

    Returns:
        ``average``: all; ``single_modal``: those with queries of one modality; ``multi_modal``: those with queries of
        an image and a text.

    Example:
        >>> task_groups(["cirr_task7", "mscoco_task0"])
        {'average': ['mscoco_task0', 'cirr_task7'], 'single_modal': ['mscoco_task0'], 'multi_modal': ['cirr_task7']}
    """
    ordered = sorted(names, key=task_order)
    asked = {name: TASK_MODALITIES[Task.parse(name).task_id][0] for name in ordered}
    groups = {
        "average": ordered,
        "single_modal": [name for name in ordered if asked[name] is not Modality.IMAGE_TEXT],
        "multi_modal": [name for name in ordered if asked[name] is Modality.IMAGE_TEXT],
    }
    return {group: members for group, members in groups.items() if members}


def score_task(
    queries: QuerySet,
    pool: Pool,
    rankings: dict[str, Ranking],
    metrics: Sequence[str] = DEFAULT_METRICS,
    depth: int | None = None,
) -> TaskResult:
    """Score the rankings of one task.

    Every labelled positive counts, whether the pool holds it or not, but for the ``*_reachable`` metrics; a query
    without any is scored 0. Of graded judgements nDCG takes the grades.

    Args:
        queries: The queries; what they ignore is taken out of the rankings.
        pool: The union pool.
        rankings: By pool, ``"union"`` or ``"local"``.
        metrics: Canonical metric names.
        depth: How deep the rankings are once that is taken out; by default as deep as they come.

    Returns:
        The values of every query; the headline goes by what is ranked, so rankings must be 10 deep at least.
    """
    labels = Labels(queries, pool)
    if queries.ignored is not None:
        rankings = {name: leave_out(ranking, pool.rows_of(queries.ignored)) for name, ranking in rankings.items()}
    rankings = {name: Ranking(some.scores[:, :depth], some.rows[:, :depth]) for name, some in rankings.items()}
    values, first_hits = {}, {}
    for name, ranking in rankings.items():
        relevant, right = judge(ranking, pool, queries.positives, queries.task.target_modality)
        values[name] = per_query_metrics(relevant, right, labels.labelled.sum(1), metrics, labels.inside(name).sum(1))
        values[name] |= labels.graded(ranking, name, metrics)
        first_hits[name] = torch.where(relevant.any(1), relevant.int().argmax(1) + 1, 0)[:, None]
    return TaskResult(queries, rankings, values, first_hits)


class Labels:
    """Where the labelled positives of some queries are.

    Args:
        queries: ``Q`` queries with at most ``P`` positives each.
        pool: The union pool.
    """

    def __init__(self, queries: QuerySet, pool: Pool) -> None:
        positives = [list(dict.fromkeys(labelled)) for labelled in queries.positives]
        self._rows, self._local = pool.rows_of(positives), pool.local.get(queries.task.name)
        #: ``(Q, P)`` encoded ids, -1 for padding.
        self.ids = padded_ids(positives)
        #: ``(Q, P)`` boolean: what is no padding.
        self.labelled = self.ids >= 0
        self._grades = None if queries.grades is None else padded_ids(queries.grades).clamp(min=0)

    def inside(self, pool: str) -> Tensor:
        """``(Q, P)`` boolean: the positives that the union pool or, where there is one, the local pool holds."""
        found = self.labelled & (self._rows >= 0)
        return found if pool == "union" or self._local is None else found & self._local[self._rows.clamp(min=0)]

    def graded(self, ranking: Ranking, pool: str, metrics: Sequence[str]) -> dict[str, Tensor]:
        """The ``(Q,)`` values of the metrics that go by grades; none where there are no grades."""
        if self._grades is None:
            return {}
        gains = torch.zeros_like(ranking.rows)
        for rows, grades in zip(self._rows.T, self._grades.T, strict=True):
            gains += torch.where((ranking.rows == rows[:, None]) & (ranking.rows >= 0), grades[:, None], 0)
        ideal = {"ndcg": self._grades, "ndcg_reachable": self._grades * self.inside(pool)}
        parsed = {name: parse_metric(name) for name in metrics}
        return {name: graded_ndcg(gains, ideal[kind], k) for name, (kind, k) in parsed.items() if kind in ideal}


def leave_out(ranking: Ranking, rows: Tensor) -> Ranking:
    """A ranking without some candidates; those behind them move up, and the list ends earlier.

    Args:
        ranking: ``Q`` queries.
        rows: ``(Q, P)`` rows of the pool, or -1.
    """
    gone = ((ranking.rows[:, :, None] == rows[:, None, :]) & (rows[:, None, :] >= 0)).any(2)
    order = gone.int().argsort(dim=1, stable=True)
    gone = gone.gather(1, order)
    scores = ranking.scores.gather(1, order).masked_fill(gone, float("-inf"))
    return Ranking(scores, ranking.rows.gather(1, order).masked_fill(gone, -1))


def average_prompts(results: Sequence[RetrievalResult]) -> RetrievalResult:
    """One outcome out of those with several prompts: values are averaged, rankings are those of the first prompt."""
    first, tasks = results[0], {}
    for name, outcome in first.tasks.items():
        same = [result.tasks[name] for result in results]
        tasks[name] = dataclasses.replace(
            outcome,
            values={
                pool: {metric: torch.stack([o.values[pool][metric] for o in same]).mean(0) for metric in row}
                for pool, row in outcome.values.items()
            },
            first_hits={pool: torch.cat([o.first_hits[pool] for o in same], 1) for pool in outcome.first_hits},
        )
    return dataclasses.replace(first, tasks=tasks)


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
