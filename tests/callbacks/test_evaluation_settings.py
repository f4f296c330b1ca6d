"""Prompts, search, shared vectors and other runs: what an evaluation may be told, and what it then writes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from worlds import PROMPTS, tiny_module, tiny_trainer

from lightning_mmembed import MBEIRDataModule, MLLMEncoder, RetrievalEvaluation
from lightning_mmembed.callbacks import RunReport
from lightning_mmembed.data import Shards, shard_dataset
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.items import MBEIR_TASKS
from lightning_mmembed.retrieval.compare import ComparedRun
from lightning_mmembed.retrieval.published import PUBLISHED
from lightning_mmembed.retrieval.runs import Record
from lightning_mmembed.retrieval.search import SearchSettings

METRICS = ("hit@1", "mrr@10", "recall@5")
GROUPS = ("average", "single_modal", "multi_modal")


def evaluate(checkpoint: Path, shards: Path, directory: Path, **arguments: Any) -> dict[str, Any]:
    """The content of ``metrics.json``."""
    callbacks = [
        RetrievalEvaluation(metrics=METRICS, dtype="float32", **arguments),
        RunReport(queries_per_task=1),
    ]
    trainer = tiny_trainer(directory, callbacks=callbacks)
    trainer.test(tiny_module(checkpoint), MBEIRDataModule(shards), verbose=False)
    content: dict[str, Any] = json.loads((directory / "metrics.json").read_text())
    return content


def queries(directory: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    rows = pq.read_table(directory / "queries.parquet").to_pylist()
    return {(row["pool"], row["task"], row["qid"]): row for row in rows}


@pytest.fixture(scope="module")
def by_prompt(tiny_shards: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Run directories of an evaluation with each of the three prompts, over one folder of vectors."""
    root = tmp_path_factory.mktemp("prompts")
    for index in range(3):
        evaluate(tiny_checkpoint, tiny_shards, root / str(index), instruction=index, vectors_dir=root / "vectors")
    return [root / str(index) for index in range(3)]


# --- prompts


def test_the_prompts_of_the_small_dataset_give_different_figures(by_prompt: list[Path]) -> None:
    figures = [[row["mrr@10"] for row in queries(path).values()] for path in by_prompt]
    assert figures[0] != figures[1] != figures[2]


def test_all_prompts_are_averaged_query_by_query_and_told_apart(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path, by_prompt: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    shared = by_prompt[0].parent / "vectors"
    before = sorted(shared.iterdir())
    content = evaluate(tiny_checkpoint, tiny_shards, tmp_path, instruction="all", vectors_dir=shared)
    assert sorted(shared.iterdir()) == before, "the pool and the queries of each prompt were there already"
    assert content["protocol"]["instruction"] == "mean of prompts 0 to 2"
    assert "mean of prompts 0 to 2" in capsys.readouterr().out
    alone = [queries(path) for path in by_prompt]
    for key, row in queries(tmp_path).items():
        for name in (*METRICS, "headline"):
            assert row[name] == pytest.approx(np.mean([one[key][name] for one in alone]))
        assert row["first_hits"] == [one[key]["first_hits"][0] for one in alone]
    contents = [json.loads((path / "metrics.json").read_text()) for path in by_prompt]
    for pool in ("union", "local"):
        assert content["prompts"][pool]["averages"] == [{g: one[pool][g] for g in GROUPS} for one in contents]
        values = [one[pool]["headline"]["average"]["value"] for one in contents]
        spread = content["prompts"][pool]["headline"]["average"]
        assert (spread["min"], spread["max"]) == pytest.approx((min(values), max(values)))
        for index, path in enumerate(by_prompt):
            for run in (path / "runs" / pool).glob("*.run"):
                assert (tmp_path / f"runs/prompt_{index}" / pool / run.name).read_text() == run.read_text()


def test_as_many_prompts_are_averaged_as_the_task_with_the_fewest_has(
    tiny_source: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(tiny_source, tmp_path / "source")
    path = source / "instructions" / "query_instructions.tsv"
    dropped = PROMPTS["image,text", "image"][2]
    assert dropped in path.read_text()
    path.write_text(path.read_text().replace(dropped, ""))
    content = evaluate(tiny_checkpoint, shard_dataset(source, tmp_path / "shards"), tmp_path / "run", instruction="all")
    assert len(content["prompts"]["union"]["averages"]) == 2


def test_random_prompts_are_drawn_for_each_query_by_the_seed(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path, by_prompt: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    alone, drawn = [queries(path) for path in by_prompt], {}
    place_of = {prompt.rstrip("."): place for prompts in PROMPTS.values() for place, prompt in enumerate(prompts)}
    for seed in (0, 1):
        arguments = {"instruction": "random", "instruction_seed": seed}
        content = evaluate(tiny_checkpoint, tiny_shards, tmp_path / str(seed), **arguments)
        assert content["protocol"]["instruction"] == f"random prompts with seed {seed}"
        assert f"random prompts with seed {seed}" in capsys.readouterr().out
        found, places = queries(tmp_path / str(seed)), []
        for query_set in Shards(tiny_shards).query_sets("test", "random", seed):
            for query in query_set.queries:
                place = place_of[query.instruction.rstrip(".")]
                for pool in ("union", "local"):
                    key = (pool, query_set.task.name, query.qid)
                    assert found[key]["mrr@10"] == pytest.approx(alone[place][key]["mrr@10"])
                places.append(place)
        assert set(places) == {0, 1, 2}
        drawn[seed] = places
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("instruction", ["first", "", "1", -1, 0.5])
def test_an_unknown_instruction_is_refused(instruction: Any) -> None:
    with pytest.raises(UserInputError, match=f"instruction={instruction!r} is unknown; write a place from 0"):
        RetrievalEvaluation(instruction=instruction)


def test_a_metric_that_is_deeper_than_the_rankings_is_refused() -> None:
    RetrievalEvaluation(metrics=["hit@50"])
    with pytest.raises(UserInputError, match="metrics: 'recall@100' is deeper than the rankings; write 50 or less"):
        RetrievalEvaluation(metrics=["hit@5", "recall@100"])


@pytest.mark.parametrize("run", ["fit", "validate", "test"])
def test_a_prompt_that_a_task_lacks_is_refused_before_anything_is_encoded(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MLLMEncoder, "forward", None)
    trainer = tiny_trainer(tmp_path, callbacks=[RetrievalEvaluation(instruction=7)], max_epochs=1)
    with pytest.raises(UserInputError, match="instruction=7: pets_task0 has 3 prompts"):
        getattr(trainer, run)(tiny_module(tiny_checkpoint), MBEIRDataModule(tiny_shards))
    assert not (tmp_path / "vectors").exists()


# --- vectors and search


def test_a_given_folder_of_vectors_is_shared_and_nothing_in_it_is_deleted(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    def change(directory: Path, dtype: str) -> None:
        callback = RetrievalEvaluation(metrics=METRICS, dtype=dtype, vectors_dir=tmp_path / "vectors")
        module = tiny_module(tiny_checkpoint, pooling="mean" if dtype == "float32" else "last")
        trainer = tiny_trainer(directory, callbacks=[callback])
        trainer.test(module, MBEIRDataModule(tiny_shards), verbose=False)

    change(tmp_path / "a", "float32")
    kept = sorted((tmp_path / "vectors").rglob("part-*"))
    times = [path.stat().st_mtime_ns for path in kept]
    change(tmp_path / "b", "float16")
    assert set(kept) < set((tmp_path / "vectors").rglob("part-*")), "those of another encoder stay"
    change(tmp_path / "c", "float32")
    assert [path.stat().st_mtime_ns for path in kept] == times, "and are taken up again"
    assert not list(tmp_path.glob("?/vectors"))


def test_search_settings_reach_the_search_and_stand_in_the_protocol(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path, by_prompt: list[Path]
) -> None:
    for name, search in (("settings", SearchSettings(pool_block=7, query_block=3)), ("mapping", {"pool_block": 7})):
        content = evaluate(
            tiny_checkpoint, tiny_shards, tmp_path / name, search=search, vectors_dir=by_prompt[0].parent / "vectors"
        )
        expected = json.loads((by_prompt[0] / "metrics.json").read_text())
        assert content == expected
        assert content["protocol"]["search_backend"] == "torch"
    with pytest.raises(UserInputError, match="backend='grep' is unknown"):
        RetrievalEvaluation(search={"backend": "grep"})


# --- other runs


def test_runs_that_are_given_are_compared_in_the_terminal_and_in_the_report(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path, by_prompt: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    compare = [by_prompt[1], by_prompt[2] / "metrics.json"]
    vectors = by_prompt[0].parent / "vectors"
    evaluate(tiny_checkpoint, tiny_shards, tmp_path / "own", compare=compare, vectors_dir=vectors)
    printed = capsys.readouterr().out
    assert "union: 1 (mmembed), against own (mmembed)" in printed
    assert "local: 2 (mmembed), against own (mmembed)" in printed
    assert 'id="comparison"' in (tmp_path / "own" / "report.html").read_text()
    assert 'id="comparison"' not in (by_prompt[0] / "report.html").read_text(), "a run alone is compared with nothing"


def change_protocol(run: Path, copy: Path, **facts: Any) -> Path:
    shutil.copytree(run, copy)
    content = json.loads((copy / "metrics.json").read_text())
    content["protocol"] |= facts
    (copy / "metrics.json").write_text(json.dumps(content))
    return copy


def change_labels(run: Path, copy: Path) -> Path:
    shutil.copytree(run, copy)
    table = pq.read_table(copy / "queries.parquet")
    column = table.column_names.index("n_positives")
    pq.write_table(table.set_column(column, "n_positives", [[9] * len(table)]), copy / "queries.parquet")
    return copy


def test_a_run_of_other_data_is_refused_before_anything_is_encoded(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path, by_prompt: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MLLMEncoder, "forward", None)
    refused = {
        "its split is 'val', here it is 'test'": change_protocol(by_prompt[0], tmp_path / "split", split="val"),
        "its candidates is 7, here it is": change_protocol(by_prompt[0], tmp_path / "pool", candidates=7),
        "its shards is '1a', here it is": change_protocol(by_prompt[0], tmp_path / "shards", shards="1a"),
        "has other labels there": change_labels(by_prompt[0], tmp_path / "labels"),
    }
    for message, other in refused.items():
        with pytest.raises(UserInputError, match=message):
            evaluate(tiny_checkpoint, tiny_shards, tmp_path / "own", compare=[other])
    assert not (tmp_path / "own" / "vectors").exists()
    assert not (tmp_path / "own" / "metrics.json").exists()


def test_a_fit_that_validates_does_not_ask_whether_a_run_of_the_test_split_fits(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path, by_prompt: list[Path]
) -> None:
    callbacks = [RetrievalEvaluation(metrics=METRICS, compare=[by_prompt[0]])]
    trainer = tiny_trainer(tmp_path, callbacks=callbacks, max_steps=1)
    module, data = tiny_module(tiny_checkpoint), MBEIRDataModule(tiny_shards, batch_size=8)
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)
    assert (tmp_path / "metrics.json").is_file()


# --- where the weights come from


def protocol(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "metrics.json").read_text())["protocol"]
    return found


def test_the_protocol_names_the_shards_and_the_checkpoint(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path, by_prompt: list[Path]
) -> None:
    assert protocol(by_prompt[0])["shards"] == Shards(tiny_shards).fingerprint
    assert "checkpoint" not in protocol(by_prompt[0])
    callbacks = [RetrievalEvaluation(metrics=METRICS, checkpoint="somewhere/best.ckpt")]
    trainer = tiny_trainer(tmp_path / "given", callbacks=callbacks)
    trainer.test(tiny_module(tiny_checkpoint), MBEIRDataModule(tiny_shards), verbose=False)
    assert protocol(tmp_path / "given")["checkpoint"] == "somewhere/best.ckpt"
    trainer = tiny_trainer(tmp_path / "loaded", callbacks=[RetrievalEvaluation(metrics=METRICS)], max_steps=1)
    module, data = tiny_module(tiny_checkpoint), MBEIRDataModule(tiny_shards, batch_size=8)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "best.ckpt")
    trainer.test(module, data, ckpt_path=tmp_path / "best.ckpt", verbose=False)
    assert protocol(tmp_path / "loaded")["checkpoint"] == str(tmp_path / "best.ckpt")
    trainer.test(module, data, verbose=False)
    assert "checkpoint" not in protocol(tmp_path / "loaded")


@pytest.mark.parametrize("run", ["validate", "test"])
def test_a_report_without_training_shows_the_matrix_of_the_evaluation_and_no_stage_of_training(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path, run: str
) -> None:
    callbacks = [RetrievalEvaluation(metrics=METRICS), RunReport()]
    trainer = tiny_trainer(tmp_path, callbacks=callbacks)
    getattr(trainer, run)(tiny_module(tiny_checkpoint), MBEIRDataModule(tiny_shards), verbose=False)
    page = (tmp_path / "report.html").read_text()
    split = "val" if run == "validate" else "test"
    assert re.findall(r"<h3>([^<]*)<small>([^<]*)", page)[0] == (f"{split} split", "24 queries")
    assert page.count('class="heat"') == 1
    assert "untrained" not in page
    assert 'id="curves"' not in page


def test_the_stages_of_a_report_are_those_of_the_fit_before_the_test(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    callbacks = [RetrievalEvaluation(metrics=METRICS, before_fit=True), RunReport()]
    trainer = tiny_trainer(tmp_path, callbacks=callbacks, max_epochs=1)
    module, data = tiny_module(tiny_checkpoint), MBEIRDataModule(tiny_shards, batch_size=8)
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)
    page = (tmp_path / "report.html").read_text()
    assert re.findall(r"<h3>([^<]*)<small>24 queries", page) == ["untrained", "trained"]


def test_a_run_that_is_missing_is_told_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match=r"compare='.*absent': .* is missing"):
        RetrievalEvaluation(compare=[tmp_path / "absent"])


def test_published_figures_stand_beside_those_of_all_tasks_of_mbeir_alone() -> None:
    whole = ComparedRun("own", "union", {**dict.fromkeys(MBEIR_TASKS, 0.5), "average": 0.5})
    part = ComparedRun("own", "local", {**dict.fromkeys(MBEIR_TASKS[1:], 0.5), "average": 0.5})
    report, silent = RunReport(published=True), RunReport()
    shown = report._comparison(Record({}, [whole, part]))
    assert shown[:2] == [whole, part]
    assert shown[2:] == [row for row in PUBLISHED if row.pool == "union"]
    assert report._comparison(Record({}, [part])) == []
    assert silent._comparison(Record({}, [whole, part])) == []
    other = ComparedRun("other", "local", part.values)
    assert silent._comparison(Record({}, [whole, part, other])) == [whole, part, other]
