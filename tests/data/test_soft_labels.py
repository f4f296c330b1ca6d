"""Batches bring the scores of a better model, each with its own pair."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from worlds import tiny_module, tiny_trainer

from lightning_mmembed import MBEIRDataModule
from lightning_mmembed.data import Shards
from lightning_mmembed.data.negatives import write_negatives
from lightning_mmembed.data.soft_labels import SoftLabels
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.losses import distillation_loss


def write(path: Path, pairs: dict[tuple[int, int], float], **facts: str) -> Path:
    columns = {"qid": [q for q, _ in pairs], "did": [d for _, d in pairs], "score": list(pairs.values())}
    table = pa.table({**columns, "score": pa.array(columns["score"], pa.float32())})
    pq.write_table(table.replace_schema_metadata({"split": "train", **facts}), path)
    return path


def test_a_pair_has_its_score_and_another_none(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pairs = {
        (int(q), int(d)): float(s) for q, d, s in zip(*rng.integers(0, 30, (2, 200)), rng.random(200), strict=True)
    }
    labels = SoftLabels(write(tmp_path / "labels.parquet", pairs))
    qids, dids = np.meshgrid(np.arange(-1, 32), np.arange(-1, 32))
    found = labels.of(qids.ravel(), dids.ravel())
    for qid, did, score in zip(qids.ravel().tolist(), dids.ravel().tolist(), found.tolist(), strict=True):
        expected = pairs.get((qid, did), math.nan)
        assert score == pytest.approx(expected, nan_ok=True)
    assert np.isnan(SoftLabels(write(tmp_path / "none.parquet", {})).of(np.array([1]), np.array([2]))).all()


@pytest.mark.parametrize("content", ["missing", "other", "columns", "test", "untold"])
def test_labels_that_cannot_be_used_are_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "labels.parquet"
    if content == "other":
        write(path, {(1, 2): 0.5}, shards="other shards")
    elif content == "test":
        write(path, {(1, 2): 0.5}, split="test", shards="these shards")
    elif content == "untold":
        pq.write_table(pa.table({"qid": [1], "did": [2], "score": [0.5]}), path)
    elif content == "columns":
        pq.write_table(pa.table({"qid": [1]}), path)
    with pytest.raises(UserInputError, match=r"labels\.parquet"):
        SoftLabels(path, "these shards")


@pytest.fixture
def half_scored(tiny_shards: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A negative for each query, and scores of all positives and of every second negative."""
    shards = Shards(tiny_shards)
    rows, pool = shards.query_rows("train"), shards.pool("train")
    qids, right = shards.query_ids(rows).tolist(), shards.positives(rows)
    wrong = [next(d for d in pool.ids.tolist()[n % 7 :] if d not in own) for n, own in enumerate(right)]
    columns = {"qid": qids, "did": wrong, "kind": [1] * len(qids), "rank": [1] * len(qids), "score": [0.0] * len(qids)}
    negatives = write_negatives(tmp_path / "n.parquet", columns, {"pool": shards.pool_fingerprint("train")}, {})
    pairs = {(q, d): 0.125 for q, d in zip(qids[::2], wrong[::2], strict=True)}
    pairs |= {(q, d): 0.75 for q, own in zip(qids, right, strict=True) for d in own}
    return negatives, write(tmp_path / "labels.parquet", pairs, shards=shards.fingerprint)


def test_training_distils_what_was_scored_and_only_that(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path, half_scored: tuple[Path, Path]
) -> None:
    negatives, labels = half_scored
    seen = []

    def loss(*args: torch.Tensor, listed: torch.Tensor | None = None, teacher_scores: torch.Tensor | None = None):  # type: ignore[no-untyped-def]
        seen.append((listed, teacher_scores))
        return distillation_loss(*args, listed=listed, teacher_scores=teacher_scores)

    module = tiny_module(tiny_checkpoint)
    module.loss = loss
    datamodule = MBEIRDataModule(tiny_shards, batch_size=8, negatives=negatives, soft_labels=labels)
    tiny_trainer(tmp_path, max_epochs=1).fit(module, datamodule)
    listed, scores = (torch.cat([one[n] for one in seen if one[0].shape[1] == 2]) for n in (0, 1))
    assert (scores[:, 0] == 0.75).all()
    assert set(scores[:, 1].tolist()) == {0.0, 0.125}
    assert ((listed[:, 1] < 0) == (scores[:, 1] == 0)).all(), "what was not scored is not listed"
    assert (listed[:, 0] >= 0).all()
    assert all((one[0] == -1).all() for one in seen if one[0].shape[1] == 1), "a validation batch has no teacher"


def test_the_share_of_queries_with_a_teacher_is_logged(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path, half_scored: tuple[Path, Path]
) -> None:
    module, (negatives, labels) = tiny_module(tiny_checkpoint), half_scored
    module.loss = distillation_loss
    trainer = tiny_trainer(tmp_path, max_epochs=1)
    trainer.fit(module, MBEIRDataModule(tiny_shards, batch_size=48, negatives=negatives, soft_labels=labels))
    assert trainer.callback_metrics["train/share_with_teacher"] == 0.5


@pytest.mark.parametrize("mined", ["not at all", "anew"])
def test_a_step_that_has_nothing_to_distil_is_refused(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path, half_scored: tuple[Path, Path], mined: str
) -> None:
    module, (negatives, labels) = tiny_module(tiny_checkpoint), half_scored
    module.loss = distillation_loss
    if mined == "anew":  # every score is of another negative
        table = pq.read_table(labels).to_pydict()
        pairs = zip(table["qid"], table["did"], table["score"], strict=True)
        write(labels, {(q, d if score == 0.75 else d + 10**6): score for q, d, score in pairs})
    datamodule = MBEIRDataModule(
        tiny_shards, batch_size=8, negatives=negatives if mined == "anew" else None, soft_labels=labels
    )
    with pytest.raises(UserInputError, match=r"no query of this step has two candidates .* callbacks\.mining=null"):
        tiny_trainer(tmp_path, max_epochs=1).fit(module, datamodule)
