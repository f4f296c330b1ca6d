"""The section on mining: sums over the tasks, shares, scores, and audits that older versions wrote."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from lightning_mmembed.mining import SCORE_BOUNDS
from lightning_mmembed.retrieval.mining_views import Mined, audit_table, audit_view
from lightning_mmembed.retrieval.report import write_report
from lightning_mmembed.retrieval.table import MISSING


def scores(**places: int) -> list[int]:
    counts = [0] * (len(SCORE_BOUNDS) - 1)
    for place, count in places.items():
        counts[int(place.removeprefix("bin"))] = count
    return counts


NEW = {
    "pets_task3": {
        "queries": 4,
        "with_wrong_modality": 1,
        "with_wrong_content": 4,
        "with_none": 0,
        "positives": 8,
        "positives_met": 2,
        "left_out_by_max_score": 5,
        "kinds": {
            "wrong_modality": {"negatives": 1, "mean_rank": 2.0, "scores": scores(bin30=1)},
            "wrong_content": {"negatives": 9, "mean_rank": 40.0, "scores": scores(bin28=4, bin29=5)},
        },
    },
    "pets_task0": {
        "queries": 2,
        "with_wrong_modality": 2,
        "with_wrong_content": 0,
        "with_none": 0,
        "positives": 2,
        "positives_met": 1,
        "left_out_by_max_score": 0,
        "kinds": {"wrong_modality": {"negatives": 3, "mean_rank": 6.0, "scores": scores(bin30=3)}},
    },
}

OLD = {
    "pets_task0": {
        "queries": 2,
        "with_wrong_modality": 2,
        "with_wrong_content": 0,
        "with_none": 0,
        "positives_met": 1,
    }
}


def test_the_last_row_sums_the_tasks_and_weighs_mean_ranks() -> None:
    view = audit_view(Mined("first", NEW))
    assert [row.label for row in view["rows"]] == ["pets_task0", "pets_task3", "all tasks"]
    whole = view["rows"][-1]
    assert (whole.queries, whole.met, whole.positives, whole.left_out) == (6, 3, 10, (5,))
    assert whole.with_kinds == (3, 4, 0)
    assert whole.negatives == ((4, 5.0), (9, 40.0))
    assert view["rows"][0].direction == "text → image"


def test_the_drawing_of_the_scores_holds_every_negative_and_nothing_beyond_it() -> None:
    drawn = audit_view(Mined("first", NEW))["histogram"]
    assert (drawn["low"], drawn["high"]) == (SCORE_BOUNDS[28], SCORE_BOUNDS[31])
    assert sorted((kind, count) for kind, *_, count in drawn["bars"]) == [(0, 4), (1, 4), (1, 5)]
    for _, left, width, height, count in drawn["bars"]:
        assert 0 <= left < left + width <= 1 + 1e-9
        assert height == count / 5


def test_the_report_shows_each_mining_an_older_one_included(tmp_path: Path) -> None:
    minings = [Mined("mining <1>", OLD), Mined("mining 2", NEW)]
    page = write_report(tmp_path / "report.html", title="t", metrics={}, minings=minings).read_text()
    assert '<section id="mining">' in page
    assert "mining &lt;1&gt;" in page
    assert page.count("Scores of the negatives") == 1
    assert "left out by<br>max_score" in page
    empty = write_report(tmp_path / "empty.html", title="t", metrics={}).read_text()
    assert "Mining" not in empty


def test_the_table_of_the_terminal_names_every_task_and_the_share_of_positives_met() -> None:
    for audit, shown in ((NEW, "30.0 %"), (OLD, MISSING)):
        out = io.StringIO()
        Console(file=out, width=160).print(audit_table(audit))
        assert all(task in out.getvalue() for task in (*audit, "all tasks"))
        assert shown in out.getvalue()
