"""Files of queries with positives and negatives as shards: a document for a text, and the negatives for training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from text_worlds import triplets

from lightning_mmembed.data import Shards, shard_dataset
from lightning_mmembed.data.negatives import MinedNegatives, draw_negatives
from lightning_mmembed.data.triplets import TripletLayout
from lightning_mmembed.data.verify import verify_shards
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.items import encode_id
from lightning_mmembed.mining import WRONG_CONTENT
from lightning_mmembed.mining_rule import KINDS

RECORDS: list[dict[str, Any] | str] = [
    {"query": "a white bird", "positive": "Swans are white.", "negative": "Crows are black."},
    {"query": "a black bird", "pos": ["Crows are black.", "Ravens too."], "neg": ["Swans are white.", "Gulls cry."]},
    {
        "query": "a loud bird",
        "positive_passages": [{"docid": "7", "title": "Gulls", "text": "they cry"}],
        "negative_passages": [{"docid": "8", "title": "", "text": "Swans are white."}],
    },
    {"anchor": "a bird", "positive": "Ravens too."},
    {"query": "a white bird", "positives": ["Storks are white."], "negatives": ["Swans are white.", "Ravens too."]},
]


def shards_of(path: Path, out: Path, **settings: Any) -> Shards:
    return Shards(shard_dataset(TripletLayout(path, **settings), out, show_progress=False, max_bad_fraction=0.5))


def texts_of(shards: Shards) -> dict[int, str]:
    return {encode_id(c.did): c.item.text or "" for c in shards.pool("train").items}


def test_equal_texts_are_one_document_and_equal_queries_one_query(tmp_path: Path) -> None:
    shards = shards_of(triplets(tmp_path / "pairs.jsonl", RECORDS), tmp_path / "shards")
    texts = texts_of(shards)
    expected = [
        "Swans are white.",
        "Crows are black.",
        "Ravens too.",
        "Gulls cry.",
        "Gulls they cry",
        "Storks are white.",
    ]
    assert list(texts.values()) == expected
    (queries,) = shards.query_sets("train")
    found = {q.item.text: [texts[encode_id(did)] for did in q.positives] for q in queries.queries}
    assert found == {
        "a white bird": ["Swans are white.", "Storks are white."],
        "a black bird": ["Crows are black.", "Ravens too."],
        "a loud bird": ["Gulls they cry"],
        "a bird": ["Ravens too."],
    }
    noted = "texts given as positive and as negative of one query, taken as positive"
    assert shards.manifest["noted"] == {noted: 1}
    assert verify_shards(tmp_path / "shards", show_progress=False).findings == []


def test_the_given_negatives_are_what_training_draws(tmp_path: Path) -> None:
    shards = shards_of(triplets(tmp_path / "pairs.jsonl", RECORDS), tmp_path / "shards")
    mined = MinedNegatives(tmp_path / "shards" / "negatives.parquet")
    mined.check_pool(shards.pool_fingerprint("train"))
    texts, pool = texts_of(shards), shards.pool("train").ids.numpy()
    given = {
        "a white bird": ["Crows are black.", "Ravens too."],
        "a black bird": ["Gulls cry.", "Swans are white."],
        "a loud bird": ["Swans are white."],
        "a bird": [],
    }
    (queries,) = shards.query_sets("train")
    for query in queries.queries:
        qid, positives = encode_id(query.qid), [encode_id(did) for did in query.positives]
        by_kind = dict(zip(KINDS, mined.of(qid), strict=True))
        assert sorted(texts[did] for did in by_kind.pop(WRONG_CONTENT).tolist()) == given[query.item.text or ""]
        assert not any(len(dids) for dids in by_kind.values())
        drawn = [d for epoch in range(9) for d in draw_negatives(mined, pool, qid, positives, 2, 0, epoch)]
        assert not set(drawn) & set(positives)
        if given[query.item.text or ""]:
            assert sorted({texts[did] for did in drawn}) == given[query.item.text or ""]


def test_a_held_out_query_takes_no_negatives_along(tmp_path: Path) -> None:
    records = [{"query": f"bird {n}", "positive": f"It is {n}.", "negative": f"It is {n + 1}."} for n in range(60)]
    shards = shards_of(triplets(tmp_path / "pairs.jsonl", list(records)), tmp_path / "shards", test_fraction=0.5)
    mined = MinedNegatives(tmp_path / "shards" / "negatives.parquet")
    (train,), (test,) = shards.query_sets("train"), shards.query_sets("test")
    assert len(train) + len(test) == 60
    assert min(len(train), len(test)) > 15
    for queries, count in ((train, 1), (test, 0)):
        assert {sum(map(len, mined.of(qid))) for qid in queries.ids.tolist()} == {count}
    assert len(shards.pool("test")) == len(shards.pool("train")) == 61


def test_a_file_without_negatives_has_no_file_of_them(tmp_path: Path) -> None:
    shards_of(triplets(tmp_path / "pairs.jsonl", [RECORDS[3]]), tmp_path / "shards")
    assert not (tmp_path / "shards" / "negatives.parquet").exists()


def answers(shards: Shards, out: Path) -> dict[str, tuple[set[str], set[str]]]:
    """By text of a training query the texts of its positives and of its negatives."""
    texts, mined = texts_of(shards), MinedNegatives(out / "negatives.parquet")
    (queries,) = shards.query_sets("train")
    return {
        query.item.text or "": (
            {texts[encode_id(did)] for did in query.positives},
            {texts[did] for part in mined.of(encode_id(query.qid)) for did in part.tolist()},
        )
        for query in queries.queries
    }


def test_a_label_says_whether_a_text_is_a_positive_and_numbered_negatives_are_negatives(tmp_path: Path) -> None:
    records: list[dict[str, Any] | str] = [
        {"anchor": "a white bird", "positive": "Swans are white.", "label": 1, "score": 0.8},
        {"anchor": "a white bird", "positive": "Crows are black.", "label": 0},
        {"query": "a black bird", "pos": ["Swans are white.", "Gulls cry."], "label": 0.0},
        {"query": "a black bird", "pos": "Ravens too.", "label": None},
        {
            "anchor": "a bird",
            "positive": "Ravens too.",
            "negative_1": "A tree.",
            "negative_2": None,
            "negative_10": "B.",
        },
        {"anchor": "no bird", "positive": "Crows are black.", "label": 0},
        {"query": "a tree", "positive": "A tree.", "negative": "B.", "scores": [0.9, 0.1]},
    ]
    shards = shards_of(triplets(tmp_path / "pairs.jsonl", records), tmp_path / "shards")
    assert shards.manifest["bad_records"] == []
    assert answers(shards, tmp_path / "shards") == {
        "a white bird": ({"Swans are white."}, {"Crows are black."}),
        "a black bird": ({"Ravens too."}, {"Swans are white.", "Gulls cry."}),
        "a bird": ({"Ravens too."}, {"A tree.", "B."}),
        "a tree": ({"A tree."}, {"B."}),
    }
    assert shards.manifest["noted"] == {"queries with negatives alone": 1}
    assert verify_shards(tmp_path / "shards", show_progress=False).findings == []


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"positive": "x"}, "it has none of query, anchor; write one"),
        ({"query": "x"}, "it has none of positive, positives, pos, positive_passages; write one"),
        ({"query": "x", "positive": []}, "it has none of positive"),
        ({"query": ["x", "y"], "positive": "z"}, "it has 2 queries"),
        ({"query": "x", "positive": ["z", " "]}, "positive holds an empty text"),
        ({"query": "x", "positive": "z", "negative": [3]}, "text=3 is no text"),
        ({"query": "x", "positive": {"title": 3}}, "title=3 is no text"),
        ({"anchor": "x", "positive": ["z", "y"], "labels": [1, 0]}, "labels is not read"),
        ({"anchor": "x", "positive": ["z", "y"], "scores": [0.9, 0.1]}, "scores is not read"),
        ({"anchor": "x", "positive": "z", "score": 0.1}, "score is not read"),
        ({"anchor": "x", "positive": "z", "label": 0.4}, "label=0.4 is neither 0 nor 1"),
        ({"anchor": "x", "positive": "z", "label": "0"}, "label='0' is neither 0 nor 1"),
        ({"anchor": "x", "positive": "z", "negative_1": " "}, "negative_1 holds an empty text"),
        ({"query": "\ud800", "positive": "z"}, "half a character"),
        ("[1]", "[1] is no object"),
        ("nothing", "not JSON"),
    ],
)
def test_a_line_that_cannot_be_used_is_named_and_leaves_nothing_behind(
    tmp_path: Path, record: dict[str, Any] | str, told: str
) -> None:
    shards = shards_of(triplets(tmp_path / "pairs.jsonl", [RECORDS[3], record, RECORDS[0]]), tmp_path / "shards")
    (bad,) = shards.manifest["bad_records"]
    assert bad["record"] == f"{tmp_path}/pairs.jsonl:2"
    assert told in bad["reason"]
    assert len(shards.pool("train")) == 3
    with pytest.raises(UserInputError, match=r"pairs\.jsonl:2"):
        shard_dataset(TripletLayout(tmp_path / "pairs.jsonl"), tmp_path / "strict", show_progress=False)


def test_a_file_in_a_form_that_is_not_read_says_so(tmp_path: Path) -> None:
    records: list[dict[str, Any] | str] = [{"anchor": "x", "positive": ["y", "z"], "labels": [1, 0]}] * 3
    with pytest.raises(UserInputError, match=r"3 of 3 records .*pairs\.jsonl:1: labels is not read.*output_format"):
        shard_dataset(TripletLayout(triplets(tmp_path / "pairs.jsonl", records)), tmp_path / "out", show_progress=False)
