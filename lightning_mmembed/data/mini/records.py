"""Collects candidates, queries and the pictures to draw, and gives them their ids."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any, TypeVar

from lightning_mmembed.data.mini.world import DATASET_IDS, DOMAIN_OF, Look, seeded
from lightning_mmembed.items import Modality, Task

T = TypeVar("T")


@dataclass(frozen=True)
class Side:
    """One half of the benchmark: the training side or the evaluation side.

    Args:
        name: ``train``, ``eval`` or, for MSCOCO's own validation pools, ``val``.
        splits: Names of the query splits; the last one has first claim on cross-modal twins.
        pool: Number of candidates that a pool aims at.
    """

    name: str
    splits: tuple[str, ...]
    pool: int


@dataclass(frozen=True)
class Entry:
    """A candidate before it is written."""

    did: str
    look: Look
    modality: Modality
    text: str | None
    image: str | None
    facts: dict[str, str] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """The line of a candidate pool; the provenance goes where M-BEIR keeps its own."""
        source = json.dumps({"look": astuple(self.look), **self.facts})
        return {
            "txt": self.text,
            "img_path": self.image,
            "modality": str(self.modality),
            "did": self.did,
            "src_content": source,
        }


def modality_of(text: str | None, image: str | None) -> Modality:
    """What an item with these two parts is made of."""
    if image is None:
        return Modality.TEXT
    return Modality.IMAGE if text is None else Modality.IMAGE_TEXT


def closest(pool: Sequence[Entry], positives: Sequence[Entry], number: int) -> list[str]:
    """The ``did`` of the ``number`` candidates that look most like the positives without showing the same."""
    wanted = positives[0].look
    others = [entry for entry in pool if entry.look != wanted]
    return [entry.did for entry in sorted(others, key=lambda entry: len(entry.look.changed(wanted)))[:number]]


class Collector:
    """Everything that will be written.

    Args:
        seed: Seed of the whole benchmark.
        query_counts: Queries per split and task name.
    """

    def __init__(self, seed: int, query_counts: dict[str, dict[str, int]]) -> None:
        self.seed = seed
        self.query_counts = query_counts
        self.pools: dict[tuple[str, str], list[Entry]] = defaultdict(list)
        self.queries: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
        self.pictures: dict[str, tuple[str, Look]] = {}
        self._numbers: Counter[str] = Counter()

    def picture(self, dataset: str, part: str, look: Look) -> str:
        """Put a picture on the list and return its path; InfoSeek's pictures lie with OVEN's, as published."""
        folder = f"mbeir_images/{'oven' if dataset == 'infoseek' else dataset}_images/{part}"
        self._numbers[folder] += 1
        path = f"{folder}/{self._numbers[folder]:05d}.jpg"
        self.pictures[path] = (DOMAIN_OF[dataset], look)
        return path

    def candidate(
        self, side: Side, task: str, look: Look, *, text: str | None = None, image: str | None = None, **facts: str
    ) -> Entry:
        """Add a candidate to the pool of ``task``."""
        dataset = Task.parse(task).dataset
        self._numbers[f"did {dataset}"] += 1
        did = f"{DATASET_IDS[dataset]}:{self._numbers[f'did {dataset}']}"
        entry = Entry(did, look, modality_of(text, image), text, image, facts)
        self.pools[side.name, task].append(entry)
        return entry

    def pictured(self, side: Side, task: str, look: Look, *, text: str | None = None, **facts: str) -> Entry:
        """Add a candidate with a picture of its own."""
        image = self.picture(Task.parse(task).dataset, f"{side.name}_pool", look)
        return self.candidate(side, task, look, text=text, image=image, **facts)

    def query(
        self,
        split: str,
        name: str,
        positives: Sequence[Entry],
        *,
        text: str | None = None,
        shown: Look | None = None,
        negatives: Sequence[str] = (),
    ) -> None:
        """Add a query; ``shown`` is the look of its picture, which is drawn anew."""
        task = Task.parse(name)
        self._numbers[f"qid {task.dataset} {split}"] += 1
        image = self.picture(task.dataset, f"{split}_queries", shown) if shown else None
        source = {"wanted": astuple(positives[0].look), "shown": astuple(shown) if shown else None}
        self.queries[split, name].append(
            {
                "qid": f"{DATASET_IDS[task.dataset]}:{self._numbers[f'qid {task.dataset} {split}']}",
                "query_txt": text,
                "query_img_path": image,
                "query_modality": str(modality_of(text, image)),
                "query_src_content": json.dumps({**source, **positives[0].facts}),
                "pos_cand_list": [entry.did for entry in positives],
                "neg_cand_list": list(negatives),
                "task_id": task.task_id,
            }
        )

    def targets(self, side: Side, task: str, options: Sequence[T]) -> Iterator[tuple[str, T]]:
        """Pair every query to be written with one of ``options``; splits share none as long as they suffice."""
        order = list(options)
        seeded(self.seed, "targets", side.name, task).shuffle(order)
        position = 0
        for split in reversed(side.splits):
            for _ in range(self.query_counts[split][task]):
                yield split, order[position % len(order)]
                position += 1
