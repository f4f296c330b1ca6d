"""The terminal table shows the figures that were given, in the order of every published table."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from lightning_mmembed.items import MBEIR_TASKS
from lightning_mmembed.retrieval.table import metrics_table, percent

# In reverse order, with a task of another dataset in front.
UNION = {name: {"hit@1": 0.1 + 0.01 * n, "modality@1": 0.5 + 0.01 * n} for n, name in enumerate(MBEIR_TASKS)}
METRICS: dict[str, Any] = {
    "union": {
        "tasks": {"zoo_task3": {"hit@1": 0.9, "modality@1": 1.0}, **dict(reversed(UNION.items()))},
        "average": {"hit@1": 0.219, "modality@1": 0.60349},
    },
    "local": {"tasks": {"zoo_task3": {"hit@5": 0.95}, "cirr_task7": {"hit@5": 0.305}}, "average": {"hit@5": 0.6279}},
}


def printed(metrics: Mapping[str, Any], **options: Any) -> list[list[str]]:
    console = Console(width=200, file=io.StringIO(), color_system=None)
    with console.capture() as capture:
        console.print(metrics_table(metrics, **options))
    lines = (line.split() for line in capture.get().splitlines())
    return [line for line in lines if len(line) > 1]


def test_tasks_stand_in_canonical_order_and_the_average_last() -> None:
    _, *rows = printed(METRICS)
    assert [row[0] for row in rows] == [*MBEIR_TASKS, "zoo_task3", "average"]


def test_every_figure_is_the_one_given_and_a_missing_one_is_a_dash() -> None:
    header, *rows = printed(METRICS, keys=("hit@1", "modality@1"))
    assert header == ["task", "hit@1", "modality@1", "local", "hit@5"]
    shown = {name: figures for name, *figures in rows}
    for name, figures in UNION.items():
        assert shown[name][:2] == [percent(figures["hit@1"]), percent(figures["modality@1"])]
    assert shown["zoo_task3"] == ["90.0", "100.0", "95.0"]
    assert shown["cirr_task7"][2] == "30.5"
    assert shown["oven_task8"][2] == "\N{EN DASH}"
    assert shown["average"] == ["21.9", "60.3", "62.8"]


def test_there_is_no_local_column_without_local_pools() -> None:
    header, *_ = printed({"union": METRICS["union"], "local": None})
    assert header == ["task", "hit@1", "hit@5", "hit@10", "mrr@10", "ndcg@10", "modality@1"]


def test_the_table_of_the_benchmark_fits_in_80_columns() -> None:
    console = Console(width=80, file=io.StringIO(), color_system=None)
    with console.capture() as capture:
        console.print(metrics_table(METRICS))
    assert "\N{HORIZONTAL ELLIPSIS}" not in capture.get()


def test_square_brackets_are_no_markup() -> None:
    metrics = {"union": {"tasks": {"[red]x_task0": {}}, "average": {}}}
    console = Console(width=80, file=io.StringIO())
    with console.capture() as capture:
        console.print(metrics_table(metrics, keys=("hit@1",), title="[b]t"))
    assert "[red]x_task0" in capture.get()
    assert "[b]t" in capture.get()


def test_shares_are_written_as_percentages_with_one_decimal() -> None:
    assert [percent(share) for share in (0.0, 0.3149, 1.0)] == ["0.0", "31.5", "100.0"]
    assert [percent(share) for share in (None, float("nan"))] == ["\N{EN DASH}"] * 2
