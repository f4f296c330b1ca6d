"""Whether reranking helps: a task's figure before and after, and how sure the difference is."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from lightning_mmembed.errors import UserInputError
from lightning_mmembed.items import task_order
from lightning_mmembed.retrieval.compare import Difference
from lightning_mmembed.retrieval.results import POOLS, RetrievalResult, task_groups
from lightning_mmembed.retrieval.significance import paired_bootstrap
from lightning_mmembed.retrieval.table import MISSING, SUMMARIES, percent, points

#: By pool, then by task and by group of tasks.
Effects = dict[str, dict[str, Difference]]


def effects(before: RetrievalResult, after: RetrievalResult, metric: str = "hit@1") -> Effects:
    """How far a metric moved, query by query, with 95 % intervals and p-values of a paired bootstrap.

    Args:
        before: An evaluation.
        after: The same queries, ranked again.
        metric: Canonical name. One that is as deep as what was reordered, or deeper, cannot move.

    Raises:
        UserInputError: If the metric was not evaluated.
    """
    found: Effects = {}
    for pool in POOLS:
        differences = {}
        for name, outcome in before.tasks.items():
            if pool in outcome.values:
                if metric not in outcome.values[pool]:
                    raise UserInputError(
                        f"metric={metric!r} was not evaluated; choose of {', '.join(outcome.values[pool])}"
                    )
                moved = after.tasks[name].values[pool][metric].double() - outcome.values[pool][metric].double()
                differences[name] = moved.numpy()
        if differences:
            found[pool] = paired_bootstrap(differences, task_groups(differences))
    return found


def verdict(difference: Difference) -> str:
    """``"helps"`` where the whole interval lies above zero, ``"hurts"`` where it lies below, else ``""``.

    Example:
        >>> verdict(Difference(0.1, 0.02, 0.18, 0.01, 0.02)), verdict(Difference(0.1, 0.0, 0.2, 0.06, 0.2))
        ('helps', '')
    """
    return "helps" if difference.low > 0 else "hurts" if difference.high < 0 else ""


def helped(found: Effects) -> list[str]:
    """The tasks where reranking helps over the first of the pools, in canonical order; see :func:`verdict`."""
    pool = next(iter(found.values()))
    return sorted((name for name in pool if name not in SUMMARIES and verdict(pool[name]) == "helps"), key=task_order)


def effect_table(
    before: RetrievalResult,
    after: RetrievalResult,
    found: Effects,
    pool: str,
    metric: str,
    reranked: Collection[str],
    title: str,
) -> Table:
    """A row for each task in canonical order, then the averages: before, after, difference, interval, verdict.

    Args:
        before: See :func:`effects`.
        after: See :func:`effects`.
        found: What :func:`effects` found.
        pool: Whose rankings.
        metric: Whose figures.
        reranked: Tasks that were; of others only the figure before is shown.
        title: Printed above.
    """
    table = Table(title=Text(title), box=box.SIMPLE_HEAD, title_style="bold", padding=0)
    table.add_column("task", no_wrap=True)
    for header in ("before", "after", "difference", "95 % interval", "reranking"):
        table.add_column(header, justify="right", no_wrap=True)
    figures = [_figures(result, pool, metric) for result in (before, after)]
    tasks = sorted((name for name in found[pool] if name not in SUMMARIES), key=task_order)
    for rows in (tasks, [key for key in SUMMARIES if key in found[pool]]):
        for name in rows:
            one, other, moved = figures[0][name], figures[1][name], found[pool][name]
            cells = [percent(one), MISSING, MISSING, MISSING, "left out"]
            if name in SUMMARIES or name in reranked:
                interval = f"{points(moved.low)} to {points(moved.high)}"
                cells = [percent(one), percent(other), points(moved.value), interval, verdict(moved)]
            table.add_row(Text(SUMMARIES.get(name, name)), *cells)
        table.add_section()
    return table


def effect_facts(before: RetrievalResult, after: RetrievalResult, found: Effects, metric: str) -> dict[str, Any]:
    """The same as :func:`effect_table` shows, for JSON: by pool and name the two figures and their difference."""
    return {
        pool: {
            name: {
                "before": _figures(before, pool, metric)[name],
                "after": _figures(after, pool, metric)[name],
                **asdict(difference),
                "verdict": verdict(difference),
            }
            for name, difference in differences.items()
        }
        for pool, differences in found.items()
    }


def _figures(result: RetrievalResult, pool: str, metric: str) -> Mapping[str, float]:
    content = result.metrics[pool]
    rows = {**content["tasks"], **{group: content[group] for group in SUMMARIES if group in content}}
    return {name: row[metric] for name, row in rows.items()}
