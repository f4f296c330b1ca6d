"""The report says what was measured, shows what was retrieved, and needs nothing but itself."""

from __future__ import annotations

import base64
import io
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pages import Node, parse
from PIL import Image

from lightning_mmembed.retrieval.report import (
    GalleryQuery,
    GalleryResult,
    Stage,
    picture_uri,
    write_report,
)
from lightning_mmembed.retrieval.views import METRIC_KEYS

# Neither in alphabetical nor in canonical order, with a task of another dataset in front.
TASKS = ("zoo_task3", "webqa_task2", "cirr_task7", "mscoco_task0", "visualnews_task0")
CANONICAL = ["visualnews_task0", "mscoco_task0", "webqa_task2", "cirr_task7", "zoo_task3"]


def picture(kind: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (6, 4), (200, 30, 90)).save(out, kind)
    return out.getvalue()


def pool(tasks: tuple[str, ...], start: float) -> dict[str, Any]:
    rows = {
        name: {key: start + 0.01 * n + 0.002 * k for k, key in enumerate(METRIC_KEYS)} for n, name in enumerate(tasks)
    }
    return {"tasks": rows, "average": {key: sum(row[key] for row in rows.values()) / len(rows) for key in METRIC_KEYS}}


def result(did: str, **changes: Any) -> GalleryResult:
    plain = GalleryResult(did, 0.5, f"text of {did}", None, "text", is_positive=False, right_modality=True)
    return replace(plain, **changes)


def query(task: str, *results: GalleryResult, **changes: Any) -> GalleryQuery:
    return replace(GalleryQuery(task, "9:1", "Find it.", "a question", None, ("9:7",), results), **changes)


METRICS = {"union": pool(TASKS, 0.2), "local": pool(TASKS, 0.6)}
STAGES = (
    Stage("before mining", {"union": {"tasks": {}, "average": {"hit@5": 0.25}}}, {"text": {"text": 60, "image": 40}}),
    Stage("after mining", {"union": None}, {"text": {"text": 90, "image,text": 10}, "image": {"image": 1, "text": 3}}),
)
HISTORY = (
    *({"step": step, "epoch": 0, "train/loss": 3.0 / step, "lr-AdamW": 1e-5} for step in range(1, 60)),
    {"step": 30, "val/union/hit@5": 0.25, "val/union/mscoco_task0/hit@5": 0.125},
    {"step": 40, "mined": 3},
    {"step": 60, "val/union/hit@5": 0.375, "train/loss": math.nan},
)


@pytest.fixture
def page(tmp_path: Path) -> Node:
    gallery = (
        query("cirr_task7", result("1:1"), result("9:7", is_positive=True), result("1:2", right_modality=False)),
        query("mscoco_task0", result("1:3")),
        query("mscoco_task0", result("9:7", is_positive=True), image=picture("PNG")),
    )
    facts = {"dataset": "mini", "seed": "7"}
    path = tmp_path / "report.html"
    assert (
        write_report(
            path,
            title="A run",
            metrics=METRICS,
            history=HISTORY,
            stages=STAGES,
            gallery=gallery,
            facts=facts,
            config="a: 1\n",
        )
        == path
    )
    return parse(path)


def gallery_page(tmp_path: Path, *queries: GalleryQuery) -> Node:
    return parse(write_report(tmp_path / "report.html", title="A run", metrics={}, gallery=queries))


def cells(row: Node) -> list[str]:
    return [cell.text for cell in row.all("td")]


def task_rows(page: Node) -> list[Node]:
    tasks = page.section("tasks")
    assert tasks is not None
    return tasks.all("tbody")[0].all("tr")


def test_a_page_loads_nothing_from_elsewhere_and_runs_nothing(page: Node) -> None:
    for node in page.all():
        assert node.tag not in {"script", "iframe", "object", "embed"}
        assert not [name for name in node.attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "action"):
            assert (node.attributes.get(name) or "#").startswith(("#", "data:"))
        assert "url(http" not in (node.attributes.get("style") or "")
    assert not re.search(r"@import|url\(\s*['\"]?(https?:)?//", page.all("style")[0].text)


def test_every_link_of_the_page_has_exactly_one_target(page: Node) -> None:
    ids = [node.attributes["id"] for node in page.all() if "id" in node.attributes]
    assert len(ids) == len(set(ids))
    links = [link for node in page.all() for link in (node.attributes.get("href"), node.attributes.get("xlink:href"))]
    clips = re.findall(r"url\((#[^)]+)\)", " ".join(node.attributes.get("clip-path") or "" for node in page.all()))
    assert {link[1:] for link in [*links, *clips] if link and link.startswith("#")} <= set(ids)


def test_the_headline_shows_the_averages_that_were_given(page: Node) -> None:
    figures = [figure.text for figure in page.all("div", "figure")]
    union, local = METRICS["union"]["average"], METRICS["local"]["average"]
    expected = [
        ("union hit@5", union["hit@5"]),
        ("union modality@1", union["modality@1"]),
        ("local hit@5", local["hit@5"]),
    ]
    assert figures == [f"{label}{100 * value:.1f}%" for label, value in expected]


def test_every_figure_of_the_task_table_is_the_one_given(page: Node) -> None:
    rows = task_rows(page)
    for name, row in zip(CANONICAL, rows, strict=False):
        expected = [METRICS[pool]["tasks"][name][key] for pool in ("union", "local") for key in METRIC_KEYS]
        assert cells(row) == [f"{100 * value:.1f}" for value in expected]
    average = [METRICS[pool]["average"][key] for pool in ("union", "local") for key in METRIC_KEYS]
    assert cells(rows[-1]) == [f"{100 * value:.1f}" for value in average]


def test_tasks_stand_in_canonical_order_and_the_average_last(page: Node) -> None:
    names = [row.all("th")[0].children[0] for row in task_rows(page)]
    assert names == [*CANONICAL, "average"]


def test_the_figures_that_a_task_lacks_are_dashes(tmp_path: Path) -> None:
    metrics = {"union": pool(TASKS[:2], 0.2), "local": {"tasks": {TASKS[0]: {"hit@5": math.nan}}, "average": {}}}
    rows = task_rows(parse(write_report(tmp_path / "r.html", title="", metrics=metrics)))
    assert [cells(row)[-1] for row in rows] == ["\u2013"] * 3


def test_a_heat_table_shows_counts_and_the_shares_of_its_rows(page: Node) -> None:
    before, after = page.all("table", "heat")
    rows = [cells(row) for row in before.all("tbody")[0].all("tr")]
    assert rows == [["60.060", "40.040", "0.00"], ["\u20130"] * 3, ["\u20130"] * 3]
    assert [cells(row) for row in after.all("tbody")[0].all("tr")][1] == ["75.03", "25.01", "0.00"]
    diagonal = [[n for n, cell in enumerate(row.all("td")) if "right" in cell.classes] for row in before.all("tr")[1:]]
    assert diagonal == [[0], [1], [2]]


def test_the_stages_are_compared_by_wanted_modality_with_their_change(page: Node) -> None:
    modality = page.section("modality")
    assert modality is not None
    table = modality.all("table", "wide")[0]
    rows = {row.all("th")[0].text: cells(row) for row in table.all("tbody")[0].all("tr")}
    assert rows["text wantedmodality@1"] == ["60.0", "90.0 +30.0"]
    assert rows["image wantedmodality@1"] == ["\u2013", "25.0"]
    assert rows["all queriesmodality@1"] == ["60.0", "87.5 +27.5"]
    assert rows["task averageunion hit@5"] == ["25.0", "\u2013"]


def test_a_single_measurement_has_a_heat_table_and_no_change_by_stage(tmp_path: Path) -> None:
    single = parse(write_report(tmp_path / "r.html", title="", metrics={}, stages=STAGES[:1]))
    modality = single.section("modality")
    assert modality is not None
    assert len(modality.all("table", "heat")) == len(modality.all("table")) == 1
    assert "before and after mining" not in modality.text
    unranked = write_report(tmp_path / "s.html", title="", metrics={}, stages=[Stage("local pools only", {}, {})])
    assert parse(unranked).section("modality") is None


def test_every_logged_group_has_a_chart_with_its_last_value(page: Node) -> None:
    charts = {chart.all("h3")[0].text: chart for chart in page.all("div", "chart")}
    assert list(charts) == ["Training loss", "Learning rate", "hit@5"]
    assert "val/union/hit@5 37.5 %" in charts["hit@5"].text
    assert "1 single tasks" in charts["hit@5"].text
    assert all(len(chart.all("svg")) == 1 and "negatives mined" in chart.text for chart in charts.values())


def test_a_mining_event_is_a_dashed_line_in_every_chart(page: Node) -> None:
    for chart in page.all("div", "chart"):
        dashed = [node for node in chart.all("path") if "stroke-dasharray" in (node.attributes.get("style") or "")]
        assert [("var(--mined)" in (node.attributes["style"] or "")) for node in dashed] == [True]


def test_the_same_history_gives_the_same_page(tmp_path: Path) -> None:
    pages = [write_report(tmp_path / f"{n}.html", title="", metrics=METRICS, history=HISTORY) for n in range(2)]
    assert pages[0].read_bytes() == pages[1].read_bytes()


def test_a_long_history_makes_no_long_file(tmp_path: Path) -> None:
    history = [{"step": step, "train/loss": (step * 7919) % 101} for step in range(30_000)]
    assert write_report(tmp_path / "r.html", title="", metrics={}, history=history).stat().st_size < 80_000


def test_text_that_looks_like_html_stays_text(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\"'&"
    bad = query("mscoco_task0", result(evil, text=evil, modality=evil), text=evil, instruction=evil, qid=evil)
    path = tmp_path / "report.html"
    metrics = {"union": {"tasks": {evil: {"hit@5": 0.5}}, "average": {}}}
    stages = [Stage(evil, {}, {"text": {"text": 1}})]
    write_report(
        path, title=evil, metrics=metrics, stages=stages, gallery=[bad], facts={evil: evil}, config=evil, history=[]
    )
    assert "<script" not in path.read_text(encoding="utf-8")
    page = parse(path)
    assert page.all("h1")[0].text == page.all("pre")[0].text == page.all("div", "text")[0].text == evil


@pytest.mark.parametrize("text", ["Straße, 東京, مرحبا", "a\ud800b", "", None])
def test_any_text_or_none_can_be_shown(tmp_path: Path, text: str | None) -> None:
    page = gallery_page(tmp_path, query("oven_task6", result("1:1", text=text), text=text, instruction=text))
    shown = [node.text for node in page.all("div", "text")]
    assert shown == ([text.replace("\ud800", "?")] if text else [])
    assert ("no text" in page.text) == (not text)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_pictures_are_embedded_byte_for_byte(tmp_path: Path, kind: str) -> None:
    data = picture(kind)
    page = gallery_page(tmp_path, query("cirr_task7", result("1:1", image=data, modality="image"), image=data))
    for image in page.all("img"):
        head, _, body = (image.attributes["src"] or "").partition(",")
        assert head == f"data:image/{kind.lower()};base64"
        assert base64.b64decode(body) == data
    assert len(page.all("img")) == 2


def test_bytes_that_are_no_known_picture_are_not_embedded(tmp_path: Path) -> None:
    svg = b"<svg xmlns='http://www.w3.org/2000/svg'/>"
    assert picture_uri(svg) is None
    page = gallery_page(tmp_path, query("cirr_task7", result("1:1", image=svg, modality="image")))
    assert not page.all("img")
    assert page.all("div", "nopic")[0].text == "picture in an unknown format"


def test_queries_without_a_positive_are_marked_as_failures(page: Node) -> None:
    marks = [("failure" in card.classes, card.all("span", "badge")[0].text) for card in page.all("article")]
    # mscoco_task0 comes first: the groups stand in canonical order too.
    assert marks == [
        (True, "✗ not found in the first 1"),
        (False, "✓ found at rank 1"),
        (False, "✓ found at rank 2"),
    ]


def test_the_head_of_a_group_counts_the_queries_that_were_found(page: Node) -> None:
    heads = [(head.attributes["id"], head.all("span", "badge")[0].text) for head in page.all("div", "group-head")]
    assert heads == [("gallery-mscoco_task0", "1 of 2 found"), ("gallery-cirr_task7", "1 of 1 found")]


def test_positives_and_wrong_modalities_are_told_apart(page: Node) -> None:
    cards = page.all("article")[-1].all("div", "result")
    assert [card.classes for card in cards] == [["result"], ["result", "positive"], ["result", "wrong"]]
    assert [card.all("b")[0].text for card in cards] == ["1", "✓ 2", "3"]
    assert ["wrong modality" in card.text for card in cards] == [False, False, True]


def test_sections_without_content_are_left_out(tmp_path: Path, page: Node) -> None:
    everything = ["tasks", "modality", "curves", "gallery", "config"]
    assert [node.attributes["id"] for node in page.all("section")] == everything
    assert [node.attributes["href"] for node in page.all("nav")[0].all("a")][1:] == [f"#{name}" for name in everything]
    bare = parse(write_report(tmp_path / "bare.html", title="A run", metrics={}))
    assert not bare.all("section")
    assert not bare.all("dl")


def test_a_report_replaces_the_older_one_and_leaves_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.html"
    for title in ("first", "second"):
        write_report(str(path), title=title, metrics={})
    assert parse(path).all("h1")[0].text == "second"
    assert list(path.parent.iterdir()) == [path]
