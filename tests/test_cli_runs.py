"""``evaluate.py run=...`` scores the TREC runs of any system as it scores a model, and builds none."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from test_cli import composed, tiny
from worlds import write_pets

from lightning_mmembed.cli import evaluate, user_error
from lightning_mmembed.cli_files import embed
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.retrieval.search import SearchSettings

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
    assert "union: run (mmembed), against again (mmembed)" in capsys.readouterr().out
    assert 'id="comparison"' in (tmp_path / "again" / "report.html").read_text()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run=absent.run", "run='absent.run' is neither a file, nor a pattern"),
        ("run_pool=global", "run_pool='global' is unknown; write one of union, local"),
        ("ckpt_path=absent.ckpt", "is scored without a model, so ckpt_path='absent.ckpt' would not be used"),
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


def test_a_run_of_a_system_that_had_what_the_shards_left_out_is_scored_without_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write_pets(tmp_path / "source")
    (source / "mbeir_images/pets_images/50.jpg").write_bytes(b"")  # of candidate 77:1050 and of query 77:350
    path = tmp_path / "bm25.run"
    lines = ["77:51 Q0 77:1050 1 0.9 x", "77:51 Q0 77:1051 2 0.8 x", "77:350 Q0 77:2050 1 0.5 x"]
    path.write_text("\n".join(lines))
    overrides = [*tiny(tmp_path, source), "data.max_bad_fraction=0.1", f"run={path}"]
    with caplog.at_level("WARNING"):
        metrics, _ = evaluate(composed("evaluate", *overrides))
    assert "2 lines of the run x name a record that the shards left out; they are dropped" in caplog.messages
    assert metrics["test/union/pets_task0/mrr@10"] == pytest.approx(1 / 6)  # the only line that is left ranks first
    path.write_text("\n".join([*lines, "77:51 Q0 77:9 3 0.1 x"]))
    with pytest.raises(UserInputError, match=r"bm25\.run:4: did='77:9' is not in the test pool"):
        evaluate(composed("evaluate", *overrides))


@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        ("all", "instruction='all' is no single prompt; write a place from 0, or random"),
        ("0.5", "instruction=0.5 is no single prompt"),
        ("3", "instruction=3: pets_task0 has 3 prompts; write a place from 0 to 2"),
    ],
)
def test_a_prompt_that_cannot_be_embedded_is_told_before_the_model_is_made(
    tiny_source: Path, tmp_path: Path, instruction: str, message: str
) -> None:
    data = ["data=mbeir", "dataset=pets", f"data.source={tiny_source}", f"paths.root_dir={tmp_path}"]
    with pytest.raises(UserInputError, match=message):
        embed(composed("embed", *data, f"instruction={instruction}", "model.encoder=null"))
    assert not list(tmp_path.rglob("vectors"))


def test_a_run_directory_is_scored_as_its_runs_are(evaluated: Path, tmp_path: Path) -> None:
    for run in (evaluated / "run", evaluated / "run" / "runs"):
        _, content, _ = score(evaluated, tmp_path / "out", f"run={run}")
        assert content["union"] == json.loads((evaluated / "run" / "metrics.json").read_text())["union"]


def test_a_run_is_not_compared_with_an_evaluation_of_another_split(evaluated: Path, tmp_path: Path) -> None:
    val = evaluated / "val"
    evaluate(composed("evaluate", *tiny(evaluated), f"paths.output_dir={val}", "split=val"))
    with pytest.raises(UserInputError, match="its split is 'val', here it is 'test'"):
        score(evaluated, tmp_path / "out", f"run={evaluated / 'run/runs'}", f"compare=[{val}]")
    assert not (tmp_path / "out" / "metrics.json").exists()
    assert "val split" in (val / "report.html").read_text()
    with pytest.raises(UserInputError, match=r"val' is of the val split, as the files there say"):
        score(evaluated, tmp_path / "out", f"run={val}")


@pytest.mark.parametrize("entry", ["train", "evaluate"])
def test_every_setting_of_the_search_can_be_set_and_has_its_default(entry: str) -> None:
    cfg = composed(entry, "callbacks.evaluation.search.pool_block=7")
    settings = {name: value for name, value in cfg.callbacks.evaluation.search.items() if name != "_target_"}
    assert settings == dataclasses.asdict(SearchSettings(pool_block=7))


def test_a_query_that_the_split_does_not_have_is_told_by_file_and_line(evaluated: Path, tmp_path: Path) -> None:
    lines = (evaluated / "run/runs/union/pets_task0.run").read_text().splitlines()
    path = tmp_path / "other.run"
    path.write_text("\n".join([*lines, lines[0].replace("77:5", "77:9", 1)]))
    with pytest.raises(
        UserInputError, match=rf"other\.run:{len(lines) + 1}: qid='77:\d+' is no query of the val split"
    ):
        score(evaluated, tmp_path / "out", f"run={path}", "split=val")
    assert not (tmp_path / "out" / "metrics.json").exists()
