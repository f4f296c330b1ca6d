"""What a tiny reranker is trained on: queries and candidates as pieces of its prompts, in lists with one positive."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightning_mmembed import Item, Query, ZeroShotReranker
from lightning_mmembed.data import Shards
from lightning_mmembed.data.mini import words
from lightning_mmembed.data.mini.draw import draw_look, encode
from lightning_mmembed.data.mini.world import DOMAIN_OF, Look
from lightning_mmembed.encoders.base import Encoder
from lightning_mmembed.items import TASK_MODALITIES, Modality, Task, dataset_number, encode_id
from lightning_mmembed.rerank.inputs import Row
from lightning_mmembed.retrieval.embed import VectorStore, encoder_fingerprint
from lightning_mmembed.retrieval.evaluate import evaluate_retrieval

#: Queries of a step, and candidates of each: its positive, and others.
QUERIES, CANDIDATES = 8, 8


@dataclass(frozen=True)
class Piece:
    """A part of a prompt.

    Args:
        ids: ``(L,)`` token ids, those of pictures among them.
        features: ``(P, D)`` embeddings of its pictures' positions, which are computed once: the tower is frozen.
    """

    ids: Tensor
    features: Tensor


def kind_of(task: Task) -> str:
    """What a task is counted under."""
    if task.task_id == 4:
        return "picture"
    return "composed" if TASK_MODALITIES[task.task_id][0] is Modality.IMAGE_TEXT else "caption"


class Pieces:
    """Queries and candidates of some shards as the reranker's prompts hold them, each prepared once."""

    def __init__(self, reranker: ZeroShotReranker, shards: Shards) -> None:
        self._reranker, self._shards = reranker, shards
        self._candidates: dict[tuple[int, int], Piece] = {}
        self._queries: dict[str, Piece] = {}

    def query(self, query: Query, did: int) -> Piece:
        """All of a prompt before the candidate, which may be any."""
        if not query.qid:  # a new one, which does not come again
            return self._piece(self._rows(query, did)[0])
        if query.qid not in self._queries:
            self._queries[query.qid] = self._piece(self._rows(query, did)[0])
        return self._queries[query.qid]

    def candidate(self, query: Query, did: int) -> Piece:
        """The rest of a prompt; of the query it depends on the task alone."""
        assert query.task is not None
        key = (query.task.task_id, did)
        if key not in self._candidates:
            self._candidates[key] = self._piece(self._rows(query, did)[1])
        return self._candidates[key]

    def _rows(self, query: Query, did: int) -> tuple[Row, Row]:
        processor = self._reranker.processor
        pairs = processor(query, [self._shards.candidate(did)], processor.writer.prompts.of(query.task))
        row, shared, pictures = pairs.rows[0], pairs.shared, pairs.shared_pictures
        return Row(row.ids[:shared], row.pictures[:pictures]), Row(row.ids[shared:], row.pictures[pictures:])

    @torch.no_grad()
    def _piece(self, row: Row) -> Piece:
        backbone, family = self._reranker.model.model, self._reranker.processor.family
        found = [
            family.image_features(backbone, family.normalised(picture.inputs["pixel_values"]))[0]  # type: ignore[attr-defined]
            for picture in row.pictures
        ]
        width = backbone.config.text_config.hidden_size
        return Piece(torch.tensor(row.ids), torch.cat([torch.zeros(0, width), *found]))


@dataclass(frozen=True)
class Batch:
    """Queries of a task, each with a list of candidates whose first one is a positive.

    Args:
        task: Theirs.
        queries: ``B`` of them.
        lists: ``B`` lists of ``C`` encoded ids.
        counts: ``(B, C)`` False where another labelled positive is among the negatives.
    """

    task: Task
    queries: list[Query]
    lists: list[list[int]]
    counts: Tensor


class NewQueries:
    """Asks for a training candidate again: with another picture, and in other words.

    The benchmark has 2,800 composed training queries. Pictures and words are those of its generator, and what they show
    is in the training pool, never among what is held out.

    Args:
        tree: The built-in benchmark in M-BEIR's layout, whose candidates say what they show.
    """

    def __init__(self, tree: Path) -> None:
        self._source: dict[int, dict[str, str]] = {}
        self._look: dict[int, Look] = {}
        self._pictures: dict[int, list[Look]] = defaultdict(list)
        for line in (tree / "cand_pool" / "global" / "mbeir_union_train_cand_pool.jsonl").read_text().splitlines():
            record = json.loads(line)
            did = encode_id(record["did"])
            source = self._source[did] = json.loads(record["src_content"])
            self._look[did] = Look(*source["look"])
            if record["modality"] == Modality.IMAGE.value:
                self._pictures[dataset_number(did)].append(self._look[did])

    def __call__(self, query: Query, did: int, rng: random.Random) -> Query:
        """Another query of the task that a candidate is a positive of.

        Args:
            query: A composed training query.
            did: Encoded id of a labelled positive.
            rng: What draws.
        """
        assert query.task is not None
        look, source = self._look[did], self._source[did]
        if query.task.task_id == 7:
            pool = self._pictures[dataset_number(did)]
            shown = rng.choice([other for other in pool if 1 <= len(other.changed(look)) <= 2])
            text = words.change_note(shown, look, rng)
        else:
            shown, named = look, source["topic"] == "name"
            text = (
                words.name_question(rng) if named else words.topic_question(source["topic"], look, rng, pictured=True)
            )
        picture = encode(draw_look(DOMAIN_OF[query.task.dataset], shown, rng))
        return replace(query, item=Item(text, picture), qid="")


class Lists:
    """The queries of a split with their positives and, of the composed tasks, what the retriever ranks beside them."""

    def __init__(
        self, encoder: Encoder, shards: Shards, split: str, out: Path, new_queries: NewQueries | None = None
    ) -> None:
        pool = shards.pool(split)
        sets = shards.query_sets(split)
        composed = [queries for queries in sets if kind_of(queries.task) == "composed"]
        store = VectorStore(out / "vectors", dtype="float32")
        found = evaluate_retrieval(encoder, pool, composed, store, encoder_fingerprint(encoder), ["hit@1"]).tasks
        self._new_queries = new_queries
        self.tasks = [queries.task for queries in sets]
        self._sets = {queries.task: queries for queries in sets}
        self._wrong: dict[Task, list[list[int]]] = {}
        for queries in composed:
            ranked = pool.ids[found[queries.task.name].rankings["union"].rows[:, :10]].tolist()
            pairs = zip(ranked, queries.positives, strict=True)
            self._wrong[queries.task] = [[did for did in dids if did not in right] for dids, right in pairs]

    def draw(self, rng: np.random.Generator, task: Task, hard: int) -> Batch:
        """Some queries of a task; the negatives of each are the positives of the others, and ``hard`` in their place.

        Args:
            rng: What draws.
            task: Whose.
            hard: So many negatives are drawn of what the retriever ranks in its top 10, where the task is composed.
        """
        queries = self._sets[task]
        numbers = rng.permutation(len(queries))[:QUERIES].tolist()
        positives = [int(rng.choice(queries.positives[number])) for number in numbers]
        lists = []
        for place, number in enumerate(numbers):
            others = positives[:place] + positives[place + 1 :]
            wrong = self._wrong[task][number] if task in self._wrong else []
            drawn = rng.permutation(wrong)[:hard].tolist()
            lists.append([positives[place], *drawn, *others[: CANDIDATES - 1 - len(drawn)]])
        right = [queries.positives[number] for number in numbers]
        counts = [
            [n == 0 or did not in of for n, did in enumerate(dids)] for dids, of in zip(lists, right, strict=True)
        ]
        asked = [queries.queries[number] for number in numbers]
        if self._new_queries is not None and kind_of(task) == "composed":
            draw = random.Random(int(rng.integers(2**32)))
            asked = [self._new_queries(query, did, draw) for query, did in zip(asked, positives, strict=True)]
        return Batch(task, asked, lists, torch.tensor(counts))
