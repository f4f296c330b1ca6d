"""A report of one run as a single HTML file that needs nothing else, neither network nor scripts."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from lightning_mmembed.files import write_atomically
from lightning_mmembed.items import Modality, task_order
from lightning_mmembed.retrieval.charts import draw_charts
from lightning_mmembed.retrieval.compare import ComparedRun
from lightning_mmembed.retrieval.mining_views import Mined, audit_view
from lightning_mmembed.retrieval.table import MISSING, mark, percent, points
from lightning_mmembed.retrieval.views import (
    average,
    comparison_views,
    direction,
    error_rows,
    headline_figures,
    task_table,
    unreachable_rows,
)

_MODALITIES = tuple(str(modality) for modality in Modality)


@dataclass(frozen=True)
class Stage:
    """What was measured at one point of a run.

    Args:
        name: Such as ``"untrained"``, ``"before mining"``, ``"after mining"`` or ``"final"``.
        metrics: Shaped like ``metrics.json``; a pool may be absent or ``None``.
        modality_matrix: ``[wanted][got]``: how many queries that want one modality have a first result of the
            other over the union pool.
    """

    name: str
    metrics: Mapping[str, Any]
    modality_matrix: Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class GalleryResult:
    """One retrieved candidate, with the bytes of its picture file."""

    did: str
    score: float
    text: str | None
    image: bytes | None
    modality: str
    is_positive: bool
    right_modality: bool


@dataclass(frozen=True)
class GalleryQuery:
    """A query with its first results, best first, and the bytes of its picture file."""

    task: str
    qid: str
    instruction: str | None
    text: str | None
    image: bytes | None
    positives: tuple[str, ...]
    results: tuple[GalleryResult, ...]

    @property
    def found_at(self) -> int | None:
        """Rank, from 1, of the first positive among the results; ``None`` if there is none."""
        return next((rank for rank, result in enumerate(self.results, 1) if result.is_positive), None)


def write_report(
    path: str | Path,
    *,
    title: str,
    metrics: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]] = (),
    stages: Sequence[Stage] = (),
    gallery: Sequence[GalleryQuery] = (),
    minings: Sequence[Mined] = (),
    comparison: Sequence[ComparedRun] = (),
    facts: Mapping[str, str] | None = None,
    config: str = "",
) -> Path:
    """Write the report of a run; sections without content are left out.

    Args:
        path: The HTML file; an older one is replaced once the new one is complete.
        title: Heading of the page.
        metrics: The content of ``metrics.json``: pool, then ``"tasks"`` (by name) or ``"average"``, then shares.
            Headlines, errors, unreachable positives and the protocol are shown where they are in it.
        history: A row per logged event; ``"step"`` and any logged keys. A ``"mined"`` key marks a mining event.
        stages: Measurements in the order in which they were taken.
        gallery: Queries with their results, grouped by task in the page.
        minings: What was mined, in the order in which it was.
        comparison: Per pool the run itself, then other runs, then published systems, which have a ``source``.
        facts: What the reader must know about the run, such as dataset, seed and versions.
        config: The run's configuration as YAML.

    Returns:
        ``path``.
    """
    sections = _sections(metrics, history, stages, gallery)
    compared = comparison_views(metrics, comparison)
    shown: dict[str, Any] = {"title": title, "facts": facts or {}, "config": config, "comparison": compared}
    shown["minings"] = [audit_view(mined) for mined in minings]
    page = template("report.html.j2").render(**shown, **sections)
    # A lone surrogate in a candidate's text must not cost the report.
    return write_atomically(path, page.encode(errors="replace"))


def picture_uri(data: bytes) -> str | None:
    """A picture file as a data URI, byte for byte; ``None`` if it is no PNG, JPEG, GIF or WebP."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        kind = "png"
    elif data.startswith(b"\xff\xd8\xff"):
        kind = "jpeg"
    elif data.startswith((b"GIF87a", b"GIF89a")):
        kind = "gif"
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        kind = "webp"
    else:
        return None
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def template(name: str) -> jinja2.Template:
    """A template of this folder; what it is given to show is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(missing=MISSING, mark=mark)
    environment.filters["percent"] = percent
    environment.filters["points"] = points
    environment.filters["picture_uri"] = picture_uri
    return environment.get_template(name)


def _sections(
    metrics: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    stages: Sequence[Stage],
    gallery: Sequence[GalleryQuery],
) -> dict[str, Any]:
    """What the template lays out, computed; an empty value leaves its section out."""
    return {
        "figures": headline_figures(metrics),
        "protocol": metrics.get("protocol") or {},
        "table": task_table(metrics),
        "errors": error_rows(metrics),
        "unreachable": unreachable_rows(metrics),
        "modalities": _MODALITIES,
        "matrices": [_matrix_view(stage) for stage in stages if _total(stage)],
        "stages": [stage.name for stage in stages],
        "stage_rows": _stage_rows(stages),
        "charts": draw_charts(history),
        "groups": _gallery_groups(gallery),
    }


def _row(stage: Stage, wanted: str) -> list[int]:
    """Queries that want ``wanted``, counted by the modality of their first result."""
    return [stage.modality_matrix.get(wanted, {}).get(got, 0) for got in _MODALITIES]


def _total(stage: Stage) -> int:
    return sum(sum(_row(stage, wanted)) for wanted in _MODALITIES)


def _matrix_view(stage: Stage) -> tuple[str, int, list[tuple[str, list[tuple[int, float | None, bool]]]]]:
    """Name, number of queries, and per wanted modality the cells (count, share of the row, on the diagonal)."""
    rows = []
    for wanted in _MODALITIES:
        counts = _row(stage, wanted)
        total = sum(counts)
        shares = [count / total if total else None for count in counts]
        rows.append((wanted, list(zip(counts, shares, (got == wanted for got in _MODALITIES), strict=True))))
    return stage.name, _total(stage), rows


def _right_share(stage: Stage, wanted: Iterable[str]) -> float | None:
    """Share of the queries wanting one of ``wanted`` whose first result has the modality they want."""
    rows = {modality: _row(stage, modality) for modality in wanted}
    total = sum(sum(row) for row in rows.values())
    right = sum(row[_MODALITIES.index(modality)] for modality, row in rows.items())
    return right / total if total else None


def _stage_rows(stages: Sequence[Stage]) -> list[tuple[str, str, list[tuple[float | None, float | None]]]]:
    """The comparison of the stages: label, metric and, per stage, (share, change since the stage before)."""
    rows = [
        (f"{wanted} wanted", "modality@1", [_right_share(stage, [wanted]) for stage in stages])
        for wanted in _MODALITIES
    ]
    rows.append(("all queries", "modality@1", [_right_share(stage, _MODALITIES) for stage in stages]))
    rows.append(("task average", "union hit@5", [average(stage.metrics, "union", "hit@5") for stage in stages]))
    view = []
    for label, key, values in rows:
        pairs = zip([None, *values], values, strict=False)
        changes = [None if before is None or now is None else now - before for before, now in pairs]
        if any(value is not None for value in values):
            view.append((label, key, list(zip(values, changes, strict=True))))
    return view


def _gallery_groups(gallery: Sequence[GalleryQuery]) -> list[tuple[str, str, int, list[GalleryQuery]]]:
    """Task, its modalities, number of queries whose positive was found, and the queries, in canonical order."""
    groups: dict[str, list[GalleryQuery]] = {}
    for query in gallery:
        groups.setdefault(query.task, []).append(query)
    return [
        (task, direction(task), sum(query.found_at is not None for query in groups[task]), groups[task])
        for task in sorted(groups, key=task_order)
    ]
