"""What sentence-transformers writes when it mines is read as it is meant, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("datasets")
pytest.importorskip("sentence_transformers", minversion="6")

from datasets import Dataset
from sentence_transformers.util import mine_hard_negatives
from test_triplets import answers, shards_of
from text_table import table_model
from text_worlds import triplets

from lightning_mmembed.data import shard_dataset
from lightning_mmembed.data.triplets import TripletLayout
from lightning_mmembed.errors import UserInputError

POSITIVES = {f"q{n}": f"c{n}" for n in range(6)}


def written(path: Path, output_format: Any, scores: bool) -> list[dict[str, Any]]:
    """What it writes for some queries with a positive and two negatives each."""
    rng = np.random.default_rng(0)
    model = table_model({word: rng.normal(size=5) for word in [*POSITIVES, *POSITIVES.values()]})
    pairs = Dataset.from_dict({"anchor": list(POSITIVES), "positive": list(POSITIVES.values())})
    settings: dict[str, Any] = {"num_negatives": 2, "output_format": output_format, "output_scores": scores}
    records: list[dict[str, Any]] = mine_hard_negatives(pairs, model, **settings, verbose=False).to_list()
    triplets(path, list(records))
    return records


@pytest.mark.parametrize(
    ("output_format", "scores"),
    [("triplet", False), ("n-tuple", False), ("labeled-pair", False), ("triplet", True), ("n-tuple", True)],
)
def test_a_file_is_read_as_it_is_meant(tmp_path: Path, output_format: str, scores: bool) -> None:
    triples = written(tmp_path / "triplets.jsonl", "triplet", False)
    negatives = {query: {row["negative"] for row in triples if row["anchor"] == query} for query in POSITIVES}
    assert {len(some) for some in negatives.values()} == {2}
    written(tmp_path / "pairs.jsonl", output_format, scores)
    shards = shards_of(tmp_path / "pairs.jsonl", tmp_path / "shards")
    assert shards.manifest["bad_records"] == []
    expected = {query: ({positive}, negatives[query]) for query, positive in POSITIVES.items()}
    assert answers(shards, tmp_path / "shards") == expected


@pytest.mark.parametrize(
    ("output_format", "scores"), [("labeled-list", False), ("labeled-list", True), ("labeled-pair", True)]
)
def test_a_file_that_does_not_say_what_is_negative_is_refused(tmp_path: Path, output_format: str, scores: bool) -> None:
    written(tmp_path / "pairs.jsonl", output_format, scores)
    layout = TripletLayout(tmp_path / "pairs.jsonl")
    with pytest.raises(UserInputError, match=r"pairs\.jsonl:1: (labels|scores?) is not read.*output_format"):
        shard_dataset(layout, tmp_path / "shards", show_progress=False)
