"""A batch whose vectors or loss are not finite stops every process, with its ids and a file that shows it again."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_worlds import in_processes
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from worlds import tiny_module, tiny_trainer

from lightning_mmembed import MBEIRDataModule, MLLMEncoder, RetrievalModule
from lightning_mmembed.checkpoints import load_encoder_weights
from lightning_mmembed.data.batches import TrainingBatch
from lightning_mmembed.distributed import Processes
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.items import decode_id
from lightning_mmembed.reproducer import Moment, NonFiniteError, finite_rows, read_reproducer, refuse_nonfinite

NAN, INF = float("nan"), float("inf")


class Keeper(Callback):
    """Keeps the batch of a step."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.batch: TrainingBatch = batch


def first_batch(shards: Path, checkpoint: Path, directory: Path) -> tuple[TrainingBatch, RetrievalModule]:
    """A batch of 6 queries and their positives, and the module of the Trainer that read it."""
    keeper, module = Keeper(), tiny_module(checkpoint)
    trainer = tiny_trainer(directory, max_steps=1, limit_val_batches=0, callbacks=[keeper])
    trainer.fit(module, MBEIRDataModule(shards, batch_size=6))
    return keeper.batch, module


@pytest.fixture(scope="module")
def batch(tiny_shards: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingBatch:
    return first_batch(tiny_shards, tiny_checkpoint, tmp_path_factory.mktemp("batch"))[0]


def moment(directory: Path, **changed: Any) -> Moment:
    facts = {"step": 41, "epoch": 3, "dropout_seed": 2**64 - 7, "precision": "32-true", "directory": directory}
    return Moment(**{**facts, **changed})


def names(codes: Tensor) -> list[str]:
    return [decode_id(code) for code in codes.tolist()]


def refused(batch: TrainingBatch, vectors: Tensor, loss: Tensor | None, where: Moment, **more: Any) -> str:
    """What the error of a run of one process says."""
    with pytest.raises(NonFiniteError) as error:
        refuse_nonfinite(Processes(), [False], batch, vectors, loss, where, **more)
    return str(error.value)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("places", [[1], [0, 7, 11], [8]])
def test_the_items_whose_vectors_are_not_finite_are_named_and_no_other(
    batch: TrainingBatch, tmp_path: Path, value: float, places: list[int]
) -> None:
    vectors = torch.ones(12, 4)
    vectors[places, 2] = value
    ids = names(torch.cat([batch.query_ids, batch.candidate_ids]))
    queries, candidates = ([ids[i] for i in places if i < 6], [ids[i] for i in places if i >= 6])
    message = refused(batch, vectors, None, moment(tmp_path))
    assert message.startswith("step 41, epoch 3: vectors are not finite, and so no loss can be\n")
    line = f"process 0: queries {' '.join(queries) or 'none'}; candidates {' '.join(candidates) or 'none'}\n"
    assert line in message
    facts = read_reproducer(tmp_path / "nonfinite-step-41-rank-0.pt")[1]
    assert facts["not_finite"] == queries + candidates


@pytest.mark.parametrize("value", [NAN, INF])
def test_of_a_loss_alone_the_whole_batch_is_named(batch: TrainingBatch, tmp_path: Path, value: float) -> None:
    message = refused(batch, torch.ones(12, 4), torch.tensor(value), moment(tmp_path))
    queries, candidates = " ".join(names(batch.query_ids)), " ".join(names(batch.candidate_ids))
    assert f"the loss is not finite\nprocess 0: queries {queries}; candidates {candidates}\n" in message


def test_where_all_is_finite_nothing_is_written(batch: TrainingBatch, tmp_path: Path) -> None:
    refuse_nonfinite(Processes(), torch.tensor([True]), batch, torch.ones(12, 4), torch.tensor(1.0), moment(tmp_path))
    assert not list(tmp_path.iterdir())


def test_the_error_says_what_was_kept_where_to_go_on_and_whether_the_weights_are_to_blame(
    batch: TrainingBatch, tmp_path: Path
) -> None:
    vectors, saved = torch.full((12, 4), NAN), []
    message = refused(batch, vectors, None, moment(tmp_path), weights=[torch.ones(3)], save=saved.append)
    assert saved == [tmp_path / "nonfinite-step-41.ckpt"]
    for part in (f"{tmp_path}/nonfinite-step-41-rank-*.pt", "not yet stepped on it, in nonfinite-step-41.ckpt"):
        assert part in message
    assert "start again with a lower learning rate" in message
    assert "an earlier step" not in message
    message = refused(
        batch, vectors, None, moment(tmp_path, checkpoint="last.ckpt"), weights=[torch.tensor([1.0, INF])]
    )
    assert "neither are the weights: an earlier step broke them" in message
    assert "go on from ckpt_path=last.ckpt" in message
    assert ".ckpt;" not in message, "none was saved"


def test_the_file_holds_the_batch_and_its_facts_and_executes_nothing(batch: TrainingBatch, tmp_path: Path) -> None:
    vectors = torch.ones(12, 4)
    vectors[3] = NAN
    refused(batch, vectors, None, moment(tmp_path))
    path = tmp_path / "nonfinite-step-41-rank-0.pt"
    assert [file.name for file in tmp_path.iterdir()] == [path.name], "no temporary file is left"
    torch.load(path, weights_only=True)
    again, facts = read_reproducer(path)
    assert len(again.inputs.buckets) == len(batch.inputs.buckets)
    for ours, theirs in zip(again.inputs.buckets, batch.inputs.buckets, strict=True):
        torch.testing.assert_close(vars(ours), vars(theirs), rtol=0, atol=0)
    for field in ("query_ids", "candidate_ids", "positive_index", "positives"):
        assert getattr(again, field).tolist() == getattr(batch, field).tolist()
    assert again.inputs.order.tolist() == batch.inputs.order.tolist()
    expected = {"step": 41, "epoch": 3, "rank": 0, "loss": None, "dropout_seed": 2**64 - 7, "precision": "32-true"}
    assert expected.items() <= facts.items()
    assert facts["ids"] == names(torch.cat([batch.query_ids, batch.candidate_ids]))
    assert facts["versions"]["torch"] == torch.__version__


def test_a_file_that_holds_no_batch_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("no batch")
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    for name in ("text.pt", "other.pt", "absent.pt"):
        with pytest.raises(UserInputError, match=re.escape(f"{name}' holds no batch of this package")):
            read_reproducer(tmp_path / name)


def test_two_lines_show_it_again_with_the_weights_that_were_kept(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    batch, module = first_batch(tiny_shards, tiny_checkpoint, tmp_path)
    words = [set(ids.tolist()) for bucket in batch.inputs.buckets for ids in bucket.input_ids]
    rare = next(word for word in set.union(*words) if sum(word in some for some in words) == 1)
    embeddings = module.encoder.get_parameter(
        next(name for name, _ in module.encoder.named_parameters() if "embed_tokens" in name)
    )
    embeddings.data[rare] = NAN  # a weight that one item alone meets
    vectors = module(batch.inputs)
    assert finite_rows(vectors).tolist().count(False) == 1
    save = partial(module.trainer.save_checkpoint, weights_only=True)
    refused(batch, vectors, None, moment(tmp_path), save=save)
    encoder = MLLMEncoder.from_pretrained(tiny_checkpoint, max_length=48)
    load_encoder_weights(encoder, tmp_path / "nonfinite-step-41.ckpt")
    again, facts = read_reproducer(tmp_path / "nonfinite-step-41-rank-0.pt")
    assert finite_rows(encoder(again.inputs)).tolist() == finite_rows(vectors).tolist()
    assert facts["not_finite"] == [facts["ids"][finite_rows(vectors).tolist().index(False)]]


def spoiled_process(processes: Processes, path: str, directory: str, wrong: dict[int, list[int]]) -> None:
    """In some processes some vectors of a batch are not finite; each writes what it raises."""
    batch, _ = read_reproducer(path)
    ids = torch.cat([batch.query_ids, batch.candidate_ids]) + 1000 * processes.rank
    batch = TrainingBatch(batch.inputs, ids[:6], ids[6:], batch.positive_index, batch.positives)
    vectors = torch.ones(12, 4)
    vectors[wrong.get(processes.rank, [])] = NAN
    finite = processes.gather(finite_rows(vectors).all()[None])
    try:
        refuse_nonfinite(processes, finite, batch, vectors, None, moment(Path(directory)))
    except NonFiniteError as error:
        found = {"message": str(error), "ids": names(ids)}
        (Path(directory) / f"told-{processes.rank}.json").write_text(json.dumps(found))


@pytest.mark.slow  # starts two processes
@pytest.mark.parametrize("wrong", [{1: [2, 9]}, {0: [0], 1: [2]}])
def test_every_process_tells_the_ids_of_all_and_those_concerned_write_a_file(
    batch: TrainingBatch, tmp_path: Path, wrong: dict[int, list[int]]
) -> None:
    refused(batch, torch.full((12, 4), NAN), None, moment(tmp_path, step=0))
    in_processes(2, spoiled_process, str(tmp_path / "nonfinite-step-0-rank-0.pt"), str(tmp_path), wrong)
    told = [json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in (0, 1)]
    assert told[0]["message"] == told[1]["message"]
    lines = []
    for rank, places in wrong.items():
        queries = [told[rank]["ids"][place] for place in places if place < 6]
        candidates = [told[rank]["ids"][place] for place in places if place >= 6]
        lines.append(f"process {rank}: queries {' '.join(queries)}; candidates {' '.join(candidates) or 'none'}")
    assert told[0]["message"].split("\n")[1:-1] == lines
    assert {path.name for path in tmp_path.glob("nonfinite-step-41*")} == {
        f"nonfinite-step-41-rank-{rank}.pt" for rank in wrong
    }
