"""Mining in a run: when it happens, with which weights, what it writes, and which batches draw from it."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from filelock import FileLock
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from worlds import ranking, tiny_module, tiny_trainer, write_pets

from lightning_mmembed import HardNegativeMining, MBEIRDataModule, MLLMEncoder, RetrievalEvaluation
from lightning_mmembed.callbacks import RunReport, access
from lightning_mmembed.checkpoints import load_encoder_weights
from lightning_mmembed.data import Shards, shard_dataset
from lightning_mmembed.data.negatives import MinedNegatives
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.items import decode_id
from lightning_mmembed.mining_rule import KINDS, MiningRule
from lightning_mmembed.retrieval.embed import encoder_fingerprint

K, K_PRIME = 20, 6
RULE = MiningRule(k=K, k_prime=K_PRIME)


class BatchRecorder(Callback):
    """Keeps (qid, drawn negatives) of every query by epoch, and the weights before the first step."""

    def __init__(self) -> None:
        self.negatives: dict[int, list[tuple[int, list[int]]]] = {}
        self.first_weights: dict[str, torch.Tensor] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.first_weights = self.first_weights or {k: v.clone() for k, v in pl_module.state_dict().items()}
        size = len(batch)
        drawn = batch.candidate_ids[size:].reshape(size, -1).tolist()
        rows = self.negatives.setdefault(trainer.current_epoch, [])
        rows += zip(batch.query_ids.tolist(), drawn, strict=True)


def mining(**arguments: Any) -> HardNegativeMining:
    return HardNegativeMining(rule=RULE, dtype="float32", **arguments)


def naive_negatives(
    encoder: MLLMEncoder, shards: Shards
) -> tuple[set[tuple[str, str, int, int]], dict[str, dict[str, int]]]:
    """(qid, did, kind, rank) of the paper's rule, written out over a full sort, and the audit of each task."""
    pool, rows, audit = list(shards.pool("train").items), set(), {}
    for queries in shards.query_sets("train"):
        wanted, counts = queries.task.target_modality, Counter()
        for query, ranked in zip(queries.queries, ranking(encoder, queries.queries, pool), strict=True):
            found: dict[int, list[tuple[str, int]]] = {0: [], 1: []}
            met = False
            for rank, candidate in enumerate(ranked[:K], 1):
                positive = candidate.did in query.positives
                met = met or positive
                counts["positives_met"] += positive
                if candidate.item.modality is not wanted and not met:
                    found[0].append((candidate.did, rank))
                if candidate.item.modality is wanted and not positive and rank > K_PRIME:
                    found[1].append((candidate.did, rank))
            counts["queries"] += 1
            counts["positives"] += len(query.positives)
            counts["with_wrong_modality"] += bool(found[0])
            counts["with_wrong_content"] += bool(found[1])
            counts["with_none"] += not (found[0] or found[1])
            rows |= {(query.qid, did, kind, rank) for kind in found for did, rank in found[kind]}
        audit[queries.task.name] = dict(counts)
    return rows, audit


def mined_rows(path: Path | str) -> set[tuple[str, str, int, int]]:
    table = pq.read_table(path).to_pylist()
    return {(decode_id(row["qid"]), decode_id(row["did"]), row["kind"], row["rank"]) for row in table}


def test_mining_after_an_epoch_changes_the_negatives_of_the_next(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    recorder, miner = BatchRecorder(), mining(after_epochs=[1, 2])
    datamodule = MBEIRDataModule(tiny_shards, batch_size=8, negatives_per_query=2)
    trainer = tiny_trainer(tmp_path, max_epochs=4, callbacks=[recorder, miner], limit_val_batches=0)
    trainer.fit(tiny_module(tiny_checkpoint), datamodule)
    assert all(drawn == [] for _, drawn in recorder.negatives[0]), "the first epoch has in-batch negatives only"
    versions = [MinedNegatives(version["path"]) for version in miner.versions]
    assert [Path(version["path"]).name for version in miner.versions] == ["negatives-1.parquet", "negatives-2.parquet"]
    assert [version["step"] for version in miner.versions] == [6, 12]
    assert versions[0].made_of["encoder"] != versions[1].made_of["encoder"]
    for epoch, version in ((1, versions[0]), (2, versions[1]), (3, versions[1])):
        for qid, drawn in recorder.negatives[epoch]:
            assert len(drawn) == 2
            kinds = version.of(qid)
            if len(kinds[0]) + len(kinds[1]):
                assert set(drawn) <= {*kinds[0].tolist(), *kinds[1].tolist()}
    assert datamodule.negatives == tmp_path / "negatives-2.parquet"


def test_a_second_fit_with_the_same_callbacks_mines_and_evaluates_as_the_first_one_did(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    callbacks = (mining(before_fit=True, every_n_epochs=1), RetrievalEvaluation(before_fit=True))
    known = []
    for folder in (tmp_path / "first", tmp_path / "second"):
        datamodule = MBEIRDataModule(tiny_shards, batch_size=16)
        trainer = tiny_trainer(folder, max_epochs=2, callbacks=list(callbacks))
        trainer.fit(tiny_module(tiny_checkpoint), datamodule)
        assert datamodule.negatives == folder / "negatives-2.parquet"
        steps = [one["step"] for one in callbacks[1].evaluations]
        known.append(([version["epochs"] for version in callbacks[0].versions], steps))
    assert known[0] == known[1]
    assert known[0][0] == [0, 1]
    assert known[0][1][0] == 0


def test_what_is_mined_equals_a_full_sort_and_the_rule_written_out(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    miner, module = mining(before_fit=True), tiny_module(tiny_checkpoint)
    made_by = encoder_fingerprint(module.encoder)
    trainer = tiny_trainer(tmp_path, max_steps=1, callbacks=[miner], limit_val_batches=0)
    trainer.fit(module, MBEIRDataModule(tiny_shards, batch_size=8))
    rows, audit = naive_negatives(tiny_module(tiny_checkpoint).encoder, Shards(tiny_shards))
    assert mined_rows(miner.versions[0]["path"]) == rows
    assert {kind for _, _, kind, _ in rows} == {0, 1}
    found = MinedNegatives(miner.versions[0]["path"])
    assert {name: {key: found.audit[name][key] for key in task} for name, task in audit.items()} == audit
    assert miner.versions[0]["audit"] == found.audit
    kinds = [(KINDS.index(name), row) for task in found.audit.values() for name, row in task["kinds"].items()]
    for kind in (0, 1):
        ranks = [rank for *_, one, rank in rows if one == kind]
        mine = [row for one, row in kinds if one == kind]
        assert sum(row["negatives"] for row in mine) == sum(sum(row["scores"]) for row in mine) == len(ranks)
        assert sum(row["negatives"] * row["mean_rank"] for row in mine) == pytest.approx(sum(ranks), abs=0.1)
    assert found.made_of["encoder"] == made_by
    assert found.made_of["pool"] == Shards(tiny_shards).pool("train").fingerprint
    assert not list(tmp_path.glob("**/.*.tmp"))


def test_mining_before_fit_serves_the_first_batch(tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    recorder, miner = BatchRecorder(), mining(before_fit=True)
    trainer = tiny_trainer(tmp_path, max_epochs=1, callbacks=[recorder, miner], limit_val_batches=0)
    trainer.fit(tiny_module(tiny_checkpoint), MBEIRDataModule(tiny_shards, batch_size=8))
    assert all(len(drawn) == 1 for _, drawn in recorder.negatives[0])


def test_mining_with_a_checkpoint_uses_its_weights_and_leaves_the_trained_ones_alone(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    trainer = tiny_trainer(tmp_path / "random", max_epochs=2, limit_val_batches=0)
    trainer.fit(tiny_module(tiny_checkpoint), MBEIRDataModule(tiny_shards, batch_size=8))
    ckpt_path = tmp_path / "random.ckpt"
    trainer.save_checkpoint(ckpt_path)

    recorder, miner = BatchRecorder(), mining(before_fit=True, ckpt_path=ckpt_path)
    module = tiny_module(tiny_checkpoint)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer = tiny_trainer(tmp_path / "hard", max_epochs=1, callbacks=[recorder, miner], limit_val_batches=0)
    trainer.fit(module, MBEIRDataModule(tiny_shards, batch_size=8))
    assert all(torch.equal(recorder.first_weights[name], value) for name, value in before.items())
    rows = mined_rows(miner.versions[0]["path"])
    encoder = tiny_module(tiny_checkpoint).encoder
    assert rows != naive_negatives(encoder, Shards(tiny_shards))[0]
    load_encoder_weights(encoder, ckpt_path)
    assert rows == naive_negatives(encoder, Shards(tiny_shards))[0]


def test_a_trainer_that_keeps_its_dataloader_draws_from_the_new_negatives_too(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    recorders = []
    for every in (0, 1):
        recorders.append(BatchRecorder())
        callbacks = [recorders[-1], mining(after_epochs=[1], dirpath=tmp_path / str(every))]
        arguments = {"reload_dataloaders_every_n_epochs": every, "limit_val_batches": 0}
        trainer = tiny_trainer(tmp_path, max_epochs=3, callbacks=callbacks, **arguments)
        trainer.fit(tiny_module(tiny_checkpoint), MBEIRDataModule(tiny_shards, batch_size=16))
    assert recorders[0].negatives == recorders[1].negatives
    assert all(drawn for _, drawn in recorders[0].negatives[1])


def test_a_checkpoint_to_mine_with_needs_mining_before_fit(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match=r"ckpt_path='x.ckpt' is only mined with before fit; set before_fit=True"):
        HardNegativeMining(ckpt_path="x.ckpt")


def test_nothing_is_mined_after_the_last_epoch(tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    miner = mining(every_n_epochs=1)
    trainer = tiny_trainer(tmp_path, max_epochs=2, callbacks=[miner], limit_val_batches=0)
    trainer.fit(tiny_module(tiny_checkpoint), MBEIRDataModule(tiny_shards, batch_size=16))
    assert [path.name for path in tmp_path.glob("*.parquet")] == ["negatives-1.parquet"]


# --- resuming -------------------------------------------------------------------------------------------------------


def fit(shards: Path, checkpoint: Path, directory: Path, ckpt_path: Path | None = None, **arguments: Any) -> Any:
    """A run of the shipped kind: evaluation, mining after the second epoch, the best and the last checkpoint."""
    recorder = BatchRecorder()
    saver = ModelCheckpoint(directory, filename="{epoch}", monitor="val/union/hit@5", mode="max", save_top_k=-1)
    callbacks = [RetrievalEvaluation(metrics=("hit@5",)), mining(after_epochs=[2]), RunReport(), saver, recorder]
    module, datamodule = tiny_module(checkpoint), MBEIRDataModule(shards, batch_size=8)
    trainer = tiny_trainer(directory, max_epochs=4, callbacks=callbacks, enable_checkpointing=True, **arguments)
    trainer.fit(module, datamodule, ckpt_path=ckpt_path)
    return module, datamodule, recorder


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
@pytest.mark.parametrize(
    ("stopped_after", "arguments"),
    [
        pytest.param(0, {}, id="before the epoch that is mined after"),
        pytest.param(1, {}, id="after the epoch that is mined after"),
        pytest.param(2, {}, id="an epoch later"),
        pytest.param(
            1, {"check_val_every_n_epoch": 2}, id="after an epoch that is mined after, saved by its validation"
        ),
    ],
)
def test_a_resumed_run_takes_up_the_negatives_and_ends_like_one_that_was_not_stopped(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path, stopped_after: int, arguments: dict[str, Any]
) -> None:
    whole, _, recorded = fit(tiny_shards, tiny_checkpoint, tmp_path, **arguments)
    ckpt_path = tmp_path / f"epoch={stopped_after}.ckpt"
    if stopped_after == 2:
        content = torch.load(ckpt_path, weights_only=True)
        path = tmp_path / "negatives-1.parquet"
        known = {str(path): hashlib.sha256(path.read_bytes()).hexdigest()}
        assert content["MBEIRDataModule"] == {"negatives": str(path), "sha256": known, "given": []}
    module, datamodule, recorder = fit(tiny_shards, tiny_checkpoint, tmp_path, ckpt_path, **arguments)
    assert datamodule.negatives is not None, "the run goes on without mined negatives"
    assert Path(datamodule.negatives) == tmp_path / "negatives-1.parquet"
    assert sorted(recorder.negatives) == list(range(stopped_after + 1, 4))
    for epoch in recorder.negatives:
        assert recorder.negatives[epoch] == recorded.negatives[epoch], epoch
    own, theirs = module.state_dict(), whole.state_dict()
    assert all(torch.equal(own[name], theirs[name]) for name in own)


def test_negatives_that_were_mined_in_another_dataset_are_refused(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    miner = mining(before_fit=True)
    trainer = tiny_trainer(tmp_path / "first", max_steps=1, callbacks=[miner], limit_val_batches=0)
    trainer.fit(tiny_module(tiny_checkpoint), MBEIRDataModule(tiny_shards, batch_size=8))
    other = shard_dataset(write_pets(tmp_path / "source", "zoo"), tmp_path / "shards")
    datamodule = MBEIRDataModule(other, batch_size=8, negatives=miner.versions[0]["path"])
    with pytest.raises(UserInputError, match=r"negatives-1.parquet' were mined in another dataset.*mine again"):
        tiny_trainer(tmp_path / "second", max_steps=1).fit(tiny_module(tiny_checkpoint), datamodule)


# --- rules ----------------------------------------------------------------------------------------------------------


def test_a_curriculum_draws_the_wrong_modality_first_and_the_wrong_content_last(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    recorder, miner = BatchRecorder(), mining(before_fit=True)
    share = {"start": 1.0, "end": 0.0, "epochs": 2}
    datamodule = MBEIRDataModule(tiny_shards, batch_size=8, negatives_per_query=3, wrong_modality_share=share)
    trainer = tiny_trainer(tmp_path, max_epochs=2, callbacks=[recorder, miner], limit_val_batches=0)
    trainer.fit(tiny_module(tiny_checkpoint), datamodule)
    found, seen = MinedNegatives(miner.versions[0]["path"]), Counter()
    for epoch in (0, 1):
        for qid, drawn in recorder.negatives[epoch]:
            kinds = [part.tolist() for part in found.of(qid)]
            if kinds[0] and kinds[1]:
                assert set(drawn[: len(kinds[epoch])]) <= set(kinds[epoch])
                seen[epoch] += 1
    assert min(seen.values()) > 0
    assert len(seen) == 2


def test_another_rule_and_another_pool_are_mined_while_training(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    miner = HardNegativeMining(before_fit=True, rule=MiningRule("top_k", k=4), pool="test")
    trainer = tiny_trainer(tmp_path, max_steps=1, callbacks=[miner], limit_val_batches=0)
    trainer.fit(tiny_module(tiny_checkpoint), MBEIRDataModule(tiny_shards, batch_size=8))
    table = pq.read_table(miner.versions[0]["path"])
    assert set(table["kind"].to_pylist()) == {KINDS.index("any_modality")}
    assert max(table["rank"].to_pylist()) == 4
    assert set(table["did"].to_pylist()) <= set(Shards(tiny_shards).pool("test").ids.tolist())


def test_a_callback_that_is_not_told_when_to_mine_is_refused() -> None:
    with pytest.raises(UserInputError, match="nothing says when to mine; give before_fit=True"):
        mining()


@pytest.mark.parametrize(
    ("arguments", "epochs", "told"),
    [
        ({"after_epochs": [2, 5]}, 2, True),
        ({"after_epochs": [2, 5]}, 3, False),
        ({"every_n_epochs": 2}, 2, True),
        ({"every_n_epochs": 2}, -1, False),
        ({"after_epochs": [2], "before_fit": True}, 1, False),
    ],
)
def test_a_run_that_ends_before_its_first_mining_is_warned(
    tiny_shards: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    arguments: dict[str, Any],
    epochs: int,
    told: bool,
) -> None:
    trainer = tiny_trainer(
        tmp_path, max_epochs=epochs, max_steps=1, callbacks=[mining(**arguments)], limit_val_batches=0
    )
    with caplog.at_level("WARNING"):
        trainer.fit(tiny_module(tiny_checkpoint), MBEIRDataModule(tiny_shards, batch_size=8))
    assert ("no negatives will be mined" in caplog.text) == told


def test_two_runs_in_one_directory_are_refused_and_one_after_the_other_is_not(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "PATIENCE", 0.1)

    def train(*callbacks: Callback) -> None:
        trainer = tiny_trainer(tmp_path, max_steps=1, callbacks=list(callbacks), limit_val_batches=0)
        trainer.fit(tiny_module(tiny_checkpoint), MBEIRDataModule(tiny_shards, batch_size=8))

    both = (RetrievalEvaluation(["hit@5"]), mining(before_fit=True))
    with FileLock(tmp_path / ".run.lock"):  # as another process has it
        for callback in both:
            with pytest.raises(UserInputError, match="another run is at work in"):
                train(callback)
    train(*both)
    train(mining(before_fit=True))


def test_a_rule_that_needs_a_second_model_is_refused_before_training() -> None:
    with pytest.raises(UserInputError, match=r"check_margin=0.0 needs the scores of a second model.*mmembed-mine"):
        HardNegativeMining(rule=MiningRule(check_margin=0.0))


def test_a_share_that_is_none_is_refused(tiny_shards: Path) -> None:
    with pytest.raises(UserInputError, match=r"wrong_modality_share=1.5 cannot be used: a share is from 0 to 1"):
        MBEIRDataModule(tiny_shards, wrong_modality_share=1.5)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
def test_the_report_shows_what_was_mined(tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    callbacks = [RetrievalEvaluation(metrics=("hit@5",)), mining(after_epochs=[1]), RunReport()]
    trainer = tiny_trainer(tmp_path, max_epochs=2, callbacks=callbacks)
    module, datamodule = tiny_module(tiny_checkpoint), MBEIRDataModule(tiny_shards, batch_size=16)
    trainer.fit(module, datamodule)
    trainer.test(module, datamodule, verbose=False)
    page = (tmp_path / "report.html").read_text()
    assert "mining 1, after 1 epoch, step 3" in page
    assert "labelled positive" in page
