"""Shards read from a URL: what they hold is what they hold in a folder, in this process and in others."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from torch.utils.data import DataLoader, Dataset

from lightning_mmembed.data import Shards
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.items import encode_id

KINDS = ("memory", "filecache", "simplecache", "file")


class Candidates(Dataset[Any]):
    """The candidates of shards, read in the worker that is asked."""

    def __init__(self, shards: Shards) -> None:
        self.shards = shards

    def __len__(self) -> int:
        return len(self.shards.candidate_rows)

    def __getitem__(self, place: int) -> tuple[str, str | None, bytes | None]:
        candidate = self.shards.candidate_at(int(self.shards.candidate_rows[place]))
        image = candidate.item.image
        assert image is None or isinstance(image, bytes)
        return candidate.did, candidate.item.text, image


@pytest.fixture
def memory(tiny_shards: Path, tmp_path: Path) -> Iterator[str]:
    """A copy of the small dataset's shards in memory, at another place in each test: caches outlive a test."""
    filesystem = fsspec.filesystem("memory")
    for path in tiny_shards.iterdir():
        filesystem.pipe_file(f"{tmp_path}/{path.name}", path.read_bytes())
    yield f"memory://{tmp_path}"
    filesystem.rm(str(tmp_path), recursive=True)


def url(kind: str, tiny_shards: Path, memory: str) -> str:
    return {"memory": memory, "file": f"file://{tiny_shards}"}.get(kind, f"{kind}::file://{tiny_shards}")


def content(shards: Shards) -> list[Any]:
    read: list[Any] = [shards.fingerprint, shards.candidate_ids.tolist()]
    for split in ("train", "val", "test"):
        pool = shards.pool(split)
        read += [list(pool.items), pool.modalities.tolist(), {k: v.tolist() for k, v in pool.local.items()}]
        read += [(s.task, s.ids.tolist(), s.positives, list(s.queries)) for s in shards.query_sets(split)]
    return read


@pytest.mark.parametrize("kind", KINDS)
def test_a_url_gives_what_the_folder_gives_in_this_process_and_pickled(
    tiny_shards: Path, memory: str, kind: str
) -> None:
    shards = Shards(url(kind, tiny_shards, memory))
    expected = content(Shards(tiny_shards))
    assert content(shards) == expected
    data = pickle.dumps(shards)
    assert len(data) < 1000
    assert content(pickle.loads(data)) == expected


@pytest.mark.parametrize("opened_before", [False, True], ids=["fresh", "read before the fork"])
@pytest.mark.parametrize("kind", KINDS)
def test_forked_workers_read_from_a_url_what_this_process_reads_from_the_folder(
    tiny_shards: Path, memory: str, kind: str, opened_before: bool
) -> None:
    shards = Shards(url(kind, tiny_shards, memory))
    expected = [Candidates(Shards(tiny_shards))[i] for i in range(len(Candidates(shards)))]
    if opened_before:
        assert Candidates(shards)[0] == expected[0]
    loader = DataLoader(Candidates(shards), batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert [tuple(entry) for entry in loader] == expected


def test_a_folder_given_as_text_is_a_folder(tiny_shards: Path) -> None:
    assert content(Shards(str(tiny_shards))) == content(Shards(tiny_shards))


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("s3gs://bucket/shards", "Protocol not known: s3gs"),
        ("oss://bucket/shards", "ossfs"),
        ("filecache::oss://bucket/shards", "ossfs"),
    ],
)
def test_a_url_that_nothing_here_reads_is_named_with_what_is_missing(location: str, reason: str) -> None:
    with pytest.raises(UserInputError, match=f"shards='{location}' cannot be read: .*{reason}"):
        Shards(location)


@pytest.mark.parametrize("kind", ["memory://nowhere", "file:///nowhere/shards", "simplecache::memory://nowhere"])
def test_a_url_without_a_manifest_is_no_dataset(kind: str) -> None:
    with pytest.raises(UserInputError, match=r"nowhere.*/manifest\.json is missing; make the shards"):
        Shards(kind)


@pytest.mark.parametrize("kept", [0, 700])
@pytest.mark.parametrize("cache", ["", "simplecache::"])
def test_a_truncated_file_at_a_url_is_named(memory: str, tmp_path: Path, kept: int, cache: str) -> None:
    filesystem = fsspec.filesystem("memory")
    name = f"{tmp_path}/candidates-00000.tar"
    filesystem.pipe_file(name, filesystem.cat_file(name)[:kept])
    with pytest.raises(UserInputError, match=r"candidates-00000\.tar ends before byte \d+; it is truncated"):
        Shards(cache + memory).candidate(encode_id("77:4055"))


@pytest.mark.parametrize("cache", ["", "simplecache::"])
def test_a_missing_file_at_a_url_is_named(memory: str, tmp_path: Path, cache: str) -> None:
    shards = Shards(cache + memory)
    fsspec.filesystem("memory").rm(f"{tmp_path}/candidates-00000.tar")
    with pytest.raises(UserInputError, match=r"candidates-00000\.tar is missing; make the shards again"):
        shards.candidate(encode_id("77:4055"))


@pytest.mark.parametrize("name", ["index.parquet", "instructions.tsv"])
def test_a_missing_index_or_instruction_file_is_named(memory: str, tmp_path: Path, name: str) -> None:
    fsspec.filesystem("memory").rm(f"{tmp_path}/{name}")
    with pytest.raises(UserInputError, match=f"{name} is missing"):
        Shards(memory).pool("train")
