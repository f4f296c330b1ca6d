"""Universal multimodal retrieval with multimodal LLMs (MM-Embed) as a Lightning module package."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_mmembed.callbacks import HardNegativeMining as HardNegativeMining
    from lightning_mmembed.callbacks import RetrievalEvaluation as RetrievalEvaluation
    from lightning_mmembed.data import MBEIRDataModule as MBEIRDataModule
    from lightning_mmembed.encoders import MLLMEncoder as MLLMEncoder
    from lightning_mmembed.items import Candidate as Candidate
    from lightning_mmembed.items import Item as Item
    from lightning_mmembed.items import Modality as Modality
    from lightning_mmembed.items import Query as Query
    from lightning_mmembed.losses import contrastive_loss as contrastive_loss
    from lightning_mmembed.mining import mine_modality_aware as mine_modality_aware
    from lightning_mmembed.module import RetrievalModule as RetrievalModule
    from lightning_mmembed.rerank import ZeroShotReranker as ZeroShotReranker

# Imported when first asked for: torch, transformers and Lightning together take seconds that a look-up need not.
_HOMES = {
    "HardNegativeMining": "callbacks",
    "RetrievalEvaluation": "callbacks",
    "MBEIRDataModule": "data",
    "MLLMEncoder": "encoders",
    "Candidate": "items",
    "Item": "items",
    "Modality": "items",
    "Query": "items",
    "contrastive_loss": "losses",
    "mine_modality_aware": "mining",
    "RetrievalModule": "module",
    "ZeroShotReranker": "rerank",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
