"""Encoders in other libraries: each module here needs the extra of its name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning_mmembed.errors import UserInputError

if TYPE_CHECKING:
    from lightning_mmembed.encoders.mllm import MLLMEncoder


def export_sentence_transformers(encoder: MLLMEncoder, directory: str | Path) -> Path:
    """See :meth:`MLLMEncoder.export_sentence_transformers`."""
    try:
        from lightning_mmembed.integrations.sentence_transformers import export
    except ModuleNotFoundError as error:
        raise UserInputError(
            "sentence-transformers is not installed; run: pip install 'lightning-mmembed[sentence-transformers]'"
        ) from error
    return export(encoder, directory)
