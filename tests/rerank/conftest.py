"""A tiny checkpoint of every family that reranks, made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from rerank_worlds import PROMPTS, build_answering

from lightning_mmembed import ZeroShotReranker


@pytest.fixture(scope="session")
def answering_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Where the checkpoint of a family lies, by its ``model_type``; read-only."""
    root = tmp_path_factory.mktemp("answering")

    def checkpoint(name: str) -> Path:
        return root / name if (root / name).is_dir() else build_answering(root / name, name)

    return checkpoint


@pytest.fixture
def reranker(answering_checkpoint: Callable[[str], Path]) -> ZeroShotReranker:
    """A reranker of a family whose positions are laid out in two dimensions."""
    return ZeroShotReranker.from_pretrained(answering_checkpoint("qwen2_5_vl"), prompts=PROMPTS)
