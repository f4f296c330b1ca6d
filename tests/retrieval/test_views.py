"""The comparison, the headlines and the errors in the report are those that were given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pages import Node, parse

from lightning_mmembed.items import MBEIR_TASKS
from lightning_mmembed.retrieval.compare import ComparedRun, Difference
from lightning_mmembed.retrieval.published import PUBLISHED
from lightning_mmembed.retrieval.report import write_report

OWN = ComparedRun(
    "mine",
    "union",
    {"zoo_task3": 0.2, "cirr_task7": 0.4, "mscoco_task0": 0.5, "average": 0.3667, "multi_modal": 0.4},
    intervals={"cirr_task7": (0.38, 0.42), "average": (0.36, 0.37)},
)
OTHER = ComparedRun(
    "theirs",
    "union",
    {"zoo_task3": 0.26, "cirr_task7": 0.3, "mscoco_task0": 0.48, "average": 0.3467},
    differences={
        "zoo_task3": Difference(0.06, 0.02, 0.1, p=0.001, p_holm=0.003),
        "cirr_task7": Difference(-0.1, -0.14, -0.06, p=0.0, p_holm=0.0),
        "mscoco_task0": Difference(-0.02, -0.04, -0.001, p=0.04, p_holm=0.08),
        "average": Difference(-0.02, -0.03, -0.01, p=0.01, p_holm=None),
    },
)
WEAK = ComparedRun("weak", "union", {"mscoco_task0": 0.1, "average": 0.1}, source="paper A; union pool")
GOOD = ComparedRun("good", "union", {"mscoco_task0": 0.6, "average": 0.7}, source="paper B; union pool")
BRIEF = ComparedRun("brief", "union", {"average": 0.65, "single_modal": 0.7}, source="paper A; union pool")
HEADLINE = {
    "tasks": {
        "mscoco_task0": {"metric": "hit@5", "value": 0.5, "low": 0.48, "high": 0.52},
        "fashioniq_task7": {"metric": "hit@10", "value": 0.3, "low": 0.28, "high": 0.32},
    },
    "average": {"value": 0.4, "low": 0.385, "high": 0.415},
    "single_modal": {"value": 0.5, "low": 0.48, "high": 0.52},
}
UNION = {
    "tasks": {"mscoco_task0": {"hit@5": 0.5}, "fashioniq_task7": {"hit@5": 0.25}},
    "average": {"hit@5": 0.375},
    "single_modal": {"hit@5": 0.5},
    "headline": HEADLINE,
}
MISSES = {"wrong_modality": 5, "wrong_domain": 2, "other": 13, "misses": 20}


def page(tmp_path: Path, metrics: dict[str, Any], *comparison: ComparedRun) -> Node:
    return parse(write_report(tmp_path / "report.html", title="A run", metrics=metrics, comparison=comparison))


def section(page: Node, name: str) -> Node:
    found = page.section(name)
    assert found is not None
    return found


def words(node: Node) -> str:
    """The text with a space between elements, which the page sets below or beside each other."""
    parts = (child if isinstance(child, str) else words(child) for child in node.children)
    return " ".join(" ".join(parts).replace("\N{EN DASH}", "-").split())


def rows(table: Node) -> dict[str, list[str]]:
    body = table.all("tbody")[0].all("tr")
    return {str(row.all("th")[0].children[0]): [words(cell) for cell in row.all("td")] for row in body}


@pytest.fixture
def compared(tmp_path: Path) -> Node:
    return section(page(tmp_path, {"union": UNION}, OWN, OTHER, WEAK, BRIEF, GOOD), "comparison")


def test_runs_come_first_and_published_systems_after_them_the_best_first(compared: Node) -> None:
    groups, names = compared.all("thead")[0].all("tr")
    heads = [(head.text, head.attributes["colspan"]) for head in groups.all("th", "group")]
    assert heads == [("this run", "1"), ("other runs", "1"), ("published", "2")]
    assert [head.children[0] for head in names.all("th", "system")] == ["mine", "theirs", "good", "weak"]
    for row in compared.all("tbody")[0].all("tr"):
        assert ["published" in cell.classes for cell in row.all("td")] == [False, False, True, True]


def test_every_figure_is_the_one_given_and_an_unknown_one_is_a_dash(compared: Node) -> None:
    assert rows(compared.all("table")[0]) == {
        "mscoco_task0": ["50.0", "48.0 -2.0 -4.0 to -0.1", "60.0", "10.0"],
        "cirr_task7": ["40.0 38.0-42.0", "30.0 ▼ -10.0 -14.0 to -6.0", "-", "-"],
        "zoo_task3": ["20.0", "26.0 ▲ +6.0 +2.0 to +10.0", "-", "-"],
        "average": ["36.7 36.0-37.0", "34.7 ▼ -2.0 -3.0 to -1.0", "70.0", "10.0"],
        "multi-modal queries": ["40.0", "-", "-", "-"],
    }


def test_tasks_stand_in_canonical_order_and_name_their_headline_metric(compared: Node) -> None:
    names = [row.all("th")[0].text for row in compared.all("tbody")[0].all("tr")]
    assert names == ["mscoco_task0hit@5", "cirr_task7", "zoo_task3", "average", "multi-modal queries"]


def test_a_mark_needs_an_adjusted_p_value_below_5_percent(compared: Node) -> None:
    marks = [(node.text[0], node.classes[1:]) for node in compared.all("span", "difference")]
    # In order of the tasks: 0.04 before the adjustment, then 0.0 and 0.003 after it; the average has none.
    assert marks == [("-", []), ("▼", ["down"]), ("▲", ["up"]), ("▼", ["down"])]


def test_a_published_system_is_linked_to_its_source(compared: Node) -> None:
    notes = {item.attributes["id"]: item.text for item in compared.all("li")}
    assert list(notes.values()) == [GOOD.source, WEAK.source]
    for head in (*compared.all("th", "system"), *compared.all("tr", "published")):
        links = [(link.attributes["href"] or "")[1:] for link in head.all("a")]
        sources = {run.name: run.source for run in (GOOD, WEAK, BRIEF)}
        assert [notes[link] for link in links] == [source for name, source in sources.items() if name in head.text]


def test_a_system_with_averages_only_stands_in_a_table_of_its_own(compared: Node) -> None:
    assert rows(compared.all("table")[1]) == {
        "mine": ["36.7", "-", "40.0"],
        "theirs": ["34.7", "-", "-"],
        "brief": ["65.0", "70.0", "-"],
    }


def test_a_pool_that_no_run_of_ones_own_was_measured_over_is_left_out(tmp_path: Path) -> None:
    local = ComparedRun("good", "local", {"mscoco_task0": 0.9}, source="paper; local pools")
    both = page(tmp_path, {}, OWN, GOOD, local)
    assert [head.text for head in section(both, "comparison").all("h3")] == ["union pool"]
    assert page(tmp_path, {}, local).section("comparison") is None


def test_all_published_systems_fit_into_one_page_with_both_pools(tmp_path: Path) -> None:
    values = dict.fromkeys((*MBEIR_TASKS, "average"), 0.5)
    own = [ComparedRun("mine", pool, values) for pool in ("union", "local")]
    whole = page(tmp_path, {}, *own, *PUBLISHED)
    ids = [node.attributes["id"] for node in whole.all() if "id" in node.attributes]
    assert len(ids) == len(set(ids))
    assert {(link.attributes["href"] or "")[1:] for link in whole.all("a")} <= set(ids)
    for table in section(whole, "comparison").all("table"):
        width = len(table.all("thead")[0].all("tr")[-1].all("th"))
        assert {len(row.all("th") + row.all("td")) for row in table.all("tbody")[0].all("tr")} == {width}
    shown = section(whole, "comparison").text
    assert all(run.name in shown and run.source in shown for run in PUBLISHED)


def test_names_and_sources_that_look_like_html_stay_text(tmp_path: Path) -> None:
    evil = "<script>\"'&"
    values = {evil: 0.5, "average": 0.5}
    metrics = {"protocol": {evil: evil}, "unreachable": {}}
    whole = page(tmp_path, metrics, ComparedRun(evil, "union", values), ComparedRun(evil, "union", values, source=evil))
    assert not whole.all("script")
    assert section(whole, "comparison").all("li")[0].text == evil


def test_the_head_of_the_page_shows_headlines_with_their_intervals(tmp_path: Path) -> None:
    one = {"tasks": {"mscoco_task0": HEADLINE["tasks"]["mscoco_task0"]}, "average": HEADLINE["average"]}
    whole = page(tmp_path, {"union": UNION, "local": {"tasks": {}, "average": {}, "headline": one}})
    # The tasks of the union pool have two metrics: their average bears neither name.
    expected = ["union headline 40.0 % 95 %: 38.5-41.5", "local hit@5 40.0 % 95 %: 38.5-41.5"]
    assert [words(figure) for figure in whole.all("div", "figure")] == expected


def test_the_task_table_shows_headlines_and_the_means_of_both_kinds_of_queries(tmp_path: Path) -> None:
    table = section(page(tmp_path, {"union": UNION}), "tasks")
    assert rows(table) == {
        "mscoco_task0": ["@5 50.0 48.0-52.0", "50.0"],
        "fashioniq_task7": ["@10 30.0 28.0-32.0", "25.0"],
        "average": ["40.0 38.5-41.5", "37.5"],
        "single-modal queries": ["50.0 48.0-52.0", "50.0"],
    }


def test_of_several_prompts_the_task_table_shows_the_spread_of_the_headline(tmp_path: Path) -> None:
    spread = {"values": [0.49, 0.5, 0.51], "mean": 0.5, "std": 0.0123, "min": 0.49, "max": 0.51}
    headline = {"tasks": {"mscoco_task0": spread}, "average": {**spread, "std": 0.004}}
    table = section(page(tmp_path, {"union": UNION, "prompts": {"union": {"headline": headline}}}), "tasks")
    assert rows(table) == {
        "mscoco_task0": ["@5 50.0 48.0-52.0 ± 1.2", "50.0"],
        "fashioniq_task7": ["@10 30.0 28.0-32.0", "25.0"],
        "average": ["40.0 38.5-41.5 ± 0.4", "37.5"],
        "single-modal queries": ["50.0 48.0-52.0", "50.0"],
    }
    assert "the mean of 3 prompts" in table.text
    assert "prompts" not in section(page(tmp_path, {"union": UNION}), "tasks").text


def test_errors_are_shares_of_the_misses(tmp_path: Path) -> None:
    none = dict.fromkeys(MISSES, 0)
    errors = {"tasks": {"zoo_task3": none, "cirr_task7": MISSES}, "all": MISSES}
    table = section(page(tmp_path, {"union": {**UNION, "errors": errors}}), "errors")
    assert [head.text for head in table.all("thead")[0].all("th")][1:] == [
        *("misses", "wrong modality", "wrong domain", "other")
    ]
    assert rows(table) == {
        "cirr_task7": ["20", "5 25.0", "2 10.0", "13 65.0"],
        "zoo_task3": ["0", "0 -", "0 -", "0 -"],
        "all queries": ["20", "5 25.0", "2 10.0", "13 65.0"],
    }


def test_only_tasks_with_unreachable_positives_are_listed(tmp_path: Path) -> None:
    keys = ("queries", "queries_without_reachable", "positives", "all_positives", "other_dataset", "no_pool")
    counts = {"oven_task6": dict(zip(keys, (7, 1, 1200, 4800, 1190, 10), strict=True))}
    counts["cirr_task7"] = dict.fromkeys(keys, 0)
    table = section(page(tmp_path, {"unreachable": counts}), "errors")
    assert rows(table) == {"oven_task6": ["7", "1", "1,200", "25.0 %", "1,190", "10"]}


def test_the_protocol_is_told_and_is_no_pool(tmp_path: Path) -> None:
    metrics = {
        "union": UNION,
        "protocol": {"split": "test", "n_queries": 190573, "search_recall": 0.98765432},
        "prompts": {"tasks": {"x_task0": {}}},
    }
    whole = page(tmp_path, metrics)
    assert whole.all("p", "protocol")[0].text == "Protocol: split test n queries 190,573 search recall 0.9877"
    assert list(rows(section(whole, "tasks"))) == [*UNION["tasks"], "average", "single-modal queries"]


def test_metrics_of_pools_only_give_neither_errors_nor_a_protocol(tmp_path: Path) -> None:
    whole = page(tmp_path, {"union": {"tasks": UNION["tasks"], "average": UNION["average"]}})
    assert [node.attributes["id"] for node in whole.all("section")] == ["tasks"]
    assert not whole.all("p", "protocol")
    assert [words(figure) for figure in whole.all("div", "figure")] == ["union hit@5 37.5 %"]
