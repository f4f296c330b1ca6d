"""Vectors are computed once, in batches of like items, and a part on disk is either whole or computed again."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.progress import Progress
from worlds import Entries

from lightning_mmembed import Candidate, Item, MLLMEncoder
from lightning_mmembed.data import Shards
from lightning_mmembed.distributed import Processes
from lightning_mmembed.encoders.lockstep import lockstep
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


class Unheard(Processes):
    """A process that does not wait for the others."""

    def barrier(self) -> None:
        pass


def test_two_processes_share_the_parts_and_the_first_alone_says_what_they_are_made_of(
    encoder: MLLMEncoder, pool: Pool, tmp_path: Path
) -> None:
    read = [Entries(pool.items), Entries(pool.items)]
    first, second = (VectorStore(tmp_path, processes=Unheard(rank, 2), show_progress=False) for rank in range(2))
    with pytest.raises(UserInputError, match=r"part-00000.npy holds no vectors"):
        second.embed(encoder, read[1], "pets", "weights", "")
    assert not list(tmp_path.glob("*/made_of.json"))
    vectors = first.embed(encoder, read[0], "pets", "weights", "")
    assert len(list(tmp_path.glob("*/made_of.json"))) == 1
    assert [entries.read for entries in read] == [[*range(PART), *range(2 * PART, 48)], list(range(PART, 2 * PART))]
    assert vectors.shape == (48, 32)


def test_a_pool_and_its_queries_are_embedded_with_one_bar_and_as_each_by_itself(
    encoder: MLLMEncoder, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, bars = Shards(tiny_shards), []
    pool, sets = shards.pool("test"), shards.query_sets("test")
    add_task = Progress.add_task
    monkeypatch.setattr(
        Progress, "add_task", lambda *a, **kw: (bars.append((a[1], kw["total"])), add_task(*a, **kw))[1]
    )
    together, apart = (VectorStore(tmp_path / name, BATCH, dtype="float32") for name in ("together", "apart"))
    vectors, asked = together.embed_pool(encoder, pool, "weights", sets)
    assert bars == [("embedding the test pool and its queries", len(pool) + 24)]
    assert [len(some) for some in asked] == [len(queries) for queries in sets]
    apart.embed_pool(encoder, pool, "weights")
    for queries in sets:
        apart.embed(encoder, queries.queries, queries.fingerprint, "weights", "", queries.likeness)
    assert content(tmp_path / "together") == content(tmp_path / "apart")
    assert len(vectors) == len(pool)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_change_no_part_and_random_numbers_are_left_as_they_are(
    encoder: MLLMEncoder, pool: Pool, likeness: tuple[torch.Tensor, ...], tmp_path: Path, workers: int
) -> None:
    run(tmp_path / "expected", encoder, pool.items, likeness)
    before = torch.get_rng_state()
    store = VectorStore(tmp_path / "found", BATCH, workers, dtype="float32", show_progress=False)
    store.embed(encoder, pool.items, "pets", "weights", "", likeness)
    assert torch.equal(torch.get_rng_state(), before)
    assert content(tmp_path / "found") == content(tmp_path / "expected")


def test_every_pass_is_followed_by_a_heartbeat(encoder: MLLMEncoder, pool: Pool, tmp_path: Path) -> None:
    passes: list[int] = []
    beats: list[int] = []
    hook = encoder.register_forward_hook(lambda _, args, vectors: passes.append(len(args[0].buckets)))
    store = VectorStore(tmp_path, tokens_per_batch=60, show_progress=False, heartbeat=lambda: beats.append(len(passes)))
    store.embed(encoder, pool.items, "pets", "weights", "")
    hook.remove()
    assert set(passes) == {1}
    assert beats == list(range(1, len(passes) + 1))
    assert len(passes) > 3


def test_vectors_made_in_autocast_are_others_and_lie_apart(encoder: MLLMEncoder, pool: Pool, tmp_path: Path) -> None:
    mixed = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    plain, half = (
        VectorStore(tmp_path, dtype="float32", show_progress=False, precision=p) for p in (nullcontext, mixed)
    )
    vectors = [store.embed(encoder, pool.items, "pets", "weights", "").read(0, 48) for store in (plain, half)]
    assert plain.folder("pets", "weights") != half.folder("pets", "weights")
    with mixed():
        assert plain.folder("pets", "weights") == half.folder("pets", "weights")
        expected = encoder.encode([candidate.item for candidate in pool.items])
    torch.testing.assert_close(vectors[1], expected, atol=0.02, rtol=0)
    assert not torch.allclose(vectors[0], vectors[1], atol=1e-4)
    assert vectors[1].norm(dim=1).sub(1).abs().max() < 1e-5


class Alone(Processes):
    """A process that talks to nobody."""

    def largest(self, value: int) -> int:
        raise AssertionError("it waits for another process")


def test_processes_with_whole_weights_do_not_meet_before_a_pass(encoder: MLLMEncoder) -> None:
    inputs = encoder.processor([Candidate(Item("a pet")), Candidate(Item("a red ellipse"))])
    with lockstep(encoder, Alone(0, 2), encoder.encode_inputs) as encode:
        assert torch.equal(encode(inputs), encoder.encode_inputs(inputs))
