"""What the tables of the report show, computed from the metrics of a run; the template lays it out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_mmembed.errors import UserInputError
from lightning_mmembed.items import TASK_MODALITIES, Task, task_order
from lightning_mmembed.retrieval.compare import ComparedRun, Difference
from lightning_mmembed.retrieval.results import POOLS
from lightning_mmembed.retrieval.table import SUMMARIES, task_names

#: Columns of the per-task table, in order; other keys of ``metrics`` are not shares and stay out of it.
METRIC_KEYS: tuple[str, ...] = (
    *("hit@1", "hit@5", "hit@10"),
    *("recall@1", "recall@5", "recall@10"),
    *("mrr@10", "ndcg@10", "modality@1"),
)

#: The column of the metric that published tables show for each task, with its interval.
HEADLINE = "headline"

#: The groups of systems in a comparison, and what stands above them.
_GROUPS = {"own": "this run", "other": "other runs", "published": "published"}

_ERRORS = {"wrong_modality": "wrong modality", "wrong_domain": "wrong domain", "other": "other"}


@dataclass(frozen=True)
class Cell:
    """A figure in a table.

    Args:
        value: A share; ``None`` if it is not known.
        key: The metric; of a headline the metric that it is for this task.
        interval: 95 % interval of ``value``.
        spread: Standard deviation over the prompts, where ``value`` is their mean.
        difference: To the first run.
        first: Whether a group of columns starts here.
        headline: Whether it stands in a headline column.
    """

    value: float | None
    key: str = ""
    interval: tuple[float, float] | None = None
    spread: float | None = None
    difference: Difference | None = None
    first: bool = False
    headline: bool = False


@dataclass(frozen=True)
class Figure:
    """A large figure at the head of the page: a pool's average, with its 95 % interval where it is known."""

    pool: str
    key: str
    value: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Column:
    """A system in the comparison.

    Args:
        name: Of the run or the system.
        group: ``"own"``, ``"other"`` or ``"published"``.
        source: Number of its footnote, from 1; 0 for a run of one's own.
        first: Whether a group of columns starts here.
    """

    name: str
    group: str
    source: int
    first: bool


def direction(task: str) -> str:
    """The modalities of a task, such as ``text → image``; empty for names that are not M-BEIR's.

    Example:
        >>> direction("mscoco_task3")
        'image → text'
    """
    try:
        query, wanted = TASK_MODALITIES[Task.parse(task).task_id]
    except UserInputError:
        return ""
    return f"{query} → {wanted}"


def average(metrics: Mapping[str, Any], pool: str, key: str) -> float | None:
    """The average of a metric over the tasks of a pool; ``None`` if it is not known."""
    value: float | None = ((metrics.get(pool) or {}).get("average") or {}).get(key)
    return None if value is None or math.isnan(value) else value


def headline_figures(metrics: Mapping[str, Any]) -> list[Figure]:
    """The figures at the head of the page: a pool's headline where it is known, else its hit@5."""
    found = []
    for pool, key in (("union", "hit@5"), ("union", "modality@1"), ("local", "hit@5")):
        headline = (metrics.get(pool) or {}).get("headline") if key == "hit@5" else None
        value = average(metrics, pool, key)
        if headline:
            kinds = {row["metric"] for row in headline["tasks"].values()}
            mean = headline["average"]
            # On M-BEIR some tasks are scored by hit@10: the average then bears neither name.
            name = next(iter(kinds)) if len(kinds) == 1 else HEADLINE
            found.append(Figure(pool, name, mean["value"], (mean["low"], mean["high"])))
        elif value is not None:
            found.append(Figure(pool, key, value))
    return found


def task_table(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Column groups ``(pool, keys)``, rows ``(task, direction, cells)``, summary rows and the number of prompts."""
    pools = {pool: metrics[pool] for pool in POOLS if (metrics.get(pool) or {}).get("tasks")}
    prompts = metrics.get("prompts") or {}
    spreads = {pool: prompts.get(pool, {}).get("headline", {}) for pool in pools}
    groups: list[tuple[str, list[str]]] = []
    for name, pool in pools.items():
        present = {key for row in pool["tasks"].values() for key in row}
        keys = [key for key in METRIC_KEYS if key in present]
        groups.append((name, [HEADLINE, *keys] if "headline" in pool else keys))
    shown = [key for key in SUMMARIES if key == "average" or any(key in pool for pool in pools.values())]
    return {
        "groups": groups,
        "rows": [(task, direction(task), _task_cells(pools, spreads, groups, task)) for task in task_names(pools)],
        "summaries": [(SUMMARIES[key], _summary_cells(pools, spreads, groups, key)) for key in shown],
        "prompts": max((len(spread["average"]["values"]) for spread in spreads.values() if spread), default=0),
    }


def _task_cells(
    pools: Mapping[str, Any], spreads: Mapping[str, Any], groups: Sequence[tuple[str, list[str]]], task: str
) -> list[Cell]:
    return _cells(
        groups,
        {name: pool["tasks"].get(task, {}) for name, pool in pools.items()},
        {name: pool.get("headline", {}).get("tasks", {}).get(task) for name, pool in pools.items()},
        {name: spread.get("tasks", {}).get(task) for name, spread in spreads.items()},
    )


def _summary_cells(
    pools: Mapping[str, Any], spreads: Mapping[str, Any], groups: Sequence[tuple[str, list[str]]], key: str
) -> list[Cell]:
    return _cells(
        groups,
        {name: pool.get(key) or {} for name, pool in pools.items()},
        {name: pool.get("headline", {}).get(key) for name, pool in pools.items()},
        {name: spread.get(key) for name, spread in spreads.items()},
    )


def _cells(
    groups: Sequence[tuple[str, list[str]]],
    shares: Mapping[str, Mapping[str, float]],
    headlines: Mapping[str, Mapping[str, Any] | None],
    spreads: Mapping[str, Mapping[str, Any] | None],
) -> list[Cell]:
    """The cells of one row over all pools."""
    cells = []
    for pool, keys in groups:
        for n, key in enumerate(keys):
            if key == HEADLINE:
                found = headlines[pool] or {}
                interval = (found["low"], found["high"]) if found else None
                spread = (spreads[pool] or {}).get("std")
                name = found.get("metric", "")
                cells.append(Cell(found.get("value"), name, interval, spread, first=not n, headline=True))
            else:
                cells.append(Cell(shares[pool].get(key), key, first=not n))
    return cells


def error_rows(metrics: Mapping[str, Any]) -> list[tuple[str, int, list[tuple[str, int, float | None]]]]:
    """Why first results over the union pool were wrong: label, misses, and per kind its name, count and share."""
    errors = (metrics.get("union") or {}).get("errors")
    if not errors:
        return []
    counts = [(task, errors["tasks"][task]) for task in sorted(errors["tasks"], key=task_order)]
    return [
        (label, row["misses"], [(kind, row[key], _share(row[key], row["misses"])) for key, kind in _ERRORS.items()])
        for label, row in [*counts, ("all queries", errors["all"])]
    ]


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def unreachable_rows(metrics: Mapping[str, Any]) -> list[tuple[str, Mapping[str, int]]]:
    """The tasks with labelled positives that their local pool does not hold, and the counts of these."""
    found = metrics.get("unreachable") or {}
    return [(task, found[task]) for task in sorted(found, key=task_order) if found[task]["positives"]]


def comparison_views(metrics: Mapping[str, Any], comparison: Sequence[ComparedRun]) -> list[dict[str, Any]]:
    """Per pool over which a run of one's own was measured: columns, rows, systems with averages only, and sources."""
    views = []
    for pool in POOLS:
        runs = [run for run in comparison if run.pool == pool]
        if any(not run.source for run in runs):
            headline = ((metrics.get(pool) or {}).get("headline") or {}).get("tasks", {})
            views.append(_comparison_view(pool, runs, {task: row["metric"] for task, row in headline.items()}))
    return views


def _comparison_view(pool: str, runs: Sequence[ComparedRun], kinds: Mapping[str, str]) -> dict[str, Any]:
    """The comparison over one pool; ``kinds`` holds the headline metric of each task."""
    own = [run for run in runs if not run.source]
    published = sorted((run for run in runs if run.source), key=lambda run: run.values.get("average", 0), reverse=True)
    # Systems of which only averages are known would be columns of dashes: they get a table of their own.
    full = [run for run in published if _tasks([run])]
    brief = [run for run in published if not _tasks([run])]
    # Footnotes are numbered as they are met, first along the head of the table, then below it.
    sources = list(dict.fromkeys(run.source for run in [*full, *brief]))
    number = {"": 0, **{source: n for n, source in enumerate(sources, 1)}}
    groups = ["own", *["other"] * (len(own) - 1), *["published"] * len(full)]
    starts = [not n or group != groups[n - 1] for n, group in enumerate(groups)]
    shown = [*own, *full]

    def cells(key: str) -> list[Cell]:
        return [
            Cell(run.values.get(key), interval=run.intervals.get(key), difference=run.differences.get(key), first=first)
            for run, first in zip(shown, starts, strict=True)
        ]

    columns = zip(shown, groups, starts, strict=True)
    return {
        "pool": pool,
        "groups": [(_GROUPS[group], group, size) for group, size in Counter(groups).items()],
        "columns": [Column(run.name, group, number[run.source], first) for run, group, first in columns],
        "rows": [(task, kinds.get(task, ""), cells(task)) for task in _tasks(shown)],
        "summaries": [(label, cells(key)) for key, label in SUMMARIES.items() if any(key in r.values for r in shown)],
        "labels": list(SUMMARIES.values()),
        "averages": [
            (run.name, number[run.source], [run.values.get(key) for key in SUMMARIES])
            for run in ([*own, *brief] if brief else [])
        ],
        "sources": sources,
    }


def _tasks(runs: Sequence[ComparedRun]) -> list[str]:
    """Every task of which any of the runs has a figure, in canonical order."""
    return sorted({key for run in runs for key in run.values} - SUMMARIES.keys(), key=task_order)
