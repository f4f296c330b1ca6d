"""Reads shards: random access by ``did`` and by query through the index."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from lightning_mmembed.data.instructions import Instructions
from lightning_mmembed.data.layout import TRAIN_POOL, read_instructions
from lightning_mmembed.data.shard import INDEX_FILE, INSTRUCTIONS_FILE, MANIFEST_FILE
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.items import Candidate, Item, Modality, Query, Task, decode_id, task_order
from lightning_mmembed.retrieval.pool import Pool, QuerySet

#: From (qid, query modality, task) to the instruction of a query.
Instruct = Callable[[str, Modality, Task], str]


class Shards:
    """A dataset as shards; opened in every process that reads it, and cheap to pickle.

    Args:
        directory: What :func:`shard_dataset` wrote.

    Raises:
        UserInputError: If there is no manifest in the directory.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        manifest = self.directory / MANIFEST_FILE
        if not manifest.is_file():
            raise UserInputError(
                f"{manifest} is missing; make the shards with mmembed-shard source=... out={directory}"
            )
        self.manifest: dict[str, Any] = json.loads(manifest.read_text())
        self.fingerprint: str = self.manifest["fingerprint"]
        self.instructions = Instructions(read_instructions(self.directory / INSTRUCTIONS_FILE))
        self._files: dict[int, mmap.mmap] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"directory": self.directory}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["directory"])  # type: ignore[misc]

    @cached_property
    def _index(self) -> Any:
        return pq.read_table(self.directory / INDEX_FILE)

    @cached_property
    def _columns(self) -> dict[str, np.ndarray]:
        names = ("id", "shard", "offset", "size", "image_offset", "image_size", "modality")
        return {name: self._index[name].to_numpy() for name in names}

    @cached_property
    def _tasks(self) -> np.ndarray:
        tasks: np.ndarray = self._index["task"].to_numpy(zero_copy_only=False).astype(str)
        return tasks

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
        names: np.ndarray = self._tasks[rows]
        return names

    def positives(self, rows: np.ndarray) -> list[list[int]]:
        """Encoded ids of the labelled positives of each query row."""
        lists: list[list[int]] = self._index["positives"].take(rows).to_pylist()
        return lists

    def query_ids(self, rows: np.ndarray) -> np.ndarray:
        """``(Q,)`` encoded ids of query rows."""
        ids: np.ndarray = self._columns["id"][rows]
        return ids

    def candidate(self, code: int) -> Candidate:
        """The candidate with an encoded id.

        Raises:
            UserInputError: If no candidate has it.
        """
        place = int(np.searchsorted(self.candidate_ids, code))
        if place == len(self.candidate_ids) or self.candidate_ids[place] != code:
            raise UserInputError(f"did={decode_id(code)!r} is in no pool of {self.directory}")
        return self.candidate_at(int(self.candidate_rows[place]))

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
        task = Task.parse(self._tasks[row])
        modality = list(Modality)[self._columns["modality"][row]]
        instruction = (instruct or self.instructions.fixed)(record["qid"], modality, task)
        item = Item(record["query_txt"] or None, image)
        return Query(item, instruction, record["qid"], task, tuple(record["pos_cand_list"]))

    def pool_fingerprint(self, name: str) -> str:
        """The fingerprint of a pool, without reading it."""
        return f"{self.fingerprint}/{name}"

    def pool(self, name: str) -> Pool:
        """A pool by name: ``train``, ``val`` or ``test`` (union of that split's local pools), in canonical order."""
        pools = self._index["pools"].take(self.candidate_rows).combine_chunks()
        member = np.zeros(len(self.candidate_rows), dtype=bool)
        local: dict[str, np.ndarray] = {}
        flat, parents = pools.flatten(), pc.list_parent_indices(pools).to_numpy()
        for pool_name in self.manifest["counts"]["pools"]:
            if pool_name == name or (name != TRAIN_POOL and pool_name.endswith(f"/{name}")):
                inside = np.zeros(len(member), dtype=bool)
                inside[parents[pc.equal(flat, pool_name).to_numpy(zero_copy_only=False)]] = True
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
            items=_Rows(rows, self.candidate_at),
            fingerprint=self.pool_fingerprint(name),
        )

    def query_sets(self, split: str, instruction_index: int = 0) -> list[QuerySet]:
        """The queries of a split, one set a task, in canonical order."""
        rows = self.query_rows(split)
        names = self.task_names(rows)
        sets = []
        for task in self.tasks(split):
            mine = rows[names == task.name]
            positives = self.positives(mine)
            ids = torch.from_numpy(self.query_ids(mine))
            instruct = partial(self.instructions.fixed, index=instruction_index)
            queries = _Rows(mine, partial(self.query_at, instruct=instruct))
            made_of = f"{self.fingerprint}/{split}/{task.name}/{instruction_index}"
            sets.append(QuerySet(task, ids, positives, queries, made_of))
        return sets

    def _read(self, row: int) -> tuple[dict[str, Any], bytes | None]:
        columns = self._columns
        shard = int(columns["shard"][row])
        record = json.loads(self._bytes(shard, int(columns["offset"][row]), int(columns["size"][row])))
        size = int(columns["image_size"][row])
        return record, self._bytes(shard, int(columns["image_offset"][row]), size) if size else None

    def _bytes(self, shard: int, offset: int, size: int) -> bytes:
        name = self.directory / self.manifest["shards"][shard]["file"]
        if shard not in self._files:
            with open(name, "rb") as file:
                # Mapped, not read: no position to share among threads and forked workers, no system call a record.
                if os.fstat(file.fileno()).st_size:  # an empty file cannot be mapped
                    self._files[shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        data = self._files[shard][offset : offset + size] if shard in self._files else b""
        if len(data) != size:
            raise UserInputError(f"{name} ends before byte {offset + size}; it is truncated: make the shards again")
        return data


class _Rows(Sequence[Any]):
    """Records read when they are asked for."""

    def __init__(self, rows: np.ndarray, read: Any) -> None:
        self._rows, self._read = rows, read

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._read(int(row)) for row in self._rows[index]]
        return self._read(int(self._rows[index]))


class ShardTexts:
    """Every text of the training pool and the training queries, and every instruction: what a tokenizer learns from.

    Args:
        shards: Directory of the shards.
    """

    def __init__(self, shards: str | Path) -> None:
        self._shards = Shards(shards)
        self.fingerprint = self._shards.fingerprint

    def __iter__(self) -> Iterator[str]:
        for candidate in self._shards.pool(TRAIN_POOL).items:
            yield candidate.item.text or ""
        for row in self._shards.query_rows("train"):
            query = self._shards.query_at(int(row))
            yield f"Instruct: {query.instruction}\nQuery: {query.item.text or ''}"
