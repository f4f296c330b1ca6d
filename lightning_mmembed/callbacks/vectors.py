"""The one way in which callbacks embed: a store below the run directory that all of them share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from lightning_mmembed.retrieval.embed import VectorStore


def vector_store(trainer: Trainer, dirpath: str | Path | None, **settings: Any) -> VectorStore:
    """A store in ``{dirpath}/vectors``, shared by the processes of the Trainer.

    Args:
        trainer: The Trainer.
        dirpath: By default the Trainer's ``default_root_dir``.
        **settings: Arguments of :class:`VectorStore`.
    """
    return VectorStore(
        Path(dirpath or trainer.default_root_dir) / "vectors",
        rank=trainer.global_rank,
        world_size=trainer.world_size,
        barrier=trainer.strategy.barrier,
        **settings,
    )
