"""Small sources of text-to-text data: a folder in BEIR's layout, and files of queries with positives and negatives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from worlds import write_lines

#: By split the lines of the judgements: query, document, score.
Judged = dict[str, list[tuple[str, str, int]]]


def write_beir(
    root: Path, documents: list[dict[str, Any]], queries: list[dict[str, Any]], judged: Judged, end: str = "\n"
) -> Path:
    """Write a folder in BEIR's layout; returns ``root``."""
    for name, records in (("corpus", documents), ("queries", queries)):
        root.mkdir(parents=True, exist_ok=True)
        (root / f"{name}.jsonl").write_bytes("".join(json.dumps(record) + end for record in records).encode())
    for split, lines in judged.items():
        rows = [("query-id", "corpus-id", "score"), *lines]
        (root / "qrels").mkdir(exist_ok=True)
        content = "".join("\t".join(map(str, row)) + end for row in rows)
        (root / "qrels" / f"{split}.tsv").write_bytes(content.encode())
    return root


def birds(root: Path, n_queries: int = 40, splits: tuple[str, ...] = ("train", "dev", "test"), **more: Any) -> Path:
    """Birds and questions on them; ids are words, and each query has up to four judgements of grades 0 to 3."""
    rng = np.random.default_rng(0)
    colours, places = ("red", "grey", "black", "white", "blue"), ("lake", "wood", "town", "hill", "field", "sea")
    documents = [
        {"_id": f"bird-{colour}-{place}", "title": f"The {colour} bird", "text": f"It lives by the {place}."}
        for colour in colours
        for place in places
    ]
    queries, judged = [], Judged({split: [] for split in splits})
    for n in range(n_queries):
        colour, place = colours[n % 5], places[n % 6]
        queries.append({"_id": f"question {n}", "text": f"which {colour} bird number {n} lives by the {place}?"})
        lines = [(f"question {n}", f"bird-{colour}-{place}", int(rng.integers(1, 4)))]
        others = rng.choice([document["_id"] for document in documents], 3, replace=False).tolist()
        lines += [(f"question {n}", other, int(rng.integers(0, 3))) for other in others if other != lines[0][1]]
        judged[splits[n % len(splits)]] += lines
    return write_beir(root, documents, queries, judged, **more)


def triplets(path: Path, records: list[dict[str, Any] | str]) -> Path:
    """Write a file of queries with what answers them and what does not."""
    return write_lines(path, records)
