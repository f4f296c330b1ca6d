"""Evaluation in a run: the logged figures, the files, and which vectors are computed again."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from worlds import Entries, ranking, read_lines, tiny_module, tiny_trainer, write_lines, write_pets

from lightning_mmembed import MBEIRDataModule, MLLMEncoder, RetrievalEvaluation
from lightning_mmembed.callbacks import RunReport
from lightning_mmembed.data import Shards, shard_dataset
from lightning_mmembed.items import encode_id
from lightning_mmembed.retrieval import embed
from lightning_mmembed.retrieval.embed import VectorStore, encoder_fingerprint

TASKS = ["pets_task0", "pets_task1", "pets_task3", "pets_task7"]


def naive_figures(encoder: MLLMEncoder, shards: Shards, split: str) -> dict[str, dict[str, dict[str, float]]]:
    """``[pool][task][metric]`` from a full sort."""
    pool = shards.pool(split)
    figures: dict[str, dict[str, dict[str, float]]] = {"union": {}, "local": {}}
    for queries in shards.query_sets(split):
        name, wanted = queries.task.name, queries.task.target_modality
        inside = {"union": np.ones(len(pool), dtype=bool), "local": pool.local[name].numpy()}
        for where, mask in inside.items():
            candidates = [pool.items[int(i)] for i in np.flatnonzero(mask)]
            hits, recalls, modality = [], [], []
            for query, ranked in zip(queries.queries, ranking(encoder, queries.queries, candidates), strict=True):
                found = {c.did for c in ranked[:5]} & set(query.positives)
                hits.append(bool(found))
                recalls.append(len(found) / len(query.positives))
                modality.append(ranked[0].item.modality is wanted)
            figures[where][name] = {
                "hit@5": np.mean(hits),
                "recall@5": np.mean(recalls),
                "modality@1": np.mean(modality),
            }
    return figures


def evaluation(**arguments: Any) -> RetrievalEvaluation:
    return RetrievalEvaluation(metrics=("hit@5", "recall@5", "modality@1"), dtype="float32", **arguments)


@pytest.mark.parametrize("split", ["val", "test"])
def test_the_logged_figures_equal_a_full_sort_in_numpy(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path, split: str
) -> None:
    module = tiny_module(tiny_checkpoint)
    trainer = tiny_trainer(tmp_path, callbacks=[evaluation()])
    run = trainer.validate if split == "val" else trainer.test
    (logged,) = run(module, MBEIRDataModule(tiny_shards), verbose=False)
    figures = naive_figures(module.encoder, Shards(tiny_shards), split)
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert set(report) == {"union", "local", "unreachable", "protocol"}
    assert report["protocol"]["split"] == split
    assert report["protocol"]["instruction"] == "prompt 0"
    assert report["protocol"]["queries"] == 24
    assert report["protocol"]["candidates"] == len(Shards(tiny_shards).pool(split))
    for where, by_task in figures.items():
        averages = {"average", "single_modal", "multi_modal"}
        assert set(report[where]) == {"tasks", *averages, "headline", "errors"}
        assert sorted(report[where]["tasks"]) == TASKS
        for metric in ("hit@5", "recall@5", "modality@1"):
            for task, values in by_task.items():
                assert report[where]["tasks"][task][metric] == pytest.approx(values[metric], abs=1e-9)
                assert logged[f"{split}/{where}/{task}/{metric}"] == pytest.approx(values[metric], abs=1e-6)
            average = np.mean([values[metric] for values in by_task.values()])
            assert report[where]["average"][metric] == pytest.approx(average, abs=1e-9)
            assert logged[f"{split}/{where}/{metric}"] == pytest.approx(average, abs=1e-6)
    assert 0 < logged[f"{split}/union/hit@5"] < 1, "a figure of 0 or 1 would compare nothing"


def test_the_figures_of_a_fit_are_those_of_the_weights_at_the_end_of_each_epoch(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    module, callback = tiny_module(tiny_checkpoint), evaluation(before_fit=True)
    untrained = naive_figures(module.encoder, Shards(tiny_shards), "val")
    trainer = tiny_trainer(tmp_path, max_epochs=2, callbacks=[callback])
    trainer.fit(module, MBEIRDataModule(tiny_shards, batch_size=8))
    assert [(e["step"], e["split"]) for e in callback.evaluations] == [(0, "val"), (6, "val"), (12, "val")]
    trained = naive_figures(module.encoder, Shards(tiny_shards), "val")
    for entry, figures in ((callback.evaluations[0], untrained), (callback.evaluations[-1], trained)):
        found = {where: entry["metrics"][where]["tasks"] for where in ("union", "local")}
        assert found == {w: {t: pytest.approx(v) for t, v in tasks.items()} for w, tasks in figures.items()}
        assert sum(sum(row.values()) for row in entry["modality_matrix"].values()) == 24
    average = np.mean([values["hit@5"] for values in trained["union"].values()])
    assert float(trainer.callback_metrics["val/union/hit@5"]) == pytest.approx(average, abs=1e-6)
    assert not (tmp_path / "metrics.json").exists(), "a fit writes no figures of a split"


def test_an_evaluation_writes_runs_and_a_report_that_names_every_task(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    trainer = tiny_trainer(tmp_path, callbacks=[evaluation(), RunReport(title="Pets", queries_per_task=2)])
    trainer.test(tiny_module(tiny_checkpoint), MBEIRDataModule(tiny_shards), verbose=False)
    page = (tmp_path / "report.html").read_text()
    assert all(task in page for task in TASKS)
    assert "<title>Pets" in page
    shards = Shards(tiny_shards)
    for where in ("union", "local"):
        for queries in shards.query_sets("test"):
            lines = (tmp_path / "runs" / where / f"{queries.task.name}.run").read_text().splitlines()
            rows = [line.split() for line in lines]
            depth = (
                len(shards.pool("test"))
                if where == "union"
                else int(shards.pool("test").local[queries.task.name].sum())
            )
            assert len(rows) == len(queries) * min(50, depth)
            assert {row[0] for row in rows} == {q.qid for q in queries.queries}
            assert [int(row[3]) for row in rows[: min(50, depth)]] == list(range(1, min(50, depth) + 1))


def test_an_unknown_metric_is_named() -> None:
    with pytest.raises(ValueError, match="metric='recal@5' is unknown"):
        RetrievalEvaluation(metrics=["recal@5"])


# --- contract 9: stale vectors are computed again -------------------------------------------------------------------


def parts(directory: Path) -> dict[Path, int]:
    """Every stored part and when it was written."""
    return {path: path.stat().st_mtime_ns for path in (directory / "vectors").glob("*/part-*.npy")}


def evaluate(checkpoint: Path, shards: Path, directory: Path, change: Any = None, **arguments: Any) -> dict[str, float]:
    module = tiny_module(checkpoint)
    if change is not None:
        change(module.encoder)
    trainer = tiny_trainer(directory, callbacks=[evaluation(**arguments)])
    figures: dict[str, float] = dict(trainer.test(module, MBEIRDataModule(shards), verbose=False)[0])
    return figures


def test_vectors_of_the_same_weights_pool_and_prompts_are_reused(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    first = evaluate(tiny_checkpoint, tiny_shards, tmp_path)
    written = parts(tmp_path)
    assert len(written) == 5  # the pool and the queries of four tasks
    assert evaluate(tiny_checkpoint, tiny_shards, tmp_path) == first
    assert parts(tmp_path) == written


def other_weights(encoder: MLLMEncoder) -> None:
    with torch.no_grad():
        encoder.backbone.language_model.norm.weight[0] += 1


def shorter_texts(encoder: MLLMEncoder) -> None:
    encoder.processor.prompts.max_length = 20


def test_vectors_of_other_weights_or_settings_are_computed_again(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    evaluate(tiny_checkpoint, tiny_shards, tmp_path)
    written = parts(tmp_path)
    for change in (other_weights, shorter_texts):
        figures = evaluate(tiny_checkpoint, tiny_shards, tmp_path, change)
        assert not set(parts(tmp_path)) & set(written), "nothing of the old is used, nor kept"
        assert figures == evaluate(tiny_checkpoint, tiny_shards, tmp_path / change.__name__, change)
        written = parts(tmp_path)


def test_queries_with_another_prompt_are_computed_again_and_the_pool_is_reused(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    evaluate(tiny_checkpoint, tiny_shards, tmp_path)
    written = parts(tmp_path)
    figures = evaluate(tiny_checkpoint, tiny_shards, tmp_path, instruction=1)
    assert {path: time for path, time in parts(tmp_path).items() if path in written} == written
    assert len(parts(tmp_path)) == 5 + 4
    assert figures == evaluate(tiny_checkpoint, tiny_shards, tmp_path / "fresh", instruction=1)


def test_a_changed_pool_is_computed_again(tiny_checkpoint: Path, tmp_path: Path) -> None:
    source, shards = write_pets(tmp_path / "source"), tmp_path / "shards"
    evaluate(tiny_checkpoint, shard_dataset(source, shards), tmp_path)
    (pool,) = source.glob("cand_pool/local/*task1_cand_pool.jsonl")
    changed = {**read_lines(pool)[0], "txt": "something else altogether"}
    for path in source.glob("cand_pool/*/*.jsonl"):
        write_lines(path, [changed if record["did"] == changed["did"] else record for record in read_lines(path)])
    figures = evaluate(tiny_checkpoint, shard_dataset(source, shards), tmp_path)
    assert figures == evaluate(tiny_checkpoint, shards, tmp_path / "fresh")


def test_a_run_killed_between_parts_goes_on_with_the_next_one(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embed, "PART_SIZE", 10)
    encoder, pool = tiny_module(tiny_checkpoint).encoder, Shards(tiny_shards).pool("train")
    made_by = encoder_fingerprint(encoder)

    def run(directory: str, entries: Entries) -> torch.Tensor:
        store = VectorStore(tmp_path / directory, batch_size=4, dtype="float32", show_progress=False)
        vectors = store.embed(encoder, entries, pool.fingerprint, made_by, "")
        return vectors.read(0, len(vectors))

    with pytest.raises(KeyboardInterrupt):
        run("killed", Entries(pool.items, fatal=25))
    left = sorted(path.name for path in (tmp_path / "killed").glob("*/*"))
    assert left == ["made_of.json", "part-00000.npy", "part-00001.npy"]
    again, whole = Entries(pool.items), Entries(pool.items)
    vectors = run("killed", again)
    assert again.read == list(range(20, 48)), "the parts that were whole are not computed again"
    assert torch.equal(vectors, run("whole", whole))
    assert whole.read == list(range(48))
    ids = [encode_id(c.did) for c in whole]
    assert ids == pool.ids.tolist()


class Watch(Callback):
    """Something with a heart, as a watchdog has."""

    def __init__(self) -> None:
        self.beats: list[str] = []

    def beat(self, position: str) -> None:
        self.beats.append(position)


def test_an_evaluation_runs_in_the_precision_of_the_trainer_and_says_that_it_goes_on(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folders = []
    for precision in ("32-true", "bf16-mixed"):
        module, watch = tiny_module(tiny_checkpoint), Watch()
        trainer = tiny_trainer(tmp_path, precision=precision, callbacks=[watch, evaluation(vectors_dir=tmp_path / "v")])
        trainer.test(module, MBEIRDataModule(tiny_shards), verbose=False)
        folders.append({path.parent for path in (tmp_path / "v").glob("*/part-*.npy")})
        assert len(watch.beats) >= 5
        assert set(watch.beats) == {"embedding"}
    encoder = module.encoder
    store = VectorStore(tmp_path / "v", dtype="float32", precision=partial(torch.autocast, "cpu", torch.bfloat16))
    place = store.folder(Shards(tiny_shards).pool("test").fingerprint, encoder_fingerprint(encoder))
    assert place in folders[1] - folders[0]
    assert len(folders[1]) == 2 * len(folders[0]) == 10
