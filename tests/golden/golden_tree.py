"""Where things stand in the miniature of the benchmark, and how its ids and vectors are read."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ir_measures import RR, R, Success, nDCG
from torch import Tensor

from lightning_mmembed.items import MBEIR_TASKS, encode_id
from lightning_mmembed.retrieval.results import RetrievalResult

#: The whole fixture beside the project, with what the reference itself wrote; it may be absent.
SHARED = Path(__file__).parents[3] / "shared" / "golden" / "mbeir_tiny" / "golden" / "expected"

TREE = Path(__file__).parent / "mbeir_tiny"
GOLDEN = TREE / "golden"
EXPECTED = json.loads((GOLDEN / "expected" / "expected.json").read_text())
MINING = json.loads((GOLDEN / "mining" / "expected_mining.json").read_text())

POOLS = ("union", "local")
DEPTHS = (1, 5, 10, 20, 50)
#: Our name of each metric that the expected values have.
NAMES = {
    **{f"hit@{k}": f"success@{k}" for k in DEPTHS},
    **{f"recall@{k}": f"recall@{k}" for k in DEPTHS},
    "mrr@10": "mrr@10",
    "ndcg@10": "ndcg@10",
    "modality@1": "modality_accuracy@1",
    **{f"recall_reachable@{k}": f"recall_reachable@{k}" for k in DEPTHS},
    "ndcg_reachable@10": "ndcg_reachable@10",
}
ORACLES = {
    **{f"hit@{k}": Success @ k for k in DEPTHS},
    **{f"recall@{k}": R @ k for k in DEPTHS},
    "mrr@10": RR @ 10,
    "ndcg@10": nDCG @ 10,
}
#: The headline figure of a task is hit@5, but for these hit@10.
DEEP_TASKS = ("fashion200k_task0", "fashion200k_task3", "fashioniq_task7")

#: Records that cannot be used, by trap, with a part of the reason.
BAD = {
    "C1": ("0:82", "is missing"),
    "C2": ("4:6", "is missing"),
    "C3": ("1:91", "cannot be decoded"),
    "C4": ("1:92", "cannot be decoded"),
    "B6": ("9:19", "9:654321"),
}
BAD_CANDIDATES = {"0:82", "1:91", "1:92"}
BAD_TRAIN_QUERIES = {"4:6", "9:19"}


def dids_of(hashed: np.ndarray) -> list[str]:
    """The fixture's integers: dataset * 10,000,000 + number; -1 is padding."""
    return [f"{code // 10_000_000}:{code % 10_000_000}" for code in hashed.tolist() if code >= 0]


def qids_of(hashed: np.ndarray) -> list[str]:
    return [f"{code // 500_000}:{code % 500_000}" for code in hashed.tolist()]


def codes(names: Sequence[str]) -> Tensor:
    return torch.tensor([encode_id(name) for name in names])


def unit(path: Path) -> Tensor:
    return torch.nn.functional.normalize(torch.from_numpy(np.load(path)).float(), dim=1)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def table(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


IMAGES = {row["path"]: row for row in table(GOLDEN / "images" / "images.tsv")}


def query_vectors_of(task: str) -> tuple[list[str], Tensor]:
    """Query ids and vectors of a task."""
    folder = GOLDEN / "embeddings" / "test"
    return qids_of(np.load(folder / f"mbeir_{task}_test_ids.npy")), unit(folder / f"mbeir_{task}_test_embed.npy")


def expected_values(pool: str) -> dict[tuple[str, str], float]:
    independent = EXPECTED["independent"][pool]
    return {(task, ours): independent[task]["canonical"][name] for task in MBEIR_TASKS for ours, name in NAMES.items()}


def our_values(result: RetrievalResult, pool: str) -> dict[tuple[str, str], float]:
    return {(task, name): v for task, row in result.metrics[pool]["tasks"].items() for name, v in row.items()}


def headline(result: RetrievalResult, pool: str) -> dict[str, float]:
    rows = result.metrics[pool]["tasks"]
    values = {task: rows[task]["hit@10" if task in DEEP_TASKS else "hit@5"] for task in MBEIR_TASKS}
    return {**values, "average": sum(values.values()) / len(values)}
