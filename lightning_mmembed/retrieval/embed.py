"""Embeds a pool or a set of queries once, to disk in parts, for every consumer: metrics, miner, search."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from lightning_mmembed.encoders.base import Encoder, log_truncated
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.files import fingerprint, resumable, write_atomically
from lightning_mmembed.items import Candidate, Query
from lightning_mmembed.progress import progress_bar
from lightning_mmembed.retrieval.pool import Pool, QuerySet
from lightning_mmembed.retrieval.vectors import Vectors, open_part

PART_SIZE = 8192


def encoder_fingerprint(encoder: Encoder) -> str:
    """Fingerprint of the weights and of everything else that a vector depends on."""
    digest = hashlib.sha256()
    for name, value in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return fingerprint(digest.hexdigest(), version("lightning-mmembed"), encoder.settings, encoder.processor.settings())


class VectorStore:
    """Vectors on disk, in parts that are each whole or absent.

    Args:
        directory: Where the parts lie; a folder below it is used for each fingerprint.
        batch_size: Items that are read at once.
        num_workers: Processes that read and prepare items.
        dtype: ``"float16"`` or ``"float32"``, as stored.
        rank: This process; each writes its own share of the parts.
        world_size: Number of processes.
        barrier: Waits for the other processes.
        show_progress: Show a progress bar with an ETA.
        tokens_per_batch: The most positions in a pass of the encoder, padding and pictures counted; see
            :meth:`~lightning_mmembed.encoders.base.Encoder.encode`.
    """

    def __init__(
        self,
        directory: str | Path,
        batch_size: int = 256,
        num_workers: int = 0,
        dtype: str = "float16",
        rank: int = 0,
        world_size: int = 1,
        barrier: Callable[[], object] = lambda: None,
        show_progress: bool = True,
        tokens_per_batch: int | None = None,
    ) -> None:
        if dtype not in ("float16", "float32"):
            raise ValueError(f"dtype={dtype!r} is unknown; write 'float16' or 'float32'")
        self.directory = Path(directory)
        self.batch_size, self.num_workers, self.dtype = batch_size, num_workers, np.dtype(dtype)
        self.rank, self.world_size, self.barrier = rank, world_size, barrier
        self.show_progress, self.tokens_per_batch = show_progress, tokens_per_batch

    def embed(
        self,
        encoder: Encoder,
        entries: Sequence[Query] | Sequence[Candidate],
        content: str,
        made_by: str,
        label: str,
        likeness: Sequence[Tensor] = (),
    ) -> Vectors:
        """The vectors of some entries: left where they are already there, computed where not.

        A part that is there was written whole by the same weights from the same content; anything else has another
        fingerprint and so another folder. A run that was killed goes on at the first missing part. A part that has
        been cut short since is computed again.

        Args:
            encoder: The encoder.
            entries: Queries with their instructions, or candidates.
            content: Fingerprint of the entries.
            made_by: :func:`encoder_fingerprint` of the encoder.
            label: What the progress bar says.
            likeness: ``(N,)`` keys, the first weighs most: within a part, entries are encoded in their order, so that
                a batch has few kinds and little padding. The vectors do not depend on it.

        Returns:
            ``(N, D)`` unit vectors on disk, in the order of the entries.

        Raises:
            UserInputError: If the disk is full.
        """
        made_of = fingerprint(content, made_by, self.dtype.name)
        folder = self.directory / made_of
        folder.mkdir(parents=True, exist_ok=True)
        parts = {
            folder / f"part-{number:05d}.npy": range(start, min(start + PART_SIZE, len(entries)))
            for number, start in enumerate(range(0, len(entries), PART_SIZE))
        }
        # Shares start at a process drawn by the fingerprint, so that small sets of one part each do not all go to one.
        own = list(parts.items())[(self.rank - int(made_of, 16)) % self.world_size :: self.world_size]
        missing = {path: rows for path, rows in own if not self._is_whole(path, len(rows), encoder.embedding_dim)}
        with resumable(folder):
            if self.rank == 0 and not (folder / "made_of.json").is_file():
                write_atomically(folder / "made_of.json", json.dumps({"content": content, "encoder": made_by}))
            if missing:
                self._compute(encoder, entries, missing, label, likeness)
        self.barrier()
        return Vectors(list(parts), encoder.embedding_dim)

    def folder(self, content: str, made_by: str) -> Path:
        """Where the vectors of some content by some encoder lie; see :meth:`embed`."""
        return self.directory / fingerprint(content, made_by, self.dtype.name)

    def embed_pool(self, encoder: Encoder, pool: Pool, made_by: str) -> Vectors:
        """The vectors of a pool; see :meth:`embed`."""
        label = f"embedding the {pool.name} pool"
        return self.embed(encoder, pool.items, pool.fingerprint, made_by, label, pool.likeness)

    def embed_queries(self, encoder: Encoder, queries: QuerySet, made_by: str) -> Tensor:
        """The vectors of a task's queries, which unlike a pool fit in memory: ``(Q, D)``; see :meth:`embed`."""
        label = f"embedding queries of {queries.task.name}"
        vectors = self.embed(encoder, queries.queries, queries.fingerprint, made_by, label, queries.likeness)
        return vectors.read(0, len(vectors))

    def prune(self, made_by: str) -> None:
        """Delete the vectors of every other encoder: those of earlier steps of a run, which nothing will ask for."""
        if self.rank == 0:
            for made_of in self.directory.glob("*/made_of.json"):
                if json.loads(made_of.read_text())["encoder"] != made_by:
                    shutil.rmtree(made_of.parent)
        self.barrier()

    def _is_whole(self, path: Path, rows: int, dim: int) -> bool:
        try:
            part = open_part(path)
        except UserInputError:
            return False
        return (part.rows, part.dim, part.dtype) == (rows, dim, self.dtype)

    def _compute(
        self,
        encoder: Encoder,
        entries: Sequence[Query] | Sequence[Candidate],
        parts: dict[Path, range],
        label: str,
        likeness: Sequence[Tensor],
    ) -> None:
        # Each rank computes other parts, so nothing in here may wait for another process.
        budget = encoder.tokens_per_batch if self.tokens_per_batch is None else self.tokens_per_batch
        truncated = 0
        with progress_bar(self.show_progress and self.rank == 0) as progress:
            bar = progress.add_task(label, total=sum(len(rows) for rows in parts.values()))
            for path, rows in parts.items():
                # Sorted anew in each part, by what the part holds alone: a part has one content, whatever was there
                # before.
                order = _sorted_by(likeness, rows)
                batches = DataLoader(
                    cast(Any, Subset(cast(Any, entries), [rows[i] for i in order.tolist()])),
                    batch_size=self.batch_size,
                    collate_fn=partial(encoder.processor, tokens_per_batch=budget),
                    num_workers=self.num_workers,
                )
                vectors = []
                for inputs in batches:
                    vectors.append(encoder.encode_inputs(inputs))
                    truncated += inputs.truncated
                    progress.advance(bar, len(inputs))
                part = np.empty((len(rows), encoder.embedding_dim), self.dtype)
                part[order] = torch.cat(vectors).numpy()
                # Through memory: into a file on a full disk, np.save may leave out the end without an error.
                file = io.BytesIO()
                np.save(file, part)
                write_atomically(path, file.getvalue())
        log_truncated(truncated, sum(len(rows) for rows in parts.values()), encoder.processor)


def _sorted_by(likeness: Sequence[Tensor], rows: range) -> np.ndarray:
    """Places within a range of rows, in the order of some keys; of equals the first one first."""
    if not likeness:
        return np.arange(len(rows))
    # lexsort takes the key that weighs most last.
    return np.lexsort([key[rows.start : rows.stop].numpy() for key in reversed(likeness)])
