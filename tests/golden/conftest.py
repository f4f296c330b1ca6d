"""The miniature of the benchmark, read and evaluated once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden_tree import GOLDEN, NAMES, TREE, codes, dids_of, query_vectors_of, unit
from torch import Tensor

from lightning_mmembed.data.layout import MBEIRLayout
from lightning_mmembed.data.records import BadRecord
from lightning_mmembed.data.shard import shard_dataset
from lightning_mmembed.data.shards import Shards
from lightning_mmembed.items import MBEIR_TASKS, Modality, Task, encode_id
from lightning_mmembed.retrieval.evaluate import evaluate_vectors
from lightning_mmembed.retrieval.pool import Pool, QuerySet
from lightning_mmembed.retrieval.results import RetrievalResult


@pytest.fixture(scope="session")
def layout() -> MBEIRLayout:
    return MBEIRLayout(TREE)


@pytest.fixture(scope="session")
def modalities(layout: MBEIRLayout) -> dict[str, Modality]:
    """Of every candidate of every pool."""
    found: dict[str, Modality] = {}
    for _, path in layout.pool_files():
        for record in layout.candidates(path):
            assert not isinstance(record, BadRecord)
            found[record.did] = record.modality
    return found


@pytest.fixture(scope="session")
def embedded_pool(modalities: dict[str, Modality]) -> tuple[Pool, Tensor]:
    """The union test pool in canonical order, and its vectors."""
    folder = GOLDEN / "embeddings" / "cand_pool"
    dids = dids_of(np.load(folder / "mbeir_union_cand_pool_ids.npy"))
    order = codes(dids).argsort()
    local = {}
    for task in MBEIR_TASKS:
        name = f"{task}_test" if task.startswith("mscoco") else task
        local[task] = torch.isin(
            codes(dids)[order], codes(dids_of(np.load(folder / f"mbeir_{name}_cand_pool_ids.npy")))
        )
    by_row = torch.tensor([modalities[dids[i]].code for i in order], dtype=torch.int8)
    pool = Pool("test", codes(dids)[order], by_row, local, [], "golden")
    return pool, unit(folder / "mbeir_union_cand_pool_embed.npy")[order]


@pytest.fixture(scope="session")
def result(layout: MBEIRLayout, embedded_pool: tuple[Pool, Tensor]) -> RetrievalResult:
    pool, vectors = embedded_pool
    judged = layout.qrels("test")
    query_sets, query_vectors = [], []
    for name in MBEIR_TASKS:
        qids, of_task = query_vectors_of(name)
        positives = [[encode_id(did) for did in judged[name][qid]] for qid in qids]
        query_sets.append(QuerySet(Task.parse(name), codes(qids), positives, [], "golden"))
        query_vectors.append(of_task)
    return evaluate_vectors(pool, vectors, query_sets, query_vectors, list(NAMES))


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return Shards(shard_dataset(TREE, tmp_path_factory.mktemp("golden") / "shards", max_bad_fraction=0.05))
