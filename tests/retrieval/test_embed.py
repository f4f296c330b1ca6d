"""Vectors are computed once, in batches of like items, and a part on disk is either whole or computed again."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from worlds import Entries

from lightning_mmembed import Candidate, MLLMEncoder
from lightning_mmembed.data import Shards
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.retrieval import embed
from lightning_mmembed.retrieval.embed import VectorStore
from lightning_mmembed.retrieval.pool import Pool
from lightning_mmembed.retrieval.vectors import Vectors

PART, BATCH = 20, 4


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed, "PART_SIZE", PART)


@pytest.fixture(scope="module")
def encoder(tiny_checkpoint: Path) -> MLLMEncoder:
    return MLLMEncoder.from_pretrained(tiny_checkpoint, max_length=48, length_buckets=1)


@pytest.fixture(scope="module")
def pool(tiny_shards: Path) -> Pool:
    return Shards(tiny_shards).pool("train")


@pytest.fixture(scope="module")
def likeness(pool: Pool) -> tuple[torch.Tensor, ...]:
    sizes = torch.tensor([len((candidate.item.text or "").encode()) for candidate in pool.items])
    return pool.modalities, sizes


def run(
    directory: Path, encoder: MLLMEncoder, entries: Sequence[Candidate], likeness: Sequence[torch.Tensor] = ()
) -> Vectors:
    store = VectorStore(directory, batch_size=BATCH, dtype="float32", show_progress=False)
    return store.embed(encoder, entries, "pets", "weights", "", likeness)


def parts(directory: Path) -> list[Path]:
    return sorted(directory.glob("*/part-*.npy"))


def content(directory: Path) -> list[bytes]:
    return [path.read_bytes() for path in parts(directory)]


def test_vectors_keep_their_order_and_value_whatever_is_batched_together(
    encoder: MLLMEncoder, pool: Pool, likeness: tuple[torch.Tensor, ...], tmp_path: Path
) -> None:
    alike, in_order = run(tmp_path / "a", encoder, pool.items, likeness), run(tmp_path / "b", encoder, pool.items)
    assert alike.shape == in_order.shape == (48, 32)
    expected = encoder.encode([candidate.item for candidate in pool.items], batch_size=1)
    for vectors in (alike, in_order):
        torch.testing.assert_close(vectors.read(0, 48), expected, atol=1e-5, rtol=0)


def test_within_a_part_items_are_read_by_modality_and_size(
    encoder: MLLMEncoder, pool: Pool, likeness: tuple[torch.Tensor, ...], tmp_path: Path
) -> None:
    entries, (modalities, sizes) = Entries(pool.items), likeness
    run(tmp_path, encoder, entries, likeness)
    expected: list[int] = []
    for start in range(0, 48, PART):
        rows = range(start, min(start + PART, 48))
        expected += sorted(rows, key=lambda row: (int(modalities[row]), int(sizes[row]), row))
    assert entries.read == expected
    assert entries.read != list(range(48))


def test_a_pool_without_sizes_is_embedded_in_order_and_one_with_sizes_by_likeness(
    encoder: MLLMEncoder, pool: Pool, likeness: tuple[torch.Tensor, ...], tmp_path: Path
) -> None:
    for sizes in (None, likeness[1]):
        entries = Entries(pool.items)
        asked = Pool("train", pool.ids, pool.modalities, {}, entries, "pets", sizes)
        store = VectorStore(tmp_path / str(sizes is None), batch_size=BATCH, show_progress=False)
        store.embed_pool(encoder, asked, "weights")
        assert (entries.read == list(range(48))) == (sizes is None)


def test_a_killed_run_ends_with_the_bytes_of_one_that_was_not(
    encoder: MLLMEncoder, pool: Pool, likeness: tuple[torch.Tensor, ...], tmp_path: Path
) -> None:
    run(tmp_path / "whole", encoder, pool.items, likeness)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", encoder, Entries(pool.items, fatal=30), likeness)
    assert len(parts(tmp_path / "killed")) == 1
    again = Entries(pool.items)
    run(tmp_path / "killed", encoder, again, likeness)
    assert sorted(again.read) == list(range(PART, 48))
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def fewer_rows(path: Path) -> None:
    np.save(path, np.load(path)[:-1])


def fewer_columns(path: Path) -> None:
    np.save(path, np.load(path)[:, :-1])


def other_precision(path: Path) -> None:
    np.save(path, np.load(path).astype(np.float16))


@pytest.mark.parametrize("harm", [cut, lengthen, empty, fewer_rows, fewer_columns, other_precision])
def test_a_part_that_is_not_what_was_written_is_computed_again_and_the_others_are_kept(
    encoder: MLLMEncoder, pool: Pool, tmp_path: Path, harm: Any
) -> None:
    run(tmp_path, encoder, pool.items)
    before = content(tmp_path)
    harm(parts(tmp_path)[1])
    entries = Entries(pool.items)
    vectors = run(tmp_path, encoder, entries)
    assert entries.read == list(range(PART, 2 * PART))
    assert content(tmp_path) == before
    assert len(vectors) == 48


@contextlib.contextmanager
def disk_for_small_files_only() -> Iterator[None]:
    """The system refuses to write a file of more than a few hundred bytes, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        yield
    finally:  # before anything is reported: the report may go to a longer file
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_an_error_that_says_how_to_go_on(encoder: MLLMEncoder, pool: Pool, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, encoder, Entries(pool.items, fatal=25))
    kept = content(tmp_path)
    full = pytest.raises(UserInputError, match=rf"no space is left for {tmp_path}.*run the same command again")
    with full, disk_for_small_files_only():
        run(tmp_path, encoder, pool.items)
    assert content(tmp_path) == kept
    assert not list(tmp_path.glob("*/.*")), "what could not be finished takes no space"


def test_no_entries_give_a_matrix_without_rows(encoder: MLLMEncoder, tmp_path: Path) -> None:
    assert run(tmp_path, encoder, []).shape == (0, 32)


def test_small_sets_are_spread_over_the_processes(encoder: MLLMEncoder, pool: Pool, tmp_path: Path) -> None:
    read = [Entries(pool.items[:2]) for _ in range(2)]
    stores = [VectorStore(tmp_path, rank=rank, world_size=2, show_progress=False) for rank in range(2)]
    for number in range(16):
        content = f"shards/test/{number}"
        stores[0].barrier = partial(stores[1].embed, encoder, read[1], content, "weights", "")
        assert stores[0].embed(encoder, read[0], content, "weights", "").shape == (2, 32)
    shares = [len(entries.read) // 2 for entries in read]
    assert sum(shares) == 16
    assert min(shares) >= 4


@pytest.mark.parametrize("number", range(12))  # with some of them the first process has nothing to compute
def test_the_first_process_alone_writes_what_a_folder_was_made_of(
    encoder: MLLMEncoder, pool: Pool, tmp_path: Path, number: int
) -> None:
    first, second = (VectorStore(tmp_path, rank=rank, world_size=2, show_progress=False) for rank in range(2))
    arguments = (encoder, pool.items[:2], f"shards/test/{number}", "weights", "")
    written = []
    second.barrier = lambda: written.append(len(list(tmp_path.glob("*/made_of.json"))))
    for rank in (second, first):
        with contextlib.suppress(UserInputError):  # the part of the other is not there yet
            rank.embed(*arguments)
    second.embed(*arguments)
    assert written == [0, 1]
