"""Multimodal and text-to-text data in one stream: trained on and evaluated together, with the negatives of each."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from text_worlds import triplets
from worlds import tiny_module, tiny_trainer

from lightning_mmembed import MBEIRDataModule, RetrievalEvaluation
from lightning_mmembed.data import Shards, shard_dataset
from lightning_mmembed.data.negatives import write_negatives
from lightning_mmembed.data.triplets import TripletLayout
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.items import decode_id


@pytest.fixture(scope="module")
def folders(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Shards of pictures and texts, and of questions with answers and wrong answers."""
    root = tmp_path_factory.mktemp("mixed")
    records = [{"query": f"the pet {n}", "positive": f"answer {n}", "negative": f"wrong {n}"} for n in range(40)]
    texts = TripletLayout(triplets(root / "pairs.jsonl", list(records)), val_fraction=0.2, test_fraction=0.2)
    return [tiny_shards, shard_dataset(texts, root / "pairs", show_progress=False)]


def mined_of_pets(tiny_shards: Path, path: Path, pool: str | None = None) -> Path:
    """A negative of the wrong modality for every training query of the pets."""
    shards = Shards(tiny_shards)
    ids = shards.query_ids(shards.query_rows("train"))
    did = int(shards.pool("train").ids[0])
    columns: dict[str, Any] = {"qid": ids, "did": np.full(len(ids), did), "kind": np.zeros(len(ids), dtype=np.int8)}
    columns |= {"rank": np.ones(len(ids), dtype=np.int16), "score": np.zeros(len(ids), dtype=np.float32)}
    return write_negatives(path, columns, {"pool": pool or shards.pool_fingerprint("train")}, {})


def fitted(folders: list[Path], checkpoint: Path, directory: Path, **data: Any) -> tuple[Any, list[set[str]]]:
    """Weights after an epoch, and the datasets of the queries of each batch."""
    torch.manual_seed(0)
    module, seen = tiny_module(checkpoint), []
    datamodule = MBEIRDataModule(folders, batch_size=8, seed=3, **data)
    step = module.training_step

    def training_step(batch: Any, *args: Any) -> Any:
        seen.append({decode_id(code).partition(":")[0] for code in batch.query_ids.tolist()})
        return step(batch, *args)

    module.training_step = training_step  # type: ignore[method-assign]
    evaluation = RetrievalEvaluation(metrics=["ndcg@10", "hit@5"])
    trainer = tiny_trainer(directory, max_epochs=1, callbacks=[evaluation])
    trainer.fit(module, datamodule)
    return {"module": module, "metrics": dict(trainer.callback_metrics), "datamodule": datamodule}, seen


def test_one_run_trains_on_and_evaluates_both_whatever_the_order_of_the_folders_and_the_workers(
    folders: list[Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    files = [mined_of_pets(folders[0], tmp_path / "pets.parquet"), folders[1] / "negatives.parquet"]
    settings = {"negatives": files, "upsample": {"pairs": 2}}
    first, seen = fitted(folders, tiny_checkpoint, tmp_path / "a", **settings)
    again, same = fitted(folders[::-1], tiny_checkpoint, tmp_path / "b", num_workers=2, **settings)
    number = str(TripletLayout(folders[1].parent / "pairs.jsonl").dataset_id)
    assert seen == same
    assert sum(kinds == {"77", number} for kinds in seen) > len(seen) / 2
    for name, weights in first["module"].state_dict().items():
        assert torch.equal(weights, again["module"].state_dict()[name]), name
    assert {"val/union/pairs_task1/ndcg@10", "val/local/pets_task0/ndcg@10"} <= first["metrics"].keys()
    known = {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    assert first["datamodule"].state_dict() == {"negatives": list(known), "sha256": known, "given": list(known)}


def test_negatives_of_neither_dataset_are_refused(folders: list[Path], tiny_checkpoint: Path, tmp_path: Path) -> None:
    other = mined_of_pets(folders[0], tmp_path / "other.parquet", pool="another/train")
    with pytest.raises(UserInputError, match=r"other\.parquet' were mined in another dataset"):
        fitted(folders, tiny_checkpoint, tmp_path, negatives=[folders[1] / "negatives.parquet", other])


def test_a_source_with_several_folders_is_refused(folders: list[Path], tiny_source: Path) -> None:
    with pytest.raises(UserInputError, match=r"data\.shards=\[.*\] are several and data\.source='\S+' is one"):
        MBEIRDataModule(folders, source=tiny_source)
