"""The window of ranks and the thresholds find what sentence-transformers finds with settings of the same names."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

pytest.importorskip("datasets")
pytest.importorskip("sentence_transformers", minversion="6")

from datasets import Dataset
from sentence_transformers.util import mine_hard_negatives
from text_table import table_model

from lightning_mmembed.mining import KINDS, MiningRule, Rankings, mine_rankings, mined_columns

WINDOWS: list[dict[str, Any]] = [
    {"range_min": 0, "range_max": 12, "num_negatives": 3},
    {"range_min": 4, "range_max": 12, "num_negatives": 8},
    {"range_min": 2, "range_max": 20, "num_negatives": 5},
]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"absolute_margin": 0.1},
        {"absolute_margin": -0.2},
        {"relative_margin": 0.05},
        {"max_score": 0.6},
        {"min_score": 0.1},
        {"absolute_margin": 0.0, "relative_margin": 0.1, "max_score": 0.8, "min_score": 0.0},
    ],
    ids=str,
)
def test_a_window_with_thresholds_finds_what_sentence_transformers_finds(
    window: dict[str, Any], filters: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    queries, corpus = [f"q{n}" for n in range(15)], [f"c{n}" for n in range(60)]
    table = {word: rng.normal(size=5) for word in queries + corpus}
    labels = {q: [f"c{n}" for n in rng.permutation(60)[: 1 + i % 3]] for i, q in enumerate(queries)}
    for query, positives in labels.items():
        table.update({positive: table[query] + rng.normal(size=5) for positive in positives})
    model = table_model(table)
    pairs = [(query, positive) for query, positives in labels.items() for positive in positives]
    mined = mine_hard_negatives(
        Dataset.from_dict({"anchor": [q for q, _ in pairs], "positive": [p for _, p in pairs]}),
        model,
        corpus=corpus,
        **window,
        **filters,
    )
    expected = sorted(set(zip(mined["anchor"], mined["negative"], strict=True)))
    assert expected

    depth = window["range_max"] + 3  # as deep as it looks: past as many as a query has positives
    vectors = [model.encode(texts, normalize_embeddings=True) for texts in (queries, corpus)]
    similarities = model.similarity(*vectors)
    scores, dids = similarities.topk(depth)
    numbers = [[corpus.index(positive) for positive in positives] for positives in labels.values()]
    lowest = np.array([similarities[i, own].min().item() for i, own in enumerate(numbers)], dtype=np.float32)
    padded = np.array([[*own, -1, -1, -1][:3] for own in numbers])
    rankings = Rankings(np.arange(15), dids.numpy(), np.zeros(dids.shape), scores.numpy(), padded, 1, lowest)
    kinds, counts = mine_rankings(rankings, MiningRule("window", k=depth, **window, **filters))
    columns = mined_columns(rankings, kinds)
    assert sorted((queries[q], corpus[d]) for q, d in zip(columns["qid"], columns["did"], strict=True)) == expected
    assert set(columns["kind"]) == {KINDS.index("any_modality")}
    # It counts what min_score leaves out together with what others did.
    skipped = dict(re.findall(r"Skipped ([\d,]+) .* due to the (\w+) of", capsys.readouterr().out))
    for number, name in ((number, name) for number, name in skipped.items() if name != "min_score"):
        assert counts[f"left_out_by_{name}"] == int(number.replace(",", ""))
