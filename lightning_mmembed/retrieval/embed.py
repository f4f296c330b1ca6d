"""Embeds a pool or a set of queries once, to disk in parts, for every consumer: metrics, miner, search."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from lightning_mmembed.encoders.mllm import MLLMEncoder
from lightning_mmembed.files import fingerprint, replacing, write_atomically
from lightning_mmembed.items import Candidate, Query

PART_SIZE = 8192


def encoder_fingerprint(encoder: MLLMEncoder) -> str:
    """Fingerprint of the weights and of everything else that a vector depends on."""
    digest = hashlib.sha256()
    for name, value in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    processor = encoder.processor
    pictures = [processor.image_size, processor.resample, encoder.image_mean.tolist(), encoder.image_std.tolist()]
    settings = [version("lightning-mmembed"), encoder.settings, processor.max_length, pictures]
    tokenizer = processor.tokenizer.backend_tokenizer.to_str()
    return fingerprint(digest.hexdigest(), settings, hashlib.sha256(tokenizer.encode()).hexdigest())


class VectorStore:
    """Vectors on disk, in parts that are each whole or absent.

    Args:
        directory: Where the parts lie; a folder below it is used for each fingerprint.
        batch_size: Items per pass of the encoder.
        num_workers: Processes that read and prepare items.
        dtype: ``"float16"`` or ``"float32"``, as stored.
        rank: This process; each writes its own share of the parts.
        world_size: Number of processes.
        barrier: Waits for the other processes.
        show_progress: Show a progress bar with an ETA.
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
    ) -> None:
        if dtype not in ("float16", "float32"):
            raise ValueError(f"dtype={dtype!r} is unknown; write 'float16' or 'float32'")
        self.directory = Path(directory)
        self.batch_size, self.num_workers, self.dtype = batch_size, num_workers, np.dtype(dtype)
        self.rank, self.world_size, self.barrier = rank, world_size, barrier
        self.show_progress = show_progress

    def embed(
        self,
        encoder: MLLMEncoder,
        entries: Sequence[Query] | Sequence[Candidate],
        content: str,
        made_by: str,
        label: str,
    ) -> Tensor:
        """The vectors of some entries: read where they are already there, computed where not.

        A part that is there was written whole by the same weights from the same content; anything else has another
        fingerprint and so another folder. A run that was killed goes on at the first missing part.

        Args:
            encoder: The encoder.
            entries: Queries with their instructions, or candidates.
            content: Fingerprint of the entries.
            made_by: :func:`encoder_fingerprint` of the encoder.
            label: What the progress bar says.

        Returns:
            ``(N, D)`` unit vectors on the CPU, in the stored precision.
        """
        folder = self.directory / fingerprint(content, made_by, self.dtype.name)
        folder.mkdir(parents=True, exist_ok=True)
        starts = range(0, len(entries), PART_SIZE)
        paths = [folder / f"part-{number:05d}.npy" for number in range(len(starts))]
        missing = [n for n, path in enumerate(paths) if n % self.world_size == self.rank and not path.is_file()]
        if missing:
            write_atomically(folder / "made_of.json", json.dumps({"content": content, "encoder": made_by}))
            self._compute(encoder, entries, {n: (starts[n], paths[n]) for n in missing}, label)
        self.barrier()
        parts = [torch.from_numpy(np.load(path, allow_pickle=False)) for path in paths]
        return torch.cat(parts) if parts else torch.zeros(0, encoder.embedding_dim)

    def prune(self, made_by: str) -> None:
        """Delete the vectors of every other encoder: those of earlier steps of a run, which nothing will ask for."""
        if self.rank == 0:
            for made_of in self.directory.glob("*/made_of.json"):
                if json.loads(made_of.read_text())["encoder"] != made_by:
                    shutil.rmtree(made_of.parent)
        self.barrier()

    def _compute(
        self,
        encoder: MLLMEncoder,
        entries: Sequence[Query] | Sequence[Candidate],
        parts: dict[int, tuple[int, Path]],
        label: str,
    ) -> None:
        sizes = {n: min(PART_SIZE, len(entries) - start) for n, (start, _) in parts.items()}
        # Each rank computes other parts, so nothing in here may wait for another process.
        with Progress(disable=not self.show_progress or self.rank > 0, transient=True) as progress:
            bar = progress.add_task(label, total=sum(sizes.values()))
            for n, (start, path) in parts.items():
                part: Subset[Any] = Subset(cast(Any, entries), range(start, start + sizes[n]))
                batches = DataLoader(
                    part,
                    batch_size=self.batch_size,
                    collate_fn=encoder.processor,
                    num_workers=self.num_workers,
                )
                vectors = []
                for inputs in batches:
                    vectors.append(encoder.encode_inputs(inputs))
                    progress.advance(bar, len(inputs))
                with replacing(path) as temporary, open(temporary, "wb") as file:
                    np.save(file, torch.cat(vectors).numpy().astype(self.dtype))
