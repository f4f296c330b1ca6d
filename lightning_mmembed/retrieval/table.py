"""The metrics of an evaluation, and the comparison of several, as tables in the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from lightning_mmembed.items import task_order
from lightning_mmembed.retrieval.compare import ComparedRun, Difference
from lightning_mmembed.retrieval.results import POOLS

#: The rows under the tasks: their key in a pool of ``metrics.json``, and what a table calls them.
SUMMARIES = {"average": "average", "single_modal": "single-modal queries", "multi_modal": "multi-modal queries"}

#: Written where a figure was not measured.
MISSING = "\N{EN DASH}"


def percent(share: float | None) -> str:
    """Write a share from 0 to 1 as a percentage with one decimal; nothing and NaN become a dash.

    Example:
        >>> percent(0.3149)
        '31.5'
    """
    return MISSING if share is None or math.isnan(share) else f"{100 * share:.1f}"


def points(difference: float) -> str:
    """Write a difference between shares in percentage points, with its sign.

    Example:
        >>> points(0.021), points(-0.0002)
        ('+2.1', '+0.0')
    """
    # Adding zero makes a positive zero of a negative one.
    return f"{round(100 * difference, 1) + 0.0:+.1f}"


def mark(difference: Difference) -> str:
    """An arrow where a difference is significant, up for better; else nothing.

    The p-value is the one adjusted over the tasks (Holm) where there is one, and has to be below 0.05.

    Example:
        >>> mark(Difference(0.02, 0.01, 0.03, p=0.001, p_holm=0.016))
        '▲'
    """
    if not _p_value(difference) < 0.05:
        return ""
    return "▲" if difference.value > 0 else "▼"


def task_names(pools: Mapping[str, Any]) -> list[str]:
    """Every task that any of the ``pools`` holds, in M-BEIR's canonical order."""
    return sorted({name for pool in pools.values() for name in (pool or {}).get("tasks", {})}, key=task_order)


def metrics_table(
    metrics: Mapping[str, Any],
    keys: Sequence[str] = ("hit@1", "hit@5", "hit@10", "mrr@10", "ndcg@10", "modality@1"),
    title: str = "",
) -> Table:
    """Lay out the metrics of an evaluation for the terminal.

    Args:
        metrics: The content of ``metrics.json``: pool, then ``"tasks"`` (by name) or ``"average"``, then shares.
        keys: The union pool's columns, in order.
        title: Printed above the table.

    Returns:
        A row per task in canonical order, then the averages; percentages. The last column is hit@5 over the
        local pools where ``metrics`` holds them. The caption tells the headline averages with their 95 % intervals
        where ``metrics`` holds them.
    """
    pools = {name: metrics.get(name) or {} for name in POOLS}
    union, local = pools["union"], pools["local"]
    # Text, not str: rich would read square brackets in a str as markup.
    # Without padding the columns are one space apart: M-BEIR's longest task name then fits in 80 columns.
    table = Table(title=Text(title) if title else None, box=box.SIMPLE_HEAD, title_style="bold", padding=0)
    table.caption = _headline(pools)
    table.add_column("task", no_wrap=True)
    for header in [*keys, *(["local hit@5"] if local else [])]:
        table.add_column(Text(header), justify="right", no_wrap=True)

    def add(name: str, wide: Mapping[str, float], narrow: Mapping[str, float], style: str = "") -> None:
        cells = [percent(wide.get(key)) for key in keys]
        table.add_row(Text(name), *cells, *([percent(narrow.get("hit@5"))] if local else []), style=style)

    for name in task_names(pools):
        add(name, union.get("tasks", {}).get(name, {}), local.get("tasks", {}).get(name, {}))
    table.add_section()
    for key, label in SUMMARIES.items():
        if key == "average" or key in union or key in local:
            add(label, union.get(key, {}), local.get(key, {}), style="bold" if key == "average" else "")
    return table


def comparison_table(comparison: Sequence[ComparedRun]) -> Group:
    """Lay out, for the terminal, how the first run over each pool stands to every other run over it.

    Args:
        comparison: Per pool the run itself, then other runs; published systems, which have a ``source``, are left
            out.

    Returns:
        A table per pool and other run, with a row per task in canonical order, then the averages: both headline
        figures in percent, the difference (other minus this) with its 95 % interval in points, and its p-value,
        adjusted over the tasks by Holm's method except for the averages.
    """
    tables = []
    for pool in POOLS:
        runs = [run for run in comparison if run.pool == pool and not run.source]
        tables += [_pair_table(runs[0], other) for other in runs[1:]]
    return Group(*tables)


def _pair_table(own: ComparedRun, other: ComparedRun) -> Table:
    """The comparison of two runs over one pool."""
    title = Text(f"{own.pool}: {other.name}, against {own.name}")
    table = Table(title=title, box=box.SIMPLE_HEAD, title_style="bold", padding=0)
    table.add_column("task", no_wrap=True)
    for header in ("this run", "other", "difference", "95 % interval", "p (Holm)"):
        table.add_column(header, justify="right", no_wrap=True)
    keys = {*own.values, *other.values}
    tasks = sorted(keys - SUMMARIES.keys(), key=task_order)
    for group in (tasks, [key for key in SUMMARIES if key in keys]):
        for key in group:
            shares = (percent(own.values.get(key)), percent(other.values.get(key)))
            table.add_row(Text(SUMMARIES.get(key, key)), *shares, *_difference_cells(other.differences.get(key)))
        table.add_section()
    return table


def _difference_cells(difference: Difference | None) -> tuple[str, str, str]:
    if difference is None:
        return MISSING, MISSING, MISSING
    p = _p_value(difference)
    return (
        f"{mark(difference)} {points(difference.value)}",
        f"{points(difference.low)} to {points(difference.high)}",
        "<0.001" if p < 0.001 else f"{p:.3f}",
    )


def _p_value(difference: Difference) -> float:
    return difference.p if difference.p_holm is None else difference.p_holm


def _headline(pools: Mapping[str, Any]) -> str | None:
    """The averages that a paper quotes, with their intervals."""
    averages = {name: pool["headline"]["average"] for name, pool in pools.items() if "headline" in pool}
    figures = [f"{n} {percent(a['value'])} ({percent(a['low'])}-{percent(a['high'])})" for n, a in averages.items()]
    return f"headline average: {', '.join(figures)}" if figures else None
