"""Mining given vectors: documents that are the query itself, a second model, and files that older versions wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_mmembed.data.negatives import MinedNegatives, write_negatives
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.items import Task
from lightning_mmembed.mining import total_counts
from lightning_mmembed.mining_rule import MiningRule
from lightning_mmembed.retrieval.mine import mine_negatives, mine_vectors
from lightning_mmembed.retrieval.pool import Pool, QuerySet

CANDIDATES, QUERIES, K = 40, 12, 8


def unit(rows: int, seed: int) -> Tensor:
    drawn = torch.randn(rows, 16, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(drawn, dim=1)


def world(**known: Any) -> tuple[Pool, list[QuerySet]]:
    ids = torch.arange(100, 100 + CANDIDATES)
    pool = Pool("tiny", ids, torch.arange(CANDIDATES, dtype=torch.int8) % 2, {}, [], "pool")
    positives = [[100 + n, 100 + n + 20] for n in range(QUERIES)]
    queries = QuerySet(Task("tiny", 0), torch.arange(QUERIES), positives, [], "queries", **known)
    return pool, [queries]


def by_query(columns: dict[str, np.ndarray]) -> dict[int, list[tuple[int, int]]]:
    found: dict[int, list[tuple[int, int]]] = {n: [] for n in range(QUERIES)}
    for qid, did, rank in zip(columns["qid"], columns["did"], columns["rank"], strict=True):
        found[int(qid)].append((int(did), int(rank)))
    return found


def test_a_document_that_a_query_ignores_is_taken_out_of_its_ranking_and_is_no_positive() -> None:
    vectors, asked = unit(CANDIDATES, 0), unit(QUERIES, 1)
    order = (asked.double() @ vectors.double().T).argsort(1, descending=True)
    ignored = [[100 + int(order[n, 0]), 100 + int(order[n, 3])] if n % 3 else [] for n in range(QUERIES)]
    pool, sets = world(ignored=ignored)
    columns, audit = mine_vectors(pool, vectors, sets, [asked], MiningRule("top_k", k=K))
    met = 0
    for n, found in by_query(columns).items():
        ranked = [100 + int(row) for row in order[n] if 100 + int(row) not in ignored[n]][:K]
        positives = set(sets[0].positives[n])
        assert found == [(did, rank) for rank, did in enumerate(ranked, 1) if did not in positives]
        met += len(positives & set(ranked))
    assert audit["tiny_task0"]["positives_met"] == met
    assert audit["tiny_task0"]["positives"] == 2 * QUERIES


def test_thresholds_go_by_the_lowest_positive_wherever_it_is_ranked() -> None:
    vectors, asked = unit(CANDIDATES, 0), unit(QUERIES, 1)
    pool, sets = world()
    columns, audit = mine_vectors(pool, vectors, sets, [asked], MiningRule("top_k", k=30, absolute_margin=0.1))
    scores, left_out = asked @ vectors.T, 0
    for n, found in by_query(columns).items():
        lowest = float(min(scores[n, n], scores[n, n + 20]))
        ranked = scores[n].argsort(descending=True)[:30].tolist()
        others = [row for row in ranked if row not in (n, n + 20)]
        kept = [row for row in others if float(scores[n, row]) + 0.1 <= lowest]
        assert [did for did, _ in found] == [100 + row for row in kept]
        left_out += len(others) - len(kept)
    assert audit["tiny_task0"]["left_out_by_absolute_margin"] == left_out > 0


def test_a_second_model_is_asked_for_where_the_rule_needs_one_and_refused_where_it_does_not() -> None:
    pool, sets = world()
    with pytest.raises(UserInputError, match=r"check_margin=0.0 needs a second encoder: give check"):
        mine_negatives(None, pool, sets, None, "x", MiningRule(check_margin=0.0))  # type: ignore[arg-type]
    with pytest.raises(UserInputError, match=r"check_margin=None has no use for a second encoder"):
        mine_negatives(None, pool, sets, None, "x", check=(None, "y"))  # type: ignore[arg-type]


def test_a_file_of_an_older_version_is_read(tmp_path: Path) -> None:
    rows = {"qid": [1, 1], "did": [7, 8], "kind": [0, 1], "rank": [1, 46], "score": [0.5, 0.1]}
    audit = {"tiny_task0": {"queries": 1, "with_wrong_modality": 1, "with_wrong_content": 1, "with_none": 0}}
    made_of = {"encoder": "e", "pool": "p", "k": 50, "k_prime": 45, "dtype": "float16"}
    found = MinedNegatives(write_negatives(tmp_path / "negatives.parquet", rows, made_of, audit))
    found.check_pool("p")
    assert [part.tolist() for part in found.of(1)] == [[7], [8], []]
    assert total_counts(found.audit) == audit["tiny_task0"]
