"""``evaluate.py run=...`` scores the TREC runs of any system as it scores a model, and builds none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from test_cli import composed, tiny

from lightning_mmembed.cli import evaluate, user_error
from lightning_mmembed.errors import UserInputError

TASKS = ["pets_task0", "pets_task1", "pets_task3", "pets_task7"]


@pytest.fixture(scope="module")
def evaluated(tiny_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of an evaluation of the untrained model; its run directory is ``run`` below it."""
    root = tmp_path_factory.mktemp("evaluated")
    evaluate(composed("evaluate", *tiny(root, tiny_source)))
    return root


def score(root: Path, out: Path, *overrides: str) -> tuple[dict[str, float], dict[str, Any], dict[str, Any]]:
    """Logged metrics, content of ``metrics.json``, and the objects."""
    cfg = composed("evaluate", *tiny(root), f"paths.output_dir={out}", *overrides)
    metrics, objects = evaluate(cfg)
    return metrics, json.loads((out / "metrics.json").read_text()), objects


def test_the_runs_of_an_evaluation_score_as_the_evaluation_did(evaluated: Path, tmp_path: Path) -> None:
    metrics, content, objects = score(evaluated, tmp_path / "again", f"run={evaluated / 'run/runs'}")
    assert objects.keys() == {"datamodule", "callbacks"}
    expected = json.loads((evaluated / "run" / "metrics.json").read_text())
    for key in ("union", "local", "unreachable"):
        assert content[key] == expected[key]
    assert metrics["test/union/hit@5"] == expected["union"]["average"]["hit@5"]
    assert metrics["test/local/pets_task3/mrr@10"] == expected["local"]["tasks"]["pets_task3"]["mrr@10"]
    tables = [pq.read_table(path / "queries.parquet") for path in (evaluated / "run", tmp_path / "again")]
    assert tables[0].equals(tables[1])
    for path in (evaluated / "run" / "runs").rglob("*.run"):
        again = tmp_path / "again" / path.relative_to(evaluated / "run")
        assert again.read_text() == path.read_text()
    page = (tmp_path / "again" / "report.html").read_text()
    assert all(task in page for task in TASKS)
    assert (tmp_path / "again" / "config.yaml").is_file()
    assert not (tmp_path / "again" / "vectors").exists()


def test_a_single_file_of_another_system_is_scored_over_the_pool_that_is_named(
    evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bm25.run"
    lines = (evaluated / "run/runs/local/pets_task3.run").read_text().replace(" mmembed\n", " bm25\n")
    path.write_text(lines)
    _, content, _ = score(evaluated, tmp_path / "local", f"run={path}", "run_pool=local")
    assert content.keys() == {"local", "unreachable", "protocol"}
    assert content["local"]["tasks"].keys() == {"pets_task3"}
    expected = json.loads((evaluated / "run" / "metrics.json").read_text())["local"]["tasks"]["pets_task3"]
    assert content["local"]["tasks"]["pets_task3"] == expected
    assert content["protocol"]["system"] == "bm25"
    assert "bm25: test, given run" in capsys.readouterr().out
    assert " bm25\n" in (tmp_path / "local/runs/local/pets_task3.run").read_text()
    _, content, _ = score(evaluated, tmp_path / "union", f"run='{evaluated}/run/runs/union/*.run'")
    assert content.keys() == {"union", "unreachable", "protocol"}
    assert list(content["union"]["tasks"]) == TASKS


def test_a_run_is_compared_with_an_evaluation(
    evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    score(evaluated, tmp_path / "again", f"run={evaluated / 'run/runs'}", f"compare=[{evaluated / 'run'}]")
    assert "union: run, against again" in capsys.readouterr().out
    assert 'id="comparison"' in (tmp_path / "again" / "report.html").read_text()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run=absent.run", "run='absent.run' is neither a file, nor a pattern"),
        ("run_pool=global", "run_pool='global' is unknown; write one of union, local"),
        ("compare=[absent]", "compare='absent': absent/metrics.json is missing"),
    ],
)
def test_what_cannot_be_scored_is_told_before_anything_is_made(
    evaluated: Path, tmp_path: Path, override: str, message: str
) -> None:
    run = f"run={evaluated / 'run/runs/union/pets_task0.run'}"
    with pytest.raises(Exception, match=r".+") as error:
        score(evaluated, tmp_path / "out", *([override] if override.startswith("run=") else [run, override]))
    told = user_error(error.value)
    assert told is not None
    assert message in told
    assert not (tmp_path / "out").exists()


def test_a_query_that_the_split_does_not_have_is_told_by_file_and_line(evaluated: Path, tmp_path: Path) -> None:
    lines = (evaluated / "run/runs/union/pets_task0.run").read_text().splitlines()
    path = tmp_path / "other.run"
    path.write_text("\n".join([*lines, lines[0].replace("77:5", "77:9", 1)]))
    with pytest.raises(
        UserInputError, match=rf"other\.run:{len(lines) + 1}: qid='77:\d+' is no query of the val split"
    ):
        score(evaluated, tmp_path / "out", f"run={path}", "split=val")
    assert not (tmp_path / "out" / "metrics.json").exists()
