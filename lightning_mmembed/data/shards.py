"""Reads shards: random access by ``did`` and by query through the index."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from lightning_mmembed.data.instructions import Instructions
from lightning_mmembed.data.layout import TRAIN_POOL, read_instructions
from lightning_mmembed.data.manifest import INDEX_FILE, INSTRUCTIONS_FILE, read_manifest
from lightning_mmembed.data.places import Place
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.items import Candidate, Item, Modality, Query, Task, dataset_number, decode_id, task_order
from lightning_mmembed.retrieval.pool import Pool, QuerySet

#: Columns of the index that say where a record lies, and its picture.
_OF_RECORDS = ("shard", "offset", "size")
_OF_PICTURES = ("image_shard", "image_offset", "image_size")

#: From (qid, query modality, task) to the instruction of a query.
Instruct = Callable[[str, Modality, Task], str]


class Shards:
    """A dataset as shards; opened in every process that reads it, and cheap to pickle.

    Args:
        directory: What :func:`shard_dataset` wrote: a folder, or a URL that fsspec reads, such as
            ``"s3://bucket/shards"`` or, with local copies, ``"filecache::s3://bucket/shards"``.

    Raises:
        UserInputError: If there is no manifest, or one of another version.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = directory if isinstance(directory, Path) else str(directory)
        self._place = Place(self.directory)
        self.manifest = read_manifest(self._place)
        self.fingerprint: str = self.manifest["fingerprint"]
        self.instructions = Instructions(read_instructions(self._place.open(INSTRUCTIONS_FILE)))

    def __getstate__(self) -> dict[str, Any]:
        return {"directory": self.directory}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["directory"])  # type: ignore[misc]

    @cached_property
    def _index(self) -> Any:
        with self._place.open(INDEX_FILE) as file:
            return pq.read_table(file)

    @cached_property
    def _columns(self) -> dict[str, np.ndarray]:
        names = [*_OF_RECORDS, *_OF_PICTURES, "id", "modality", "weight"]
        return {name: self._index[name].to_numpy() for name in names}

    @cached_property
    def _tasks(self) -> tuple[np.ndarray, np.ndarray]:
        """The name of every task, and its place among them for each row: texts would take 70 bytes a row."""
        encoded = self._index["task"].dictionary_encode().combine_chunks()
        return np.array(encoded.dictionary.to_pylist(), dtype=str), encoded.indices.to_numpy().astype(np.int16)

    @cached_property
    def candidate_rows(self) -> np.ndarray:
        """``(C,)`` index rows of the candidates, by id."""
        rows = np.flatnonzero(pc.equal(self._index["split"], "").to_numpy())
        return rows[np.argsort(self._columns["id"][rows])]

    @cached_property
    def candidate_ids(self) -> np.ndarray:
        """``(C,)`` encoded ids of the candidates, ascending."""
        ids: np.ndarray = self._columns["id"][self.candidate_rows]
        return ids

    def query_rows(self, split: str) -> np.ndarray:
        """``(Q,)`` index rows of the queries of a split."""
        return np.flatnonzero(pc.equal(self._index["split"], split).to_numpy())

    def tasks(self, split: str) -> list[Task]:
        """The tasks that have queries in a split, in canonical order."""
        counts, suffix = self.manifest["counts"]["queries"], f"/{split}"
        names = (name.removesuffix(suffix) for name in counts if name.endswith(suffix))
        return [Task.parse(name) for name in sorted(names, key=task_order)]

    def task_names(self, rows: np.ndarray) -> np.ndarray:
        """``(Q,)`` task name of each query row."""
        names, places = self._tasks
        found: np.ndarray = names[places[rows]]
        return found

    def positives(self, rows: np.ndarray) -> list[list[int]]:
        """Encoded ids of the labelled positives of each query row."""
        lists: list[list[int]] = self._index["positives"].take(rows).to_pylist()
        return lists

    def query_ids(self, rows: np.ndarray) -> np.ndarray:
        """``(Q,)`` encoded ids of query rows."""
        ids: np.ndarray = self._columns["id"][rows]
        return ids

    def source_ids(self, split: str = "") -> dict[str, str]:
        """What the source calls its queries, or without a split its candidates: from ``qid`` or ``did`` to its own id.

        Empty where the source has ``did`` and ``qid`` itself, as M-BEIR has.
        """
        if "source_id" not in self._index.column_names:
            return {}
        rows = self.query_rows(split) if split else self.candidate_rows
        names = self._index["source_id"].take(rows).to_pylist()
        codes = self._columns["id"][rows].tolist()
        return {decode_id(code): name for code, name in zip(codes, names, strict=True) if name is not None}

    def _lists(self, column: str, rows: np.ndarray) -> list[list[int]] | None:
        """A column that the index of some sources has; None where it says nothing of these rows."""
        if column not in self._index.column_names:
            return None
        lists: list[list[int]] = [found or [] for found in self._index[column].take(rows).to_pylist()]
        return lists if any(lists) else None

    def _grades(self, rows: np.ndarray) -> list[list[int]] | None:
        """How relevant each positive of each query row is; None where all are alike."""
        grades = self._lists("grades", rows)
        return grades if grades and any(grade != 1 for given in grades for grade in given) else None

    def query_weights(self, rows: np.ndarray) -> np.ndarray:
        """``(Q,)`` how often each query stands in the source's up-sampled file; without one, in its own file."""
        weights: np.ndarray = self._columns["weight"][rows]
        return weights

    def candidate(self, code: int) -> Candidate:
        """The candidate with an encoded id.

        Raises:
            UserInputError: If no candidate has it.
        """
        return self.candidate_at(self.candidate_row(code))

    def candidate_row(self, code: int) -> int:
        """The index row of the candidate with an encoded id.

        Raises:
            UserInputError: If no candidate has it.
        """
        place = int(np.searchsorted(self.candidate_ids, code))
        if place == len(self.candidate_ids) or self.candidate_ids[place] != code:
            raise UserInputError(f"did={decode_id(code)!r} is in no pool of {self.directory}")
        return int(self.candidate_rows[place])

    def candidate_at(self, row: int) -> Candidate:
        """The candidate at an index row."""
        record, image = self._read(row)
        return Candidate(Item(record["txt"] or None, image), record["did"])

    def query_at(self, row: int, instruct: Instruct | None = None) -> Query:
        """The query at an index row, with the first instruction or the one that ``instruct`` picks.

        Args:
            row: The index row.
            instruct: From (qid, query modality, task) to an instruction; by default the first of those that fit.
        """
        record, image = self._read(row)
        names, places = self._tasks
        task = Task.parse(str(names[places[row]]))
        modality = list(Modality)[self._columns["modality"][row]]
        instruction = (instruct or self.instructions.fixed)(record["qid"], modality, task)
        item = Item(record["query_txt"] or None, image)
        return Query(item, instruction, record["qid"], task, tuple(record["pos_cand_list"]))

    def expect(self, rows: Iterable[int]) -> None:
        """Say that the records at some index rows are read next, and their pictures; see :meth:`Place.expect`."""
        self._place.expect(part for row in rows for part in self._ranges(row))

    def pool_fingerprint(self, name: str) -> str:
        """The fingerprint of a pool, without reading it."""
        return f"{self.fingerprint}/{name}"

    def pool_fingerprints(self, name: str) -> set[str]:
        """That, and those of what the pool is made of: negatives that were mined in either can be used."""
        return {self.pool_fingerprint(name)}

    def pool(self, name: str) -> Pool:
        """A pool in canonical order: ``train``, ``val``, ``test``, or a local one: ``mscoco_task0/val``."""
        pools = self._index["pools"].take(self.candidate_rows).combine_chunks()
        member = np.zeros(len(self.candidate_rows), dtype=bool)
        local: dict[str, np.ndarray] = {}
        flat, parents = pools.flatten().to_numpy(), pc.list_parent_indices(pools).to_numpy()
        for number, pool_name in enumerate(self.manifest["counts"]["pools"]):
            if pool_name == name or (name != TRAIN_POOL and pool_name.endswith(f"/{name}")):
                inside = np.zeros(len(member), dtype=bool)
                inside[parents[flat == number]] = True
                member |= inside
                if pool_name != name:
                    local[pool_name.removesuffix(f"/{name}")] = inside
        if not member.any():
            raise UserInputError(f"{self.directory} has no pool {name!r}")
        rows = self.candidate_rows[member]
        return Pool(
            name=name,
            ids=torch.from_numpy(self.candidate_ids[member]),
            modalities=torch.from_numpy(self._columns["modality"][rows]),
            local={task: torch.from_numpy(inside[member]) for task, inside in local.items()},
            items=_Rows(rows, self.candidate_at, self.expect),
            fingerprint=self.pool_fingerprint(name),
            sizes=torch.from_numpy(self._columns["size"][rows].astype(np.int64)),
        )

    def query_sets(
        self, split: str, instruction: int | Literal["random"] = 0, instruction_seed: int = 0
    ) -> list[QuerySet]:
        """The queries of a split, one set a task, in canonical order.

        Args:
            split: The split.
            instruction: Which of the prompts every query gets, or ``"random"`` to draw one for each.
            instruction_seed: Seed of the draw.

        Raises:
            UserInputError: If there is a query that has no such prompt; this is told before any record is read.
        """
        if instruction == "random":
            instruct: Instruct = partial(self.instructions.draw, seed=instruction_seed, epoch=0)
            mode = f"random-{instruction_seed}"
        else:
            instruct, mode = partial(self.instructions.fixed, index=instruction), str(instruction)
        rows = self.query_rows(split)
        names = self.task_names(rows)
        sets = []
        for task in self.tasks(split):
            mine = rows[names == task.name]
            for qid, modality in self._kinds(mine):
                instruct(qid, modality, task)
            queries = _Rows(mine, partial(self.query_at, instruct=instruct), self.expect)
            made_of = f"{self.fingerprint}/{split}/{task.name}/{mode}"
            sizes = torch.from_numpy(self._columns["size"][mine].astype(np.int64))
            ids = torch.from_numpy(self.query_ids(mine))
            more = (self._grades(mine), self._lists("ignored", mine))
            sets.append(QuerySet(task, ids, self.positives(mine), queries, made_of, sizes, *more))
        return sets

    def prompt_count(self, split: str) -> int:
        """How many prompts every query of a split has; 0 if the split has no query."""
        rows = self.query_rows(split)
        names = self.task_names(rows)
        counts = [
            len(self.instructions.choices(qid, modality, task))
            for task in self.tasks(split)
            for qid, modality in self._kinds(rows[names == task.name])
        ]
        return min(counts, default=0)

    def _kinds(self, rows: np.ndarray) -> list[tuple[str, Modality]]:
        """What the prompts of some query rows go by: an id of each (dataset, modality), and the modality."""
        ids, modalities = self._columns["id"][rows], self._columns["modality"][rows]
        _, firsts = np.unique(dataset_number(ids) * len(Modality) + modalities, return_index=True)
        return [(decode_id(int(ids[i])), list(Modality)[modalities[i]]) for i in firsts]

    def _read(self, row: int) -> tuple[dict[str, Any], bytes | None]:
        with self.naming(row):
            record, *picture = [self._place.read_at(*part) for part in self._ranges(row)]
            return json.loads(record), picture[0] if picture else None

    @contextlib.contextmanager
    def naming(self, row: int) -> Iterator[None]:
        """Name the record at an index row, and where it lies, in what is wrong with it.

        Raises:
            UserInputError: In place of what is wrong.
        """
        try:
            yield
        except ValueError as error:
            split, code = self._index["split"][row].as_py(), decode_id(int(self._columns["id"][row]))
            places = ", ".join(f"{file} at byte {offset}" for file, offset, _ in self._ranges(row))
            problem = str(error).removeprefix(f"{code}: ")  # the processor names it too
            kind = f"{split} query" if split else "candidate"
            raise UserInputError(f"{kind} {code} ({places}): {problem}") from error

    def _ranges(self, row: int) -> list[tuple[str, int, int]]:
        """File, offset and size of the record at a row, and of its picture if it has one."""
        columns, files = self._columns, self.manifest["shards"]
        parts = (_OF_RECORDS, _OF_PICTURES) if columns["image_size"][row] else (_OF_RECORDS,)
        return [
            (files[columns[shard][row]]["file"], int(columns[offset][row]), int(columns[size][row]))
            for shard, offset, size in parts
        ]


class _Rows(Sequence[Any]):
    """Records read when they are asked for."""

    def __init__(self, rows: np.ndarray, read: Callable[[int], Any], expect: Callable[[Iterable[int]], None]) -> None:
        self._rows, self._read, self._expect = rows, read, expect

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._read(int(row)) for row in self._rows[index]]
        return self._read(int(self._rows[index]))

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """What a DataLoader asks for: a batch."""
        rows = self._rows[indices]
        if (np.diff(rows) != 1).any():  # in order, the system reads ahead by itself, and further than a batch
            self._expect(rows)
        return [self._read(int(row)) for row in rows]
