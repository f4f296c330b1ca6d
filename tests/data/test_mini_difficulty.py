"""The built-in benchmark cannot be solved without learning."""

from __future__ import annotations

import re

import numpy as np
import pytest
from numpy.typing import NDArray

from lightning_mmembed.data.mini.draw import draw_look
from lightning_mmembed.data.mini.records import Collector
from lightning_mmembed.data.mini.tasks import collect
from lightning_mmembed.data.mini.world import seeded
from lightning_mmembed.items import Modality

Vectors = dict[str, NDArray[np.float64]]


@pytest.fixture(scope="module")
def collector() -> Collector:
    return collect(0)


def hits_at_5(asked: list[NDArray[np.float64]], pool: Vectors, positives: list[list[str]]) -> float:
    queries, rows, dids = np.stack(asked), np.stack(list(pool.values())), list(pool)
    scores = queries @ (rows / np.linalg.norm(rows, axis=1, keepdims=True)).T
    top = np.argsort(-scores, axis=1)[:, :5]
    found = [any(dids[i] in wanted for i in row) for row, wanted in zip(top, positives, strict=True)]
    return sum(found) / len(found)


def test_word_overlap_alone_does_not_solve_text_to_text_search(collector: Collector) -> None:
    rng = np.random.default_rng(0)
    table: Vectors = {}

    def embed(text: str) -> NDArray[np.float64]:
        words = re.findall(r"[a-z]+", text.lower())
        return np.asarray(np.mean([table.setdefault(word, rng.normal(size=64)) for word in words], axis=0))

    entries = [entry for (side, _), pool in collector.pools.items() if side in ("eval", "test") for entry in pool]
    texts = {entry.did: embed(entry.text) for entry in entries if entry.text and entry.modality is Modality.TEXT}
    queries = collector.queries["test", "webqa_task1"]
    asked = [embed(query["query_txt"]) for query in queries]
    assert hits_at_5(asked, texts, [query["pos_cand_list"] for query in queries]) < 0.15


def test_average_patches_alone_do_not_solve_look_alike_search(collector: Collector) -> None:
    projection = np.random.default_rng(0).normal(size=(768, 128))

    def embed(path: str) -> NDArray[np.float64]:
        domain, look = collector.pictures[path]
        pixels = np.asarray(draw_look(domain, look, seeded(0, "picture", path)), dtype=np.float64) / 127.5 - 1
        patches = pixels.reshape(4, 16, 4, 16, 3).transpose(0, 2, 1, 3, 4).reshape(16, -1)
        return np.asarray(patches.mean(axis=0) @ projection)

    entries = [entry for (side, _), pool in collector.pools.items() if side in ("eval", "test") for entry in pool]
    images = {entry.did: embed(entry.image) for entry in entries if entry.image and entry.modality is Modality.IMAGE}
    queries = collector.queries["test", "nights_task4"]
    asked = [embed(query["query_img_path"]) for query in queries]
    assert hits_at_5(asked, images, [query["pos_cand_list"] for query in queries]) < 0.15
