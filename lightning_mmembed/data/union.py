"""Several folders of shards as one dataset, such as multimodal and text-to-text data that are trained on together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lightning_mmembed.data.instructions import Instructions
from lightning_mmembed.data.layout import TRAIN_POOL
from lightning_mmembed.data.places import Place
from lightning_mmembed.data.shards import Shards
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.files import fingerprint
from lightning_mmembed.items import dataset_number

#: One folder or URL of shards, or several.
Directories = str | Path | Sequence[str | Path]


def open_shards(directories: Directories) -> Shards:
    """Open a folder of shards, or several as one.

    Raises:
        UserInputError: If there are none, or they cannot be used together; see :class:`UnionShards`.
    """
    if isinstance(directories, str | Path):
        return Shards(directories)
    return Shards(directories[0]) if len(directories) == 1 else UnionShards(directories)


class UnionShards(Shards):
    """Several folders of shards as one, read like one: their pools, tasks and queries are put together.

    The order in which the folders are named does not matter.

    Args:
        directories: Folders or URLs of shards.

    Raises:
        UserInputError: If there is no folder, or two of them share a dataset id or a task.
    """

    def __init__(self, directories: Sequence[str | Path]) -> None:
        if not directories:
            raise UserInputError("data.shards=[] names no folder; give the shards of each dataset")
        parts = [Shards(directory) for directory in directories]
        self.parts = sorted(parts, key=lambda part: part.fingerprint)
        self.directory = " and ".join(str(part.directory) for part in self.parts)
        self.fingerprint = fingerprint("union", [part.fingerprint for part in self.parts])
        self._refuse_shared_tasks()
        self.manifest = self._merged_manifest()
        self._place = _Places({str(part.directory): part._place for part in self.parts})
        prompts = [part.instructions.of_datasets(self._datasets[i]) for i, part in enumerate(self.parts)]
        self.instructions = Instructions({key: texts for some in prompts for key, texts in some.items()})

    def __getstate__(self) -> dict[str, Any]:
        return {"directory": [part.directory for part in self.parts]}

    def pool_fingerprints(self, name: str) -> set[str]:
        """Fingerprints of a pool and of the parts that it is made of."""
        return {self.pool_fingerprint(name), *(part.pool_fingerprint(name) for part in self.parts)}

    @cached_property
    def _index(self) -> Any:
        pools = list(self.manifest["counts"]["pools"])
        tables, first = [], 0
        for part in self.parts:
            places = np.array([pools.index(name) for name in part.manifest["counts"]["pools"]], dtype=np.int16)
            tables.append(_moved(part._index, first, places))
            first += len(part.manifest["shards"])
        return pa.concat_tables(tables, promote_options="default")

    @cached_property
    def _datasets(self) -> list[list[int]]:
        """The dataset ids of each part."""
        found: list[list[int]] = []
        for part in self.parts:
            own = np.unique(dataset_number(part._index["id"].to_numpy())).tolist()
            for other, ids in zip(self.parts, found, strict=False):
                if shared := sorted(set(ids) & set(own)):
                    raise UserInputError(
                        f"data.shards: {other.directory} and {part.directory} both hold dataset_id={shared[0]}; "
                        "make one of them again with another, as mmembed-shard ... dataset_id="
                    )
            found.append(own)
        return found

    def _refuse_shared_tasks(self) -> None:
        owners: dict[str, Shards] = {}
        for part in self.parts:
            for task in {name.rpartition("/")[0] for name in part.manifest["counts"]["queries"]}:
                if task in owners:
                    raise UserInputError(
                        f"data.shards: {owners[task].directory} and {part.directory} both have the task {task}; "
                        "make one of them again with another dataset="
                    )
                owners[task] = part

    def _merged_manifest(self) -> dict[str, Any]:
        merged: dict[str, Any] = {
            "fingerprint": self.fingerprint,
            "counts": {"pools": {}, "queries": {}},
            "shards": [],
            "bad_records": [],
        }
        for part in self.parts:
            counts = part.manifest["counts"]
            for kind in ("pools", "queries"):
                for name, count in counts[kind].items():
                    merged["counts"][kind][name] = merged["counts"][kind].get(name, 0) + count
            merged["shards"] += [
                shard | {"file": f"{part.directory}/{shard['file']}"} for shard in part.manifest["shards"]
            ]
            merged["bad_records"] += part.manifest["bad_records"]
        return merged


class _Places(Place):
    """Reads the files of several places by their whole names."""

    def __init__(self, places: dict[str, Place]) -> None:
        self._places = places

    def read_at(self, name: str, offset: int, size: int) -> bytes:
        directory, _, file = name.rpartition("/")
        return self._places[directory].read_at(file, offset, size)

    def expect(self, ranges: Iterable[tuple[str, int, int]]) -> None:
        own: dict[str, list[tuple[str, int, int]]] = {}
        for name, offset, size in ranges:
            directory, _, file = name.rpartition("/")
            own.setdefault(directory, []).append((file, offset, size))
        for directory, some in own.items():
            self._places[directory].expect(some)


def _moved(index: Any, first: int, pools: np.ndarray) -> Any:
    """An index whose shards are counted from ``first`` on, and whose pools have other numbers."""
    for name in ("shard", "image_shard"):
        numbers = index[name].to_numpy()
        moved = np.where(numbers < 0, numbers, numbers + first).astype(np.int32)  # -1 is no picture
        index = index.set_column(index.column_names.index(name), name, pa.array(moved))
    lists = index["pools"].combine_chunks()
    values = pa.array(pools[lists.flatten().to_numpy()])
    offsets = pa.array(np.concatenate([[0], np.cumsum(pc.list_value_length(lists).to_numpy())]).astype(np.int32))
    return index.set_column(index.column_names.index("pools"), "pools", pa.ListArray.from_arrays(offsets, values))


class ShardTexts:
    """Every text of the training pool and the training queries, and every instruction: what a tokenizer learns from.

    Args:
        shards: Directory of the shards, or several.
    """

    def __init__(self, shards: Directories) -> None:
        self._shards = open_shards(shards)
        self.fingerprint = self._shards.fingerprint

    def __iter__(self) -> Iterator[str]:
        for candidate in self._shards.pool(TRAIN_POOL).items:
            yield candidate.item.text or ""
        for row in self._shards.query_rows("train"):
            query = self._shards.query_at(int(row))
            yield f"Instruct: {query.instruction}\nQuery: {query.item.text or ''}"
