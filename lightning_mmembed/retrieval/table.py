"""The metrics of an evaluation as a table in the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from lightning_mmembed.items import task_order

#: Written where a figure was not measured.
MISSING = "\N{EN DASH}"


def percent(share: float | None) -> str:
    """Write a share from 0 to 1 as a percentage with one decimal; nothing and NaN become a dash.

    Example:
        >>> percent(0.3149)
        '31.5'
    """
    return MISSING if share is None or math.isnan(share) else f"{100 * share:.1f}"


def task_names(metrics: Mapping[str, Any]) -> list[str]:
    """Every task that any pool of ``metrics`` holds, in M-BEIR's canonical order."""
    return sorted({name for pool in metrics.values() for name in (pool or {}).get("tasks", {})}, key=task_order)


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
        A row per task in canonical order, then the average; percentages. The last column is hit@5 over the
        local pools where ``metrics`` holds them.
    """
    union, local = metrics.get("union") or {}, metrics.get("local") or {}
    # Text, not str: rich would read square brackets in a str as markup.
    # Without padding the columns are one space apart: M-BEIR's longest task name then fits in 80 columns.
    table = Table(title=Text(title) if title else None, box=box.SIMPLE_HEAD, title_style="bold", padding=0)
    table.add_column("task", no_wrap=True)
    for header in [*keys, *(["local hit@5"] if local else [])]:
        table.add_column(Text(header), justify="right", no_wrap=True)

    def add(name: str, wide: Mapping[str, float], narrow: Mapping[str, float], style: str = "") -> None:
        cells = [percent(wide.get(key)) for key in keys]
        table.add_row(Text(name), *cells, *([percent(narrow.get("hit@5"))] if local else []), style=style)

    for name in task_names({"union": union, "local": local}):
        add(name, union.get("tasks", {}).get(name, {}), local.get("tasks", {}).get(name, {}))
    table.add_section()
    add("average", union.get("average", {}), local.get("average", {}), style="bold")
    return table
