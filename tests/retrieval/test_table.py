"""The terminal table shows the figures that were given, in the order of every published table."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import pytest
from rich.console import Console, RenderableType

from lightning_mmembed.items import MBEIR_TASKS
from lightning_mmembed.retrieval.compare import ComparedRun, Difference
from lightning_mmembed.retrieval.table import comparison_table, mark, metrics_table, percent

# In reverse order, with a task of another dataset in front.
UNION = {name: {"hit@1": 0.1 + 0.01 * n, "modality@1": 0.5 + 0.01 * n} for n, name in enumerate(MBEIR_TASKS)}
METRICS: dict[str, Any] = {
    "union": {
        "tasks": {"zoo_task3": {"hit@1": 0.9, "modality@1": 1.0}, **dict(reversed(UNION.items()))},
        "average": {"hit@1": 0.219, "modality@1": 0.60349},
    },
    "local": {"tasks": {"zoo_task3": {"hit@5": 0.95}, "cirr_task7": {"hit@5": 0.305}}, "average": {"hit@5": 0.6279}},
}
# What an evaluation writes beside the tasks.
FULL: dict[str, Any] = {
    "union": {
        **METRICS["union"],
        "single_modal": {"hit@1": 0.25},
        "multi_modal": {"hit@1": 0.125},
        "headline": {"tasks": {}, "average": {"value": 0.3667, "low": 0.35, "high": 0.38}},
    },
    "local": {**METRICS["local"], "multi_modal": {"hit@5": 0.31}},
    "prompts": {"tasks": {"pets_task3": {"hit@1": 0.5}}},
    "protocol": {"split": "test", "instruction": 0},
}
RUNS = [
    ComparedRun("mine", "union", {"zoo_task3": 0.25, "cirr_task7": 0.5, "average": 0.375}),
    ComparedRun(
        "[b]theirs",
        "union",
        {"zoo_task3": 0.2, "cirr_task7": 0.75, "average": 0.475},
        differences={
            "zoo_task3": Difference(-0.05, -0.11, 0.01, p=0.04, p_holm=0.08),
            "cirr_task7": Difference(0.25, 0.2, 0.3, p=0.0, p_holm=0.0),
            "average": Difference(0.1, 0.05, 0.15, p=0.02, p_holm=None),
        },
    ),
    ComparedRun("published", "union", {"cirr_task7": 0.9, "average": 0.9}, source="a paper"),
    ComparedRun("mine", "local", {"zoo_task3": 0.5, "average": 0.5}),
    ComparedRun("lacking", "local", {"average": 0.25}),
]


def words(table: RenderableType, width: int = 200) -> list[list[str]]:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    with console.capture() as capture:
        console.print(table)
    lines = (line.split() for line in capture.get().splitlines())
    return [line for line in lines if len(line) > 1]


def printed(metrics: Mapping[str, Any], **options: Any) -> list[list[str]]:
    return words(metrics_table(metrics, **options))


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


@pytest.mark.parametrize("table", [metrics_table(FULL), comparison_table(RUNS)], ids=["metrics", "comparison"])
def test_the_table_of_the_benchmark_fits_in_80_columns(table: RenderableType) -> None:
    assert words(table, width=80) == words(table)
    assert not any("\N{HORIZONTAL ELLIPSIS}" in word for line in words(table, width=80) for word in line)


def test_the_means_of_both_kinds_of_queries_stand_under_the_average() -> None:
    *_, average, single, multi, _ = printed(FULL, keys=("hit@1",))
    assert average == ["average", "21.9", "62.8"]
    assert single == ["single-modal", "queries", "25.0", "\N{EN DASH}"]
    assert multi == ["multi-modal", "queries", "12.5", "31.0"]


def test_the_caption_tells_the_headline_with_its_interval() -> None:
    assert printed(FULL)[-1] == ["headline", "average:", "union", "36.7", "(35.0-38.0)"]


def test_what_is_no_pool_adds_no_tasks() -> None:
    assert "pets_task3" not in [row[0] for row in printed(FULL)]


def test_every_other_run_is_compared_with_the_first_over_the_same_pool() -> None:
    header = ["task", "this", "run", "other", "difference", "95", "%", "interval", "p", "(Holm)"]
    assert words(comparison_table(RUNS)) == [
        ["union:", "[b]theirs,", "against", "mine"],
        header,
        ["cirr_task7", "50.0", "75.0", "▲", "+25.0", "+20.0", "to", "+30.0", "<0.001"],
        ["zoo_task3", "25.0", "20.0", "-5.0", "-11.0", "to", "+1.0", "0.080"],
        ["average", "37.5", "47.5", "▲", "+10.0", "+5.0", "to", "+15.0", "0.020"],
        ["local:", "lacking,", "against", "mine"],
        header,
        ["zoo_task3", "50.0", *["\N{EN DASH}"] * 4],
        ["average", "50.0", "25.0", *["\N{EN DASH}"] * 3],
    ]


@pytest.mark.parametrize(
    ("difference", "expected"),
    [
        (Difference(0.1, 0.0, 0.2, p=0.001, p_holm=0.049), "▲"),
        (Difference(-0.1, -0.2, 0.0, p=0.001, p_holm=0.049), "▼"),
        (Difference(-0.1, -0.2, 0.0, p=0.01, p_holm=0.05), ""),
        (Difference(0.1, 0.0, 0.2, p=0.01, p_holm=None), "▲"),
        (Difference(0.0, 0.0, 0.0, p=float("nan"), p_holm=None), ""),
    ],
)
def test_a_mark_needs_an_adjusted_p_value_below_5_percent(difference: Difference, expected: str) -> None:
    assert mark(difference) == expected


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
