"""Embeds a pool or a set of queries once, to disk in parts, for every consumer: metrics, miner, search."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lightning_mmembed.distributed import ALONE, Processes
from lightning_mmembed.encoders.base import Encoder, log_truncated
from lightning_mmembed.encoders.lockstep import lockstep
from lightning_mmembed.encoders.processor import EncoderInputs
from lightning_mmembed.encoders.prompts import Entry
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.files import fingerprint, resumable, write_atomically
from lightning_mmembed.items import Candidate, Query
from lightning_mmembed.progress import progress_bar
from lightning_mmembed.retrieval.pool import Pool, QuerySet
from lightning_mmembed.retrieval.vectors import Vectors, open_part

#: Entries of a part: few enough that even small pools are shared out evenly, and that little is lost with a process.
PART_SIZE = 1024

#: The devices that autocast may be on for.
_AUTOCAST = ("cpu", "cuda", "mps", "xpu")


def encoder_fingerprint(encoder: Encoder) -> str:
    """Fingerprint of the weights and of everything else in the encoder that a vector depends on.

    Of sharded weights it is the same as of whole ones; all processes that share them must ask for it together.
    """
    digest = hashlib.sha256()
    for name, value in sorted(encoder.state_dict().items()):
        whole: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
        digest.update(name.encode())
        digest.update(whole.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return fingerprint(digest.hexdigest(), version("lightning-mmembed"), encoder.settings, encoder.processor.settings())


class VectorStore:
    """Vectors on disk, in parts that are each whole or absent.

    Args:
        directory: Where the parts lie; a folder below it is used for each fingerprint. Several processes must see the
            same files there.
        batch_size: The most items in a pass of the encoder; by default only ``tokens_per_batch`` counts.
        num_workers: Processes that read and prepare items.
        dtype: ``"float16"`` or ``"float32"``, as stored.
        processes: Those that share out the parts. All of them must ask for the same vectors. They wait for each other
            at the end, and for one that has failed until the time-out of their process group: 30 minutes, unless the
            strategy was given another ``timeout``.
        show_progress: Show a progress bar with an ETA.
        tokens_per_batch: The most positions in a pass of the encoder, padding and pictures counted; see
            :meth:`~lightning_mmembed.encoders.base.Encoder.encode`.
        precision: Gives the context that the passes of the encoder run in, such as that of autocast. What it makes of
            them is part of the fingerprint of the vectors.
        heartbeat: Called after every pass.
    """

    def __init__(
        self,
        directory: str | Path,
        batch_size: int | None = None,
        num_workers: int = 0,
        dtype: str = "float16",
        processes: Processes = ALONE,
        show_progress: bool = True,
        tokens_per_batch: int | None = None,
        precision: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
        heartbeat: Callable[[], object] = lambda: None,
    ) -> None:
        if dtype not in ("float16", "float32"):
            raise ValueError(f"dtype={dtype!r} is unknown; write 'float16' or 'float32'")
        self.directory = Path(directory)
        self.batch_size, self.num_workers, self.dtype = batch_size, num_workers, np.dtype(dtype)
        self.processes, self.show_progress, self.tokens_per_batch = processes, show_progress, tokens_per_batch
        self.precision, self.heartbeat = precision, heartbeat

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
        return self._embed(encoder, [_Content(entries, content, likeness)], made_by, label)[0]

    def folder(self, content: str, made_by: str) -> Path:
        """Where the vectors of some content by some encoder lie; see :meth:`embed`."""
        with self.precision():
            return self.directory / fingerprint(content, made_by, self.dtype.name, *_precision())

    def embed_pool(
        self, encoder: Encoder, pool: Pool, made_by: str, query_sets: Sequence[QuerySet] = ()
    ) -> tuple[Vectors, list[Vectors]]:
        """The vectors of a pool and of sets of queries, shared out over the processes together; see :meth:`embed`.

        Args:
            encoder: The encoder.
            pool: The pool.
            made_by: :func:`encoder_fingerprint` of the encoder.
            query_sets: The queries.

        Returns:
            ``(N, D)`` vectors of the pool, and for each set ``(Q, D)`` vectors.
        """
        queries = [_Content(some.queries, some.fingerprint, some.likeness) for some in query_sets]
        contents = [_Content(pool.items, pool.fingerprint, pool.likeness), *queries]
        label = f"embedding the {pool.name} pool" + (" and its queries" if queries else "")
        first, *others = self._embed(encoder, contents, made_by, label)
        return first, others

    def prune(self, made_by: str) -> None:
        """Delete the vectors of every other encoder: those of earlier steps of a run, which nothing will ask for."""
        if self.processes.rank == 0:
            for made_of in self.directory.glob("*/made_of.json"):
                if json.loads(made_of.read_text())["encoder"] != made_by:
                    shutil.rmtree(made_of.parent)
        self.processes.barrier()

    def _embed(self, encoder: Encoder, contents: Sequence[_Content], made_by: str, label: str) -> list[Vectors]:
        folders = [self.folder(content.fingerprint, made_by) for content in contents]
        parts = [_parts(content, number, folders[number]) for number, content in enumerate(contents)]
        own = _share([part for some in parts for part in some], self.processes)
        missing = [part for part in own if not self._is_whole(part, encoder.embedding_dim)]
        with resumable(self.directory):
            for content, folder in zip(contents, folders, strict=True):
                folder.mkdir(parents=True, exist_ok=True)
                if self.processes.rank == 0 and not (folder / "made_of.json").is_file():
                    made_of = {"content": content.fingerprint, "encoder": made_by}
                    write_atomically(folder / "made_of.json", json.dumps(made_of))
            self._compute(encoder, contents, missing, label)
        self.processes.barrier()
        return [Vectors([part.path for part in some], encoder.embedding_dim) for some in parts]

    def _is_whole(self, part: _Part, dim: int) -> bool:
        try:
            there = open_part(part.path)
        except UserInputError:
            return False
        return (there.rows, there.dim, there.dtype) == (len(part.rows), dim, self.dtype)

    def _compute(self, encoder: Encoder, contents: Sequence[_Content], parts: Sequence[_Part], label: str) -> None:
        # Each process computes other parts, so nothing in here may wait for another but a pass of a sharded encoder,
        # which a process without parts takes part in, too.
        budget = encoder.tokens_per_batch if self.tokens_per_batch is None else self.tokens_per_batch
        loader = DataLoader(
            _Windows(
                contents, parts, partial(encoder.processor.windows, tokens_per_batch=budget, batch_size=self.batch_size)
            ),
            batch_size=None,
            num_workers=self.num_workers,
            generator=torch.Generator(),  # of its own: training goes on as if nothing had been embedded
        )
        total, truncated = sum(len(part.rows) for part in parts), 0
        show = self.show_progress and self.processes.rank == 0 and bool(parts)
        with (
            progress_bar(show) as progress,
            lockstep(encoder, self.processes, partial(self._encode, encoder)) as encode,
        ):
            bar = progress.add_task(label, total=total)
            begun: dict[int, list[Tensor]] = {}
            for number, inputs in loader if parts else ():
                vectors = begun.setdefault(number, [])
                vectors.append(encode(inputs))
                truncated += inputs.truncated
                progress.advance(bar, len(inputs))
                if sum(map(len, vectors)) == len(parts[number].rows):
                    parts[number].write(torch.cat(begun.pop(number)), self.dtype)
        log_truncated(truncated, total, encoder.processor)

    def _encode(self, encoder: Encoder, inputs: EncoderInputs) -> Tensor:
        with self.precision():
            vectors = encoder.encode_inputs(inputs)
        self.heartbeat()
        return vectors


@dataclass(frozen=True)
class _Content:
    """What is embedded; see :meth:`VectorStore.embed`."""

    entries: Sequence[Query] | Sequence[Candidate]
    fingerprint: str
    likeness: Sequence[Tensor]


@dataclass(frozen=True)
class _Part:
    """Some rows of one of several contents, and where their vectors lie."""

    path: Path
    content: int
    rows: range
    likeness: Sequence[Tensor]

    def order(self) -> np.ndarray:
        """Places within the part in the order of the likeness, of equals the first one first.

        It goes by what the part holds alone, so a part has one content, whatever was there before.
        """
        if not self.likeness:
            return np.arange(len(self.rows))
        # lexsort takes the key that weighs most last.
        return np.lexsort([key[self.rows.start : self.rows.stop].numpy() for key in reversed(self.likeness)])

    def write(self, vectors: Tensor, dtype: np.dtype[Any]) -> None:
        """Write the vectors, which come in :meth:`order`."""
        part = np.empty(vectors.shape, dtype)
        part[self.order()] = vectors.numpy()
        # Through memory: into a file on a full disk, np.save may leave out the end without an error.
        file = io.BytesIO()
        np.save(file, part)
        write_atomically(self.path, file.getvalue())


class _Windows(IterableDataset[tuple[int, EncoderInputs]]):
    """What some parts hold, prepared a few passes at a time; each worker prepares other parts.

    No window reaches over two parts: what is computed together, and so the last bit of a vector, goes by its part
    alone, whichever process computes it.
    """

    def __init__(
        self,
        contents: Sequence[_Content],
        parts: Sequence[_Part],
        prepare: Callable[[Iterable[Entry]], Iterator[EncoderInputs]],
    ) -> None:
        self._contents, self._parts, self._prepare = contents, parts, prepare

    def __iter__(self) -> Iterator[tuple[int, EncoderInputs]]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for number in range(first, len(self._parts), step):
            part = self._parts[number]
            entries = self._contents[part.content].entries
            for inputs in self._prepare(entries[part.rows[place]] for place in part.order().tolist()):
                yield number, inputs


def _parts(content: _Content, number: int, folder: Path) -> list[_Part]:
    """The parts of a content, which depend on nothing but its entries."""
    starts = range(0, len(content.entries), PART_SIZE)
    rows = [range(start, min(start + PART_SIZE, len(content.entries))) for start in starts]
    return [_Part(folder / f"part-{i:05d}.npy", number, some, content.likeness) for i, some in enumerate(rows)]


def _share(parts: Sequence[_Part], processes: Processes) -> list[_Part]:
    """Deal out parts, each to the process with the fewest rows so far; gives those of this process."""
    rows, own = [0] * processes.size, []
    for part in parts:
        rank = rows.index(min(rows))
        rows[rank] += len(part.rows)
        if rank == processes.rank:
            own.append(part)
    return own


def _precision() -> list[str]:
    """What passes are computed in, where it is not what the weights say."""
    types = [torch.get_autocast_dtype(device) for device in _AUTOCAST if torch.is_autocast_enabled(device)]
    default = torch.get_default_dtype()
    return [str(kind) for kind in [*types, *([default] if default is not torch.float32 else [])]]
