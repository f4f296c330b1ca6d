"""Shards read from a URL hold what they hold in a folder, in this process and in others; what a batch reads is
announced to a local disk, and changes nothing that is read."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_mmembed.data import Shards, places
from lightning_mmembed.data.batches import TrainingBatches
from lightning_mmembed.data.places import Place
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.items import encode_id

#: A filesystem in ``asyncwrapper`` fails when it is used after a fork; the last has no ``://``.
KINDS = ("memory", "filecache", "simplecache", "file", "asyncwrapper", "simplecache of a path")


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
    special = {
        "memory": memory,
        "file": f"file://{tiny_shards}",
        "simplecache of a path": f"simplecache::{tiny_shards}",
    }
    return special.get(kind, f"{kind}::file://{tiny_shards}")


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


# --- from a folder --------------------------------------------------------------------------------------------------


class Wrong(Dataset[int]):
    """How many of many reads give other bytes than the file's; the file is opened before the fork."""

    def __init__(self, path: Path) -> None:
        self.place, self.name, self.data = Place(path.parent), path.name, path.read_bytes()
        self[0]

    def __len__(self) -> int:
        return 6

    def __getitem__(self, seed: int) -> int:
        offsets = random.Random(seed).choices(range(len(self.data) - 8), k=10_000)
        return sum(self.place.read_at(self.name, o, 8) != self.data[o : o + 8] for o in offsets)


def test_forked_workers_that_read_the_same_open_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(random.Random(0).randbytes(100_000))
    loader = DataLoader(Wrong(path), batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert list(loader) == [0] * 6


def test_bytes_at_an_offset_are_those_of_the_file_and_all_that_were_asked_for(tmp_path: Path) -> None:
    data = bytes(range(256)) * 40
    (tmp_path / "file").write_bytes(data)
    for location in (tmp_path, f"file://{tmp_path}"):
        place = Place(location)
        for offset in (5000, 0, 255, 10239):  # not in order
            assert place.read_at("file", offset, 1) == data[offset : offset + 1]
        assert place.read_at("file", 4095, 6145) == data[4095:]
        for offset, size in ((4095, 6146), (10240, 1), (20000, 5)):
            with pytest.raises(UserInputError, match=f"file ends before byte {offset + size}; it is truncated"):
                place.read_at("file", offset, size)


def test_each_file_is_opened_once_and_closed_with_its_place(tiny_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    really_open = os.open

    def noted_open(path: Path, flags: int) -> int:
        opened.append(really_open(path, flags))
        return opened[-1]

    monkeypatch.setattr(os, "open", noted_open)
    names = [path.name for path in tiny_shards.glob("*.tar")]
    place = Place(tiny_shards)
    for name in names * 2:
        place.expect([(name, 0, 512)])
        place.read_at(name, 0, 512)
    assert len(opened) == len(names) > 1
    assert [os.lseek(descriptor, 0, os.SEEK_CUR) for descriptor in opened] == [0] * len(names), "no position moves"
    del place
    for descriptor in opened:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


FEW_DESCRIPTORS = """
import random, resource, sys
from pathlib import Path
from lightning_mmembed.data.places import Place
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
place = Place(Path(sys.argv[1]))
names = [f"{n}.tar" for n in range(300)] * 2
random.Random(0).shuffle(names)
place.expect([(name, 0, 4) for name in names])
assert [place.read_at(name, 1, 2) for name in names] == [f"{int(name[:-4]):04d}"[1:3].encode() for name in names]
"""


def test_more_files_are_read_than_a_process_may_open(tmp_path: Path) -> None:
    for number in range(300):
        (tmp_path / f"{number}.tar").write_text(f"{number:04d}")
    process = subprocess.run(
        [sys.executable, "-c", FEW_DESCRIPTORS, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr


def test_a_file_that_makes_room_for_another_is_not_closed_under_a_thread_that_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "MAX_OPEN_FILES", 1)
    pread = os.pread

    def slow_pread(descriptor: int, size: int, offset: int) -> bytes:
        time.sleep(random.random() * 1e-3)  # others close and open files meanwhile
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", slow_pread)
    for number in range(20):
        (tmp_path / str(number)).write_text(f"{number:04d}")
    place = Place(tmp_path)
    numbers = random.Random(0).choices(range(20), k=800)
    with ThreadPoolExecutor(8) as threads:
        read = list(threads.map(lambda number: place.read_at(str(number), 0, 4), numbers))
    assert read == [f"{number:04d}".encode() for number in numbers]


# --- what is read next is announced ---------------------------------------------------------------------------------

#: (kind, file, offset, size) of a hint or a read.
Event = tuple[str, int, int, int]

needs_hints = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no hints")


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """Every hint and every read at an offset, in the order in which they happen."""
    noted: list[Event] = []
    advise, pread = os.posix_fadvise, os.pread

    def noted_advise(descriptor: int, offset: int, size: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        noted.append(("hint", os.fstat(descriptor).st_ino, offset, size))
        advise(descriptor, offset, size, advice)

    def noted_pread(descriptor: int, size: int, offset: int) -> bytes:
        noted.append(("read", os.fstat(descriptor).st_ino, offset, size))
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "posix_fadvise", noted_advise)
    monkeypatch.setattr(os, "pread", noted_pread)
    return noted


def pool_batches(shards: Shards) -> Iterator[list[Any]]:
    """The training pool in batches out of order, as it is embedded."""
    items: Any = shards.pool("train").items
    order = random.Random(0).sample(range(len(items)), len(items))
    return iter(DataLoader(Subset(items, order), batch_size=7, collate_fn=list))


def query_batches(shards: Shards) -> Iterator[list[Any]]:
    """The queries of evaluation in batches, from the last to the first."""
    for queries in shards.query_sets("test"):
        entries: Any = queries.queries
        yield from DataLoader(Subset(entries, range(len(entries))[::-1]), batch_size=3, collate_fn=list)


def training_batches(shards: Shards) -> Iterator[list[Any]]:
    """Batches of training: queries, positives, negatives."""
    rows, pool = shards.query_rows("train"), shards.pool("train").ids.numpy()
    batches = TrainingBatches(shards, rows, pool, list, negatives_per_query=2)  # type: ignore[arg-type]
    for start in range(0, len(rows), 6):
        entries: Any = batches[0, np.arange(start, start + 6)].inputs
        yield entries


BATCHES = (pool_batches, query_batches, training_batches)


@needs_hints
@pytest.mark.parametrize("batches", BATCHES)
def test_exactly_what_a_batch_reads_is_announced_before_the_first_of_its_reads(
    tiny_shards: Path, events: list[Event], batches: Callable[[Shards], Iterator[list[Any]]]
) -> None:
    read = list(batches(Shards(tiny_shards)))
    groups = [(kind, sorted(event[1:] for event in group)) for kind, group in groupby(events, lambda event: event[0])]
    assert [kind for kind, _ in groups] == ["hint", "read"] * len(read)
    for batch, (_, announced), (_, taken) in zip(read, groups[::2], groups[1::2], strict=True):
        assert announced == taken
        assert len(taken) == len(batch) + sum(entry.item.image is not None for entry in batch)


@needs_hints
def test_what_is_read_in_order_is_left_to_the_system(tiny_shards: Path, events: list[Event]) -> None:
    items: Any = Shards(tiny_shards).pool("train").items
    items.__getitems__(list(range(8)))
    assert {kind for kind, *_ in events} == {"read"}
    items.__getitems__([*range(7), 8])
    assert {kind for kind, *_ in events} == {"read", "hint"}


@pytest.mark.parametrize("batches", BATCHES)
def test_hints_change_nothing_that_is_read(
    tiny_shards: Path, monkeypatch: pytest.MonkeyPatch, batches: Callable[[Shards], Iterator[list[Any]]]
) -> None:
    hinted = list(batches(Shards(tiny_shards)))
    at_a_url = list(batches(Shards(f"file://{tiny_shards}")))
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    unhinted = list(batches(Shards(tiny_shards)))
    assert hinted == unhinted
    assert at_a_url == unhinted


def test_the_entries_of_a_batch_are_those_read_one_by_one_in_the_order_asked_for(tiny_shards: Path) -> None:
    items: Any = Shards(tiny_shards).pool("train").items
    for indices in ([5, 0, 5, -1, 17], [3], []):
        assert items.__getitems__(indices) == [items[index] for index in indices]


@needs_hints
def test_a_hint_that_fails_is_no_error_and_those_after_it_are_given(tiny_shards: Path, events: list[Event]) -> None:
    shard = tiny_shards / "candidates-00000.tar"
    invalid = (shard.name, 0, -1)  # refused by the system
    Place(tiny_shards).expect([("absent.tar", 0, 5), invalid, (shard.name, 512, 40)])
    assert events[-1] == ("hint", shard.stat().st_ino, 512, 40)


@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("hints", [True, False])
def test_a_missing_shard_is_named_with_and_without_hints(
    tiny_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    batches: Callable[[Shards], Iterator[list[Any]]],
    hints: bool,
) -> None:
    folder = Path(shutil.copytree(tiny_shards, tmp_path / "shards"))
    for path in folder.glob("*.tar"):
        path.unlink()
    if not hints:
        monkeypatch.delattr(os, "posix_fadvise", raising=False)
    with pytest.raises(UserInputError, match=r"shards/[a-z0-9-]+\.tar is missing; make the shards again"):
        list(batches(Shards(folder)))


@needs_hints
@pytest.mark.parametrize("kind", KINDS)
def test_at_a_url_nothing_is_announced_and_no_local_file_is_opened(
    tiny_shards: Path, memory: str, kind: str, events: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(url(kind, tiny_shards, memory))

    def refuse(*_: Any) -> int:
        raise AssertionError("a URL is no path")

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refuse)
        place.expect([("candidates-00000.tar", 0, 512)])
    assert events == []
    assert len(place.read_at("candidates-00000.tar", 0, 512)) == 512
    assert events == []
