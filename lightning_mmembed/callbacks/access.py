"""What the callbacks take from a Trainer: its dataset, and one store of vectors that all of them share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from lightning_mmembed.data.datamodule import MBEIRDataModule
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.retrieval.embed import VectorStore


def datamodule_of(trainer: Trainer) -> MBEIRDataModule:
    """The datamodule of a Trainer.

    Raises:
        UserInputError: If it has none, or one that knows no pools.
    """
    datamodule = getattr(trainer, "datamodule", None)
    if not isinstance(datamodule, MBEIRDataModule):
        raise UserInputError(
            f"the Trainer's datamodule is {type(datamodule).__name__}; evaluation and mining need an MBEIRDataModule, "
            "passed as trainer.fit(module, datamodule)"
        )
    return datamodule


def output_directory(trainer: Trainer, dirpath: str | Path | None) -> Path:
    """Where a callback writes: ``dirpath``, or the Trainer's ``default_root_dir``."""
    return Path(trainer.default_root_dir if dirpath is None else dirpath)


def vector_store(
    trainer: Trainer, dirpath: str | Path | None, vectors_dir: str | Path | None = None, /, **settings: Any
) -> VectorStore:
    """A store of vectors, filled by all processes of the Trainer.

    Args:
        trainer: The Trainer.
        dirpath: See :func:`output_directory`.
        vectors_dir: Where the vectors lie; by default in ``vectors`` in the output directory.
        **settings: Arguments of :class:`VectorStore`.
    """
    return VectorStore(
        output_directory(trainer, dirpath) / "vectors" if vectors_dir is None else vectors_dir,
        rank=trainer.global_rank,
        world_size=trainer.world_size,
        barrier=trainer.strategy.barrier,
        **settings,
    )
