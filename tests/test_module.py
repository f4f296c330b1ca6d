"""The module under a real Trainer: it learns, validates, and its checkpoints load without executing anything."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from transformers import get_cosine_schedule_with_warmup
from worlds import tiny_module, tiny_trainer

from lightning_mmembed import MBEIRDataModule, RetrievalModule
from lightning_mmembed.checkpoints import load_encoder_weights
from lightning_mmembed.data import Shards
from lightning_mmembed.data.batches import TrainingBatch
from lightning_mmembed.encoders.base import encoder_of
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.loss_modules import MatryoshkaLoss
from lightning_mmembed.losses import contrastive_loss


class Recorder(Callback):
    """Keeps the losses, the learning rates and the batches of a fit."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rates: list[float] = []
        self.batches: list[tuple[int, TrainingBatch]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.batches.append((trainer.current_epoch, batch))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))


def test_training_makes_the_loss_fall(tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    recorder, module = Recorder(), tiny_module(tiny_checkpoint)
    trainer = tiny_trainer(tmp_path, max_epochs=4, callbacks=[recorder])
    trainer.fit(module, MBEIRDataModule(tiny_shards, batch_size=8))
    assert len(recorder.losses) == 4 * 6
    assert sum(recorder.losses[-6:]) < 0.8 * sum(recorder.losses[:6])
    assert {"train/loss", "train/accuracy", "val/loss", "val/accuracy"} <= trainer.callback_metrics.keys()


def test_the_loss_of_a_step_is_that_of_its_definition(tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    recorder, module = Recorder(), tiny_module(tiny_checkpoint, lr=0.0)
    tiny_trainer(tmp_path, max_steps=1, callbacks=[recorder], limit_val_batches=0).fit(
        module, MBEIRDataModule(tiny_shards, batch_size=48)
    )
    batch = recorder.batches[0][1]
    queries, candidates = module.encoder.encode_inputs(batch.inputs).split([48, 48])
    total, masked = 0.0, 0
    for row in range(48):
        target, positives = int(batch.positive_index[row]), batch.positives[row].tolist()
        kept = [c for c in range(48) if c == target or int(batch.candidate_ids[c]) not in positives]
        masked += 48 - len(kept)
        scores = [float(queries[row] @ candidates[c]) / 0.05 for c in kept]
        total -= scores[kept.index(target)] - math.log(sum(map(math.exp, scores)))
    assert recorder.losses[0] == pytest.approx(total / 48, rel=1e-4)
    assert masked == 0 or masked < 48


def test_two_runs_of_one_seed_give_the_same_weights(tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    found = []
    for name in ("one", "two"):
        module = tiny_module(tiny_checkpoint)
        trainer = tiny_trainer(tmp_path / name, max_epochs=1, limit_val_batches=0)
        trainer.fit(module, MBEIRDataModule(tiny_shards, batch_size=16, seed=4))
        found.append(module.encoder.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_validation_is_the_same_in_every_epoch_but_for_the_weights(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    module, datamodule = tiny_module(tiny_checkpoint), MBEIRDataModule(tiny_shards, batch_size=8, negatives_per_query=2)
    first, second = (tiny_trainer(tmp_path).validate(module, datamodule, verbose=False)[0] for _ in range(2))
    assert first == second
    assert tiny_trainer(tmp_path).test(module, datamodule, verbose=False)[0].keys() == {"test/loss", "test/accuracy"}


def test_the_scheduler_is_stepped_after_every_batch_and_knows_their_number(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    recorder, module = Recorder(), tiny_module(tiny_checkpoint, lr=1.0)
    module.scheduler = partial(get_cosine_schedule_with_warmup, num_warmup_steps=2)
    trainer = tiny_trainer(tmp_path, max_epochs=2, callbacks=[recorder], limit_val_batches=0)
    trainer.fit(module, MBEIRDataModule(tiny_shards, batch_size=12))
    expected = [0, 0.5, *(0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6))]
    assert recorder.rates == pytest.approx(expected)


def test_a_scheduler_that_needs_the_number_of_steps_says_so_when_there_is_none(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    module = tiny_module(tiny_checkpoint)
    module.scheduler = partial(get_cosine_schedule_with_warmup, num_warmup_steps=2)
    with pytest.raises(UserInputError, match="the scheduler needs to know the number of steps; set max_epochs"):
        tiny_trainer(tmp_path, max_epochs=-1, max_time="00:00:00:01").fit(module, MBEIRDataModule(tiny_shards))


def test_a_loss_for_vectors_of_another_width_is_refused_before_a_callback_begins(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    class Begins(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            raise AssertionError("such as an evaluation of the whole pool")

    module = tiny_module(tiny_checkpoint)
    module.loss = MatryoshkaLoss(contrastive_loss, [16, 8])
    with pytest.raises(UserInputError, match=r"matryoshka_dims=\[16, 8\]: the largest must be 32"):
        tiny_trainer(tmp_path, max_epochs=1, callbacks=[Begins()]).fit(module, MBEIRDataModule(tiny_shards))


def test_frozen_parameters_are_left_out_of_the_optimizer(tiny_checkpoint: Path) -> None:
    module = tiny_module(tiny_checkpoint)
    module.encoder.backbone.vision_tower.requires_grad_(False)
    optimizer = module.configure_optimizers()
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in module.encoder.parameters() if p.requires_grad}
    assert len(held) < len(list(module.encoder.parameters()))


def test_the_default_optimizer_is_adamw_at_the_learning_rate_of_the_paper(tiny_checkpoint: Path) -> None:
    optimizer = RetrievalModule(tiny_module(tiny_checkpoint).encoder).configure_optimizers()
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[0]["lr"] == 1e-4


def test_a_checkpoint_loads_with_weights_only_and_gives_the_trained_encoder(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    saver = ModelCheckpoint(tmp_path, save_last=True)
    module, datamodule = tiny_module(tiny_checkpoint), MBEIRDataModule(tiny_shards, batch_size=16)
    tiny_trainer(tmp_path, max_epochs=1, callbacks=[saver], enable_checkpointing=True).fit(module, datamodule)
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert content["MBEIRDataModule"] == {"negatives": None, "sha256": {}, "given": []}
    fresh = tiny_module(tiny_checkpoint).encoder
    before = fresh.encode_document(["a red ellipse"])
    load_encoder_weights(fresh, tmp_path / "last.ckpt")
    after = fresh.encode_document(["a red ellipse"])
    assert torch.equal(after, module.encoder.encode_document(["a red ellipse"]))
    assert not torch.allclose(after, before)


def test_several_checkpoints_give_the_mean_of_their_weights(tiny_checkpoint: Path, tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.ckpt" for number in range(3)]
    trainer, weights = tiny_trainer(tmp_path), []
    for seed, path in enumerate(paths):
        module = tiny_module(tiny_checkpoint)
        torch.manual_seed(seed)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter)
        trainer.strategy.connect(module)
        trainer.save_checkpoint(path)
        weights.append(dict(module.encoder.named_parameters()))
    encoder = tiny_module(tiny_checkpoint).encoder
    load_encoder_weights(encoder, paths)
    for name, parameter in encoder.named_parameters():
        torch.testing.assert_close(parameter, torch.stack([some[name] for some in weights]).mean(0))
    with pytest.raises(UserInputError, match=r"ckpt_path=\[\] names no checkpoint"):
        load_encoder_weights(encoder, [])


def test_a_module_without_an_encoder_is_named() -> None:
    with pytest.raises(
        UserInputError, match=r"Linear.encoder is NoneType; the datamodule and the callbacks need a module"
    ):
        encoder_of(nn.Linear(1, 1))


def test_a_split_without_queries_is_named(tiny_source: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    from worlds import write_pets

    source = write_pets(tmp_path / "source")
    (source / "query/val/mbeir_pets_val.jsonl").write_text("")
    datamodule = MBEIRDataModule(tmp_path / "shards", source=source)
    with pytest.raises(UserInputError, match=r"shards has 0 val queries for 1 processes"):
        tiny_trainer(tmp_path, max_epochs=1).fit(tiny_module(tiny_checkpoint), datamodule)


def test_an_unknown_batch_mix_is_named(tiny_shards: Path) -> None:
    with pytest.raises(UserInputError, match="batch_mix='striped' is unknown; write one of mixed, one-task"):
        MBEIRDataModule(tiny_shards, batch_mix="striped")


def test_tasks_too_small_for_batches_of_one_task_are_named_and_a_run_without_any_batch_is_refused(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {queries.task.name: len(queries) for queries in Shards(tiny_shards).query_sets("train")}
    twice = max(sizes)
    sizes[twice] *= 2
    smallest, largest = min(sizes.values()), max(sizes.values())
    assert smallest < largest
    for batch_size in (smallest, largest, largest + 1):
        settings: dict[str, Any] = {"batch_mix": "one-task", "upsample": {twice: 2}}
        datamodule = MBEIRDataModule(tiny_shards, batch_size=batch_size, **settings)
        trainer = tiny_trainer(tmp_path, max_epochs=1, limit_val_batches=0)
        caplog.clear()
        if batch_size > largest:
            message = rf"batch_size={batch_size} in each of 1 processes .* leaves none: \S+ has \d+.*; lower batch_size"
            with pytest.raises(UserInputError, match=message):
                trainer.fit(tiny_module(tiny_checkpoint), datamodule)
        else:
            trainer.fit(tiny_module(tiny_checkpoint), datamodule)
            for name, size in sizes.items():
                assert (f"{name} has {size}" in caplog.text) == (size < batch_size)
