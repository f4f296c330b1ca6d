"""Contract 8, training: a run resumed from a checkpoint of any moment ends as one that was not stopped.

A whole run saves a checkpoint at every moment at which Lightning may; from each of them another run goes on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim.lr_scheduler import LambdaLR
from worlds import tiny_module, tiny_trainer

from lightning_mmembed import HardNegativeMining, MBEIRDataModule, RetrievalEvaluation
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.mining_rule import MiningRule

BATCHES = 3  # of an epoch


class Saver(Callback):
    """Saves at the end of every batch, validation and epoch, before or after the other callbacks have seen it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.saved = folder, list[Path]()

    def save(self, trainer: Trainer, moment: str) -> None:
        done = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        path = self.folder / f"{len(self.saved)}-{moment}-after-{done}.ckpt"
        trainer.save_checkpoint(path)
        self.saved.append(path)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.save(trainer, "batch")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer, "validation")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer, "epoch")


@dataclass
class Recorder(Callback):
    """Notes every batch (epoch, place, qids, dids, instructions, step of the logs, learning rate) and validation."""

    batches: list[tuple[Any, ...]] = field(default_factory=list)
    validations: list[tuple[int, int]] = field(default_factory=list)

    def __hash__(self) -> int:
        return id(self)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        words = sorted(bucket.input_ids.tolist() for bucket in batch.inputs.buckets)
        ids, rate = (
            (batch.query_ids.tolist(), batch.candidate_ids.tolist()),
            trainer.optimizers[0].param_groups[0]["lr"],
        )
        logged = trainer.fit_loop.epoch_loop._batches_that_stepped
        self.batches.append((trainer.current_epoch, batch_idx, *ids, words, logged, rate))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validations.append((trainer.global_step, trainer.fit_loop.epoch_loop.batch_progress.total.ready))


class Interruption(Exception):
    """What ends a run in the middle."""


class Interrupter(Callback):
    """Ends a run after some batches."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.total.ready == self.after:
            raise Interruption


@dataclass
class World:
    shards: Path
    checkpoint: Path
    folder: Path

    def fit(
        self,
        ckpt_path: Path | None = None,
        callbacks: tuple[Callback, ...] = (),
        data: dict[str, Any] | None = None,
        mined: bool = False,
        lora: bool = False,
        **trainer: Any,
    ) -> tuple[dict[str, torch.Tensor], Recorder, Trainer]:
        """Weights, records and Trainer of a run of two epochs."""
        torch.manual_seed(3)
        settings: dict[str, Any] = {"lora": {"r": 2, "lora_dropout": 0.3}} if lora else {}
        module = tiny_module(self.checkpoint, **settings)
        module.scheduler = partial(LambdaLR, lr_lambda=lambda step: 1 / (1 + step))
        recorder = Recorder()
        rule = MiningRule(k=20, k_prime=6)
        others = [HardNegativeMining(after_epochs=[1], rule=rule, dirpath=self.folder)] if mined else []
        found = tiny_trainer(self.folder, **{"max_epochs": 2, **trainer}, callbacks=[*callbacks, *others, recorder])
        found.fit(module, MBEIRDataModule(self.shards, **{"batch_size": 16, **(data or {})}), ckpt_path=ckpt_path)
        return {name: value.clone() for name, value in module.state_dict().items()}, recorder, found


@pytest.fixture
def world(tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path) -> World:
    return World(tiny_shards, tiny_checkpoint, tmp_path)


def assert_same(found: Any, expected: Any, moment: str) -> None:
    """The resumed run ends with the weights of the whole one, and has done the rest of it and nothing else."""
    weights, recorder, trainer = found
    whole, recorded, _ = expected
    assert all(torch.equal(weights[name], whole[name]) for name in whole), moment
    assert trainer.global_step == expected[2].global_step, moment
    n = len(recorder.batches)
    assert recorder.batches == recorded.batches[len(recorded.batches) - n :], moment
    steps = [batch[:2] for batch in recorder.batches]
    begun = 0 if not steps else steps[0][0] * BATCHES + steps[0][1]
    due = [validation for validation in recorded.validations if validation[1] > begun or not steps]
    assert recorder.validations[len(recorder.validations) - len(due) :] == due or not steps, moment


MOMENTS = [
    pytest.param({"mined": True}, id="mining"),
    pytest.param({"val_check_interval": 2, "accumulate_grad_batches": 2}, id="validation within an epoch"),
    *(
        pytest.param(arguments, id=name, marks=pytest.mark.slow)
        for name, arguments in {
            "accumulation": {"accumulate_grad_batches": 2},
            "dropout of LoRA": {"lora": True},
            "no validation": {"limit_val_batches": 0, "mined": True},
            "a validation every other epoch": {"check_val_every_n_epoch": 2},
            "part of an epoch": {"limit_train_batches": 2, "limit_val_batches": 0},
            "the same dataloader": {"reload_dataloaders_every_n_epochs": 0, "limit_val_batches": 0, "mined": True},
            "steps": {"max_steps": 5, "max_epochs": -1},
            "steps without validation": {"max_steps": 5, "max_epochs": -1, "limit_val_batches": 0},
            "steps and accumulation": {"max_steps": 3, "accumulate_grad_batches": 2, "val_check_interval": 1},
            "validation by steps": {"val_check_interval": 2, "check_val_every_n_epoch": None},
            "steps and validation by steps": {"max_steps": 5, "val_check_interval": 2, "check_val_every_n_epoch": None},
        }.items()
    ),
]


@pytest.mark.parametrize("arguments", MOMENTS)
def test_a_run_resumed_at_any_moment_ends_as_one_that_was_not_stopped(world: World, arguments: dict[str, Any]) -> None:
    saver = Saver(world.folder)
    expected = world.fit(callbacks=(saver,), **arguments)
    assert len(saver.saved) > len(expected[1].batches)
    mined = {path: path.read_bytes() for path in world.folder.glob("negatives-*.parquet")}
    assert bool(mined) == bool(arguments.get("mined"))
    for path in saver.saved:
        for negatives in mined:
            negatives.unlink()  # where the checkpoint knows them they are needed, and where not they are mined again
        for negatives, content in mined.items():
            if str(negatives) == torch.load(path, weights_only=True)["MBEIRDataModule"]["negatives"]:
                negatives.write_bytes(content)
        assert_same(world.fit(path, **arguments), expected, path.name)
        assert {path: path.read_bytes() for path in mined} == mined or "epoch" not in path.name


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_batches_that_workers_have_read_ahead_are_not_taken_for_done(world: World, workers: int) -> None:
    expected = world.fit(data={"num_workers": workers})
    saver = Saver(world.folder)
    with pytest.raises(Interruption):
        world.fit(callbacks=(saver, Interrupter(2)), data={"num_workers": workers})
    assert_same(world.fit(saver.saved[1], data={"num_workers": workers}), expected, saver.saved[1].name)


@pytest.mark.parametrize("moment", ["2-batch-after-3", "3-validation-after-3", "4-epoch-after-3"])
def test_mining_that_was_due_at_the_end_of_an_epoch_is_done_once_and_kept(world: World, moment: str) -> None:
    """Mined before the checkpoint or after it: the file of the killed run is taken as it is."""
    saver = Saver(world.folder)
    expected = world.fit(callbacks=(saver,), mined=True)
    negatives = world.folder / "negatives-1.parquet"
    before = negatives.stat().st_mtime_ns, negatives.read_bytes()
    shutil.rmtree(world.folder / "vectors")
    found = world.fit(world.folder / f"{moment}.ckpt", mined=True)
    assert_same(found, expected, moment)
    assert (negatives.stat().st_mtime_ns, negatives.read_bytes()) == before
    assert not (world.folder / "vectors").exists(), "nothing was embedded again"
    assert [path.name for path in world.folder.glob("*.parquet")] == ["negatives-1.parquet"]


# --- another number of queries per step -----------------------------------------------------------------------------


def test_another_number_of_queries_per_step_is_refused_in_the_middle_of_an_epoch(world: World) -> None:
    saver = Saver(world.folder)
    world.fit(callbacks=(saver,))
    message = (
        r"saved in the middle of an epoch of 16 queries per step, and data.batch_size=8 on 1 processes makes 8; "
        r"set data.batch_size=16"
    )
    with pytest.raises(UserInputError, match=message):
        world.fit(saver.saved[0], data={"batch_size": 8})


def test_another_number_of_queries_per_step_is_taken_at_the_end_of_an_epoch(world: World) -> None:
    saver = Saver(world.folder)
    world.fit(callbacks=(saver,))
    _, recorder, _ = world.fit(next(path for path in saver.saved if "epoch" in path.name), data={"batch_size": 8})
    assert [batch[:2] for batch in recorder.batches] == [(1, place) for place in range(6)]


def test_a_resumed_run_evaluates_what_a_whole_one_does(world: World) -> None:
    evaluations, saver = [], Saver(world.folder)
    for ckpt_path in (None, world.folder / "0-batch-after-1.ckpt"):
        evaluation = RetrievalEvaluation(metrics=("hit@5",), dirpath=world.folder)
        world.fit(ckpt_path, callbacks=(evaluation,) if ckpt_path else (evaluation, saver))
        evaluations.append(evaluation.evaluations)
    assert evaluations[0] == evaluations[1]


# --- the negatives that a checkpoint was trained with ---------------------------------------------------------------


def other_negatives(path: Path) -> bytes:
    """Put other negatives of the same pool at the place of a file; returns what it held."""
    held, table = path.read_bytes(), pq.read_table(path)
    pq.write_table(table.slice(0, table.num_rows // 2), path)
    return held


def given_negatives(world: World) -> Path:
    """A file of negatives, as one that was mined before."""
    world.fit(mined=True, limit_val_batches=0)
    return (world.folder / "negatives-1.parquet").rename(world.folder / "given.parquet")


@pytest.mark.parametrize("moment", ["0-batch-after-1", "3-epoch-after-3"])
def test_a_run_whose_negatives_were_replaced_meanwhile_is_refused(world: World, moment: str) -> None:
    given, saver = given_negatives(world), Saver(world.folder)
    settings: dict[str, Any] = {"data": {"negatives": [given], "negatives_per_query": 2}, "limit_val_batches": 0}
    expected = world.fit(callbacks=(saver,), **settings)
    held = other_negatives(given)
    with pytest.raises(
        UserInputError, match=r"given\.parquet' was replaced since .*put that file back, or begin a new"
    ):
        world.fit(world.folder / f"{moment}.ckpt", **settings)
    given.write_bytes(held)
    assert_same(world.fit(world.folder / f"{moment}.ckpt", **settings), expected, moment)


def test_a_run_is_not_resumed_with_other_negatives_than_it_was_begun_with(world: World) -> None:
    given, saver = given_negatives(world), Saver(world.folder)
    world.fit(callbacks=(saver,), limit_val_batches=0)
    with pytest.raises(UserInputError, match=r"negatives=\S+: the run .* was begun with none, .*weights=\.\.\."):
        world.fit(saver.saved[0], data={"negatives": given}, limit_val_batches=0)
    settings: dict[str, Any] = {"data": {"negatives": given}, "limit_val_batches": 0}
    expected = world.fit(callbacks=(saver,), **settings)
    assert_same(world.fit(saver.saved[-1], limit_val_batches=0), expected, "given once")


def test_a_checkpoint_that_knows_the_path_alone_is_taken_as_it_is(world: World) -> None:
    given, saver = given_negatives(world), Saver(world.folder)
    settings: dict[str, Any] = {"data": {"negatives": given}, "limit_val_batches": 0}
    world.fit(callbacks=(saver,), **settings)
    content = torch.load(saver.saved[0], weights_only=True)
    assert content["MBEIRDataModule"].pop("sha256") == {str(given): hashlib.sha256(given.read_bytes()).hexdigest()}
    torch.save(content, world.folder / "old.ckpt")
    other_negatives(given)
    world.fit(world.folder / "old.ckpt", **settings)


def test_a_file_that_the_run_itself_mines_again_is_taken_and_the_one_before_is_not(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    path = given_negatives(world).rename(world.folder / "negatives-1.parquet")
    other_negatives(path)
    pq.write_table(pq.read_table(path).replace_schema_metadata(of_another_encoder(path)), path)
    given, saver = path.read_bytes(), Saver(world.folder)
    settings: dict[str, Any] = {"data": {"negatives": path}, "mined": True, "limit_val_batches": 0}
    caplog.clear()
    expected = world.fit(callbacks=(saver,), **settings)
    assert path.read_bytes() != given
    replaced = [record.message for record in caplog.records if record.levelname == "WARNING" and "given" in record.msg]
    assert len(replaced) == 1
    assert f"no more from negatives={path}" in replaced[0]
    for saved in saver.saved[BATCHES:]:  # the first of them was saved before it was mined
        assert_same(world.fit(saved, **settings), expected, saved.name)
    with pytest.raises(UserInputError, match=r"negatives-1\.parquet' was replaced"):
        world.fit(saver.saved[0], **settings)


def of_another_encoder(path: Path) -> dict[bytes, bytes]:
    """The metadata of a file of negatives, but for what mined it."""
    metadata = pq.read_schema(path).metadata
    made_of = {**json.loads(metadata[b"made_of"]), "encoder": "another"}
    return {**metadata, b"made_of": json.dumps(made_of).encode()}
