"""What the report and the terminal show of a mining: counts of each task, and scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from lightning_mmembed.items import task_order
from lightning_mmembed.mining import SCORE_BOUNDS, total_counts
from lightning_mmembed.mining_rule import FILTERS, KINDS
from lightning_mmembed.retrieval.table import MISSING, percent
from lightning_mmembed.retrieval.views import direction

if TYPE_CHECKING:
    from lightning_mmembed.retrieval.report import GalleryQuery


@dataclass(frozen=True)
class MinedQuery:
    """A query with its positive and some of its negatives, and what stands above each of them."""

    query: GalleryQuery
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Mined:
    """A mining to show.

    Args:
        name: Such as ``"mining 1, after 5 epochs"``.
        audit: By task what :func:`~lightning_mmembed.mining.mining_audit` gives; what an older one lacks is left out.
        examples: Some of the negatives.
    """

    name: str
    audit: Mapping[str, Mapping[str, Any]]
    examples: Sequence[MinedQuery] = ()


@dataclass(frozen=True)
class AuditRow:
    """What was mined for a task, or for all.

    Args:
        label: The task.
        direction: Its modalities.
        queries: Number of queries.
        with_kinds: For each kind how many have a negative of it, and for ``None`` how many have no negative at all.
        negatives: For each kind the number of negatives and their mean rank; ``None`` if that is not known.
        met: Labelled positives that were ranked and taken out.
        positives: Labelled positives; 0 if that is not known.
        left_out: Candidates that each threshold left out.
    """

    label: str
    direction: str
    queries: int
    with_kinds: tuple[int, ...]
    negatives: tuple[tuple[int, float] | None, ...]
    met: int
    positives: int
    left_out: tuple[int, ...]


def audit_view(mined: Mined) -> dict[str, Any]:
    """The section of a mining: its name, kinds, thresholds, rows (the last one for all tasks), bars and examples."""
    audit, totals = mined.audit, total_counts(mined.audit)
    kinds = [kind for kind in KINDS if f"with_{kind}" in totals]
    filters = [name for name in FILTERS if f"left_out_by_{name}" in totals]
    tasks = sorted(audit, key=task_order)
    rows = [_row(task, direction(task), audit[task], kinds, filters) for task in tasks]
    whole: dict[str, Any] = {**totals, "kinds": _together([task.get("kinds", {}) for task in audit.values()])}
    rows.append(_row("all tasks", "", whole, kinds, filters))
    return {
        "name": mined.name,
        "kinds": [kind.replace("_", " ") for kind in kinds],
        "filters": filters,
        "rows": rows,
        "histogram": _histogram([whole["kinds"].get(kind, {}).get("scores", []) for kind in kinds]),
        "examples": mined.examples,
    }


def audit_table(audit: Mapping[str, Mapping[str, Any]]) -> Table:
    """The counts of a mining, to print."""
    view = audit_view(Mined("", audit))
    table = Table()
    table.add_column("task", no_wrap=True)
    heads = ["queries", *(f"with {kind}" for kind in (*view["kinds"], "none")), "negatives", "positives met"]
    for head in [*heads, *(f"left out by {name}" for name in view["filters"])]:
        table.add_column(head, justify="right")
    for row in view["rows"]:
        negatives = sum(found[0] for found in row.negatives if found)
        met = percent(row.met / row.positives) + " %" if row.positives else MISSING
        shares = [f"{percent(count / max(1, row.queries))} %" for count in row.with_kinds]
        left_out = [f"{count:,}" for count in row.left_out]
        table.add_row(row.label, f"{row.queries:,}", *shares, f"{negatives:,}", met, *left_out)
    return table


def _row(
    label: str, modalities: str, counts: Mapping[str, Any], kinds: Sequence[str], filters: Sequence[str]
) -> AuditRow:
    found = counts.get("kinds", {})
    nothing = (0, float("nan")) if "positives" in counts else None  # an older audit does not count negatives
    return AuditRow(
        label,
        modalities,
        counts["queries"],
        tuple(counts.get(f"with_{kind}", 0) for kind in (*kinds, "none")),
        tuple((found[kind]["negatives"], found[kind]["mean_rank"]) if kind in found else nothing for kind in kinds),
        counts["positives_met"],
        counts.get("positives", 0),
        tuple(counts.get(f"left_out_by_{name}", 0) for name in filters),
    )


def _together(parts: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The kinds of several tasks as those of one."""
    whole = {}
    for kind in KINDS:
        some = [part[kind] for part in parts if kind in part]
        if some:
            count = sum(part["negatives"] for part in some)
            ranks = sum(part["negatives"] * part["mean_rank"] for part in some)
            scores = np.sum([part["scores"] for part in some], 0).tolist()
            whole[kind] = {"negatives": count, "mean_rank": ranks / count, "scores": scores}
    return whole


def _histogram(kinds: Sequence[Sequence[int]]) -> dict[str, Any] | None:
    """Lowest and highest bound, and bars (kind, left edge, width, height, count), all as shares of the drawing."""
    counted = [counts for counts in kinds if len(counts)]
    if not counted:
        return None
    filled = np.flatnonzero(np.sum(counted, 0))
    first, last = int(filled[0]), int(filled[-1]) + 1
    width, most = 1 / (last - first), max(max(counts) for counts in counted)
    bars = [
        (kind, (place - first + kind / len(kinds)) * width, width / len(kinds), counts[place] / most, counts[place])
        for kind, counts in enumerate(kinds)
        for place in range(first, last)
        if len(counts) and counts[place]
    ]
    return {"low": SCORE_BOUNDS[first], "high": SCORE_BOUNDS[last], "bars": bars}
